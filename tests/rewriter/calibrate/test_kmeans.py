"""Weighted k-means: planted centres are found, the objective never rises, weights pull, no cluster stays empty."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvsink.calibrate import kmeans
from kvsink.calibrate.kmeans import assign, weighted_kmeans


def clusters(groups: int, k: int, c: int, each: int = 30, spread: float = 0.01) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(k * c)
    centres = torch.randn(groups, k, c, generator=g) * 5
    rows = centres.repeat_interleave(each, dim=1)
    rows = rows + spread * torch.randn(rows.shape, generator=g)
    return centres, rows[:, torch.randperm(k * each, generator=g)]


@pytest.mark.parametrize(("k", "c"), [(8, 4), (16, 2), (5, 1), (32, 8)])
def test_planted_centres_are_found(k: int, c: int) -> None:
    if c == 1:
        centres = torch.arange(3 * k, dtype=torch.float32).reshape(3, k, 1) * 2
        rows = centres.repeat_interleave(30, 1) + 0.01 * torch.randn(3, 30 * k, 1, generator=torch.Generator().manual_seed(0))
    else:
        centres, rows = clusters(3, k, c)
    runs = [weighted_kmeans(rows, None, k, seed=s) for s in range(6)]
    best = min(runs, key=lambda r: r.objective[-1])
    _, apart = assign(centres, best.centroids)
    assert float(apart.max()) < 0.01**2  # of each planted centre to the nearest found one: 30 rows of deviation 0.01
    assert best.objective[-1] <= 1.1 * c * 0.01**2


@settings(max_examples=25, deadline=None)
@given(groups=st.integers(1, 3), k=st.integers(1, 40), c=st.integers(1, 6), seed=st.integers(0, 2**31), weighted=st.booleans())
def test_the_objective_never_rises(groups: int, k: int, c: int, seed: int, weighted: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 80, c, generator=g)
    w = torch.rand(groups, 80, generator=g) ** 4 * (torch.rand(groups, 80, generator=g) < 0.8) if weighted else None
    out = weighted_kmeans(x, w, k, steps=30, tolerance=0.0, seed=seed)
    assert all(b <= a * (1 + 1e-5) + 1e-9 for a, b in zip(out.objective, out.objective[1:], strict=False)), out.objective
    wide = torch.ones(groups, 80) if w is None else w / w.mean(-1, keepdim=True)
    direct = (wide * torch.cdist(x.double(), out.centroids.double()).amin(-1).square()).mean()
    assert abs(float(direct) - out.objective[-1]) <= 1e-4 * out.objective[0] + 1e-6


def test_centroids_are_weighted_means() -> None:
    x = torch.randn(2, 200, 3, generator=torch.Generator().manual_seed(0))
    w = torch.rand(2, 200, generator=torch.Generator().manual_seed(1))
    out = weighted_kmeans(x, w, 6, tolerance=0.0, steps=200)
    index, _ = assign(x, out.centroids)
    for group in range(2):
        for k in range(6):
            inside = index[group] == k
            mean = (w[group, inside, None] * x[group, inside]).sum(0) / w[group, inside].sum()
            assert (mean - out.centroids[group, k]).abs().max() < 1e-4


def test_weights_pull() -> None:
    """Two tight clouds and one centroid: it lies where the weight is; without weights it lies between."""
    x = torch.cat([torch.zeros(1, 50, 2), torch.ones(1, 50, 2)], dim=1)
    w = torch.cat([torch.full((1, 50), 99.0), torch.ones(1, 50)], dim=1)
    assert abs(float(weighted_kmeans(x, w, 1).centroids.mean()) - 0.01) < 1e-6
    assert abs(float(weighted_kmeans(x, None, 1).centroids.mean()) - 0.5) < 1e-6


def test_no_cluster_stays_empty() -> None:
    """Seeds that all stand on one point: the others move to the rows that are worst served."""
    x = torch.cat([torch.zeros(1, 90, 1), torch.tensor([[[10.0], [20.0], [30.0]]]).repeat(1, 2, 1)], dim=1)
    out = weighted_kmeans(x, None, 4, tolerance=0.0)
    assert out.centroids.flatten().sort().values.tolist() == [0.0, 10.0, 20.0, 30.0] and out.objective[-1] == 0.0


@pytest.mark.parametrize("chunk", [1, 1000])
def test_chunks_do_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(3, 50, 4, generator=g), torch.randn(3, 9, 4, generator=g)
    monkeypatch.setitem(kmeans._CHUNK, "cpu", chunk)
    index, distance = assign(x, c)
    wanted = torch.cdist(x.double(), c.double())
    assert torch.equal(index, wanted.argmin(-1))
    assert (distance - wanted.amin(-1).square()).abs().max() < 1e-5


def test_seeds_and_refusals() -> None:
    x = torch.randn(2, 300, 2, generator=torch.Generator().manual_seed(0))
    one, two, other = (weighted_kmeans(x, None, 130, steps=3, seed=s).centroids for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
    with pytest.raises(ValueError, match="300 rows are fewer than 301 clusters; give at least 301"):
        weighted_kmeans(x, None, 301)
