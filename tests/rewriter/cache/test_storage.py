"""Storage of a layer: it grows or stays, is cropped and reset, and follows its rows to other batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvsink.cache.cache import KVSinkCache
from kvsink.cache.storage import BLOCK, HELD
from kvsink.errors import KvsinkError
from tests.close import largest_difference
from tests.graphs import rewritten
from tests.models import tokens
from tests.rewriter.cache.feeding import close, feed, states


@pytest.mark.parametrize("max_length", [64, 40])
def test_static_equals_growing(model: Any, max_length: int) -> None:
    chunks = (tokens(2, 9, seed=1), tokens(2, 1, seed=2), tokens(2, 5, seed=3), tokens(2, 1, seed=4))
    growing, static = KVSinkCache.for_model(model), KVSinkCache.for_model(model, 2, max_length=max_length)
    assert close(feed(model, growing, *chunks), feed(model, static, *chunks))
    assert int(growing.get_seq_length()) == int(static.get_seq_length()) == 16
    assert largest_difference(states(growing, slots=slice(16)), states(static, slots=slice(16))) == 0
    assert (growing.get_max_length(), static.get_max_length()) == (-1, max_length)
    assert growing.layers[0].get_mask_sizes(3) == (19, 0) and static.layers[0].get_mask_sizes(3) == (max_length, 0)


def test_growth_keeps_what_is_held(model: Any) -> None:
    prompt, rest = tokens(1, BLOCK - 3, seed=1), tokens(1, 8, seed=2)
    growing, static = KVSinkCache.for_model(model), KVSinkCache.for_model(model, 1, max_length=2 * BLOCK)
    feed(model, growing, prompt)
    before = [t.clone() for t in states(growing)]
    assert growing.packed_layers()[0].k_codes.shape[2] == BLOCK
    one = feed(model, growing, *rest.split(1, dim=1))
    two = feed(model, static, prompt, *rest.split(1, dim=1))[:, -8:]
    assert growing.packed_layers()[0].k_codes.shape[2] == 2 * BLOCK
    assert largest_difference(before, states(growing, slots=slice(BLOCK))) > 0  # the first block filled up
    assert largest_difference([t[..., :-3, :] for t in before], states(growing, slots=slice(BLOCK - 3))) == 0
    assert close(one, two)


def test_layers_share_what_holds_nothing_and_nothing_else(klt: Any) -> None:
    cache = KVSinkCache.for_model(klt, 2, max_length=64)
    one, two = cache.packed_layers()[:2]
    empty = {n for n in HELD if getattr(one, n).numel() == 0}
    assert empty and {n for n in HELD if getattr(one, n) is getattr(two, n)} == empty


@pytest.mark.parametrize("max_length", [None, 64])
def test_reset_is_a_fresh_cache(klt: Any, max_length: int | None) -> None:
    used, fresh = (KVSinkCache.for_model(klt, 2, max_length=max_length) for _ in range(2))
    feed(klt, used, tokens(2, 20, seed=1), tokens(2, 1, seed=2))
    used.reset()
    assert int(used.get_seq_length()) == 0
    chunks = (tokens(2, 6, seed=3), tokens(2, 1, seed=4), tokens(2, 1, seed=5))
    assert largest_difference(feed(klt, used, *chunks), feed(klt, fresh, *chunks)) == 0
    for a, b in zip(used.packed_layers(), fresh.packed_layers(), strict=True):
        assert torch.equal(a.exact_slot, b.exact_slot)


@pytest.mark.parametrize("max_length", [None, 64])
def test_a_crop_forgets_the_tail(model: Any, max_length: int | None) -> None:
    cropped, fresh = (KVSinkCache.for_model(model, 1, max_length=max_length) for _ in range(2))
    head, tail, other = tokens(1, 12, seed=1), tokens(1, 7, seed=2), tokens(1, 5, seed=3)
    feed(model, cropped, head, tail)
    cropped.crop(-7)
    assert int(cropped.get_seq_length()) == 12
    for layer in cropped.packed_layers():
        assert (layer.exact_slot < 12).all() and (layer.exact_score[layer.exact_slot == -1] == float("-inf")).all()
    feed(model, fresh, head)
    assert largest_difference(states(cropped, slots=slice(12)), states(fresh, slots=slice(12))) == 0
    if all(s.source == "first" for layer in fresh.packed_layers() for s in layer.segments):
        one, two = feed(model, cropped, other, other[:, :1]), feed(model, fresh, other, other[:, :1])
        assert largest_difference(one, two) == 0


def test_a_crop_drops_exact_rows_behind_it_and_takes_new_ones(massive: Any) -> None:
    cache = KVSinkCache.for_model(massive, 1, max_length=64)
    feed(massive, cache, tokens(1, 10, seed=1), tokens(1, 30, seed=2))
    before = [layer.exact_slot.clone() for layer in cache.packed_layers()]
    assert any((slot >= 10).any() for slot in before)
    cache.crop(-30)
    assert all((layer.exact_slot < 10).all() for layer in cache.packed_layers())
    feed(massive, cache, tokens(1, 30, seed=3))
    for layer in cache.packed_layers():
        assert (layer.exact_score > float("-inf")).all()  # the free places are taken again
        assert int(layer.exact_slot.max()) < 40


def test_cropped_rows_of_the_window_do_not_come_back() -> None:
    """Slots of the cropped tail are filled with other rows: the window must not answer with the old ones."""
    model = rewritten("llama", "sdpa", "rtn", key_bits=8, value_bits=8, window=6)
    cropped, fresh = (KVSinkCache.for_model(model, 1, max_length=64) for _ in range(2))
    head, tail, other = tokens(1, 12, seed=1), tokens(1, 6, seed=2), tokens(1, 6, seed=3)
    feed(model, cropped, head, tail)
    cropped.crop(-6)
    feed(model, fresh, head)
    for step in other.split((1, 2, 1, 2), dim=1):
        one, two = feed(model, cropped, step), feed(model, fresh, step)
        assert largest_difference(one, two) <= 0.02 * float(two.abs().max())  # rows 6 to 11: 8 bits here, exact there
    for a, b in zip(cropped.packed_layers(), fresh.packed_layers(), strict=True):
        assert torch.equal(a.recent_slot, b.recent_slot)


def test_impossible_crops(klt: Any) -> None:
    cache = KVSinkCache.for_model(klt)
    cache.crop(-3)  # nothing is held yet
    feed(klt, cache, tokens(1, 5))
    cache.crop(0)
    assert int(cache.get_seq_length()) == 5
    with pytest.raises(KvsinkError, match="cannot crop 6 tokens from a cache of 5"):
        cache.crop(-6)
    cache.crop(-5)
    assert int(cache.get_seq_length()) == 0


@pytest.mark.parametrize("max_length", [None, 48])
@pytest.mark.parametrize("way", ["reorder", "repeat", "select", "mask"])
def test_rows_of_a_batch_move_together(klt: Any, way: str, max_length: int | None) -> None:
    prompt, later = tokens(3, 12, seed=1), tokens(6, 3, seed=2)
    pick = {"reorder": [2, 0, 0], "repeat": [0, 0, 1, 1, 2, 2], "select": [2, 1], "mask": [0, 2]}[way]
    n = len(pick)
    moved, fresh = (KVSinkCache.for_model(klt, rows, max_length=max_length) for rows in (3, n))
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, :3] = mask[2, :5] = 0  # positions differ between the rows: they have to move too
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    feed(klt, moved, prompt, attention_mask=mask, position_ids=positions)
    match way:
        case "reorder":
            moved.reorder_cache(torch.tensor(pick))
        case "repeat":
            moved.batch_repeat_interleave(2)
        case "select":
            moved.batch_select_indices(torch.tensor(pick))
        case "mask":
            moved.batch_select_indices(torch.tensor([True, False, True]))
    feed(klt, fresh, prompt[pick], attention_mask=mask[pick], position_ids=positions[pick])
    assert torch.equal(moved.shared.positions, fresh.shared.positions)
    rest = dict(
        attention_mask=torch.cat([mask[pick], torch.ones(n, 3, dtype=torch.int64)], dim=1),
        position_ids=positions[pick][:, -1:] + torch.arange(1, 4),
    )
    one, two = (feed(klt, cache, later[:n], **rest) for cache in (moved, fresh))
    assert close(one, two)
    for a, b in zip(moved.packed_layers(), fresh.packed_layers(), strict=True):
        assert a.batch_size == n and torch.equal(a.exact_slot, b.exact_slot)
