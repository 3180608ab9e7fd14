"""Rows of channels become symmetric integer codes with one fixed step per channel: nothing but codes is stored per row.

Formula    code = clamp(round(x / s_c), -2^(w-1), 2^(w-1) - 1), stored as code + 2^(w-1);  x^ = s_c · code
           rounding is half to even
Source     the per-channel form of the quantized cache of com.microsoft::GroupQueryAttention (onnxruntime 1.31 and later): its
           4-bit bytes are these bytes, its 8-bit ones are these less 128
Differs    no
Shapes     x [B, H, S, D], step float32 [H, D] → codes uint8 [B, H, S, D · w / 8], scale float16 [B, H, S, 0], and back
Exact      |x^ - x| <= s / 2 for x inside the range of the codes
Raises     ValueError when D is not divisible by 8
Cost       3·numel(x) flops
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import pack_bits, unpack_bits

__all__ = ["best_steps", "static_decode", "static_encode"]

_TINY = 1e-12
_RATIOS = 48  # steps that are tried, from the whole range of a channel down to a sixth of it


def static_encode(x: Tensor, step: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rows → (codes, empty scale)."""
    half = float(1 << (bits - 1))
    x = x if x.dtype == torch.float64 else x.float()
    codes = torch.round(x / step[:, None].to(x.dtype)).clamp(-half, half - 1) + half
    return pack_bits(codes.to(torch.uint8), bits), x.new_empty((*x.shape[:-1], 0), dtype=torch.float16)


def static_decode(codes: Tensor, step: Tensor, bits: int) -> Tensor:
    """Codes → rows float32."""
    values = unpack_bits(codes, bits, step.shape[-1]).float() - float(1 << (bits - 1))
    return values * step[:, None].float()


def best_steps(x: Tensor, weights: Tensor | None, bits: int) -> Tensor:
    """The step of least (weighted) squared error of every channel, float32 [H, D]: rows [H, N, D], weights [H, N, 1 or D]."""
    half = float(1 << (bits - 1))
    reach = x.abs().amax(1).clamp_min(_TINY)  # [H, D]
    least, found = torch.full_like(reach, float("inf")), reach / half
    for ratio in torch.logspace(0, -0.78, _RATIOS).tolist():
        step = ratio * reach / max(half - 0.5, 0.5)
        error = (torch.round(x / step[:, None]).clamp(-half, half - 1) * step[:, None] - x).square()
        total = (error if weights is None else error * weights).sum(1)
        found, least = torch.where(total < least, step, found), torch.minimum(total, least)
    return found.float()
