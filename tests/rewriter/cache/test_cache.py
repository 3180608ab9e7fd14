"""The packed cache behaves as transformers' own does: batches, beams, crops, growth, files; and its exact rows are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvsink.cache.cache import KVSinkCache
from kvsink.errors import KvsinkError, UnsupportedError
from kvsink.report import counted_bits
from tests.close import FUSED_FLOAT32, HALF_SCALE, largest_difference
from tests.graphs import rewritten
from tests.models import HEAD_DIM, KV_HEADS, LAYERS, WINDOW, build, tokens
from tests.rewriter.cache.feeding import close, feed, states

# -- lengths -----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_rewritten_has_no_packed_cache() -> None:
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM is not rewritten"):
        KVSinkCache.for_model(build("llama"))


# -- exact rows --------------------------------------------------------------------------------------------------------


def test_exact_rows_are_the_rows(klt: Any) -> None:
    """Bit for bit what a 16-bit cache of the same model holds at those slots, and they stay while others come."""
    chunks = (tokens(2, 9, seed=1), tokens(2, 6, seed=2), tokens(2, 1, seed=3))
    stock = DynamicCache(config=klt.config)
    feed(klt, stock, chunks[0])
    cache = KVSinkCache.for_model(klt, 2, max_length=32)
    feed(klt, cache, chunks[0])
    for layer, plain in zip(cache.packed_layers(), stock.layers, strict=True):
        for row in range(2):
            slots = layer.exact_slot[row].tolist()
            assert {0, 1} <= set(slots) and len(slots) == 5
            for place, slot in enumerate(slots):
                if slot >= 0:
                    assert torch.equal(layer.exact_k[row, :, place], plain.keys[row, :, slot])
                    assert torch.equal(layer.exact_v[row, :, place], plain.values[row, :, slot])
        assert sorted(layer.recent_slot.tolist()) == [5, 6, 7, 8]
        for slot in (5, 6, 7, 8):
            assert torch.equal(layer.recent_k[:, :, slot % 4], plain.keys[:, :, slot])
            assert torch.equal(layer.recent_v[:, :, slot % 4], plain.values[:, :, slot])
    held = [(layer.exact_slot.clone(), layer.exact_k.clone()) for layer in cache.packed_layers()]
    feed(klt, cache, *chunks[1:])
    for layer, (slot, k) in zip(cache.packed_layers(), held, strict=True):
        assert {0, 1} <= set(layer.exact_slot[0].tolist())
        assert sorted(layer.recent_slot.tolist()) == [12, 13, 14, 15]
        for row in range(2):
            now = layer.exact_slot[row].tolist()
            for place, s in enumerate(slot[row].tolist()):
                if s >= 0 and s in now:
                    assert torch.equal(layer.exact_k[row, :, now.index(s)], k[row, :, place])


def test_a_window_larger_than_the_prompt_is_exact() -> None:
    plain, model = build("llama"), rewritten("llama", "sdpa", "rtn", key_bits=2, value_bits=2, window=40)
    ids = tokens(1, 30, seed=6)
    with torch.no_grad():
        wanted = plain(ids).logits
    assert close(feed(model, KVSinkCache.for_model(model, strict=True), *ids.split(7, dim=1)), wanted)


# -- reset, crop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [None, 64])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding"])
def test_after_a_reset_another_batch_is_taken(family: str, max_length: int | None) -> None:
    stock = build(family)
    model = rewritten(family, "sdpa", "rtn", key_bits=16, value_bits=16)
    cache = KVSinkCache.for_model(model, 2, max_length=max_length)
    for batch in (2, 1, 3):
        chunks = (tokens(batch, 9, seed=batch), tokens(batch, 1, seed=4), tokens(batch, 5, seed=5))
        wanted = feed(stock, DynamicCache(config=stock.config), *chunks)
        assert close(feed(model, cache, *chunks), wanted)
        assert all(layer.k_codes.shape[0] == batch for layer in cache.packed_layers())
        with pytest.raises(KvsinkError, match=f"holds {batch} sequences and is given {batch + 1}; call cache.reset"):
            feed(model, cache, tokens(batch + 1, 1))
        cache.reset()


@pytest.mark.parametrize("max_length", [None, 64])
def test_another_batch_keeps_exact_rows_and_positions(klt: Any, max_length: int | None) -> None:
    used, fresh = (KVSinkCache.for_model(klt, batch, max_length=max_length) for batch in (3, 2))
    feed(klt, used, tokens(3, 20, seed=1), tokens(3, 1, seed=2))
    used.reset()
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    padded = dict(attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    one, two = (feed(klt, cache, tokens(2, 9, seed=3), **padded) for cache in (used, fresh))
    assert largest_difference(one, two) == 0
    assert torch.equal(used.shared.positions, fresh.shared.positions)
    for a, b in zip(used.packed_layers(), fresh.packed_layers(), strict=True):
        assert torch.equal(a.exact_slot, b.exact_slot)


# -- batches and beams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [None, 64])
def test_a_left_padded_batch_equals_its_rows(wide: Any, max_length: int | None) -> None:
    model = wide
    lengths, longest = (12, 7, 3), 12
    rows = [tokens(1, n, seed=n) for n in lengths]
    ids = torch.cat([torch.cat([torch.zeros(1, longest - r.shape[1], dtype=torch.int64), r], dim=1) for r in rows])
    settings = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True)

    def run(ids: Tensor) -> Any:
        given = {} if max_length is None else {"past_key_values": KVSinkCache.for_model(model, len(ids), max_length=max_length)}
        return model.generate(ids, attention_mask=(ids != 0).long(), **given, **settings)

    together = run(ids)
    for row, alone_ids in enumerate(rows):
        alone, pad, n = run(alone_ids), longest - lengths[row], lengths[row] + 9
        assert together.sequences[row, longest:].tolist() == alone.sequences[0, lengths[row] :].tolist()
        for a, b in zip(together.logits, alone.logits, strict=True):
            assert largest_difference(a[row], b[0]) <= HALF_SCALE * float(b.abs().max())
        one, two = together.past_key_values, alone.past_key_values
        for a, b in zip(states(one, row, slice(pad, pad + n)), states(two, 0, slice(n)), strict=True):
            if a.dtype == torch.uint8:
                assert torch.equal(a, b)
            elif a.numel():
                assert largest_difference(a, b) <= 2 * HALF_SCALE * float(b.abs().max())
        for a, b in zip(one.packed_layers(), two.packed_layers(), strict=True):
            exact = {s - pad for s in a.exact_slot[row].tolist() if s >= 0}
            assert exact == {s for s in b.exact_slot[0].tolist() if s >= 0}


def test_beams_equal_those_of_the_original(passthrough: Any) -> None:
    ids = tokens(2, 8, seed=4)
    settings = dict(max_new_tokens=12, num_beams=3, num_return_sequences=2, do_sample=False, eos_token_id=None)
    assert torch.equal(passthrough.generate(ids, **settings), build("llama").generate(ids, **settings))


def test_beams_score_what_a_fresh_cache_scores(model: Any) -> None:
    """After every reordering the scores of a beam are still those of its own tokens."""
    ids = tokens(1, 8, seed=4)
    settings = dict(
        max_new_tokens=6,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        eos_token_id=None,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    out = model.generate(ids, **settings)
    static = model.generate(ids, past_key_values=KVSinkCache.for_model(model, 3, max_length=32), **settings)
    assert torch.equal(out.sequences, static.sequences)
    prompt, grown = out.sequences[:, :8], out.sequences[:, 8:]
    logits = feed(model, KVSinkCache.for_model(model), prompt, *grown.split(1, dim=1))[:, 7:-1]
    score = logits.log_softmax(-1).gather(2, grown[..., None]).sum((1, 2))
    assert (score - out.sequences_scores).abs().max() <= FUSED_FLOAT32 * float(score.abs().max())


def test_sampling_with_a_seed_repeats(model: Any) -> None:
    settings = dict(max_new_tokens=10, do_sample=True, temperature=1.5, num_return_sequences=3, eos_token_id=None)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(model.generate(tokens(1, 8, seed=4), **settings))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_generate_goes_on_from_the_cache_it_returns(model: Any) -> None:
    ids = tokens(1, 8, seed=4)
    settings = dict(do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    whole = model.generate(ids, max_new_tokens=12, **settings)
    first = model.generate(ids, max_new_tokens=5, **settings)
    assert isinstance(first.past_key_values, KVSinkCache)
    second = model.generate(first.sequences, max_new_tokens=7, past_key_values=first.past_key_values, **settings)
    assert torch.equal(second.sequences, whole.sequences)


def test_prompt_lookup_crops_the_cache_it_is_given(passthrough: Any) -> None:
    ids = tokens(1, 6, seed=4).repeat(1, 3)
    settings = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    wanted = build("llama").generate(ids, **settings)
    given = KVSinkCache.for_model(passthrough)
    assert torch.equal(passthrough.generate(ids, past_key_values=given, prompt_lookup_num_tokens=3, **settings), wanted)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [None, 300])
def test_bits_are_those_of_the_report_at_the_length_held(model: Any, max_length: int | None) -> None:
    model.bfloat16()  # a report counts exact rows as 16 bit
    cache = KVSinkCache.for_model(model, 3, max_length=max_length)
    assert cache.bits_per_element() == 0
    for length in (8, 20):
        cache.reset()
        feed(model, cache, tokens(3, length))
        counted = [counted_bits(p.codec, KV_HEADS, HEAD_DIM, length, 3, LAYERS) for p in model._kvsink_runtime.plans]
        assert cache.bits_per_element() == pytest.approx(sum(map(sum, counted)) / (2 * LAYERS), rel=1e-12)
        assert cache.held_nbytes() + cache.spare_nbytes() == cache.nbytes() and cache.spare_nbytes() > cache.held_nbytes()
    model.float()


def test_a_full_cache_has_no_spare_bytes(klt: Any) -> None:
    cache = KVSinkCache.for_model(klt, 2, max_length=24)
    feed(klt, cache, tokens(2, 24))
    assert cache.spare_nbytes() == 0 and cache.held_nbytes() == cache.nbytes()


@pytest.mark.parametrize("family", ["gemma3", "mistral-sliding"])
@pytest.mark.parametrize("max_length", [None, 400])
def test_16_bit_rows_count_as_such_in_every_kind_of_layer(family: str, max_length: int | None) -> None:
    model = rewritten(family, "sdpa", "rtn", key_bits=16, value_bits=16).bfloat16()
    cache = KVSinkCache.for_model(model, 2, max_length=max_length)
    feed(model, cache, tokens(2, 330), tokens(2, 1))
    rows = {id(layer.shared): (int(layer.length), 5 * 2 * int(layer.length)) for layer in cache.packed_layers()}
    stock = sum(min(WINDOW if max_length else WINDOW - 1, 331) for layer in cache.layers if layer not in cache.packed_layers())
    held = sum(int(layer.length) for layer in cache.packed_layers()) + stock
    extra = sum(nbytes for _, nbytes in rows.values()) + 8 * LAYERS  # positions, what is real, and the length of each layer
    elements = 2 * 2 * KV_HEADS * HEAD_DIM * held
    assert cache.bits_per_element() == pytest.approx(16 + 8 * extra / elements, abs=8 * 8 * LAYERS / elements)
