"""The basis of keys in which an error counts as much as attention makes of it.

Formula    y a key in the frame of its block, S its covariance; q a query before RoPE, w its weight, turned by its distance D to
           the block's start. The loss of an error e is e M e^T,
               M = lim over n of  sum over D < n of R_D^T E[w q^T q] R_D / n
           which is, of a pair of channels that turn, the mean of both second moments, and of channels that do not, theirs
               M^1/2 S M^1/2 = U Lam U^T,   T = M^1/2 U,   z = y T,   y^ = z^ T^-1
           Lam are the variances of z, and errors of z count alike in all components: T^-1 M T^-T = I. Of all bases T loses least at
           a given rate, by Hadamard's inequality for both matrices
Source     ours (`klt`)
Differs    from an average up to the served length: pairs so slow that no context turns them around count as if one did, and M is
           of no length
Shapes     S, M, T [H, D, D] float64, Lam [H, D]
Exact      yes, of a model whose queries do not depend on the position but for RoPE
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DAMPING", "basis_of_attention", "turned_moment"]

DAMPING = 0.01
"""Share of the mean diagonal that is added to M, so that no direction which calibration did not ask about is without weight."""


def turned_moment(second: Tensor, rotary: int) -> Tensor:
    """M [H, D, D] of queries with the second moment `second` [H, D, D] before RoPE, which turns the first `rotary` channels."""
    own = torch.diagonal(second, dim1=-2, dim2=-1)[:, :rotary]
    mean = own.unflatten(-1, (2, -1)).mean(1).repeat(1, 2)
    out = torch.zeros_like(second)
    out[:, :rotary, :rotary] = torch.diag_embed(mean)
    out[:, rotary:, rotary:] = second[:, rotary:, rotary:]
    return out


def basis_of_attention(covariance: Tensor, moment: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor, Tensor]:
    """Lam [H, D], falling, with T and T^-T [H, D, D]."""
    size = torch.diagonal(moment, dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(torch.finfo(moment.dtype).tiny)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    values, vectors = torch.linalg.eigh(moment / size + damping * eye)
    root = values.sqrt()[:, None]
    forth, back = (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
    variance, turn = torch.linalg.eigh(forth @ covariance @ forth)
    return variance.flip(-1).clamp_min(0.0), forth @ turn.flip(-1), back @ turn.flip(-1)
