"""Blocks of tokens: uniform codes whose ranges run along tokens, and the rows of a block that is still filling.

Formula    per channel and group of G tokens: lo = min x, s = (max x - lo) / (2^w - 1) over the valid rows of the group,
           code = clamp(round((x - lo) / s), 0, 2^w - 1);  x^ = s·code + lo;  s and lo are rounded to float16 first
           per token: n = sqrt(sum over heads and channels of x²), rounded to float16;  1 where that is 0
Source     KIVI, arXiv 2402.02750 section 3 (per-channel keys); OScaR, arXiv 2605.19660 (one norm per token)
Differs    a constant group has step and codes 0 and is read as its value; a group without valid rows has step and minimum 0
Shapes     x [B, H, N, D], valid bool [B, N], N divisible by G → codes uint8 [B, H, N, D·w/8],
           scale float16 [B, H, N / G, 2·D]: D steps, then D minima; norm float16 [B, 1, N, 1]
Exact      no; |x^ - x| <= s / 2 for valid rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import pack_bits, unpack_bits

__all__ = ["dequantize_tokens", "open_blocks", "quantize_tokens", "token_norm", "touched", "window_rows"]

_HALF_MAX = 65504.0
_HALF_TINY = 6.0e-8


def touched(length: Tensor, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Blocks of `size` slots that `rows` new rows behind `length` touch: the first, and int64 [n] offsets from it.

    n depends on `rows` alone; an offset past the last touched block is 0, so that writing it repeats the first.
    """
    first = length // size
    offset = torch.arange((rows + size - 2) // size + 1, device=length.device)
    return first, torch.where((first + offset) * size < length + rows, offset, 0)


def window_rows(recent: Tensor, new: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Slots int64 [N] of the touched blocks, and their rows [B, H, N, D]: held ones from the ring, then the new ones.

    recent [B, H, W, D] holds slot s at place s mod W, with W >= size. Rows of slots not reached yet repeat the last.
    """
    first, offset = touched(length, new.shape[2], size)
    slots = first * size + torch.arange(offset.numel() * size, device=new.device)
    ring = recent.shape[2]
    place = torch.where(slots < length, slots % ring, (ring + slots - length).clamp_max(ring + new.shape[2] - 1))
    return slots, torch.cat([recent.to(new.dtype), new], dim=2).index_select(2, place)


def open_blocks(recent_slot: Tensor, total: Tensor | int, flush: int, newest: int) -> Tensor:
    """Slots of the ring that are read as they came: those of the block of `flush` rows that is not full at `total` rows,
    and the `newest`; -1 for the others."""
    keep = recent_slot >= total - newest
    if flush:
        keep = keep | (recent_slot >= total // flush * flush)
    return torch.where(keep & (recent_slot < total), recent_slot, -1)


def token_norm(x: Tensor) -> Tensor:
    """One norm per token over all heads: float16 [B, 1, N, 1], never 0."""
    n = x.float().square().sum((1, 3), keepdim=True).sqrt().clamp_max(_HALF_MAX).to(torch.float16)
    return torch.where(n > 0, n, torch.ones_like(n))


def quantize_tokens(x: Tensor, valid: Tensor, width: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes of every row, ranges over the valid rows of each group."""
    top = float(2**width - 1)
    groups = x.float().unflatten(2, (-1, group))  # [B, H, N / G, G, D]
    seen = valid.unflatten(1, (-1, group))[:, None, :, :, None]
    lo = groups.masked_fill(~seen, float("inf")).amin(3, keepdim=True)
    hi = groups.masked_fill(~seen, float("-inf")).amax(3, keepdim=True)
    some = seen.any(3, keepdim=True)
    lo, hi = torch.where(some, lo, 0.0), torch.where(some, hi, 0.0)
    base = lo.clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16)
    step = ((hi - lo) / top).clamp_max(_HALF_MAX).to(torch.float16)
    level = (groups - base.float()) / step.float().clamp_min(_HALF_TINY)
    codes = torch.where(step > 0, torch.round(level).clamp(0.0, top), 0.0)
    scale = torch.cat([step, base], dim=-1).squeeze(3)
    return pack_bits(codes.to(torch.uint8).flatten(2, 3), width), scale


def dequantize_tokens(codes: Tensor, scale: Tensor, width: int, group: int, skip: int = 0) -> Tensor:
    """Rows float32 of codes [B, H, N, bytes] whose first row is row `skip` of the first group in `scale`."""
    dim, rows = scale.shape[-1] // 2, codes.shape[2]
    own = scale.repeat_interleave(group, dim=2)[:, :, skip : skip + rows].float()
    return unpack_bits(codes, width, dim).float() * own[..., :dim] + own[..., dim:]
