"""Non-uniform scalar codes: free code points in a range that is fixed per key channel, or taken per token for values.

Formula    u, l = the upper and lower quantile that leave a share s / 2 outside on either side (s = 0: maximum, minimum),
           o = (u + l) / 2, r = (u - l) / 2, y = clamp((x - o) / r, -1, 1);  code = the code point nearest to y
           x^ = Q'[code]·r + o, with Q' the code points of reading (Q, or Q scaled to undo the loss of variance)
           keys: o, r per channel, from calibration;  values: o, r per token over the channels of all heads, rounded to float16
           before the codes use them;  r = 0 counts as 1
Source     KVQuant, arXiv 2401.18079 section 3
Differs    see kvsink.methods.kvquant
Shapes     keys x [B, H, S, D], o, r [H, D]; values x [B, H, S, D] → scale float16 [B, 1, S, 2] holds (r, o);
           Q, Q' float32 [2^b] ascending → codes uint8 [B, H, S, D·b/8]
Exact      no
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import pack_bits, unpack_bits

__all__ = ["nuq_decode_static", "nuq_decode_token", "nuq_encode_static", "nuq_encode_token", "span"]

_HALF_MAX = 65504.0


def span(x: Tensor, outliers: float) -> tuple[Tensor, Tensor]:
    """Offset and range of the last axis that leave a share `outliers` of the entries outside."""
    if outliers:
        ordered = x.sort(dim=-1).values
        n = x.shape[-1]
        cut = min(round(outliers / 2 * n), (n - 1) // 2)
        low, high = ordered[..., cut], ordered[..., n - 1 - cut]
    else:
        low, high = x.amin(-1), x.amax(-1)
    middle, half = (high + low) / 2, (high - low) / 2
    return middle, torch.where(half > 0, half, torch.ones_like(half))


def _width(levels: Tensor) -> int:
    return levels.shape[0].bit_length() - 1


def _codes(y: Tensor, levels: Tensor) -> Tensor:
    between = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(y.clamp(-1.0, 1.0).contiguous(), between).to(torch.uint8)


def nuq_encode_static(x: Tensor, offset: Tensor, extent: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Keys in the static range of their channel → (codes, empty scale)."""
    y = (x.float() - offset[:, None]) / extent[:, None]
    return pack_bits(_codes(y, levels), _width(levels)), x.new_empty((x.shape[0], 1, x.shape[2], 0), dtype=torch.float16)


def nuq_decode_static(codes: Tensor, offset: Tensor, extent: Tensor, read: Tensor) -> Tensor:
    """The inverse of `nuq_encode_static`, float32."""
    y = read[unpack_bits(codes, _width(read), offset.shape[1]).int()]
    return y * extent[:, None] + offset[:, None]


def nuq_encode_token(x: Tensor, levels: Tensor, outliers: float) -> tuple[Tensor, Tensor]:
    """Values in the range of their token → (codes, scale [B, 1, S, 2])."""
    x = x.float()
    flat = x.transpose(1, 2).flatten(2)  # [B, S, H·D]
    middle, half = span(flat, outliers)
    scale = torch.stack((half, middle), dim=-1).clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16)[:, None]
    half, middle = scale.float().split(1, dim=-1)
    half = torch.where(half > 0, half, torch.ones_like(half))
    return pack_bits(_codes((x - middle) / half, levels), _width(levels)), scale


def nuq_decode_token(codes: Tensor, scale: Tensor, read: Tensor) -> Tensor:
    """The inverse of `nuq_encode_token`, float32."""
    half, middle = scale.float().split(1, dim=-1)
    width = _width(read)
    return read[unpack_bits(codes, width, codes.shape[-1] * 8 // width).int()] * half + middle
