"""Which rows may stay exact: by their number and by the hidden states of a block."""

from __future__ import annotations

import torch

from kvsink.cache.cache import KVSinkCache
from kvsink.model.candidates import pivot_scores, position_hash
from tests.graphs import rewritten
from tests.models import tokens
from tests.rewriter.codecs.test_anchors import CHUNKS, feed


def test_random_rows_are_the_same_everywhere() -> None:
    model = rewritten("llama", "sdpa", "rtn", protect="random:5")
    wanted = sorted(position_hash(torch.arange(40)).topk(5).indices.tolist())
    for chunks in ((40,), CHUNKS):
        cache = KVSinkCache.for_model(model)
        feed(model, cache, tokens(2, 40, seed=len(chunks)), chunks)
        assert [sorted(r) for layer in cache.packed_layers() for r in layer.exact_slot.tolist()] == [wanted] * 4
    hashes = position_hash(torch.arange(4096))
    assert len(hashes.unique()) > 4090 and 0.48 < float(hashes.mean()) < 0.52
    picks = [set(position_hash(torch.arange(n, n + 400)).topk(100).indices.tolist()) for n in (0, 400)]
    assert 10 < len(picks[0] & picks[1]) < 45  # 25 by chance


def test_pivots_pass_both_thresholds() -> None:
    hidden = torch.ones(2, 6, 8) * 0.1
    hidden[0, 2, 3], hidden[0, 4, 1], hidden[0, 5, 0] = -500.0, 99.0, 101.0
    hidden[1] *= 10  # a median of 1: nothing below 1000 passes
    hidden[1, 1, 1], hidden[1, 2, 2], hidden[1, 0, 0] = 900.0, -1100.0, 1e6
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 0] = False
    passed = pivot_scores(hidden, valid, 100.0, 1000.0)
    assert {tuple(at) for at in (passed > float("-inf")).nonzero().tolist()} == {(0, 2), (0, 5), (1, 2)}
    assert passed[0, 2] == 500.0 and pivot_scores(hidden, None, 100.0, 1000.0)[1, 0] == 1e6
