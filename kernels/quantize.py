"""Rows of channels become packed integer codes and, where the quantizer needs them, a few 16-bit numbers per row.

Formula    kind "uniform"      per row and group: lo = clip·min x, s = (clip·max x - lo) / (2^w - 1),
                               code = clamp(round((x - lo) / s), 0, 2^w - 1);  scale holds (s, lo)
           kind "uniform-int"  the same step with an integer zero point: z = round(-lo / s),
                               code = clamp(round(x / s) + z, 0, 2^w - 1);      scale holds (s, z)
           kind "uniform-quantile"  y of `kvsink.kernels.quantile`, q the clip, coded as kind "uniform" without one
           kind "gauss"        per row and group: m = mean x, d = rms(x - m), code = nearest Lloyd-Max level to
                               (x - m) / d;                                     scale holds (d, m)
           kind "lloyd"        static deviation sigma_c of each channel: code = nearest Lloyd-Max level of width w_c to
                               x_c / (sigma_c · g); without gain g = 1; with gain g starts at rms(x / sigma) of the row and
                               is fitted to the levels by least squares, before and after a second encoding;
                                                                                scale holds (g)
           kind "lloyd-even"   the same with equally spaced levels, which a kernel reads without a table
           rounding is half to even; s, lo, z, d, m, g are rounded to float16 first, 65504 in place of anything larger, and
           the codes use the rounded value;
           sums over a row or group are taken in float64, so that their order does not show in what is rounded
Source     uniform: KIVI, arXiv 2402.02750 section 3; uniform-int and clip: RotateKV, arXiv 2501.16383 and its released
           code; gauss and lloyd: ours (`klt`)
Differs    the step divides by 2^w - 1 at every width; a constant group gets step 1 (uniform-int) or 0 (uniform)
Shapes     x [..., H, S, D], widths int per run of 8 channels [D / 8], sigma float32 [H, D] →
           codes uint8 [..., H, S, sum(widths)], scale float16 [..., H, S, n]
Units      scale in units of x; widths in bits
Exact      no; uniform: |x^ - x| <= s / 2 for x inside the clipped range
Raises     ValueError for an unknown kind or D not divisible by 8
Cost       about 6·numel(x) flops
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .base import Cost, OpSpec, nbytes, register_op
from .levels import even_levels, even_thresholds, lloyd_max, thresholds
from .packing import pack_bits
from .quantile import quantile_clamp

__all__ = ["KINDS", "SIGMA_KINDS", "quantize", "quantize_ref", "rms", "scales_per_row", "segments"]

KINDS = ("uniform", "uniform-int", "uniform-quantile", "gauss", "lloyd", "lloyd-even")
SIGMA_KINDS = ("lloyd", "lloyd-even", "trellis")  # with a deviation per channel and a width per run of channels
_HALF_MAX = 65504.0
_HALF_TINY = 6.0e-8  # smallest positive float16


def segments(widths: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Maximal runs of equal width as (first channel, end channel, first byte, width); 0-bit runs are left out."""
    out, channel, byte = [], 0, 0
    for width, run in groupby(widths):
        n = 8 * len(list(run))
        if width:
            out.append((channel, channel + n, byte, width))
        channel, byte = channel + n, byte + n * width // 8
    return out


def scales_per_row(kind: str, dim: int, group_size: int, gain: bool) -> int:
    """How many float16 numbers one row of `dim` channels stores beside its codes."""
    if kind in SIGMA_KINDS:
        return int(gain)
    return 2 * (dim // group_size)


def _half(x: Tensor) -> Tensor:
    return x.clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16)


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True, dtype=torch.float64).to(x.dtype)


def rms(x: Tensor) -> Tensor:
    """Root of the mean square of the last dimension, kept; taken in float64, in the dtype of x."""
    return x.square().mean(-1, keepdim=True, dtype=torch.float64).sqrt().to(x.dtype)


def _sum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True, dtype=torch.float64)


