"""The packed cache behaves as transformers' own does: batches, beams, crops, growth, files; and its exact rows are exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvsink.cache.cache import _BLOCK, KVSinkCache
from kvsink.errors import KvsinkError, SidecarError, UnsupportedError
from kvsink.report import counted_bits
from tests.close import FUSED_FLOAT32, HALF_SCALE, largest_difference
from tests.graphs import rewritten
from tests.models import HEAD_DIM, KV_HEADS, LAYERS, WINDOW, build, tokens

METHODS = ("klt", "centred", "rotatekv", "rtn")


@pytest.fixture(scope="module", params=METHODS)
def model(request: pytest.FixtureRequest) -> Any:
    return rewritten("llama", "sdpa", request.param)


@pytest.fixture
def wide(model: Any) -> Iterator[Any]:
    """The model in float64: in float32, sums in another order turn a code that stands on a threshold."""
    yield model.double()
    model.float()


@pytest.fixture(scope="module")
def klt() -> Any:
    return rewritten("llama", "sdpa", "klt", protect="first:2+massive:3", window=4)


@pytest.fixture(scope="module")
def massive() -> Any:
    return rewritten("llama", "sdpa", "rtn", protect="massive:3", key_bits=3)


@pytest.fixture(scope="module")
def passthrough() -> Any:
    return rewritten("llama", "sdpa", "rtn", key_bits=16, value_bits=16)


def feed(model: Any, cache: Any, *chunks: Tensor, **inputs: Any) -> Tensor:
    """Logits of all chunks, fed one after the other."""
    with torch.no_grad():
        return torch.cat([model(c, past_key_values=cache, **inputs).logits for c in chunks], dim=1)


def states(cache: KVSinkCache, row: int | slice = slice(None), slots: slice = slice(None)) -> list[Tensor]:
    """Codes and scales of the given rows and slots."""
    return [
        getattr(layer, name)[row][..., slots, :]
        for layer in cache.packed_layers()
        for name in ("k_codes", "k_scale", "v_codes", "v_scale")
    ]


def close(one: Tensor, two: Tensor) -> bool:
    """Equal up to float32 sums in another order."""
    return largest_difference(one, two) <= FUSED_FLOAT32 * float(two.abs().max())


# -- lengths -----------------------------------------------------------------------------------------------------------


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
    prompt, rest = tokens(1, _BLOCK - 3, seed=1), tokens(1, 8, seed=2)
    growing, static = KVSinkCache.for_model(model), KVSinkCache.for_model(model, 1, max_length=2 * _BLOCK)
    feed(model, growing, prompt)
    before = [t.clone() for t in states(growing)]
    assert growing.packed_layers()[0].k_codes.shape[2] == _BLOCK
    one = feed(model, growing, *rest.split(1, dim=1))
    two = feed(model, static, prompt, *rest.split(1, dim=1))[:, -8:]
    assert growing.packed_layers()[0].k_codes.shape[2] == 2 * _BLOCK
    assert largest_difference(before, states(growing, slots=slice(_BLOCK))) > 0  # the first block filled up
    assert largest_difference([t[..., :-3, :] for t in before], states(growing, slots=slice(_BLOCK - 3))) == 0
    assert close(one, two)


def test_a_full_cache_says_so(model: Any) -> None:
    cache = KVSinkCache.for_model(model, 1, max_length=8)
    feed(model, cache, tokens(1, 7))
    before = [t.clone() for t in cache.tensors().values()]
    with pytest.raises(KvsinkError, match="layer 0: 2 rows do not fit behind 7 of max_length=8"):
        feed(model, cache, tokens(1, 2))
    assert largest_difference(before, list(cache.tensors().values())) == 0
    feed(model, cache, tokens(1, 1))
    with pytest.raises(KvsinkError, match="max_length=0 is not positive"):
        KVSinkCache.for_model(model, 1, max_length=0)


def test_positions_far_beyond_the_cache_are_undone() -> None:
    """A prompt may start anywhere; the table of block starts grows to reach it."""
    model = rewritten("llama", "sdpa", "klt", key_bits=8, value_bits=8, protect="none")
    plain = rewritten("llama", "sdpa", "rtn", key_bits=16, value_bits=16)
    ids, positions = tokens(1, 12), torch.arange(70_000, 70_012)[None]
    caches = [KVSinkCache.for_model(m, 1, max_length=32, strict=True) for m in (model, plain)]
    far = [feed(m, c, ids, position_ids=positions) for m, c in zip((model, plain), caches, strict=True)]
    assert largest_difference(*far) <= 0.05 * float(far[1].abs().max())  # 8 bits
    assert caches[0].shared.positions[0, :12].tolist() == positions[0].tolist()


def test_a_model_that_is_not_rewritten_has_no_packed_cache() -> None:
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM is not rewritten"):
        KVSinkCache.for_model(build("llama"))


def test_a_cache_fed_by_hand_is_refused_when_it_needs_hidden_states(massive: Any) -> None:
    cache = KVSinkCache.for_model(massive)
    rows = torch.zeros(1, KV_HEADS, 3, HEAD_DIM)
    with pytest.raises(KvsinkError, match="saw no hidden states"):
        cache.update(rows, rows, 0)


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


def test_massive_rows_are_those_of_the_largest_entries(massive: Any) -> None:
    inputs: dict[int, Tensor] = {}

    def note(i: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[i] = args[0] if args else kwargs["hidden_states"]

        return hook

    hooks = [b.register_forward_pre_hook(note(i), with_kwargs=True) for i, b in enumerate(massive.model.layers)]
    cache = KVSinkCache.for_model(massive)
    feed(massive, cache, tokens(1, 20, seed=6))
    for hook in hooks:
        hook.remove()
    for i, layer in enumerate(cache.packed_layers()):
        rows = inputs[i][0].abs().flatten().topk(3).indices // inputs[i].shape[-1]
        assert {s for s in layer.exact_slot[0].tolist() if s >= 0} == set(rows.tolist())


def test_a_window_larger_than_the_prompt_is_exact() -> None:
    plain, model = build("llama"), rewritten("llama", "sdpa", "rtn", key_bits=2, value_bits=2, window=40)
    ids = tokens(1, 30, seed=6)
    with torch.no_grad():
        wanted = plain(ids).logits
    assert close(feed(model, KVSinkCache.for_model(model, strict=True), *ids.split(7, dim=1)), wanted)


# -- reset, crop -------------------------------------------------------------------------------------------------------


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


def test_a_long_prompt_of_another_batch_passes_through_a_fixed_window() -> None:
    stock, model = build("mistral-sliding"), rewritten("mistral-sliding", "sdpa", "rtn", key_bits=16, value_bits=16)
    cache = KVSinkCache.for_model(model, 2, max_length=700)
    for batch in (2, 1):
        chunks = (tokens(batch, 400, seed=batch), tokens(batch, 1, seed=4))
        assert close(feed(model, cache, *chunks), feed(stock, DynamicCache(config=stock.config), *chunks))
        cache.reset()


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


# -- batches and beams -------------------------------------------------------------------------------------------------


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
    settings = dict(max_new_tokens=6, num_beams=3, num_return_sequences=3, do_sample=False, eos_token_id=None,
                    length_penalty=0.0, return_dict_in_generate=True, output_scores=True)  # fmt: skip
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


# -- files -------------------------------------------------------------------------------------------------------------


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
        feed(klt, c, tokens(2, 3, seed=2), attention_mask=full, position_ids=(full.cumsum(1) - 1)[:, -3:])
        for c in (cache, again)
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
