"""Candidates: by a marked channel one row each, by entries the tokens of the largest entries; padding never counts."""

from __future__ import annotations

import torch

from kvsink.kernels import select_sinks

ONE, NONE = torch.ones(1), torch.zeros(1, dtype=torch.int64)


def test_by_channel_the_largest_rows_in_order() -> None:
    hidden = torch.zeros(1, 5, 4)
    hidden[0, :, 2] = torch.tensor([1.0, -9.0, 3.0, 0.0, -4.0])
    hidden[0, 3, 1] = 100.0  # another channel
    valid = torch.ones(1, 5, dtype=torch.bool)
    score, index = select_sinks(hidden, valid, torch.tensor([2]), ONE, 3, False)
    assert index.tolist() == [[1, 4, 2]] and score.tolist() == [[9.0, 4.0, 3.0]]
    score, index = select_sinks(hidden, valid, torch.tensor([2, 1]), torch.tensor([1.0, 0.1]), 2, False)
    assert index.tolist() == [[3, 1]] and score.tolist() == [[10.0, 9.0]]


def test_by_entries_a_token_may_appear_twice() -> None:
    hidden = torch.zeros(1, 4, 3)
    hidden[0, 2, 0], hidden[0, 2, 1], hidden[0, 1, 2] = 50.0, -40.0, 30.0
    score, index = select_sinks(hidden, torch.ones(1, 4, dtype=torch.bool), NONE, ONE, 3, True)
    assert index.tolist() == [[2, 2, 1]] and score.tolist() == [[50.0, 40.0, 30.0]]


def test_padding_scores_minus_infinity() -> None:
    hidden = torch.full((2, 4, 3), 5.0)
    valid = torch.tensor([[False, False, True, True], [True] * 4])
    for entries in (False, True):
        score, index = select_sinks(hidden, valid, NONE, ONE, 12 if entries else 4, entries)
        finite = score > float("-inf")
        assert set(index[0][finite[0]].tolist()) == {2, 3} and finite[1].all()


def test_fewer_rows_than_asked_for() -> None:
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert select_sinks(torch.randn(1, 2, 3), valid, NONE, ONE, 5, False)[0].shape == (1, 2)
    assert select_sinks(torch.randn(1, 2, 3), valid, NONE, ONE, 50, True)[0].shape == (1, 6)
