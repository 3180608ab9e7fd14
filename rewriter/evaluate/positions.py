"""What an evaluation found, told apart by position: how much of a context lies before a token that is predicted.

Formula    position of a prediction = index of the token whose logits are taken, so many tokens stand before it
           per bucket: perplexity, KL and same top token as over whole windows (`kvsink.evaluate.evaluation`)
Shapes     values of a chunk [rows, C]; sums [N, buckets] in float64
Units      KL in nats; intervals of 95 % by draws of whole windows, None where there is one window
Raises     EvaluationError for edges that do not rise from 0 to the length of a window
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kvsink.errors import EvaluationError
from kvsink.evaluate.intervals import Interval, bootstrap

__all__ = ["Bucket", "Sums", "doubling"]


@dataclass(frozen=True)
class Bucket:
    """Predictions at positions start .. stop - 1 of every window; what needs a reference is None without one."""

    start: int
    stop: int
    tokens: int
    perplexity: float
    baseline_perplexity: float | None = None
    change: float | None = None  # of the perplexity, relative
    change_interval: Interval | None = None
    kl: float | None = None
    kl_interval: Interval | None = None
    top1: float | None = None
    top1_interval: Interval | None = None

    @property
    def name(self) -> str:
        """Its range in thousands of 1,024 where both ends are whole, else in tokens: 0-1K, 1024-1500."""
        whole = not self.start % 1024 and not self.stop % 1024
        return f"{self.start // 1024}-{self.stop // 1024}K" if whole else f"{self.start}-{self.stop}"


def doubling(length: int, first: int = 1024) -> tuple[int, ...]:
    """Edges 0, first, 2 first, 4 first, ... up to `length`, where the last bucket ends."""
    edges = [0]
    while first < length:
        edges.append(first)
        first *= 2
    return (*edges, length)


class Sums:
    """Sums over the predictions of every window and bucket, by name."""

    def __init__(self, windows: int, length: int, edges: Sequence[int] | None = None) -> None:
        self.edges = (0, length) if edges is None else tuple(edges)
        if list(self.edges) != sorted({0, *self.edges, length}) or self.edges[-1] != length:
            raise EvaluationError(f"edges must rise from 0 to the {length} tokens of a window, not {list(self.edges)}")
        self._inner = torch.tensor(self.edges[1:-1], dtype=torch.int64)
        self._shape = windows, len(self.edges) - 1
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, rows: slice, start: int, values: Tensor) -> None:
        """Values [rows, C] of the predictions at positions start, start + 1, ... of these windows."""
        at = torch.bucketize(torch.arange(start, start + values.shape[1]), self._inner, right=True)
        table = self._sums.setdefault(name, torch.zeros(self._shape, dtype=torch.float64))
        table[rows].index_add_(1, at, values.cpu().double())

    def of_window(self, name: str) -> Tensor:
        """[N]: the sum over all buckets; zeros where nothing was added."""
        return self._sums.get(name, torch.zeros(self._shape, dtype=torch.float64)).sum(1)

    def buckets(self, compared: bool) -> tuple[Bucket, ...]:
        """Every bucket that predictions fell into; compared: there was a reference."""
        found = []
        for i, (start, stop) in enumerate(pairwise(self.edges)):
            each = min(stop, self.edges[-1] - 1) - start  # in every window; its last token predicts nothing
            if not each:
                continue
            names = ("nll", "base_nll", "kl", "agree") if compared else ("nll",)
            means = torch.stack([self._sums[name][:, i] / each for name in names], 1)  # [N, 1 or 4]
            tokens = each * len(means)
            nll, *rest = means.mean(0).tolist()
            bucket = Bucket(start, stop, tokens, math.exp(nll))
            if compared:
                base, kl, top1 = rest
                bucket = replace(
                    bucket,
                    baseline_perplexity=math.exp(base),
                    change=math.exp(nll - base) - 1,
                    change_interval=bootstrap(means, lambda m: torch.exp(m[:, 0] - m[:, 1]) - 1),
                    kl=max(0.0, kl),
                    kl_interval=bootstrap(means[:, 2:3]),
                    top1=top1,
                    top1_interval=bootstrap(means[:, 3:4]),
                )
            found.append(bucket)
        return tuple(found)
