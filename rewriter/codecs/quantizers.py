"""How rows of each kind become codes: one `Quantizer` per kind, looked up by the kind's name.

Formula    see the file of each quantizer; scalar kinds are `kvsink.kernels.quantize`
Shapes     x [B, H, S, D] float32 or float64, after the stages of the codec → codes uint8 [B, H, S, bytes],
           scale float16 [B, H or 1, S, n], and back to x^ [B, H, S, D] float32
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvsink.kernels.dequantize import dequantize_ref
from kvsink.kernels.levels import distortion
from kvsink.kernels.nuq import nuq_decode_static, nuq_decode_token, nuq_encode_static, nuq_encode_token
from kvsink.kernels.packing import packed_bytes
from kvsink.kernels.quantize import KINDS, SIGMA_KINDS, quantize_ref, scales_per_row
from kvsink.kernels.static import static_decode, static_encode
from kvsink.kernels.trellis import DISTORTION, TRELLIS_WIDTHS, trellis_decode, trellis_encode
from kvsink.kernels.vector import normed_encode, vector_decode, vector_encode

if TYPE_CHECKING:
    from kvsink.codecs.spec import SideSpec

__all__ = ["QUANTIZERS", "VECTOR_KINDS", "Quantizer", "register_quantizer"]

Params = Mapping[str, Tensor]

VECTOR_KINDS = ("vector", "vector-normed")  # codebooks


@dataclass(frozen=True)
class Quantizer:
    """One kind of quantizer as the codec sees it. `prefix` is "k" or "v" and begins the names of its tables.

    encode(x, spec, params, prefix) → (codes, scale); decode(codes, scale, spec, params, prefix) → x^;
    tables(spec, prefix): names of its constant tables, in order; row_bytes and row_scales (spec, head_dim): width of the
    code tensor in bytes and of the scale tensor in numbers. learns(spec): calibration rows its tables need at the least, 0
    when none are learnt from samples. shapes(spec, prefix, heads, head_dim): shapes of tables that have one. scalar: the ops
    `kvsink::quantize` and `kvsink::dequantize` do it; other kinds go through `kvsink::encode` and `kvsink::decode`.
    scale_of_token: the scales are of a token, not of its heads: scale [B, 1, S, n]. check(spec): what the kind does not take of
    a declaration, in words; empty when it takes it. least, most: bits of a run of channels; average: the most
    of a whole row a channel; distortion: mean squared error by bits
    on a unit Gaussian, for kinds whose runs have widths of their own.
    """

    encode: Callable[[Tensor, SideSpec, Params, str], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, SideSpec, Params, str], Tensor]
    tables: Callable[[SideSpec, str], tuple[str, ...]]
    row_bytes: Callable[[SideSpec, int], int]
    row_scales: Callable[[SideSpec, int], int]
    learns: Callable[[SideSpec], int] = lambda s: 0
    shapes: Callable[[SideSpec, str, int, int], Mapping[str, tuple[int, ...]]] = lambda s, prefix, heads, dim: {}
    scalar: bool = False
    scale_of_token: bool = False
    check: Callable[[SideSpec], str] = lambda s: ""
    least: int = 0
    most: int = 8
    average: int = 8
    distortion: Callable[[int], float] = distortion


QUANTIZERS: dict[str, Quantizer] = {}


def register_quantizer(kind: str, quantizer: Quantizer) -> Quantizer:
    """Add a kind; its name is taken once."""
    if kind in QUANTIZERS:
        raise ValueError(f"quantizer {kind} is registered twice")
    QUANTIZERS[kind] = quantizer
    return quantizer


def _encode(x: Tensor, s: SideSpec, p: Params, prefix: str) -> tuple[Tensor, Tensor]:
    return quantize_ref(x, p.get(f"{prefix}_sigma"), s.kind, s.widths, s.group_size, s.clip, s.gain)


def _decode(codes: Tensor, scale: Tensor, s: SideSpec, p: Params, prefix: str) -> Tensor:
    return dequantize_ref(codes, scale, p.get(f"{prefix}_sigma"), s.kind, s.widths, s.group_size, s.gain)


def _vector_rows(x: Tensor, s: SideSpec, p: Params, prefix: str) -> tuple[Tensor, Tensor]:
    return vector_encode(x, p[f"{prefix}_book"], s.code_bits, s.gain)


def _normed_rows(x: Tensor, s: SideSpec, p: Params, prefix: str) -> tuple[Tensor, Tensor]:
    return normed_encode(x, p[f"{prefix}_book"], s.code_bits)


def _no_walk(s: SideSpec) -> str:
    if not 1 <= s.bits <= QUANTIZERS[s.kind].average or not set(s.widths) <= set(TRELLIS_WIDTHS):
        return f"a trellis has 1 to 4 bits a channel, in runs of 1 to 6, not bits={s.bits:g} and widths {sorted(set(s.widths))}"
    return "a trellis has its gain in the last byte of its codes: gain=True" if s.gain else ""


def _tables(s: SideSpec, prefix: str) -> tuple[str, ...]:
    return (f"{prefix}_sigma",) if s.kind in SIGMA_KINDS else ()


def _walk_tables(s: SideSpec, prefix: str) -> tuple[str, ...]:
    return (f"{prefix}_sigma", *([f"{prefix}_unsigma"] if s.unbiased else []))


for _kind in KINDS:
    register_quantizer(
        _kind,
        Quantizer(
            encode=_encode,
            decode=_decode,
            tables=_tables,
            row_bytes=lambda s, dim: sum(s.widths),
            row_scales=lambda s, dim: scales_per_row(s.kind, dim, s.group_size, s.gain),
            shapes=lambda s, prefix, heads, dim: {f"{prefix}_sigma": (heads, dim)} if s.kind in SIGMA_KINDS else {},
            scalar=True,
        ),
    )

for _kind in VECTOR_KINDS:
    _normed = _kind == "vector-normed"
    register_quantizer(
        _kind,
        Quantizer(
            encode=_normed_rows if _normed else _vector_rows,
            decode=lambda codes, scale, s, p, prefix: vector_decode(codes, scale, p[f"{prefix}_book"], s.code_bits),
            tables=lambda s, prefix: (f"{prefix}_book",),
            row_bytes=lambda s, dim: packed_bytes(dim // s.couple, s.code_bits),
            row_scales=lambda s, dim: int(s.gain or s.kind == "vector-normed"),
            learns=lambda s: 2**s.code_bits,
            shapes=lambda s, prefix, heads, dim: {
                f"{prefix}_book": (1 if s.shared else heads, dim // s.couple, 2**s.code_bits, s.couple)
            },
            scale_of_token=_normed,
            check=lambda s: "a token has its norm and no gain beside it: gain=True" if s.gain and s.kind == "vector-normed" else "",
        ),
    )

register_quantizer(
    "trellis",
    Quantizer(
        encode=lambda x, s, p, prefix: (
            trellis_encode(x, p[f"{prefix}_sigma"], s.widths),
            x.new_empty((*x.shape[:-1], 0), dtype=torch.float16),
        ),
        decode=lambda codes, scale, s, p, prefix: trellis_decode(codes, p[_walk_tables(s, prefix)[-1]], s.widths),
        tables=_walk_tables,
        row_bytes=lambda s, dim: sum(s.widths) + 1,
        row_scales=lambda s, dim: 0,
        shapes=lambda s, prefix, heads, dim: dict.fromkeys(_walk_tables(s, prefix), (heads, dim)),
        check=_no_walk,
        least=min(TRELLIS_WIDTHS),
        most=max(TRELLIS_WIDTHS),
        average=4,
        distortion=DISTORTION.__getitem__,
    ),
)

register_quantizer(
    "static",
    Quantizer(
        encode=lambda x, s, p, prefix: static_encode(x, p[f"{prefix}_step"], s.widths[0]),
        decode=lambda codes, scale, s, p, prefix: static_decode(codes, p[f"{prefix}_step"], s.widths[0]),
        tables=lambda s, prefix: (f"{prefix}_step",),
        row_bytes=lambda s, dim: sum(s.widths),
        row_scales=lambda s, dim: 0,
        learns=lambda s: 16,
        shapes=lambda s, prefix, heads, dim: {f"{prefix}_step": (heads, dim)},
    ),
)

register_quantizer(
    "nuq",
    Quantizer(
        encode=lambda x, s, p, prefix: (
            nuq_encode_static(x, p["k_offset"], p["k_range"], p["k_levels"])
            if prefix == "k"
            else nuq_encode_token(x, p["v_levels"], s.outliers)
        ),
        decode=lambda codes, scale, s, p, prefix: (
            nuq_decode_static(codes, p["k_offset"], p["k_range"], p["k_read"])
            if prefix == "k"
            else nuq_decode_token(codes, scale, p["v_read"])
        ),
        tables=lambda s, prefix: (*(("k_offset", "k_range") if prefix == "k" else ()), f"{prefix}_levels", f"{prefix}_read"),
        row_bytes=lambda s, dim: sum(s.widths),
        row_scales=lambda s, dim: 0 if s.domain == "block" else 2,
        learns=lambda s: 2 ** int(s.bits),
        shapes=lambda s, prefix, heads, dim: {
            **({"k_offset": (heads, dim), "k_range": (heads, dim)} if prefix == "k" else {}),
            f"{prefix}_levels": (2 ** int(s.bits),),
            f"{prefix}_read": (2 ** int(s.bits),),
        },
        scale_of_token=True,
    ),
)
