"""Figures by position: those of whole windows, and float64 figures of one pass without a cache, bucket by bucket."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from kvsink.errors import EvaluationError
from kvsink.evaluate.evaluation import evaluate
from kvsink.evaluate.positions import Bucket, Sums, doubling
from tests.models import VOCAB, build

TOKENS = 40
EDGES = (0, 7, 8, 24, TOKENS)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCAB, (5, TOKENS), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def pair():
    model, other = build("llama").eval(), build("llama").eval()
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.3)
    return model, other


def one_shot(model, ids):
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits.double(), -1)[:, :-1]


@pytest.mark.parametrize(("chunk", "batch"), [(1, 5), (5, 2), (64, 5)])
def test_buckets_equal_their_definition(pair, ids, chunk, batch):
    model, other = pair
    result = evaluate(other, model, ids, chunk=chunk, batch=batch, edges=EDGES)
    log_p, log_q = one_shot(model, ids), one_shot(other, ids)  # [5, 39, V]
    target = ids[:, 1:, None]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double()
    nll, base = (-x.gather(-1, target)[..., 0] for x in (log_q, log_p))
    assert [(b.start, b.stop) for b in result.positions] == list(itertools.pairwise(EDGES))
    assert [b.tokens for b in result.positions] == [35, 5, 80, 75]
    for b in result.positions:
        at = slice(b.start, b.stop)
        assert b.kl == pytest.approx(kl[:, at].mean().item(), rel=1e-4)
        assert b.top1 == pytest.approx(same[:, at].mean().item())
        assert b.perplexity == pytest.approx(nll[:, at].mean().exp().item(), rel=1e-5)
        assert b.change == pytest.approx((nll - base)[:, at].mean().exp().item() - 1, rel=1e-4)
        for value, bounds in ((b.kl, b.kl_interval), (b.change, b.change_interval), (b.top1, b.top1_interval)):
            assert bounds[0] <= value <= bounds[1]
    assert json.loads(json.dumps(result.to_json()))["positions"][0]["kl"] == result.positions[0].kl


def test_nothing_is_told_apart_unless_asked_for(pair, ids):
    assert evaluate(pair[0], pair[0], ids).positions == ()
    alone = evaluate(pair[0], None, ids, edges=(0, TOKENS)).positions
    assert len(alone) == 1 and alone[0].kl is None and alone[0].perplexity > 1
    one = evaluate(pair[1], pair[0], ids[:1], edges=(0, TOKENS)).positions[0]
    assert one.kl > 0 and one.kl_interval is None  # one window has no spread


def test_edges_double_up_to_the_length():
    assert doubling(8192) == (0, 1024, 2048, 4096, 8192)
    assert doubling(5000) == (0, 1024, 2048, 4096, 5000)
    assert doubling(1024) == (0, 1024) and doubling(100) == (0, 100)
    assert [Bucket(a, b, 1, 1.0).name for a, b in ((0, 1024), (16384, 32768), (4096, 5000))] == ["0-1K", "16-32K", "4096-5000"]


@pytest.mark.parametrize("edges", [(), (0,), (1, 10), (0, 5, 5, 10), (0, 9), (0, 11), (0, 6, 3, 10)])
def test_edges_that_do_not_rise_to_the_length(edges):
    with pytest.raises(EvaluationError, match="must rise from 0 to the 10 tokens"):
        Sums(1, 10, edges)
