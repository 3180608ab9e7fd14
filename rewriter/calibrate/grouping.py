"""Channels of keys weighed as queries weigh them, and put into groups whose codebooks gain most from what they have in common.

Formula    w_c = sqrt(m_c / mean m), at least 1e-6 of the largest, m the diagonal of the mean of R_p^T q^T q R_p over causal pairs
           Sigma the covariance of w·k, divided by one norm a token where the quantizer does; units are pairs of channels that turn
           together; two units at a time are joined, by a matching of small total det(Sigma_g + e I)^(1/|g|), e = 1e-4 of the mean
           diagonal, until a group has as many channels as share a code
           z = k B,  B = diag(w) P: channel order[i] times its weight is channel i;  k = z B^-1
Source     TaSQ, arXiv 2610.03027, released code
Differs    a matching is the best of a dozen that exchanges between two pairs make no better; the release finds the least. Channels
           that do not turn are paired with their neighbours
Shapes     m [H, D]; rows [H, N, D]; B, B^-T [H, D, D] float64
Raises     UnsupportedError where groups are not made by doubling
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvsink.errors import UnsupportedError

__all__ = ["channel_weights", "grouped_basis", "grouped_order", "matched"]

_STARTS = 12  # matchings from which exchanges begin


def channel_weights(moment: Tensor) -> Tensor:
    """w [H, D] of m [H, D]; ones where nothing was seen."""
    mean = moment.mean(-1, keepdim=True)
    w = torch.where(mean > 0, moment / torch.where(mean > 0, mean, 1.0), 1.0).sqrt()
    return torch.maximum(w, 1e-6 * w.amax(-1, keepdim=True))


def matched(cost: Tensor) -> list[tuple[int, int]]:
    """Pairs of n things, n even, of small total cost; cost [n, n] symmetric."""
    n, c = len(cost), cost.tolist()
    left, greedy = set(range(n)), []
    for _, a, b in sorted((c[i][j], i, j) for i in range(n) for j in range(i + 1, n)):
        if a in left and b in left:
            left -= {a, b}
            greedy.append((a, b))
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(n, generator=g).tolist() for _ in range(_STARTS - 1)]
    found = [_exchanged(start, c) for start in (greedy, *(list(zip(d[::2], d[1::2], strict=True)) for d in drawn))]
    return min(found, key=lambda pairs: sum(c[a][b] for a, b in pairs))


def _exchanged(pairs: list[tuple[int, int]], c: list[list[float]]) -> list[tuple[int, int]]:
    """Partners of two pairs change places while that makes the total less."""
    better = True
    while better:
        better = False
        for i in range(len(pairs)):
            for j in range(i + 1, len(pairs)):
                (a, b), (x, y) = pairs[i], pairs[j]
                total = c[a][b] + c[x][y]
                for one, two in (((a, x), (b, y)), ((a, y), (b, x))):
                    if c[one[0]][one[1]] + c[two[0]][two[1]] < total * (1 - 1e-12):
                        total = c[one[0]][one[1]] + c[two[0]][two[1]]
                        pairs[i], pairs[j], better = one, two, True
    return pairs


def grouped_order(covariance: Tensor, rotary: int, size: int) -> list[int]:
    """Channels of one head in the order of their groups of `size`; covariance [D, D], of which the first `rotary` channels turn."""
    d, half = len(covariance), rotary // 2
    if size & (size - 1) or size < 2 or d % size:
        raise UnsupportedError(
            f"groups of {size} channels of {d} cannot be made by joining pairs; use codes of 2, 4, 8 or 16 channels"
        )
    units = [[j, j + half] for j in range(half)] + [[j, j + 1] for j in range(rotary, d, 2)]
    damped = covariance + 1e-4 * covariance.diagonal().mean() * torch.eye(d, dtype=covariance.dtype)
    while len(units[0]) < size:
        joined = torch.tensor([[a + b for b in units] for a in units])  # [n, n, 2u]
        logs = torch.linalg.slogdet(damped[joined[..., :, None], joined[..., None, :]]).logabsdet
        cost = (logs / joined.shape[-1]).exp()
        units = [units[a] + units[b] for a, b in matched(cost)]
    return [channel for unit in units for channel in unit]


def grouped_basis(moment: Tensor | None, rows: Tensor, rotary: int, size: int, normed: bool) -> tuple[Tensor, Tensor]:
    """B and its transposed inverse; moment: m, None where all channels weigh alike; rows: keys before RoPE."""
    rows = rows.double()
    w = torch.ones(rows.shape[0], rows.shape[2], dtype=torch.float64) if moment is None else channel_weights(moment)
    z = rows * w[:, None]
    z = z / z.square().mean((0, 2), keepdim=True).sqrt().clamp_min(1e-8) if normed else z
    z = z - z.mean(1, keepdim=True)
    forth = torch.zeros(*w.shape, w.shape[-1], dtype=torch.float64)
    back = torch.zeros_like(forth)
    for head, covariance in enumerate(z.mT @ z / z.shape[1]):
        order = grouped_order(covariance, rotary, size)
        at = torch.arange(len(order))
        forth[head, order, at], back[head, order, at] = w[head, order], 1.0 / w[head, order]
    return forth, back
