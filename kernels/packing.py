"""Integer codes of 1 to 8 bits, packed into bytes without gaps.

Formula    eight codes of w bits are one little-endian word of 8·w bits: code i holds bits [i·w, (i+1)·w)
Source     ours
Shapes     codes uint8 [..., n], n divisible by 8 → bytes uint8 [..., n·w/8], and back
Exact      yes
Raises     ValueError when n is not divisible by 8 or w is outside 1..8
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_bits", "unpack_bits"]


def _check(count: int, width: int) -> None:
    if not 1 <= width <= 8:
        raise ValueError(f"codes of {width} bits cannot be packed; widths are 1 to 8")
    if count % 8:
        raise ValueError(f"{count} codes cannot be packed; the count must be divisible by 8")


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """Pack codes uint8 [..., n] of `width` bits into uint8 [..., n·width/8]."""
    n = codes.shape[-1]
    _check(n, width)
    if width == 8:
        return codes
    if 8 % width == 0:
        per_byte = 8 // width
        fields = codes.reshape(*codes.shape[:-1], n // per_byte, per_byte)
        packed = fields[..., 0]
        for i in range(1, per_byte):
            packed = packed | (fields[..., i] << (i * width))
        return packed
    runs = codes.reshape(*codes.shape[:-1], n // 8, 8).to(torch.int64)
    word = runs[..., 0]
    for i in range(1, 8):
        word = word | (runs[..., i] << (i * width))
    out = torch.stack([(word >> (8 * p)) & 255 for p in range(width)], dim=-1)  # [..., n/8, width]
    return out.to(torch.uint8).reshape(*codes.shape[:-1], n * width // 8)


def unpack_bits(packed: Tensor, width: int, count: int) -> Tensor:
    """Unpack uint8 [..., count·width/8] into codes uint8 [..., count]."""
    _check(count, width)
    if width == 8:
        return packed
    mask = (1 << width) - 1
    if 8 % width == 0:
        fields = torch.stack([(packed >> (i * width)) & mask for i in range(8 // width)], dim=-1)
        return fields.reshape(*packed.shape[:-1], count)
    runs = packed.reshape(*packed.shape[:-1], count // 8, width).to(torch.int64)
    word = runs[..., 0]
    for p in range(1, width):
        word = word | (runs[..., p] << (8 * p))
    codes = torch.stack([(word >> (i * width)) & mask for i in range(8)], dim=-1)
    return codes.to(torch.uint8).reshape(*packed.shape[:-1], count)