def _bucketize(x: Tensor, width: int, even: bool = False) -> Tensor:
    # A handful of comparisons beats a search for few levels, and both agree: code = number of thresholds below x.
    table = (even_thresholds if even else thresholds)(width, x.device)
    return torch.bucketize(x.contiguous(), table.to(x.dtype)).to(torch.uint8)


def _uniform(x: Tensor, width: int, group_size: int, clip: float, integer_zero: bool) -> tuple[Tensor, Tensor]:
    top = float(2**width - 1)
    groups = x.unflatten(-1, (-1, group_size))  # [..., D / G, G]
    hi, lo = clip * groups.amax(-1, keepdim=True), clip * groups.amin(-1, keepdim=True)
    s = _half((hi - lo) / top)
    step = s.float()
    if integer_zero:
        step = torch.where(step > 0, step, torch.ones_like(step))
        z = _half(torch.round(-lo / step))
        codes = torch.round(groups / step) + z.float()
        scale = torch.cat([_half(step), z], dim=-1)
    else:
        base = _half(lo)
        codes = torch.round((groups - base.float()) / step.clamp_min(_HALF_TINY))
        scale = torch.cat([s, base], dim=-1)
    codes = codes.clamp(0.0, top).to(torch.uint8).flatten(-2)
    return codes, scale.flatten(-2)


def _gauss(x: Tensor, width: int, group_size: int) -> tuple[Tensor, Tensor]:
    groups = x.unflatten(-1, (-1, group_size))
    m = _half(_mean(groups))
    centred = groups - m.float()
    d = _half(rms(centred))
    codes = _bucketize(centred / d.float().clamp_min(_HALF_TINY), width).flatten(-2)
    return codes, torch.cat([d, m], dim=-1).flatten(-2)


def _lloyd(x: Tensor, sigma: Tensor, widths: Sequence[int], gain: bool, even: bool) -> tuple[Tensor, Tensor]:
    levels = even_levels if even else lloyd_max
    parts = segments(widths)
    deviation = sigma[:, None, :].clamp_min(_HALF_TINY)  # [H, 1, D]
    y = x / deviation

    def encode(g: Tensor) -> list[Tensor]:
        return [_bucketize(y[..., a:b] / g, w, even) for a, b, _, w in parts]

    def fit(codes: list[Tensor]) -> Tensor:
        # Least squares in units of x: the g for which g·sigma·level comes closest to x over the coded channels.
        dot = torch.zeros_like(y[..., :1], dtype=torch.float64)
        square = torch.zeros_like(dot)
        for (a, b, _, w), code in zip(parts, codes, strict=True):
            level = levels(w, x.device)[code.int()] * deviation[..., a:b]
            dot = dot + _sum(x[..., a:b] * level)
            square = square + _sum(level.square())
        return _half(dot.to(x.dtype) / square.to(x.dtype).clamp_min(1e-30))

    if not parts:
        return x.new_empty((*x.shape[:-1], 0), dtype=torch.uint8), x.new_zeros((*x.shape[:-1], int(gain)), dtype=torch.float16)
    if gain:
        codes = encode(fit(encode(rms(y).clamp_min(_HALF_TINY))).float().clamp_min(_HALF_TINY))
        scale = fit(codes)
    else:
        codes = encode(torch.ones_like(y[..., :1]))
        scale = x.new_empty((*x.shape[:-1], 0), dtype=torch.float16)
    return torch.cat([pack_bits(c, w) for c, (_, _, _, w) in zip(codes, parts, strict=True)], dim=-1), scale


