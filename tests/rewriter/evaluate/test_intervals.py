"""Intervals against what defines them: the binomial's own bounds, and the spread of a mean."""

from __future__ import annotations

import math

import pytest
import torch

from kvsink.evaluate.intervals import binomial, bootstrap


@pytest.mark.parametrize(("right", "total"), [(1, 5), (5, 10), (29, 30), (480, 500)])
def test_a_share_stands_z_deviations_from_its_bounds(right, total):
    share = right / total
    for bound in binomial(right, total):
        assert abs(share - bound) == pytest.approx(1.959963984540054 * math.sqrt(bound * (1 - bound) / total), rel=1e-9)


def test_shares_of_all_and_of_none():
    low, high = binomial(10, 10)
    assert (high, low) == pytest.approx((1, 1 / (1 + 1.959963984540054**2 / 10)))
    assert binomial(0, 10) == pytest.approx((0, 1 - low), abs=1e-12)
    assert binomial(0, 0) is None


def test_published_example():
    """81 of 263 (Newcombe, Statistics in Medicine 17 (1998), table I): 0.2553 to 0.3662."""
    assert binomial(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_the_bootstrap_of_a_mean_is_its_standard_error():
    values = torch.randn(400, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = bootstrap(values)
    error = (values.std(correction=0) / math.sqrt(400)).item()
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.08)  # 2,000 draws: a quantile's own error is 3 %
    assert (high + low) / 2 == pytest.approx(values.mean().item(), abs=0.3 * error)


def test_windows_stay_together_when_a_ratio_is_drawn():
    sums = torch.tensor([[1.0, 2.0], [10.0, 20.0], [3.0, 6.0]])
    assert bootstrap(sums, lambda m: m[:, 0] / m[:, 1]) == (0.5, 0.5)


def test_one_window_says_nothing():
    assert bootstrap(torch.ones(1, 1)) is None
    assert bootstrap(torch.ones(2, 1)) == (1, 1)
