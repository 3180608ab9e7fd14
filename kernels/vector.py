"""Coupled channels become one index into a codebook of vectors: b bits for c neighbouring channels of one head.

Formula    code_g = argmin_k || x_g - C_gk ||^2 for every run g of c channels, the lower index at ties;  x^_g = C_g,code
           with a gain, C codes x / g: g starts at rms(x) of the row and is fitted to the code vectors by least squares before
           and after a second encoding, rounded to float16;  x^_g = g · C_g,code; sums of the gain are taken in float64
           normed: n = rms of a token over all heads and channels, rounded to float16; C codes x / n and x^ = n · C_code
Source     CQ, arXiv 2405.03917; AnTKV, arXiv 2506.19505; the norm is of TaSQ, arXiv 2610.03027; the gain is ours
Shapes     x [B, H, S, D], book float32 [H or 1, D/c, 2^b, c] → codes uint8 [B, H, S, ceil(D/c·b/8)], scale float16
           [B, H, S, 1 or 0], normed [B, 1, S, 1], and back to x^ float32 [B, H, S, D]
Exact      no
Cost       2·2^b·D flops per row and head to encode, in chunks of `_CHUNK` distances; a table look-up to decode
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import pack_codes, unpack_codes
from .quantize import rms

__all__ = ["nearest", "normed_encode", "token_rms", "vector_decode", "vector_encode"]

_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 25}  # distances held at once
_HALF_MAX, _HALF_TINY = 65504.0, 6.0e-8


def nearest(rows: Tensor, book: Tensor) -> Tensor:
    """Index int64 [G, N] of the code vector nearest to each row [G, N, c] in its group's book [G, K, c]."""
    g, n, _ = rows.shape
    half = -0.5 * book.square().sum(-1)[:, None]  # x·C - |C|^2 / 2 is largest where the distance is smallest
    step = max(1, _CHUNK["cuda" if rows.is_cuda else "cpu"] // (g * book.shape[1]))
    parts = [torch.baddbmm(half, rows[:, at : at + step], book.mT).argmax(-1) for at in range(0, n, step)]
    return torch.cat(parts, dim=1) if len(parts) != 1 else parts[0]


def _codes(x: Tensor, book: Tensor) -> Tensor:
    b, h, s, _ = x.shape
    groups, size, c = book.shape[1:]
    rows = x.unflatten(-1, (groups, c)).permute(1, 3, 0, 2, 4).reshape(h * groups, b * s, c)
    wide = book.expand(h, -1, -1, -1).reshape(h * groups, size, c)
    return nearest(rows, wide).reshape(h, groups, b, s).permute(2, 0, 3, 1)  # [B, H, S, D/c]


def _vectors(codes: Tensor, book: Tensor) -> Tensor:
    heads, groups, size, c = book.shape
    first = torch.arange(heads * groups, device=codes.device).reshape(heads, 1, groups) * size
    return book.reshape(-1, c)[codes + first].flatten(-2)


def vector_encode(x: Tensor, book: Tensor, code_bits: int, gain: bool) -> tuple[Tensor, Tensor]:
    """Rows [B, H, S, D] → (codes, scale)."""
    x = x if x.dtype == torch.float64 else x.float()
    book = book.to(x.dtype)
    if not gain:
        return pack_codes(_codes(x, book), code_bits), x.new_empty((*x.shape[:-1], 0), dtype=torch.float16)

    def fit(codes: Tensor) -> Tensor:
        y = _vectors(codes, book)
        dot, square = (z.sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype) for z in (x * y, y.square()))
        g = dot / square.clamp_min(1e-30)
        return g.clamp(0.0, _HALF_MAX).to(torch.float16)

    codes = _codes(x / fit(_codes(x / rms(x).clamp_min(_HALF_TINY), book)).float().clamp_min(_HALF_TINY), book)
    return pack_codes(codes, code_bits), fit(codes)


def token_rms(x: Tensor) -> Tensor:
    """n of rows [B, H, S, D]: float16 [B, 1, S, 1], never 0."""
    n = x.square().mean((1, 3), keepdim=True, dtype=torch.float64).sqrt()
    return n.clamp(_HALF_TINY, _HALF_MAX).to(torch.float16)


def normed_encode(x: Tensor, book: Tensor, code_bits: int) -> tuple[Tensor, Tensor]:
    """Rows [B, H, S, D] → (codes, norm of each token); `vector_decode` reads them."""
    x = x if x.dtype == torch.float64 else x.float()
    n = token_rms(x)
    return vector_encode(x / n.to(x.dtype), book, code_bits, False)[0], n


def vector_decode(codes: Tensor, scale: Tensor, book: Tensor, code_bits: int) -> Tensor:
    """(codes, scale) → rows float32 [B, H, S, D]."""
    x = _vectors(unpack_codes(codes, code_bits, book.shape[1]), book)
    return x * scale.float() if scale.shape[-1] else x
