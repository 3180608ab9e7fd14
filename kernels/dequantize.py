"""Packed codes become rows of channels again: the inverse of `quantize` up to its rounding.

Formula    uniform: x^ = s·code + lo · uniform-int: x^ = s·(code - z) · gauss: x^ = d·level[code] + m ·
           lloyd, lloyd-even: x^_c = g·sigma_c·level_w[code], and 0 in channels of 0 bits
Source     see `quantize`
Shapes     codes uint8 [..., H, S, sum(widths)], scale float16 [..., H, S, n], sigma float32 [H, D] →
           x^ float32 [..., H, S, D]
Exact      yes: a pure function of the codes
Cost       about 2·numel(x^) flops; reads codes and scale
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Cost, OpSpec, nbytes, register_op
from .levels import even_levels, lloyd_max
from .packing import unpack_bits
from .quantize import EXAMPLES as QUANTIZE_EXAMPLES
from .quantize import SIGMA_KINDS, quantize_ref, segments

__all__ = ["dequantize", "dequantize_ref"]


def dequantize_ref(
    codes: Tensor, scale: Tensor, sigma: Tensor | None, kind: str, widths: Sequence[int], group_size: int, gain: bool
) -> Tensor:
    """The definition; see the formulas at the top of this file."""
    dim = 8 * len(widths)
    if kind in SIGMA_KINDS:
        levels = even_levels if kind == "lloyd-even" else lloyd_max
        assert sigma is not None
        out = torch.zeros((*codes.shape[:-1], dim), dtype=torch.float32, device=codes.device)
        for a, b, byte, w in segments(widths):
            packed = codes[..., byte : byte + (b - a) * w // 8]
            out[..., a:b] = levels(w, codes.device)[unpack_bits(packed, w, b - a).int()]
        out = out * sigma[:, None, :]
        return out * scale.float() if gain else out
    width = widths[0]
    q = unpack_bits(codes, width, dim)
    s = scale.float().unflatten(-1, (-1, 2))  # [..., D / G, 2]
    step, base = s[..., :1], s[..., 1:]
    if kind == "gauss":
        levels = lloyd_max(width, codes.device)[q.int()].unflatten(-1, (-1, group_size))
        return (levels * step + base).flatten(-2)
    values = q.float().unflatten(-1, (-1, group_size))
    if kind == "uniform-int":
        return ((values - base) * step).flatten(-2)
    return (values * step + base).flatten(-2)


@torch.library.custom_op("kvsink::dequantize", mutates_args=())
def dequantize(
    codes: Tensor, scale: Tensor, sigma: Tensor | None, kind: str, widths: Sequence[int], group_size: int, gain: bool
) -> Tensor:
    return dequantize_ref(codes, scale, sigma, kind, widths, group_size, gain)


@dequantize.register_fake
def _outputs(
    codes: Tensor, scale: Tensor, sigma: Tensor | None, kind: str, widths: Sequence[int], group_size: int, gain: bool
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], 8 * len(widths)), dtype=torch.float32)


def _from_quantize(make: Callable[[torch.Generator], Mapping[str, Any]]) -> Callable[[torch.Generator], Mapping[str, Any]]:
    def example(g: torch.Generator) -> Mapping[str, Any]:
        a = dict(make(g))
        codes, scale = quantize_ref(**a)
        keep = ("sigma", "kind", "widths", "group_size", "gain")
        return dict(codes=codes, scale=scale, **{k: a[k] for k in keep})

    return example


SPEC = register_op(
    OpSpec(
        name="dequantize",
        op=dequantize,
        ref=dequantize_ref,
        cost=lambda **a: Cost(
            flops=2 * 8 * len(a["widths"]) * (a["codes"].numel() // max(1, a["codes"].shape[-1])),
            read=nbytes(a["codes"], a["scale"]),
            written=4 * 8 * len(a["widths"]) * (a["codes"].numel() // max(1, a["codes"].shape[-1])),
        ),
        examples=tuple(_from_quantize(e) for e in QUANTIZE_EXAMPLES),
    )
)
