"""The attention each row receives: the tiles against a loop over queries, one chunk against many."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from kvsink.kernels import observe as op
from kvsink.kernels.observe import observe_ref
from tests.close import FUSED_FLOAT32, largest_difference

SCORES = ("mass", "qnorm", "exact")
B, HQ, H, D, SCALE = 2, 4, 2, 8, 0.3


def inputs(length: int, padding: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """One sequence of `length` tokens; the second row of the batch begins with `padding` padded ones."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, h, length, D, generator=g) for h in (HQ, H, H))
    valid = torch.ones(B, length, dtype=torch.bool)
    valid[1, :padding] = False
    mask = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, None, :]
    k_all, v_all = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    logits = (q @ k_all.mT * SCALE).masked_fill(~mask, -torch.inf)
    return dict(q=q, k=k, v=v, out=logits.softmax(-1).nan_to_num() @ v_all, mask=mask, valid=valid)


def by_hand(x: dict[str, Tensor], score: str) -> Tensor:
    """One query, head and batch row at a time, in float64."""
    out = torch.zeros(B, x["k"].shape[2], dtype=torch.float64)
    for b in range(B):
        for head in range(HQ):
            for i in range(x["q"].shape[2]):
                if not x["valid"][b, i]:
                    continue
                q, k, v = x["q"][b, head, i].double(), x["k"][b, head // 2].double(), x["v"][b, head // 2].double()
                seen = x["mask"][b, 0, i]
                a = torch.zeros(len(seen), dtype=torch.float64)
                a[seen] = (k[seen] @ q * SCALE).softmax(0)
                if score != "mass":
                    a = a * q.norm()
                if score == "exact":
                    a = a * (v - x["out"][b, head, i].double()).abs().sum(-1) * SCALE
                out[b] += a
    return out


def run(x: dict[str, Tensor], score: str, rows: slice = slice(None), causal: bool = False) -> Tensor:
    end = x["q"][:, :, rows].shape[2] + (rows.start or 0)
    return op(
        x["q"][:, :, rows],
        x["k"],
        x["v"],
        x["out"][:, :, rows],
        None if causal else x["mask"][:, :, rows],
        torch.tensor(rows.start or 0),
        x["valid"][:, rows],
        SCALE,
        score,
    )[:, :end]


@pytest.fixture(params=["matrix", "tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "tiles":
        for name, value in (("_SMALL", 0), ("TILE", 5), ("_NARROW", 3)):
            monkeypatch.setattr(sys.modules[observe_ref.__module__], name, value)
    return request.param


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("padding", [0, 4])
def test_it_is_the_sum_over_queries(way: str, score: str, padding: int) -> None:
    x = inputs(13, padding)
    wanted = by_hand(x, score)
    assert largest_difference(run(x, score), wanted) <= FUSED_FLOAT32 * float(wanted.max())
    assert (run(x, score)[1, :padding] == 0).all()


@pytest.mark.parametrize("score", SCORES)
def test_padding_behind_a_sequence_gives_nothing(way: str, score: str) -> None:
    """Padded queries on the right see the whole sequence, unlike those on the left, and count for nothing all the same."""
    x = inputs(13)
    x["valid"][0, 10:] = False
    wanted = by_hand(x, score)
    assert largest_difference(run(x, score), wanted) <= FUSED_FLOAT32 * float(wanted.max())


@pytest.mark.parametrize("score", SCORES)
def test_without_a_mask_queries_look_back(way: str, score: str) -> None:
    x = inputs(13)
    assert largest_difference(run(x, score, causal=True), run(x, score)) <= FUSED_FLOAT32 * 13 * HQ


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("causal", [False, True])
def test_chunks_add_up(way: str, score: str, causal: bool) -> None:
    x = inputs(13, 0 if causal else 4)
    total, at = torch.zeros(B, 13), 0
    for n in (6, 1, 1, 5):
        part = run(x, score, slice(at, at + n), causal)
        total[:, : part.shape[1]] += part
        at += n
    assert largest_difference(total, run(x, score, causal=causal)) <= FUSED_FLOAT32 * float(total.max())


def test_mass_sums_to_the_number_of_queries(way: str) -> None:
    x = inputs(11, 3)
    assert torch.allclose(run(x, "mass").sum(1), torch.tensor([11.0 * HQ, 8.0 * HQ]), rtol=FUSED_FLOAT32)


def test_slots_beyond_the_chunk_get_nothing(way: str) -> None:
    x = inputs(13)
    a = dict(out=x["out"][:, :, :4], mask=None, first=torch.tensor(5), valid=None, scale=SCALE, score="mass")
    got = op(x["q"][:, :, :4], x["k"], x["v"], **a)
    assert (got[:, 9:] == 0).all() and (got[:, :9] > 0).all()
    ragged = torch.ones(B, 1, 4, 13, dtype=torch.bool)  # a mask that hides nothing
    assert (op(x["q"][:, :, :4], x["k"], x["v"], **{**a, "mask": ragged})[:, 9:] == 0).all()
    assert (observe_ref(x["q"][:, :, :4], x["k"], x["v"], **{**a, "mask": ragged})[:, 9:] == 0).all()
