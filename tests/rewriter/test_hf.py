"""The way into transformers: which of its private names are used, and that generate() takes the packed cache and no other."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.generation.utils import GenerationMixin
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import kvsink
from kvsink.hf import KvsinkConfig, KvsinkQuantizer, install_generate
from kvsink.model.runtime import runtime_of
from tests.graphs import rewritten
from tests.models import build, tokens

SETTINGS: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)


@pytest.fixture(scope="module")
def model() -> Any:
    return rewritten("llama", "sdpa", "klt", key_bits=2, value_bits=2)


def cache_of(model: Any, **settings: Any) -> Any:
    """The cache that generate() used."""
    return model.generate(tokens(1, 9), return_dict_in_generate=True, **{**SETTINGS, **settings}).past_key_values


def test_the_private_hook_is_what_we_think_it_is() -> None:
    """transformers may change it. The replacement needs nothing private: pass
    past_key_values=kvsink.KVSinkCache.for_model(model) to generate(), and take `install_generate` out of kvsink.hf."""
    parameters = list(inspect.signature(GenerationMixin._prepare_cache_for_generation).parameters)
    assert parameters == ["self", "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"]
    source = inspect.getsource(GenerationMixin._prepare_cache_for_generation)
    assert '"cache"' in source or '"past_key_values"' in source  # since transformers 5.24, and before


def test_the_replacement_works_without_the_hook() -> None:
    model = rewritten("llama", "sdpa", "klt")
    wanted = model.generate(tokens(1, 9), **SETTINGS)
    del model._prepare_cache_for_generation
    given = kvsink.KVSinkCache.for_model(model)
    assert torch.equal(model.generate(tokens(1, 9), past_key_values=given, **SETTINGS), wanted)
    assert int(given.get_seq_length()) == 16


def test_import_registers_the_quantizer() -> None:
    assert AUTO_QUANTIZER_MAPPING["kvsink"] is KvsinkQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["kvsink"] is KvsinkConfig
    record = KvsinkConfig("rotatekv", 2.5).to_dict()
    assert record["quant_method"] == "kvsink" and KvsinkConfig(**record).to_dict() == record
    quantizer = KvsinkQuantizer(KvsinkConfig())
    assert quantizer.is_serializable() and not quantizer.is_trainable and quantizer.is_compileable


def test_generate_makes_a_packed_cache(model: Any) -> None:
    cache = cache_of(model)
    assert isinstance(cache, kvsink.KVSinkCache) and int(cache.get_seq_length()) == 16
    assert len(cache.packed_layers()) == 2 and cache.layers[0].max_length is None
    assert isinstance(cache_of(model, cache_implementation="static"), kvsink.KVSinkCache)


def test_the_packed_cache_makes_a_difference(model: Any) -> None:
    """At 2 bits the logits move: the cache is really used, not merely present."""
    outs = [
        m.generate(tokens(1, 30), return_dict_in_generate=True, output_logits=True, **SETTINGS) for m in (model, build("llama"))
    ]
    assert (outs[0].logits[0] - outs[1].logits[0]).abs().max() <= 1e-5  # the prompt attends to exact rows
    assert (outs[0].logits[1] - outs[1].logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["dynamic", "static", "none"])
def test_a_cache_of_the_caller_is_left_alone(model: Any, kind: str) -> None:
    plain = build("llama")
    wanted = plain.generate(tokens(1, 9), **SETTINGS)
    if kind == "none":
        got = model.generate(tokens(1, 9), use_cache=False, **SETTINGS)
    else:
        given = DynamicCache(config=plain.config) if kind == "dynamic" else StaticCache(config=plain.config, max_cache_len=32)
        got = model.generate(tokens(1, 9), past_key_values=given, **SETTINGS)
        assert int(given.get_seq_length()) == 16
    assert torch.equal(got, wanted)


def test_each_call_gets_its_own_cache(model: Any) -> None:
    one, two = model.generate(tokens(1, 9), **SETTINGS), model.generate(tokens(1, 9), **SETTINGS)
    assert torch.equal(one, two)


def test_installing_twice_is_harmless(model: Any) -> None:
    hook = model._prepare_cache_for_generation
    install_generate(model)
    assert model._prepare_cache_for_generation is hook


def test_a_model_without_a_runtime_generates_as_ever() -> None:
    model = build("llama")
    install_generate(model)
    assert isinstance(cache_of(model), DynamicCache)


def test_an_asked_for_compilation_gets_a_static_cache(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks of 256 slots, so that prompts of nearly the same length share one graph."""
    made: list[tuple[int, int]] = []
    original = kvsink.KVSinkCache.for_model.__func__

    def note(cls: Any, model: Any, batch_size: int = 1, max_length: int | None = None, strict: bool = False) -> Any:
        made.append((batch_size, max_length or 0))
        return original(cls, model, batch_size, max_length, strict)

    monkeypatch.setattr(kvsink.KVSinkCache, "for_model", classmethod(note))
    model.generate(tokens(2, 9), compile_config=CompileConfig(), num_beams=2, **SETTINGS)
    assert made == [(4, 256)]


def test_padding_is_never_kept_exact_without_rope() -> None:
    """GPT-2 tells its attention no positions: the first rows of a padded prompt are still its first tokens."""
    model = rewritten("gpt2", "sdpa", "rtn", key_bits=2, value_bits=2, protect="first:2")
    row = tokens(1, 6, seed=2)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), row], dim=1)
    settings = dict(**SETTINGS, return_dict_in_generate=True)
    alone = model.generate(row, attention_mask=torch.ones_like(row), **settings)
    together = model.generate(padded, attention_mask=(padded != 0).long(), **settings)
    for layer, other in zip(together.past_key_values.packed_layers(), alone.past_key_values.packed_layers(), strict=True):
        assert [s - 4 for s in layer.exact_slot[0].tolist()] == other.exact_slot[0].tolist() == [0, 1]
    assert together.sequences[0, 10:].tolist() == alone.sequences[0, 6:].tolist()


def test_the_runtime_is_found_from_the_model(model: Any) -> None:
    assert runtime_of(model).method == "klt" and runtime_of(model).table_nbytes() > 0
