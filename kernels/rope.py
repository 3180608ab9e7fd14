"""Rotary position embedding of the half-split kind, forwards and backwards, for all or the first channels of a head.

Formula    with x = [a, b | c] (two halves of the rotary channels, the rest c untouched):
           y = [a·cos - b·sin, b·cos + a·sin | c];  the inverse divides by cos² + sin², which is the squared attention
           scaling of scaled RoPE variants
Source     RoFormer, arXiv 2104.09864 section 3.4; the layout is that of transformers' `rotate_half`
Shapes     x [..., S, D], cos and sin [..., S, R] with R <= D, both halves holding the same angles
Exact      yes: unrope(rope(x)) = x
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rope", "unrope"]


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x by the angles of cos and sin. An empty cos (a model without RoPE) returns x."""
    r = cos.shape[-1]
    if r == 0:
        return x
    half = r // 2
    a, b = x[..., :half], x[..., half:r]
    turned = torch.cat((a * cos[..., :half] - b * sin[..., :half], b * cos[..., half:] + a * sin[..., half:]), dim=-1)
    if r == x.shape[-1]:
        return turned
    rest = x[..., r:].expand(*turned.shape[:-1], x.shape[-1] - r)
    return torch.cat((turned, rest), dim=-1)


def unrope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo `rope` with the same cos and sin."""
    if cos.shape[-1] == 0:
        return x
    norm = (cos * cos + sin * sin).clamp_min(1e-12)
    return rope(x, cos / norm, -sin / norm)
