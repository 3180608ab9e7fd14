"""Appending: rows land in their slots as the codec codes them, and the running selection equals a selection at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvsink.kernels import append_
from kvsink.kernels.append import append_ref
from kvsink.kernels.selection import merge_exact
from tests.states import CODECS, SLOTS, append_arguments, filled, layer_of, rows

IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options)}" for name, options in CODECS]


def select(
    scores: Tensor, k: Tensor, chunks: list[int], segments: tuple[int, ...], width: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run merge_exact over chunks; scores [segments, B, T], k [B, H, T, D], the values are -k."""
    b, h, _, d = k.shape
    total = sum(segments)
    slot, best = torch.full((b, total), -1, dtype=torch.int32), torch.full((b, total), float("-inf"))
    held = torch.zeros(b, h, total, d), torch.zeros(b, h, total, d)
    at = 0
    for n in chunks:
        candidates: list[Tensor] = []
        for segment, count in enumerate(segments):
            candidates += scores[segment, :, at : at + n].topk(min(width or count, n), dim=1)
        chunk = k[:, :, at : at + n], -k[:, :, at : at + n]
        slot, best, *held = merge_exact(slot, best, tuple(held), chunk, candidates, segments, torch.tensor(at))
        at += n
    return slot, best, held[0], held[1]


@settings(max_examples=80, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    segments=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 2**31),
    hidden=st.floats(0, 1),
)
def test_the_running_selection_is_the_selection_at_once(
    chunks: list[int], segments: tuple[int, ...], seed: int, hidden: float
) -> None:
    g, total = torch.Generator().manual_seed(seed), sum(chunks)
    scores = torch.randn(len(segments), 2, total, generator=g)
    scores = scores.masked_fill(torch.rand(scores.shape, generator=g) < hidden, float("-inf"))
    k = torch.randn(2, 3, total, 4, generator=g)
    slot, best, exact_k, exact_v = select(scores, k, chunks, segments)
    at, wanted = 0, [set(), set()]
    for segment, count in enumerate(segments):
        for row in range(2):
            top = scores[segment, row].topk(min(count, total))
            wanted[row] |= {int(i) for v, i in zip(*top, strict=True) if v > float("-inf")}
            held = best[row, at : at + count]
            assert held[held > float("-inf")].tolist() == [v for v in top.values.tolist() if v > float("-inf")]
        at += count
    for row in range(2):
        named = [int(s) for s in slot[row] if s >= 0]
        assert len(named) == len(set(named))  # held once
        assert set(named) == wanted[row]
        for place, s in enumerate(slot[row].tolist()):
            if s >= 0:
                assert torch.equal(exact_k[row, :, place], k[row, :, s])
                assert torch.equal(exact_v[row, :, place], -k[row, :, s])
    assert (slot[best == float("-inf")] == -1).all()  # nothing that no one asked for is ever held


def test_a_row_named_twice_is_held_once_and_the_other_place_remembers_it() -> None:
    scores = torch.tensor([[[3.0, 2.0, 1.0]], [[9.0, 1.0, 2.0]]])
    k = torch.randn(1, 1, 3, 4)
    slot, best, *_ = select(scores, k, [3], (1, 2))
    assert slot.tolist() == [[0, -2, 2]]  # place 1 wants slot 0 too and is marked -(0 + 2)
    assert best.tolist() == [[3.0, 9.0, 2.0]]
    later = torch.cat([scores, torch.tensor([[[5.0]], [[0.0]]])], dim=2)
    slot, _, exact_k, _ = select(later, torch.cat([k, torch.ones(1, 1, 1, 4)], 2), [3, 1], (1, 2))
    assert slot.tolist() == [[3, 0, 2]]  # slot 0 lost the first place and lives on in the second
    assert torch.equal(exact_k[0, :, 1], k[0, :, 0])


def test_one_candidate_repeated_inside_a_segment_is_held_once() -> None:
    """The entries of one token may fill several places of `massive`."""
    slot, best = torch.full((1, 3), -1, dtype=torch.int32), torch.full((1, 3), float("-inf"))
    empty = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
    chunk = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    pair = [torch.tensor([[9.0, 8.0, 7.0]]), torch.tensor([[4, 4, 1]])]
    slot, *_ = merge_exact(slot, best, empty, chunk, pair, (3,), torch.tensor(10))
    assert slot.tolist() == [[14, -16, 11]]


@pytest.mark.parametrize(("method", "options"), CODECS, ids=IDS)
def test_state_after_appending(method: str, options: tuple) -> None:
    layer, k, v = filled(method, options, batch=2, lengths=(11, 1, 7))
    c, p = layer.codec, dict(zip(layer.codec.param_names(), layer.params, strict=True))
    total = k.shape[2]
    assert int(layer.length) == 12  # the last chunk is the caller's to count
    positions = torch.arange(total)[None]
    cos, sin = layer.shared.runtime.angles(1, positions)
    for codes, scale, wanted in (
        (layer.k_codes, layer.k_scale, c.encode_keys(k, cos, sin, positions, p, True)),
        (layer.v_codes, layer.v_scale, c.encode_values(v, p)),
    ):
        assert (codes[:, :, :total] != wanted[0]).float().mean() <= 0.001  # one matmul or several: ties only
        assert torch.allclose(scale[:, :, : wanted[1].shape[2]].float(), wanted[1].float(), rtol=2.0**-10, atol=1e-6)
        assert (codes[:, :, total:] == 0).all()
    assert layer.shared.positions[:, :total].tolist() == [list(range(total))] * 2
    if c.ring:
        kept = range(total - c.ring, total)
        assert sorted(layer.recent_slot.tolist()) == list(kept)
        for slot in kept:
            assert torch.equal(layer.recent_k[:, :, slot % c.ring], k[:, :, slot])
            assert torch.equal(layer.recent_v[:, :, slot % c.ring], v[:, :, slot])
    for row in range(2):
        for place, slot in enumerate(layer.exact_slot[row].tolist()):
            if slot >= 0:
                assert torch.equal(layer.exact_k[row, :, place], k[row, :, slot])
                assert torch.equal(layer.exact_v[row, :, place], v[row, :, slot])
    assert (layer.exact_slot >= 0).any() or not c.exact_rows


@pytest.mark.parametrize(("method", "options"), CODECS, ids=IDS)
def test_the_op_is_its_reference(method: str, options: tuple) -> None:
    one, two = layer_of(method, options, 2), layer_of(method, options, 2)
    k, v = rows(2, 9, seed=3)
    append_(**append_arguments(one, k, v))
    append_ref(**append_arguments(two, k, v))
    for left, right in zip(one.state(), two.state(), strict=True):
        assert torch.equal(left, right)


def test_rows_that_do_not_fit_are_an_index_error() -> None:
    layer = layer_of("rtn")
    layer.length.fill_(SLOTS - 2)
    k, v = rows(1, 3)
    with pytest.raises(IndexError):
        append_(**append_arguments(layer, k, v))
