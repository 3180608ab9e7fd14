"""Lloyd-Max levels: symmetric to the last bit, at their fixed point, with the distortions of Max 1960."""

from __future__ import annotations

import math

import pytest
import torch

from kvsink.kernels.levels import distortion, even_levels, even_thresholds, lloyd_max, thresholds

# Max 1960, table I: mean squared error on a unit Gaussian with 2, 4, 8 and 16 levels, as printed there.
KNOWN = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


@pytest.mark.parametrize("bits", range(1, 9))
def test_symmetric_and_ascending(bits: int) -> None:
    levels = lloyd_max(bits)
    assert levels.dtype == torch.float32 and levels.shape == (2**bits,)
    assert torch.equal(levels, -levels.flip(0))
    assert (levels.diff() > 0).all()
    edges = thresholds(bits)
    assert edges.shape == (2**bits - 1,) and edges[len(edges) // 2] == 0
    assert torch.equal(edges, (levels[1:] + levels[:-1]) / 2)


@pytest.mark.parametrize(("bits", "known"), KNOWN.items())
def test_known_distortions(bits: int, known: float) -> None:
    assert abs(distortion(bits) - known) <= known * 5e-4  # four printed digits


def test_distortion_falls_by_at_most_6_db_a_bit() -> None:
    assert distortion(0) == 1.0
    for bits in range(1, 9):
        assert 2.5 < distortion(bits - 1) / distortion(bits) < 4.0


def test_one_bit_is_the_mean_of_half_a_gaussian() -> None:
    assert abs(float(lloyd_max(1)[1]) - math.sqrt(2 / math.pi)) <= 2.0**-24


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_the_means_of_their_cells_and_have_the_stated_error(bits: int) -> None:
    """By integration, independent of how the levels were found."""
    x = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    weight = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (24 / 2_000_000)
    cell = torch.bucketize(x, thresholds(bits).double())
    levels = lloyd_max(bits).double()
    mass, total = (torch.zeros(2**bits, dtype=torch.float64).index_add_(0, cell, w) for w in (weight, weight * x))
    assert (total / mass - levels).abs().max() <= 1e-4  # the outermost cells hold a few thousand points of the grid
    assert abs(float(((x - levels[cell]) ** 2 * weight).sum()) / distortion(bits) - 1) <= 1e-5


@pytest.mark.parametrize("bits", range(1, 9))
def test_equal_steps_are_symmetric_and_of_least_error(bits: int) -> None:
    levels, edges = even_levels(bits).double(), even_thresholds(bits).double()
    step = float(levels[-1] - levels[0]) / (2**bits - 1)
    assert torch.equal(levels, -levels.flip(0)) and (levels.diff() - step).abs().max() <= 1e-6
    assert (edges - (levels[1:] + levels[:-1]) / 2).abs().max() <= 1e-6
    x = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    weight = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (24 / 2_000_000)
    errors = []
    for factor in (0.99, 1.0, 1.01):
        error = (x - factor * levels[torch.bucketize(x, factor * edges)]) ** 2
        errors.append(float((error * weight).sum()))
    assert errors[1] < errors[0] and errors[1] < errors[2]
    assert errors[1] >= distortion(bits) * (1 - 1e-5)
