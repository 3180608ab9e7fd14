"""What is left with a tensor: found by that tensor alone, and gone with it, with what it speaks of."""

from __future__ import annotations

import copy
import gc
from weakref import ref

import torch

import kvsink
from kvsink.model.attention import ASKED
from kvsink.model.handover import Handover
from kvsink.model.passing import given_cache
from tests.graphs import rewritten
from tests.models import tokens


def test_what_is_left_is_found_by_the_very_tensor_alone() -> None:
    left: Handover[str] = Handover()
    one, equal = torch.zeros(2, 3), torch.zeros(2, 3)
    left.leave(one, "one")
    assert left.found(one) == "one" and left.found(None) is None
    for other in (equal, one.view_as(one), one[:], one.clone(), one.to(torch.float64), one.detach(), copy.deepcopy(one)):
        assert left.found(other) is None
    left.leave(equal, "equal")
    assert (left.found(one), left.found(equal)) == ("one", "equal")
    left.leave(one, "anew")
    assert left.found(one) == "anew" and len(left) == 2
    assert Handover[str]().found(one) is None  # another kind of thing


def test_what_is_left_goes_with_its_tensor() -> None:
    left: Handover[set[int]] = Handover()
    one, what = torch.zeros(2), {1}
    left.leave(one, what)
    gone = ref(what)
    del one, what
    gc.collect()
    assert gone() is None and len(left) == 0


def test_a_cache_leaves_nothing_behind() -> None:
    """Every layer says with its keys that it attends itself; neither keys nor layers outlive the pass and the cache."""
    model = rewritten("llama", "sdpa", "rtn")
    before = len(ASKED)
    cache = kvsink.KVSinkCache.for_model(model)
    with torch.no_grad():
        for seed in range(3):
            model(tokens(1, 5, seed=seed), **given_cache(model, cache))
    assert len(ASKED) <= before + len(cache.layers)  # the first keys of a layer, of which it keeps an empty view
    gone = [ref(layer) for layer in cache.layers]
    del cache
    gc.collect()
    assert not any(layer() is not None for layer in gone) and len(ASKED) == before
