"""How far a figure can be trusted: 95 % intervals of shares that were counted and of means over windows.

Formula    counted: the p with |k/n - p| <= z sqrt(p (1 - p) / n), z = 1.96
           means:   2.5 % and 97.5 % quantiles over 2,000 draws of as many windows, with replacement
Source     Wilson, "Probable inference, the law of succession, and statistical inference" (1927); Efron, "Bootstrap methods:
           another look at the jackknife" (1979)
Units      those of the figure
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["binomial", "bootstrap"]

Interval = tuple[float, float]
_Z = 1.959963984540054  # both tails hold 5 %


def binomial(right: int, total: int) -> Interval | None:
    """Bounds of a share of which `right` of `total` independent cases were seen; None without a case."""
    if not total:
        return None
    p, s = right / total, _Z * _Z / total
    middle, half = (p + s / 2) / (1 + s), math.sqrt(s * p * (1 - p) + s * s / 4) / (1 + s)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(windows: Tensor, figure: Callable[[Tensor], Tensor] | None = None, draws: int = 2000) -> Interval | None:
    """Bounds of a figure that comes from means over windows; None for fewer than two windows, which tell nothing of a spread.

    windows [N, K]: K sums of each window, all over equally many tokens; figure: [draws, K] of means -> [draws], by default the
    first column. The draws are the same at every call.
    """
    count = len(windows)
    if count < 2:
        return None
    picks = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(0))
    means = windows.double().cpu()[picks].mean(1)  # [draws, K]
    values = means[:, 0] if figure is None else figure(means)
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
