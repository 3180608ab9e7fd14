"""Outliers: the record of a block is what a slow selection over all its rows keeps, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvsink.kernels.sparse import lay_sparse, merge_sparse, record_size
from kvsink.kernels.tokens import touched

N, SLOTS = 8, 40


def selected(x: Tensor, o: Tensor, r: Tensor, valid: Tensor, m: int) -> dict[int, dict[int, float]]:
    """By hand: block → index → value of the entries kept; x [T, C], o and r [1 or T, 1 or C]."""
    t, c = x.shape
    excess = (x.half().float() - o).abs() - r
    out: dict[int, dict[int, float]] = {}
    for block in range(-(-t // N)):
        found = []
        for i in range(block * N, min(t, block * N + N)):
            for j in range(c):
                if valid[i] and excess[i, j] > 0:
                    found.append((-float(excess[i, j]), (i - block * N) * c + j, float(x[i, j].half())))
        out[block] = {index: value for _, index, value in sorted(found)[:m]}
    return out


def run(x: Tensor, o: Tensor, r: Tensor, valid: Tensor, m: int, chunks: list[int]) -> tuple[Tensor, Tensor]:
    """merge_sparse over chunks; x [B, T, C]."""
    b, at = x.shape[0], 0
    value, index = torch.zeros(b, SLOTS // N, m, dtype=torch.float16), torch.full((b, SLOTS // N, m), -1, dtype=torch.int16)
    for n in chunks:
        first, block = touched(torch.tensor(at), n, N)
        slots = (first * N + torch.arange(block.numel() * N)).clamp_max(x.shape[1] - 1)
        spans = (t[:, slots] if t.shape[1] > 1 else t for t in (o, r))
        merge_sparse(value, index, x[:, at : at + n], torch.tensor(at), valid[:, slots], *spans, N)
        at += n
    return value, index


def held(value: Tensor, index: Tensor) -> dict[int, float]:
    return {int(i): float(v) for v, i in zip(value, index, strict=True) if i >= 0}


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=8).filter(lambda c: sum(c) <= SLOTS),
    c=st.integers(1, 6),
    m=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    per_token=st.booleans(),
    ties=st.booleans(),
)
def test_the_record_is_the_selection_at_once(chunks: list[int], c: int, m: int, seed: int, per_token: bool, ties: bool) -> None:
    g, total = torch.Generator().manual_seed(seed), sum(chunks)
    x = 2 * torch.randn(2, total, c, generator=g)
    x = (2 * x).round() / 2 if ties else x
    shape = (2, total, 1) if per_token else (1, 1, c)
    o, r = 0.25 * torch.randn(shape, generator=g), torch.rand(shape, generator=g) + 0.5
    if ties:
        o, r = torch.zeros(shape), torch.ones(shape)
    valid = torch.rand(2, total, generator=g) < 0.8
    m = min(m, N * c)
    value, index = run(x, o, r, valid, m, chunks)
    for row in range(2):
        part = row if per_token else 0
        for block, wanted in selected(x[row], o[part], r[part], valid[row], m).items():
            assert held(value[row, block], index[row, block]) == wanted
    for split in ([total], [1] * total):
        again = run(x, o, r, valid, m, split)
        assert torch.equal(value, again[0]) and torch.equal(index, again[1])


def test_rows_that_are_gone_leave_no_entries() -> None:
    """After a crop new rows stand in the slots: what was recorded there is dropped."""
    x = torch.full((1, 12, 2), 9.0)
    o, r, valid = torch.zeros(1, 1, 2), torch.ones(1, 1, 2), torch.ones(1, 48, dtype=torch.bool)
    value, index = run(x, o, r, valid[:, :12], 4, [12])
    assert held(value[0, 1], index[0, 1]) == {0: 9.0, 1: 9.0, 2: 9.0, 3: 9.0}
    new = torch.tensor([[[0.5, 3.0]]])
    merge_sparse(value, index, new, torch.tensor(9), valid[:, :8], o, r, N)  # cut at 9, one row more
    assert held(value[0, 1], index[0, 1]) == {0: 9.0, 1: 9.0, 3: 3.0}


def test_entries_are_laid_over_their_places_in_any_window() -> None:
    g = torch.Generator().manual_seed(0)
    x, record = torch.randn(2, 3, SLOTS, 4, generator=g), torch.randn(2, SLOTS // N, 5, generator=g).half()
    index = torch.stack([torch.randperm(N * 12, generator=g)[:5] for _ in range(10)]).view(2, 5, 5).to(torch.int16)
    index[0, 2, 1:3] = -1
    wanted = x.clone()
    for b in range(2):
        for block in range(5):
            for v, i in zip(record[b, block], index[b, block].tolist(), strict=True):
                if i >= 0:
                    wanted[b, i % 12 // 4, block * N + i // 12, i % 4] = v
    for start, end in ((0, SLOTS), (3, 5), (7, 17), (8, 16), (39, 40)):
        got = lay_sparse(x[:, :, start:end], record, index, start, N)
        assert torch.equal(got, wanted[:, :, start:end])
    assert not torch.equal(wanted, x)


@pytest.mark.parametrize(("share", "channels", "tokens", "size"), [(0.01, 192, 128, 246), (0.01, 100, 8, 8), (0.001, 32, 8, 1)])
def test_the_size_is_rounded_up(share: float, channels: int, tokens: int, size: int) -> None:
    assert record_size(share, channels, tokens) == size
