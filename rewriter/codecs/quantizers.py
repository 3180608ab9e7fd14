"""How rows of each kind become codes: one `Quantizer` per kind, looked up by the kind's name.

Formula    see the file of each quantizer; scalar kinds are `kvsink.kernels.quantize`
Shapes     x [B, H, S, D] float32 or float64, after the stages of the codec → codes uint8 [B, H, S, bytes],
           scale float16 [B, H or 1, S, n], and back to x^ [B, H, S, D] float32
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from kvsink.kernels.dequantize import dequantize_ref
from kvsink.kernels.quantize import KINDS, SIGMA_KINDS, quantize_ref, scales_per_row

if TYPE_CHECKING:
    from kvsink.codecs.spec import SideSpec

__all__ = ["QUANTIZERS", "Quantizer", "register_quantizer"]

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Quantizer:
    """One kind of quantizer as the codec sees it. `prefix` is "k" or "v" and begins the names of its tables.

    encode(x, spec, params, prefix) → (codes, scale); decode(codes, scale, spec, params, prefix) → x^;
    tables(spec, prefix): names of its constant tables, in order; row_bytes and row_scales (spec, head_dim): width of the
    code tensor in bytes and of the scale tensor in numbers.
    """

    encode: Callable[[Tensor, SideSpec, Params, str], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, SideSpec, Params, str], Tensor]
    tables: Callable[[SideSpec, str], tuple[str, ...]]
    row_bytes: Callable[[SideSpec, int], int]
    row_scales: Callable[[SideSpec, int], int]


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


def _tables(s: SideSpec, prefix: str) -> tuple[str, ...]:
    return (f"{prefix}_sigma",) if s.kind in SIGMA_KINDS else ()


for _kind in KINDS:
    register_quantizer(
        _kind,
        Quantizer(
            encode=_encode,
            decode=_decode,
            tables=_tables,
            row_bytes=lambda s, dim: sum(s.widths),
            row_scales=lambda s, dim: scales_per_row(s.kind, dim, s.group_size, s.gain),
        ),
    )
