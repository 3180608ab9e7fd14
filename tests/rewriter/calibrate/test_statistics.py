"""Statistics of shards: merging is a sum."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsink.calibrate.statistics import KeyStats, ValueStats

FLOAT32_SUMS = 1e-5
"""Sums of products taken in float32 and added in float64, relative to the largest."""


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


def test_merging_is_a_sum() -> None:
    g = torch.Generator().manual_seed(0)
    keys, keep = torch.randn(2, 2, 9, 8, generator=g), torch.rand(2, 9, generator=g) < 0.7
    angle = torch.rand(4, 8, generator=g)
    whole, parts = KeyStats.empty(4, 2, 8), [KeyStats.empty(4, 2, 8) for _ in range(2)]
    positions = torch.arange(9).expand(2, 9)
    whole.add(keys, positions, keep, angle.cos(), angle.sin())
    for row, part in enumerate(parts):
        part.add(keys[row : row + 1], positions[:1], keep[row : row + 1], angle.cos(), angle.sin())
    parts[0].merge(parts[1])
    assert torch.equal(parts[0].count, whole.count) and float(whole.count.sum()) == float(keep.sum())
    assert relative(parts[0].first, whole.first) <= 1e-12 and relative(parts[0].second, whole.second) <= FLOAT32_SUMS
    values = ValueStats.empty(2, 8)
    values.add(keys, keep)
    assert relative(values.total, keys.transpose(1, 2)[keep].double().sum(0)) <= 1e-12
