"""`generate()` hands its cache on to the next call of the same shape, and never one that somebody else can see."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import kvsink
from kvsink.cache.cache import KVSinkCache
from tests.graphs import rewritten
from tests.models import tokens

SETTINGS: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, cache_implementation="static")


@pytest.fixture
def model() -> Any:
    return rewritten("llama", "sdpa", "klt", key_bits=2, value_bits=2, fold=False)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[KVSinkCache]:
    """Numbers of the caches that are made anew; not the caches, which would then have another holder."""
    found: list[Any] = []
    real = KVSinkCache.for_model.__func__  # type: ignore[attr-defined]

    def for_model(cls: Any, *args: Any, **kwargs: Any) -> KVSinkCache:
        found.append(args[1:])
        return real(cls, *args, **kwargs)

    monkeypatch.setattr(KVSinkCache, "for_model", classmethod(for_model))
    return found


def test_the_next_call_takes_it_empty(model: Any, made: list[Any]) -> None:
    long, short = tokens(2, 20), tokens(2, 9)
    model.generate(long, **SETTINGS | {"max_new_tokens": 12})
    again = model.generate(short, **SETTINGS | {"max_new_tokens": 23})  # 32 slots both times
    assert len(made) == 1
    del vars(model)["_kvsink_last_cache"]
    assert torch.equal(model.generate(short, **SETTINGS | {"max_new_tokens": 23}), again) and len(made) == 2


def test_a_cache_that_the_caller_has_stays_the_callers(model: Any, made: list[Any]) -> None:
    held = model.generate(tokens(1, 9), return_dict_in_generate=True, **SETTINGS).past_key_values
    before = {name: t.clone() for name, t in held.tensors().items()}
    model.generate(tokens(1, 9) + 1, **SETTINGS)
    assert len(made) == 2 and all(torch.equal(t, before[name]) for name, t in held.tensors().items())


def test_a_layer_that_the_caller_has_stays_the_callers(model: Any, made: list[Any]) -> None:
    layer = model.generate(tokens(1, 9), return_dict_in_generate=True, **SETTINGS).past_key_values.layers[1]
    before = layer.k_codes.clone()
    model.generate(tokens(1, 9) + 1, **SETTINGS)
    assert len(made) == 2 and torch.equal(layer.k_codes, before)


def test_a_call_inside_a_call_has_its_own(model: Any, made: list[Any]) -> None:
    inner: list[torch.Tensor] = []

    def within(batch: int, ids: torch.Tensor) -> list[int]:
        if not inner:
            inner.append(model.generate(tokens(1, 9) + 1, **SETTINGS))
        return list(range(model.config.vocab_size))

    out = model.generate(tokens(1, 9), prefix_allowed_tokens_fn=within, **SETTINGS)
    assert len(made) == 2
    assert torch.equal(out, model.generate(tokens(1, 9), **SETTINGS))
    assert torch.equal(inner[0], model.generate(tokens(1, 9) + 1, **SETTINGS))


@pytest.mark.parametrize("change", ["rows", "length", "dtype", "rewrite", "inference"])
def test_what_does_not_fit_is_made_anew(model: Any, made: list[Any], change: str) -> None:
    model.generate(tokens(1, 9), **SETTINGS)
    ids, settings = tokens(2 if change == "rows" else 1, 9), dict(SETTINGS)
    if change == "length":
        settings["max_new_tokens"] = 9
    if change == "dtype":
        model.double()
    if change == "rewrite":
        kvsink.rewrite(model, "klt", key_bits=3, value_bits=3, calibration=tokens(2, 64), protect="first:1", fold=False)
    with torch.inference_mode(change == "inference"):
        model.generate(ids, **settings)
    assert len(made) == 2


def test_after_a_call_that_stopped_half_way(model: Any, made: list[Any]) -> None:
    wanted = model.generate(tokens(1, 9), **SETTINGS)
    last, calls = model.model.layers[-1], []

    def stop(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError

    handle = last.register_forward_pre_hook(stop)
    with pytest.raises(MemoryError):
        model.generate(tokens(1, 9) + 1, **SETTINGS)
    handle.remove()
    assert torch.equal(model.generate(tokens(1, 9), **SETTINGS), wanted)


def test_copies_of_a_model_have_none(model: Any) -> None:
    wanted = model.generate(tokens(1, 9), **SETTINGS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not vars(other)["_kvsink_last_cache"].made
        assert torch.equal(other.generate(tokens(1, 9), **SETTINGS), wanted)


def test_a_model_that_is_given_another_plan_lets_it_go(model: Any) -> None:
    from kvsink.model.runtime import detach

    model.generate(tokens(1, 9), **SETTINGS)
    assert "_kvsink_last_cache" in vars(model)
    detach(model)
    assert "_kvsink_last_cache" not in vars(model)


def test_layers_of_other_kinds_are_made_anew(made: list[Any]) -> None:
    sliding = rewritten("gemma3", "sdpa", "klt", key_bits=2, value_bits=2)
    for _ in range(2):
        sliding.generate(tokens(1, 9), **SETTINGS)
    assert len(made) == 2 and "_kvsink_last_cache" not in vars(sliding)
