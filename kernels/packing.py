"""Integer codes packed into bytes without gaps.

Formula    `pack_bits`, 1 to 8 bits: eight codes of w bits are one little-endian word: code i holds bits [i·w, (i+1)·w)
           `pack_codes`, 1 to 12 bits: the same layout for any count of codes; the last byte is filled with zeros
Source     ours
Shapes     codes uint8 [..., n], n divisible by 8 → bytes uint8 [..., n·w/8], and back
           codes int [..., n] → bytes uint8 [..., ceil(n·w/8)], and back to int64
Exact      yes
Raises     ValueError when n is not divisible by 8 (`pack_bits`) or w is outside its range
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_bits", "pack_codes", "packed_bytes", "unpack_bits", "unpack_codes"]


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


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` codes of `width` bits take."""
    if not 1 <= width <= 12:
        raise ValueError(f"codes of {width} bits cannot be packed; widths are 1 to 12")
    return -(-count * width // 8)


def pack_codes(codes: Tensor, width: int) -> Tensor:
    """Pack codes [..., n] of `width` bits into uint8 [..., ceil(n·width/8)]."""
    n = codes.shape[-1]
    size = packed_bytes(n, width)
    if width == 8:
        return codes.to(torch.uint8)
    place = torch.arange(width, device=codes.device)
    bits = ((codes.long()[..., None] >> place) & 1).flatten(-2)  # [..., n·width]
    bits = torch.nn.functional.pad(bits, (0, 8 * size - n * width)).unflatten(-1, (size, 8))
    return (bits << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def unpack_codes(packed: Tensor, width: int, count: int) -> Tensor:
    """Unpack uint8 [..., ceil(count·width/8)] into codes int64 [..., count]."""
    size = packed_bytes(count, width)
    if width == 8:
        return packed.long()
    wide = torch.nn.functional.pad(packed[..., :size], (0, 2)).long()
    bit = torch.arange(count, device=packed.device) * width
    byte = bit >> 3  # a code of at most 12 bits lies in three bytes
    word = wide[..., byte] | (wide[..., byte + 1] << 8) | (wide[..., byte + 2] << 16)
    return (word >> (bit & 7)) & ((1 << width) - 1)
