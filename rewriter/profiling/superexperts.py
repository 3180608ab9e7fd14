"""Which experts are Super Experts: the published criterion, its robustness, and the layers that form massive activations.

Formula    A = {a[l, e]} over all routed, shared and dense entries; P = 99.5th percentile of A (linear interpolation)
           Super Expert: a > P, a > max A / 10, l in L;  candidate: a > max A / 20, l in L
           L: max |H_l| passes 100 and 1000 · median |H_l|, and either exceeds 3 · max |H_{l-1}| or goes on a climb that began so
           with at least a tenth more; and the next block keeps at least half of it
Source     Super Experts, arXiv 2507.23279 section 3, equation 6 and algorithm 1
Differs    the text gives no number for the test of L: growth, climb and "carried on" are ours, the thresholds are those of
           massive activations (arXiv 2402.17762). The released profiler takes the first three quarters of the layers
           instead, divides with //, and reads the first routed row alone; none of that here. Experts that no token
           reached count with a = 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["PERCENTILE", "Verdict", "forming_layers", "judge", "robustness"]

PERCENTILE, SHARE, CANDIDATE_SHARE = 99.5, 0.1, 0.05
_GROWTH, _CLIMB, _CARRIED = 3.0, 1.1, 0.5
Label = str


@dataclass(frozen=True)
class Verdict:
    """Super Experts and further candidates by falling a, and the thresholds they passed."""

    super_experts: tuple[Label, ...]
    candidates: tuple[Label, ...]
    percentile: float
    largest: float
    entries: int


def forming_layers(largest: Sequence[float], medians: Sequence[float], embedding: float = 0.0) -> tuple[int, ...]:
    """L: blocks that take part in forming massive activations. `embedding` is the largest |H| that enters block 0."""
    out: list[int] = []
    for l in range(len(largest) - 1):
        before = largest[l - 1] if l else embedding
        massive = largest[l] > 100 and largest[l] > 1000 * medians[l]
        rises = largest[l] > _GROWTH * before or (l - 1 in out and largest[l] > _CLIMB * before)
        if massive and rises and largest[l + 1] >= _CARRIED * largest[l]:
            out.append(l)
    return tuple(out)


def judge(a: Mapping[Label, float], layers: Sequence[int], percentile: float = PERCENTILE, share: float = SHARE) -> Verdict:
    """Apply the criterion to a[label] of all entries; labels are `layer:name`."""
    if not a:
        return Verdict((), (), 0.0, 0.0, 0)
    values = torch.tensor(list(a.values()), dtype=torch.float64)
    limit, top = float(torch.quantile(values, percentile / 100)), float(values.max())
    inside = sorted((x for x in a if int(x.partition(":")[0]) in set(layers)), key=lambda x: -a[x])
    found = tuple(x for x in inside if a[x] > limit and a[x] > share * top)
    more = tuple(x for x in inside if x not in found and a[x] > CANDIDATE_SHARE * top)
    return Verdict(found, more, limit, top, len(a))


def robustness(a: Mapping[Label, float], layers: Sequence[int]) -> list[dict[str, float | int]]:
    """How many entries pass for other percentiles and shares of the maximum."""
    return [
        {"percentile": p, "share": s, "count": len(judge(a, layers, p, s).super_experts)}
        for p in (95.0, 99.0, 99.5, 99.9)
        for s in (0.07, 0.08, 0.09, 0.1)
    ]
