"""Anchors against a replay with Python lists: who is kept after every chunk, with which rows and which score."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvsink.codecs import Anchors, Codec, SideSpec
from kvsink.kernels import release_, settle_

B, H, D, SLOTS = 2, 1, 4, 64
NAMES = ("exact_k", "exact_v", "exact_slot", "exact_score", "recent_k", "recent_v", "recent_slot", "recent_score")
CODEC = Codec(SideSpec(), SideSpec(), segments=(2,), window=5, anchors=Anchors(ppm=100_000))


class Store:
    """The state of one layer; `feed` does what the cache does around the attention of a chunk."""

    def __init__(self, codec: Codec) -> None:
        layout = codec.layout(B, H, D, D, SLOTS, torch.float32)
        self.codec, self.state = codec, [torch.full(layout[n][0], layout[n][2], dtype=layout[n][1]) for n in NAMES]
        self.length = 0

    def __getattr__(self, name: str) -> Tensor:
        return self.state[NAMES.index(name)]

    def feed(self, k: Tensor, scores: Tensor, valid: Tensor) -> None:
        """Rows k [B, H, S, D] (values -k), and what they and all before them receive, [B, SLOTS]."""
        s, text = k.shape[2], self.codec.text()
        total = torch.tensor(self.length + s)
        release_(s, total, self.state, text)
        slots = torch.arange(self.length, self.length + s)[-self.codec.window :]
        if self.codec.window:
            self.recent_k[:, :, slots % self.codec.window] = k[:, :, -self.codec.window :]
            self.recent_v[:, :, slots % self.codec.window] = -k[:, :, -self.codec.window :]
            self.recent_slot[slots % self.codec.window] = slots.int()
        settle_(k, -k, scores, valid, total, self.state, text)
        self.length += s

    def anchors(self, row: int) -> dict[int, float]:
        slots, scores = self.exact_slot[row, self.codec.exact_rows :], self.exact_score[row, self.codec.exact_rows :]
        return {int(s): float(x) for s, x in zip(slots, scores, strict=True) if s >= 0}


class Replay:
    """The rule in words: a window of recent slots, a score per slot still exact, and a budget."""

    def __init__(self, codec: Codec, valid: Tensor, taken: set[int]) -> None:
        self.codec, self.valid, self.taken = codec, valid, taken
        self.kept: list[int] = []
        self.score: dict[int, float] = {}
        self.length = 0

    def compete(self, leaving: list[int], total: int) -> None:
        a = self.codec.anchors
        pool = self.kept + [s for s in leaving if s >= 0 and self.valid[s] and s not in self.taken]
        rank = {s: self.score[s] / (total - s if a.normalize else 1) for s in pool}
        self.kept = sorted(pool, key=lambda s: -rank[s])[: a.capacity(total)]

    def feed(self, n: int, scores: Tensor) -> None:
        w, first, total = self.codec.window, self.length, self.length + n
        self.compete([s for s in range(first - w, first) if s < total - w], total)
        for s in {*self.kept, *range(max(0, first - w), first)}:
            self.score[s] = self.score.get(s, 0.0) + float(scores[s])
        self.score.update({s: float(scores[s]) for s in range(first, total)})
        self.compete(list(range(first, total - w)), total)
        self.length = total


CODECS = (
    CODEC,
    replace(CODEC, window=0),
    replace(CODEC, segments=()),
    replace(CODEC, anchors=Anchors(rows=3)),
    replace(CODEC, anchors=Anchors(ppm=200_000, normalize=True)),
)


@pytest.mark.parametrize("chunks", [(40,), (3, 20, 1, 1, 1, 9, 1, 4), (1,) * 30, (5, 5, 6, 6)])
@pytest.mark.parametrize("codec", CODECS, ids=lambda c: f"w{c.window}-{c.segments}-{c.anchors}")
def test_the_replay_keeps_the_same_rows(codec: Codec, chunks: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(3)
    length = sum(chunks)
    k = torch.randn(B, H, length, D, generator=g)
    valid = torch.ones(B, length, dtype=torch.bool)
    valid[1, :4] = False
    store = Store(codec)
    taken = {6} if codec.segments else set()
    if codec.segments:
        store.exact_slot[:, 0] = 6  # a protection segment holds it
    replays = [Replay(codec, valid[b], taken) for b in range(B)]
    at = 0
    for n in chunks:
        scores = torch.rand(B, SLOTS, generator=g)
        scores[:, 9] += 5.0  # everybody looks at row 9
        scores[:, at + n :] = 0
        store.feed(k[:, :, at : at + n], scores, valid[:, at : at + n])
        at += n
        for b, replay in enumerate(replays):
            replay.feed(n, scores[b])
            held = store.anchors(b)
            assert set(held) == set(replay.kept)
            assert held == pytest.approx({s: replay.score[s] for s in replay.kept}, rel=1e-5)
    for b in range(B):
        held = store.anchors(b)
        assert 9 in held and not taken & held.keys() and not (b == 1 and held.keys() & {0, 1, 2, 3})
        for place, slot in enumerate(store.exact_slot[b, codec.exact_rows :].tolist(), start=codec.exact_rows):
            if slot >= 0:
                assert torch.equal(store.exact_k[b, :, place], k[b, :, slot])
                assert torch.equal(store.exact_v[b, :, place], -k[b, :, slot])


def test_the_budget_grows_with_the_tokens() -> None:
    store, sizes = Store(CODEC), []
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        k = torch.randn(B, H, 1, D, generator=g)
        store.feed(k, torch.rand(B, SLOTS, generator=g), torch.ones(B, 1, dtype=torch.bool))
        sizes.append(len(store.anchors(0)))
    budgets = [-(-t // 10) for t in range(1, 31)]
    assert sizes == [min(b, max(0, t - 5)) for t, b in enumerate(budgets, start=1)]
    assert store.exact_slot.shape[1] == 2 + 7  # ceil(10 % of 64)


def test_a_row_that_lost_is_not_restored() -> None:
    """Row 0 leaves with little, then receives everything; a row with less takes its place for good."""
    codec = replace(CODEC, anchors=Anchors(rows=1), window=1, segments=())
    store = Store(codec)
    for at in range(6):
        scores = torch.zeros(B, SLOTS)
        scores[:, 1] = 0.5
        scores[:, 0] = 0.1 if at < 3 else 100.0
        store.feed(torch.ones(B, H, 1, D), scores, torch.ones(B, 1, dtype=torch.bool))
    assert list(store.anchors(0)) == [1]
