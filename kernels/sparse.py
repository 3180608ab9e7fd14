"""Sparse outliers: a record of fixed size per block of tokens holds the entries that a dense code would clamp the most.

Formula    entry x of token t and channel c, in the basis of the quantizer, rounded to float16; e = |x - o| - r its distance
           from the dense range (o, r: per channel for keys, per token for values);  a block of n tokens with C channels
           keeps the m = ceil(p·C·n) entries with the largest e > 0, ties to the smaller index t·C + c;  read: x^ = x there
Source     KVQuant, arXiv 2401.18079 section 3.4 (dense and sparse)
Differs    the record has a fixed size, so that a cache has static shapes; entries compete inside their block as rows come,
           and one that loses its place is read from its clamped dense code
Shapes     value float16, index int16 (-1 empty) [B, ceil(L / n), m]; new rows [B, S, C], C = heads·channels, n·C <= 32768
Exact      kept entries to float16; the record of a block does not depend on how its rows were chunked
Cost       one selection among n·C entries per block touched, or m + C for a single row
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tokens import touched

__all__ = ["INDEX_LIMIT", "lay_sparse", "merge_sparse", "record_size"]

INDEX_LIMIT = 32768  # places an int16 index can name
_HALF_MAX = 65504.0


def record_size(share: float, channels: int, tokens: int) -> int:
    """m: entries a block keeps."""
    exact = share * channels * tokens
    return int(exact) + (exact - int(exact) > 1e-9)


def _rank(excess: Tensor, keep: Tensor, index: Tensor) -> Tensor:
    """One int64 per entry that orders by excess, then by the smaller index; -1 for what cannot be kept."""
    bits = excess.contiguous().view(torch.int32).to(torch.int64)  # of positive floats the bits order as the numbers do
    return torch.where(keep & (excess > 0), bits * INDEX_LIMIT + (INDEX_LIMIT - 1 - index), -1)


def merge_sparse(
    value: Tensor, index: Tensor, x: Tensor, length: Tensor, valid: Tensor, offset: Tensor, extent: Tensor, tokens: int
) -> None:
    """New rows x [B, S, C] behind `length` compete with the entries held; value and index are written in place.

    valid bool [B, N] and the range (offset, extent) [B or 1, N or 1, C or 1] are of the N slots of the touched blocks.
    """
    b, s, c = x.shape
    first, block = touched(length, s, tokens)
    n, m = block.numel(), value.shape[2]
    slots = torch.arange(s, device=x.device) + length
    inside = slots - first * tokens  # places of the new rows in the window
    held_value, held_index = value.index_select(1, first + block), index.index_select(1, first + block).to(torch.int64)
    place = held_index.clamp_min(0)
    token = (place // c + torch.arange(n, device=x.device)[:, None] * tokens).flatten(1)  # [B, n·m]
    o, r = (_pick(t, token, (place % c).flatten(1)) for t in (offset, extent))
    old = (held_index.flatten(1) >= 0) & (token + first * tokens < length) & valid.gather(1, token)
    rank = _rank((held_value.flatten(1).float() - o).abs() - r, old, place.flatten(1)).view(b, n, m)
    half = x.float().clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16)
    o, r = (t.index_select(1, inside) if t.shape[1] > 1 else t for t in (offset, extent))
    fresh = _rank(
        (half.float() - o).abs() - r,
        valid.index_select(1, inside)[..., None].expand(-1, -1, c),
        (slots % tokens)[:, None] * c + torch.arange(c, device=x.device),
    )
    if s > 1:
        fresh = torch.full((b, n * tokens, c), -1, device=x.device).index_copy_(1, inside, fresh)
        half = half.new_zeros(b, n * tokens, c).index_copy_(1, inside, half)
    best, order = torch.cat([rank, fresh.reshape(b, n, -1)], dim=2).topk(m, dim=2)
    kept = torch.cat([held_value, half.reshape(b, n, -1)], dim=2).gather(2, order)
    named = torch.where(best >= 0, INDEX_LIMIT - 1 - best % INDEX_LIMIT, -1).to(index.dtype)
    value.index_copy_(1, first + block, torch.where(best >= 0, kept, 0.0).index_select(1, block))
    index.index_copy_(1, first + block, named.index_select(1, block))


def _pick(t: Tensor, token: Tensor, channel: Tensor) -> Tensor:
    """Entries of a range [B or 1, N or 1, C or 1] for token and channel [B, K]."""
    if t.shape[1] > 1:
        return t.squeeze(2).expand(token.shape[0], -1).gather(1, token)
    return t.flatten()[channel]


def lay_sparse(x: Tensor, value: Tensor, index: Tensor, start: int, tokens: int) -> Tensor:
    """Rows x [B, H, N, D] of slots start … start + N - 1 with the entries of a record [B, blocks, m] in their places."""
    b, h, n, d = x.shape
    c, first, end = h * d, start // tokens, -(-(start + n) // tokens)
    at = index[:, first:end].to(torch.int64)
    block = torch.arange(first, end, device=x.device)[:, None] * tokens
    place = at + (block - start) * c
    behind = n * c  # where entries of other rows go
    place = torch.where((at >= 0) & (place >= 0) & (place < behind), place, behind).flatten(1)
    flat = torch.nn.functional.pad(x.transpose(1, 2).reshape(b, n * c), (0, 1))
    flat = flat.scatter(1, place, value[:, first:end].flatten(1).to(x.dtype))
    return flat[:, :behind].reshape(b, n, h, d).transpose(1, 2)
