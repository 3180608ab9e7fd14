"""A packed cache saved to a file goes on alike, and a file that is not whole, or of another plan, is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvsink.cache.cache import KVSinkCache
from kvsink.errors import KvsinkError, SidecarError
from tests.close import largest_difference
from tests.models import tokens
from tests.rewriter.cache.feeding import close, feed, states


@pytest.mark.parametrize(("saved", "loaded"), [(None, None), (64, None), (None, 64), (64, 48)])
def test_a_saved_cache_goes_on_alike(klt: Any, tmp_path: Path, saved: int | None, loaded: int | None) -> None:
    cache, file = KVSinkCache.for_model(klt, 2, max_length=saved), tmp_path / "cache.safetensors"
    mask = torch.ones(2, 15, dtype=torch.int64)
    mask[1, :4] = 0
    feed(klt, cache, tokens(2, 15, seed=1), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    cache.save(file)
    again = KVSinkCache.load(file, klt, max_length=loaded)
    assert int(again.get_seq_length()) == 15
    full = torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], dim=1)
    one, two = (
        feed(klt, c, tokens(2, 3, seed=2), attention_mask=full, position_ids=(full.cumsum(1) - 1)[:, -3:]) for c in (cache, again)
    )
    assert close(one, two) and (largest_difference(one, two) == 0 or saved != loaded)
    n = slice(18)
    assert largest_difference(states(cache, slots=n), states(again, slots=n)) == 0
    for a, b in zip(cache.packed_layers(), again.packed_layers(), strict=True):
        assert torch.equal(a.exact_slot, b.exact_slot) and torch.equal(a.recent_slot, b.recent_slot)
    with pytest.raises(KvsinkError, match="holds 15 tokens, more than max_length=14"):
        KVSinkCache.load(file, klt, max_length=14)


def test_a_strict_cache_can_be_saved_and_stays_strict(klt: Any, tmp_path: Path) -> None:
    cache, file = KVSinkCache.for_model(klt, strict=True), tmp_path / "cache.safetensors"
    feed(klt, cache, tokens(1, 9))
    cache.save(file)
    again = KVSinkCache.load(file, klt)
    assert all(layer.codec.strict for layer in again.packed_layers())
    assert largest_difference(feed(klt, again, tokens(1, 5, seed=1)), feed(klt, cache, tokens(1, 5, seed=1))) == 0


def test_a_cache_of_another_plan_is_refused(klt: Any, massive: Any, tmp_path: Path) -> None:
    file = tmp_path / "cache.safetensors"
    cache = KVSinkCache.for_model(klt)
    feed(klt, cache, tokens(1, 5))
    cache.save(file)
    with pytest.raises(SidecarError, match="another plan"):
        KVSinkCache.load(file, massive)


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "incomplete"])
def test_a_damaged_cache_file_is_refused(klt: Any, tmp_path: Path, damage: str) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = tmp_path / "cache.safetensors"
    cache = KVSinkCache.for_model(klt)
    feed(klt, cache, tokens(1, 5))
    cache.save(file)
    match damage:
        case "missing":
            file.unlink()
        case "truncated":
            file.write_bytes(file.read_bytes()[:-100])
        case "foreign":
            save_file({"x": torch.zeros(3)}, str(file))
        case "incomplete":
            with safe_open(str(file), framework="pt") as opened:
                meta = opened.metadata()
            tensors = load_file(str(file))
            del tensors["layers.1.v_codes"]
            save_file(tensors, str(file), metadata=meta)
    with pytest.raises(SidecarError, match=str(file)):
        KVSinkCache.load(file, klt)


def test_an_empty_cache_says_that_there_is_nothing_to_save(klt: Any, tmp_path: Path) -> None:
    with pytest.raises(KvsinkError, match="empty"):
        KVSinkCache.for_model(klt).save(tmp_path / "cache.safetensors")
