"""Quantizer "modal": rows of text with all levels of their width, visual rows with fewer levels in places of the same width.

Formula    s = (c - a) / (2^w - 1), z = -round(a / s), code = clamp(round(x / s) + z, 0, 2^w - 1), x^ = s (code - z);
           text: w = bits, [a, c] = clip · [min, max]; visual: w = visual_bits with visual_clip
Source     AKVQ-VL, arXiv 2501.15021 (bits by modality)
Differs    a visual row is stored in places as wide as a text row's, so that any row may be either
Shapes     x [B, H, S, D], visual bool [B, S] among the tables ("visual"; absent: all text) → codes uint8 [B, H, S, D·w/8],
           scale float16 [B, H, S, 2·D/G], as "uniform-int" of `kvsink.kernels.quantize`
Exact      no; |x^ - x| <= s / 2 inside the clipped range
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvsink.kernels.dequantize import dequantize_ref
from kvsink.kernels.packing import pack_bits, unpack_bits
from kvsink.kernels.quantize import quantize_ref, scales_per_row

from .quantizers import Params, Quantizer, register_quantizer

if TYPE_CHECKING:
    from kvsink.codecs.spec import SideSpec

__all__ = ["MODAL"]


def _encode(x: Tensor, s: SideSpec, p: Params, prefix: str) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_ref(x, None, "uniform-int", s.widths, s.group_size, s.clip, False)
    visual = p.get("visual")
    if visual is None:
        return codes, scale
    few = (s.visual_bits,) * len(s.widths)
    coarse, coarse_scale = quantize_ref(x, None, "uniform-int", few, s.group_size, s.visual_clip, False)
    coarse = pack_bits(unpack_bits(coarse, few[0], x.shape[-1]), s.widths[0])
    rows = visual[:, None, :, None]
    return torch.where(rows, coarse, codes), torch.where(rows, coarse_scale, scale)


def _decode(codes: Tensor, scale: Tensor, s: SideSpec, p: Params, prefix: str) -> Tensor:
    return dequantize_ref(codes, scale, None, "uniform-int", s.widths, s.group_size, False)


MODAL = register_quantizer(
    "modal",
    Quantizer(
        encode=_encode,
        decode=_decode,
        tables=lambda s, prefix: (),
        row_bytes=lambda s, dim: sum(s.widths),
        row_scales=lambda s, dim: scales_per_row("uniform-int", dim, s.group_size, False),
    ),
)
