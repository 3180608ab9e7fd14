"""Layers with a recurrent state beside keys and values: states as transformers holds them; what they cannot do is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvsink
from kvsink.cache.hybrid import KVSinkHybridLayer, states_of
from kvsink.errors import KvsinkError
from kvsink.model.passing import given_cache
from kvsink.tools.tiny_models import build_family
from tests.models import tokens


@pytest.fixture(scope="module")
def model() -> Any:
    made = build_family("falcon-h1")
    kvsink.rewrite(made, "rtn", key_bits=8, value_bits=8, calibration=tokens(4, 32, seed=1))
    return made


def test_states_are_held_as_transformers_holds_them(model: Any) -> None:
    ids = tokens(1, 9, seed=2)
    packed, plain = kvsink.KVSinkCache.for_model(model), DynamicCache(config=model.config)
    with torch.no_grad():
        for cache in (packed, plain):
            model(ids, use_cache=True, **given_cache(model, cache))
    for i, (ours, theirs) in enumerate(zip(packed.layers, plain.layers, strict=True)):
        assert isinstance(ours, KVSinkHybridLayer)
        assert states_of(model.config, i).get("number_of_states", 1) == getattr(theirs, "number_of_states", 1)
        held = {n: t for n, t in vars(theirs).items() if n.endswith("_states")}
        assert held
        for name, state in held.items():
            mine = getattr(ours, name)
            pairs = zip(state, mine, strict=True) if isinstance(state, list) else [(state, mine)]
            assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor)), name


@pytest.mark.parametrize(("way", "argument"), [("batch_repeat_interleave", 2), ("batch_select_indices", torch.tensor([0]))])
def test_what_a_state_cannot_do_is_refused(model: Any, way: str, argument: Any) -> None:
    cache = kvsink.KVSinkCache.for_model(model)
    with torch.no_grad():
        model(tokens(1, 4, seed=3), use_cache=True, **given_cache(model, cache))
    with pytest.raises(KvsinkError, match="layer 0 holds a recurrent state, which transformers does not"):
        getattr(cache, way)(argument)
