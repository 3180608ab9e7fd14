"""A cache whose keys are coded over blocks of tokens: growth, crops, batches, files, bits, graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.cache.storage import BLOCK
from kvsink.errors import UnsupportedError
from kvsink.graph.backend import last_report, stock_plan
from kvsink.graph.pipeline import run_passes
from kvsink.report import counted_bits
from tests.close import FUSED_FLOAT32, HALF_SCALE, largest_difference
from tests.graphs import packed_graph, rewritten, run
from tests.models import HEAD_DIM, KV_HEADS, build, tokens
from tests.states import method_named

METHODS = ("kivi/8", "oscar/8", "kvarn/8")
STATES = ("k_codes", "k_scale", "k_norm", "v_codes", "v_scale")
MODELS: dict[str, Any] = {}


@pytest.fixture(params=METHODS)
def model(request: pytest.FixtureRequest) -> Any:
    if request.param not in MODELS:
        MODELS[request.param] = rewritten("llama", "sdpa", method_named(request.param), protect="first:1")
    return MODELS[request.param]


def feed(model: Any, cache: Any, *chunks: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(c, past_key_values=cache, **inputs).logits for c in chunks], dim=1)


def close(one: Tensor, two: Tensor) -> bool:
    return largest_difference(one, two) <= FUSED_FLOAT32 * float(two.abs().max())


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    """Bytes equal but for a rounding tie here and there; float16 numbers within their last bit."""
    for a, b in zip(one, two, strict=True):
        if a.dtype == torch.uint8 and (a != b).float().mean() > 0.002:
            return False
        if a.dtype == torch.float16 and not torch.allclose(a.float(), b.float(), rtol=2.0**-10, atol=1e-6):
            return False
    return True


def held(cache: KVSinkCache, slots: int) -> list[Tensor]:
    """Codes, scales and norms of the first slots; groups of 4 tokens."""
    out = []
    for layer in cache.packed_layers():
        for name in STATES:
            tensor = getattr(layer, name)
            grouped = name == "k_scale" or (name == "v_scale" and layer.codec.value.by_token_block)
            out.append(tensor[:, :, : -(-slots // 4) if grouped else slots])
    return out


def test_static_equals_growing(model: Any) -> None:
    chunks = (tokens(2, 9, seed=1), tokens(2, 1, seed=2), tokens(2, 21, seed=3), tokens(2, 1, seed=4))
    growing, static = KVSinkCache.for_model(model), KVSinkCache.for_model(model, 2, max_length=35)
    assert close(feed(model, growing, *chunks), feed(model, static, *chunks))
    assert same(held(growing, 32), held(static, 32))
    assert static.packed_layers()[0].k_scale.shape[2] == 9  # 35 slots in groups of 4


def test_growth_keeps_what_is_held(model: Any) -> None:
    prompt, rest = tokens(1, BLOCK - 3, seed=1), tokens(1, 8, seed=2)
    growing, static = KVSinkCache.for_model(model), KVSinkCache.for_model(model, 1, max_length=2 * BLOCK)
    feed(model, growing, prompt)
    before = [t.clone() for t in held(growing, 248)]
    one = feed(model, growing, *rest.split(1, dim=1))
    two = feed(model, static, prompt, *rest.split(1, dim=1))[:, -8:]
    assert growing.packed_layers()[0].k_scale.shape[2] == 2 * BLOCK // 4
    assert largest_difference(before, held(growing, 248)) == 0
    assert close(one, two)


def test_a_cache_is_filled_to_its_last_slot(model: Any) -> None:
    """The last block does not fit as a whole: nothing is written behind the end."""
    for length in (13, 16, 17):
        cache = KVSinkCache.for_model(model, 1, max_length=length)
        feed(model, cache, tokens(1, 7), *tokens(1, length - 7, seed=1).split(1, dim=1))
        roomy = KVSinkCache.for_model(model, 1, max_length=64)
        feed(model, roomy, tokens(1, 7), *tokens(1, length - 7, seed=1).split(1, dim=1))
        assert largest_difference(held(cache, length), held(roomy, length)) == 0


def test_reset_is_a_fresh_cache(model: Any) -> None:
    used, fresh = (KVSinkCache.for_model(model, 2, max_length=64) for _ in range(2))
    feed(model, used, tokens(2, 29, seed=1), tokens(2, 1, seed=2))
    used.reset()
    chunks = (tokens(2, 6, seed=3), tokens(2, 1, seed=4), tokens(2, 5, seed=5))
    assert largest_difference(feed(model, used, *chunks), feed(model, fresh, *chunks)) == 0
    assert largest_difference(held(used, 12), held(fresh, 12)) == 0


@pytest.mark.parametrize("max_length", [None, 64])
def test_a_crop_inside_the_open_block_is_exact(model: Any, max_length: int | None) -> None:
    cropped, fresh = (KVSinkCache.for_model(model, 1, max_length=max_length) for _ in range(2))
    head, tail, other = tokens(1, 18, seed=1), tokens(1, 5, seed=2), tokens(1, 9, seed=3)
    feed(model, cropped, head, tail)
    cropped.crop(-5)
    feed(model, fresh, head)
    one, two = (feed(model, c, *other.split((1, 2, 6), dim=1)) for c in (cropped, fresh))
    if cropped.packed_layers()[0].codec.value.newest:  # of the newest values some had left the ring: 2 bits here
        assert 0 < largest_difference(one[:, 0], two[:, 0]) <= 0.5 * float(two.abs().max())
    else:
        assert largest_difference(one, two) == 0
        assert largest_difference(held(cropped, 27), held(fresh, 27)) == 0


def test_a_crop_into_a_coded_block_goes_on_from_its_codes(model: Any) -> None:
    """27 rows, cut at 13: slots 8 to 12 open again, but the ring had gone on to 19. Their codes speak for them, once."""
    cache = KVSinkCache.for_model(model, 1, max_length=64)
    feed(model, cache, tokens(1, 27, seed=1))
    layer = cache.packed_layers()[0]
    params = dict(zip(layer.codec.param_names(), layer.params, strict=True))
    before = layer.codec.read_keys(layer.codec.named(layer.state()), params, 0, 16)
    cache.crop(13)
    assert sorted(s for s in layer.recent_slot.tolist() if s < 13) == [8, 9, 10, 11, 12]
    for slot in range(8, 13):
        assert torch.equal(layer.recent_k[:, :, slot % 8], before[:, :, slot])
    feed(model, cache, *tokens(1, 9, seed=2).split(1, dim=1))
    after = layer.codec.read_keys(layer.codec.named(layer.state()), params, 0, 16)
    assert torch.equal(after[:, :, 1:8], before[:, :, 1:8])
    step = float(layer.k_scale[..., :HEAD_DIM].float().max()) * float(layer.k_norm.max() if layer.k_norm.numel() else 1)
    assert (after[:, :, 8:13] - before[:, :, 8:13]).abs().max() <= 0.51 * step * (1 if not layer.k_norm.numel() else 4)
    assert cache.get_seq_length() == 22


def test_every_crop_leaves_a_cache_that_goes_on(model: Any) -> None:
    for keep in range(27):
        cache = KVSinkCache.for_model(model)
        feed(model, cache, tokens(1, 27, seed=1))
        cache.crop(keep - 27)
        out = feed(model, cache, tokens(1, 1, seed=2), tokens(1, 12, seed=3))
        assert torch.isfinite(out).all() and int(cache.get_seq_length()) == keep + 13
        live = {s for s in cache.packed_layers()[0].recent_slot.tolist() if s < keep + 13}
        assert set(range((keep + 13) // 8 * 8, keep + 13)) <= live


@pytest.mark.parametrize("way", ["reorder", "repeat", "select"])
def test_rows_of_a_batch_move_together(model: Any, way: str) -> None:
    prompt, later = tokens(3, 21, seed=1), tokens(6, 5, seed=2)
    pick = {"reorder": [2, 0, 0], "repeat": [0, 0, 1, 1, 2, 2], "select": [2, 1]}[way]
    n = len(pick)
    moved, fresh = (KVSinkCache.for_model(model, rows, max_length=48) for rows in (3, n))
    mask = torch.ones(3, 21, dtype=torch.int64)
    mask[1, :3] = mask[2, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    feed(model, moved, prompt, attention_mask=mask, position_ids=positions)
    match way:
        case "reorder":
            moved.reorder_cache(torch.tensor(pick))
        case "repeat":
            moved.batch_repeat_interleave(2)
        case "select":
            moved.batch_select_indices(torch.tensor(pick))
    feed(model, fresh, prompt[pick], attention_mask=mask[pick], position_ids=positions[pick])
    rest = dict(
        attention_mask=torch.cat([mask[pick], torch.ones(n, 5, dtype=torch.int64)], dim=1),
        position_ids=positions[pick][:, -1:] + torch.arange(1, 6),
    )
    assert close(*(feed(model, cache, later[:n], **rest) for cache in (moved, fresh)))
    assert largest_difference(held(moved, 21), held(fresh, 21)) <= FUSED_FLOAT32


def test_a_padded_prompt_equals_the_prompt_alone(model: Any) -> None:
    """Padding by whole blocks: the same tokens, and logits up to rounding; the padding is not what sets any range."""
    row, more = tokens(1, 21, seed=5), tokens(1, 6, seed=6)
    ids = torch.cat([torch.cat([torch.zeros(1, 8, dtype=torch.int64), row], 1), tokens(1, 29, seed=7)])
    mask = torch.ones(2, 29, dtype=torch.int64)
    mask[0, :8] = 0
    padded, alone = KVSinkCache.for_model(model, 2, max_length=48), KVSinkCache.for_model(model, 1, max_length=48)
    outs = [feed(model, padded, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))[:1, 8:]]
    wanted = [feed(model, alone, row)]
    for i, step in enumerate(more.split(1, dim=1)):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
        where = torch.tensor([[21 + i], [29 + i]])
        outs.append(feed(model, padded, step.expand(2, 1), attention_mask=mask, position_ids=where)[:1])
        wanted.append(feed(model, alone, step))
    for one, two in zip(outs, wanted, strict=True):
        assert largest_difference(one, two) <= 10 * FUSED_FLOAT32 * float(two.abs().max())
    for a, b in zip(padded.packed_layers(), alone.packed_layers(), strict=True):
        assert torch.equal(a.k_codes[0, :, 8:35], b.k_codes[0, :, :27])


def test_the_incomplete_block_is_exact_even_when_strict(model: Any) -> None:
    plain, ids = build("llama"), tokens(1, 7, seed=6)
    with torch.no_grad():
        wanted = plain(ids).logits
    cache = KVSinkCache.for_model(model, strict=True)
    assert close(feed(model, cache, ids[:, :4], ids[:, 4:]), wanted)
    longer = tokens(1, 24, seed=6)
    with torch.no_grad():
        wanted = plain(longer).logits
    assert largest_difference(feed(model, KVSinkCache.for_model(model, strict=True), longer), wanted) > 0.01


@pytest.mark.parametrize(("saved", "loaded"), [(None, None), (64, None), (None, 64), (64, 31)])
def test_a_saved_cache_goes_on_alike(model: Any, tmp_path: Path, saved: int | None, loaded: int | None) -> None:
    cache, file = KVSinkCache.for_model(model, 2, max_length=saved), tmp_path / "cache.safetensors"
    feed(model, cache, tokens(2, 19, seed=1))
    cache.save(file)
    again = KVSinkCache.load(file, model, max_length=loaded)
    assert close(*(feed(model, c, *tokens(2, 9, seed=2).split((1, 8), dim=1)) for c in (cache, again)))
    assert largest_difference(held(cache, 28), held(again, 28)) == 0


def test_generate_continues_and_beams_run(model: Any) -> None:
    ids = tokens(1, 11, seed=4)
    settings = dict(do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    whole = model.generate(ids, max_new_tokens=12, **settings)
    first = model.generate(ids, max_new_tokens=5, **settings)
    second = model.generate(first.sequences, max_new_tokens=7, past_key_values=first.past_key_values, **settings)
    assert torch.equal(second.sequences, whole.sequences)
    beams = model.generate(ids, max_new_tokens=6, num_beams=3, num_return_sequences=3, **settings)
    assert beams.sequences.shape == (3, 17)


@pytest.mark.sample(3)
@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize("method", METHODS)
def test_every_pass_keeps_outputs_and_bytes(method: str, length: int) -> None:
    gm = packed_graph("llama", "sdpa", method_named(method), length, batch=2, protect="first:2")
    runs = {"before": run(gm)}
    report = run_passes(gm, watch=lambda name, rewritten: runs.__setitem__(name, run(rewritten)))
    assert len(report.done("fuse")) == 2 and not report.left_alone()
    for name, (outputs, state) in runs.items():
        bound = FUSED_FLOAT32 if name in ("fuse", "verify") else 0.0
        assert largest_difference(outputs, runs["before"][0]) <= bound, name
        states = [[t for t in each if isinstance(t, Tensor)] for each in (state, runs["before"][1])]
        assert same(*states) and (bound or largest_difference(*states) == 0), name
    names = [str(node.target) for node in gm.graph.nodes]
    assert sum("append_" in n for n in names) == sum("attend" in n for n in names) == 2
    assert not any("kvsink.read" in n or "hadamard" in n for n in names)


def test_compiled_equals_uncompiled(model: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="kvsink", options={"kvsink.inner": "eager"})
    one, two = (KVSinkCache.for_model(model, 2, max_length=40) for _ in range(2))
    for n in (9, 1, 1, 14, 1):
        ids = tokens(2, n, seed=n)
        left, right = feed(compiled, one, ids), feed(model, two, ids)
        scales = [[layer.k_scale for layer in cache.packed_layers()] for cache in (one, two)]
        bound = HALF_SCALE if largest_difference(*scales) else FUSED_FLOAT32
        assert largest_difference(left, right) <= bound * float(right.abs().max())
    assert same(held(one, 26), held(two, 26))
    report = last_report()
    assert report is not None and len(report.done("fuse")) == 2
    torch._dynamo.reset()


def test_counted_bits_are_the_formula() -> None:
    """KIVI: 2 bits and 32 / G for step and minimum on either side; 128 rows of 16 bit; 32 + 8 bits of
    position and whether it is padding per token."""
    model, dim, heads, n = rewritten("llama", "sdpa", "kivi"), 64, 3, 4096
    key = kvsink.get_method("kivi").side("key", 2).resolved(heads, dim)
    value = kvsink.get_method("kivi").side("value", 2).resolved(heads, dim)
    codec = kvsink.codecs.Codec(key, value)
    small = (32 * 128 / 2 + 64 / 2 + 40 * n / 2) / (heads * dim * n)  # slots of the ring, the length, positions and real slots
    for bits in counted_bits(codec, heads, dim, n):
        assert abs(bits - (2 + 1 + 16 * 128 / n + small)) < 1e-9
    oscar = kvsink.get_method("oscar")
    codec = kvsink.codecs.Codec(oscar.side("key", 2).resolved(heads, dim), oscar.side("value", 2).resolved(heads, dim))
    k_bits, v_bits = counted_bits(codec, heads, dim, n)
    assert abs(k_bits - v_bits - 16 / (heads * dim)) < 1e-9  # one float16 norm per token
    report = kvsink.rewrite(build("llama"), "kivi")
    assert report.layers[0].key == "uniform 2 bit, per channel over 32 tokens, in blocks of 128"
    assert report.layers[0].value == "uniform 2 bit, newest 128 exact"
    assert (KV_HEADS, HEAD_DIM) == (2, 16) and model is not None


def test_what_cannot_be_done_says_so() -> None:
    with pytest.raises(UnsupportedError, match=r"a stock cache cannot hold; call kvsink.rewrite\(model, 'kivi'\)"):
        stock_plan({"method": "kivi"})
    mixed = rewritten("gemma3", "sdpa", "kivi")
    cache = KVSinkCache.for_model(mixed)
    assert [layer.layer for layer in cache.packed_layers()] == [1]  # sliding layers stay transformers' own
    feed(mixed, cache, tokens(1, 20), tokens(1, 1))
