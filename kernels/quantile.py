"""Rows of channels with every entry no farther out than a quantile of the magnitudes of its row.

Formula    per row and group of n channels: t = the int(q·n)-th smallest of |x|, counted from 0, the largest at the most;
           y = clamp(x, -t, t)
Source     OSCAR, arXiv 2605.17757, released code; WUSH-KV, arXiv 2609.38121 section 4, takes it over
Differs    no
Shapes     x [.., D] → y [.., D], n a divisor of D
Exact      inside the clamp
Cost       one selection per group
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["quantile_clamp"]


def quantile_clamp(x: Tensor, group_size: int, share: float) -> Tensor:
    """y; share: q in (0, 1]."""
    groups = x.unflatten(-1, (-1, group_size))
    rank = min(int(share * group_size), group_size - 1) + 1  # torch counts from 1
    t = groups.abs().kthvalue(rank, dim=-1, keepdim=True).values
    return groups.clamp(-t, t).flatten(-2)