def quantize_ref(
    x: Tensor, sigma: Tensor | None, kind: str, widths: Sequence[int], group_size: int, clip: float, gain: bool
) -> tuple[Tensor, Tensor]:
    """The definition; see the formulas at the top of this file."""
    if kind not in KINDS:
        raise ValueError(f"unknown quantizer {kind!r}; known: {', '.join(KINDS)}")
    if x.shape[-1] != 8 * len(widths):
        raise ValueError(f"{len(widths)} widths of 8 channels do not cover {x.shape[-1]} channels")
    x = x if x.dtype == torch.float64 else x.float()
    if kind in SIGMA_KINDS:
        assert sigma is not None
        return _lloyd(x, sigma, widths, gain, kind == "lloyd-even")
    width = widths[0]
    if kind == "gauss":
        codes, scale = _gauss(x, width, group_size)
    elif kind == "uniform-quantile":
        codes, scale = _uniform(quantile_clamp(x, group_size, clip), width, group_size, 1.0, False)
    else:
        codes, scale = _uniform(x, width, group_size, clip, kind == "uniform-int")
    return pack_bits(codes, width), scale


def _outputs(
    x: Tensor, sigma: Tensor | None, kind: str, widths: Sequence[int], group_size: int, clip: float, gain: bool
) -> tuple[Tensor, Tensor]:
    n = scales_per_row(kind, x.shape[-1], group_size, gain)
    codes = x.new_empty((*x.shape[:-1], sum(widths)), dtype=torch.uint8)
    return codes, x.new_empty((*x.shape[:-1], n), dtype=torch.float16)


@torch.library.custom_op("kvsink::quantize", mutates_args=())
def quantize(
    x: Tensor, sigma: Tensor | None, kind: str, widths: Sequence[int], group_size: int, clip: float, gain: bool
) -> tuple[Tensor, Tensor]:
    return quantize_ref(x, sigma, kind, widths, group_size, clip, gain)


quantize.register_fake(_outputs)


def _example(
    kind: str, widths: tuple[int, ...], group_size: int, gain: bool, shape: tuple[int, ...], size: float = 1.0, middle: float = 0.0
):
    def make(g: torch.Generator) -> dict[str, object]:
        x = size * torch.randn(shape, generator=g) + middle
        sigma = torch.rand(shape[-3], shape[-1], generator=g) + 0.5 if kind in SIGMA_KINDS else None
        clip = 0.8 if kind.startswith("uniform") and widths[0] == 2 else 1.0
        return dict(x=x, sigma=sigma, kind=kind, widths=list(widths), group_size=group_size, clip=clip, gain=gain)

    return make


EXAMPLES = (
    _example("uniform", (2,) * 8, 64, False, (1, 3, 7, 64)),
    _example("uniform-int", (3,) * 16, 32, False, (2, 2, 1, 128)),
    _example("uniform", (8,) * 2, 16, False, (1, 1, 5, 16)),
    _example("uniform-quantile", (2,) * 8, 32, False, (2, 3, 5, 64)),
    _example("gauss", (4,) * 8, 64, False, (1, 3, 33, 64)),
    _example("lloyd", (4, 4, 3, 2, 2, 1, 1, 0), 64, True, (2, 3, 9, 64)),
    _example("lloyd", (1,) * 2, 16, False, (1, 2, 3, 16)),
    _example("lloyd-even", (4, 3, 2, 1), 32, True, (2, 2, 5, 32)),
    _example("uniform", (3,) * 4, 32, False, (1, 2, 3, 32), 1e6),  # numbers beyond what float16 holds
    _example("uniform-int", (8,) * 4, 32, False, (1, 2, 3, 32), 0.01, 1e3),
    _example("gauss", (2,) * 4, 32, False, (1, 2, 3, 32), 1e6, -1e6),
    _example("lloyd", (3, 2, 2, 1), 32, True, (1, 2, 3, 32), 1e6),
)


def _cost(**a: Any) -> Cost:
    x, rows = a["x"], a["x"].numel() // a["x"].shape[-1]
    row = sum(a["widths"]) + 2 * scales_per_row(a["kind"], x.shape[-1], a["group_size"], a["gain"])
    return Cost(flops=6 * x.numel(), read=nbytes(x), written=rows * row)


SPEC = register_op(OpSpec(name="quantize", op=quantize, ref=quantize_ref, cost=_cost, examples=EXAMPLES))
