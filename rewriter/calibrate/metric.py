"""The basis of keys in which an error counts as much as attention makes of it.

Formula    y a key in the frame of its block, S its covariance; q a query before RoPE, w its weight, turned by its distance D to
           the block's start. The loss of an error e is e M e^T,
               M = lim over n of  sum over D < n of R_D^T E[w q^T q] R_D / n
           which is, of a pair of channels that turn, the mean of both second moments, and of channels that do not, theirs
               M^1/2 S M^1/2 = U Lam U^T,   T = M^1/2 U,   z = y T,   y^ = z^ T^-1
           Lam are the variances of z, and errors of z count alike in all components: T^-1 M T^-T = I. Of all bases T loses least at
           a given rate, by Hadamard's inequality for both matrices
           "balanced": T = c M^1/2 U Lam^-1/4 Had, both S and M damped: all channels have one variance and errors of one weight,
           the least loss of one step for all (c: as large as the rows were);  "hadamard": T Had
Source     ours (`klt`); WUSH-KV, arXiv 2609.38121 equation 1 and theorem 3 ("balanced")
Differs    from an average up to the served length: pairs so slow that no context turns them around count as if one did, and M is
           of no length
Shapes     S, M, T [H, D, D] float64, Lam [H, D]
Exact      yes, of a model whose queries do not depend on the position but for RoPE
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvsink.kernels.hadamard import hadamard_ref

__all__ = ["DAMPING", "basis_of_attention", "condition", "damped", "spread_basis", "turned_moment"]

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


def condition(moment: Tensor) -> float:
    """The largest condition number of second moments [H, D, D]; infinite where one is singular to rounding."""
    values = torch.linalg.eigvalsh(moment)
    least, most = values[:, 0], values[:, -1]
    singular = least <= moment.shape[-1] * torch.finfo(moment.dtype).eps * most
    return float(torch.where(singular, torch.inf, most / least).amax())


def damped(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """A second moment [H, D, D] with `damping` times its mean diagonal added to the diagonal; of 0, `damping`."""
    size = torch.diagonal(moment, dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return moment + damping * torch.where(size > 0, size, 1.0) * torch.eye(moment.shape[-1], dtype=moment.dtype)


def basis_of_attention(covariance: Tensor, moment: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor, Tensor]:
    """Lam [H, D], falling, with T and T^-T [H, D, D]."""
    size = torch.diagonal(moment, dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(torch.finfo(moment.dtype).tiny)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    values, vectors = torch.linalg.eigh(moment / size + damping * eye)
    root = values.sqrt()[:, None]
    forth, back = (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
    variance, turn = torch.linalg.eigh(forth @ covariance @ forth)
    return variance.flip(-1).clamp_min(0.0), forth @ turn.flip(-1), back @ turn.flip(-1)


def spread_basis(variance: Tensor, basis: tuple[Tensor, Tensor], order: int, energy: Tensor | None) -> tuple[Tensor, Tensor]:
    """T and T^-T [H, D, D] behind which all channels are alike. basis: T and T^-T before, with variances [H, D]; order: of the
    Hadamard matrix; energy: the trace of S [H], for the balanced one."""
    forth, back = basis
    if energy is not None:
        root = variance.clamp_min(torch.finfo(variance.dtype).tiny).pow(0.25)
        scale = (energy / root.square().sum(-1)).sqrt()[:, None] / root
        forth, back = forth * scale[:, None], back / scale[:, None]
    return hadamard_ref(forth, order), hadamard_ref(back, order)
