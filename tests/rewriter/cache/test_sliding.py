"""Layers that see a bounded number of tokens: packed when asked, suggested where they hold a large share, named by their window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import DynamicCache

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.errors import KvsinkError
from kvsink.model.passing import given_cache
from kvsink.tools.tiny_models import build_family
from tests.graphs import rewritten
from tests.models import LAYERS, build, tokens
from tests.rewriter.cache.feeding import close, feed

ids = tokens(8, 64, seed=1)


def logits(model: Any, cache: Any, row: torch.Tensor) -> torch.Tensor:
    """A prompt, then token by token."""
    out = [model(row[:, :20], use_cache=True, **given_cache(model, cache)).logits]
    out += [model(row[:, t : t + 1], use_cache=True, **given_cache(model, cache)).logits for t in range(20, row.shape[1])]
    return torch.cat(out, 1)


@pytest.mark.parametrize("family", ["llama4", "gemma3", "cohere2"])
def test_windows_and_chunks_are_packed_when_asked_and_near_the_stock_model(family: str) -> None:
    stock, model = build_family(family), build_family(family)
    report = kvsink.rewrite(model, "klt", key_bits=8, value_bits=8, calibration=ids, sliding=True)
    assert all(row.packed for row in report.layers)
    row = tokens(1, 40, seed=2)
    with torch.no_grad():
        wanted = logits(stock, hf.DynamicCache(config=stock.config), row)
        found = logits(model, kvsink.KVSinkCache.for_model(model), row)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_what_stays_is_named_by_its_window_and_packing_it_is_suggested() -> None:
    report = kvsink.rewrite(build_family("llama4"), "rtn", calibration=ids)
    left = [row.reason for row in report.layers if not row.packed]
    assert left and all(reason.startswith("chunked attention: its window of ") for reason in left)
    model = build_family("gemma3")
    model.config.sliding_window = 4096
    report = kvsink.rewrite(model, "rtn", calibration=ids, check=False)
    assert any("--sliding packs them too" in note for note in report.notes)
    assert report.bits == pytest.approx(sum((r.key_bits + r.value_bits) / 4 for r in report.layers))


def test_bits_are_counted_over_layers_that_hold_keys_and_by_what_they_hold() -> None:
    report = kvsink.rewrite(build_family("qwen3-next"), "rtn", calibration=ids)
    packed = [row for row in report.layers if row.packed]
    assert len(packed) < len(report.layers)
    assert report.bits == pytest.approx(sum(r.key_bits + r.value_bits for r in packed) / (2 * len(packed)))
    mixed = kvsink.rewrite(build_family("gemma3"), "rtn", calibration=ids)
    window, full = (r for r in mixed.layers)
    assert window.elements * 4096 == full.elements * 8  # a window of 8 tokens
    assert mixed.bits < full.key_bits + 0.1


def test_a_long_prompt_of_another_batch_passes_through_a_fixed_window() -> None:
    stock, model = build("mistral-sliding"), rewritten("mistral-sliding", "sdpa", "rtn", key_bits=16, value_bits=16)
    cache = KVSinkCache.for_model(model, 2, max_length=700)
    for batch in (2, 1):
        chunks = (tokens(batch, 400, seed=batch), tokens(batch, 1, seed=4))
        assert close(feed(model, cache, *chunks), feed(stock, DynamicCache(config=stock.config), *chunks))
        cache.reset()


def test_sliding_layers_keep_transformers_own_cache() -> None:
    model = rewritten("gemma3", "sdpa", "klt")
    cache = KVSinkCache.for_model(model)
    assert len(cache.layers) == LAYERS and [layer.layer for layer in cache.packed_layers()] == [1]
    feed(model, cache, tokens(1, 20), tokens(1, 1))
    stock = [t for t in vars(cache.layers[0]).values() if isinstance(t, Tensor)]
    held = (*cache.packed_layers()[0].state(), *stock)
    assert len(stock) >= 2
    assert cache.nbytes() == sum(t.numel() * t.element_size() for t in held)
    with pytest.raises(KvsinkError, match="layers that kvsink leaves alone cannot be saved"):
        cache.save("nowhere.safetensors")
