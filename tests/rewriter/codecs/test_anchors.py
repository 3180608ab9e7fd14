"""Protection by attention in a whole model: who is found, and that every way of handling a cache keeps the anchors right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.cache.layer import KVSinkLayer
from kvsink.cache.storage import BLOCK
from kvsink.errors import KvsinkError
from kvsink.folder.sidecar import read_sidecar, write_sidecar
from kvsink.graph.backend import last_report
from kvsink.model.observed import OBSERVED
from kvsink.model.runtime import detach
from kvsink.report import counted_bits
from tests.close import FUSED_FLOAT32, largest_difference
from tests.graphs import rewritten
from tests.models import HEAD_DIM, KV_HEADS, build, tokens

CHUNKS = (20, 1, 1, 8, 1, 1, 8)


@pytest.fixture(scope="module")
def model() -> Any:
    return rewritten("llama", "sdpa", "rtn", protect="anchors:10%+first:2", window=6)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def feed(model: Any, cache: Any, ids: Tensor, chunks: tuple[int, ...], **inputs: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(c, past_key_values=cache, **inputs).logits for c in ids.split(chunks, dim=1)], dim=1)


def anchors(layer: KVSinkLayer, row: int = 0) -> dict[int, float]:
    """Slot → score of the anchors of one batch row."""
    slots, scores = (t[row, layer.codec.exact_rows :].tolist() for t in (layer.exact_slot, layer.exact_score))
    return {s: x for s, x in zip(slots, scores, strict=True) if s >= 0}


def same(one: KVSinkCache, two: KVSinkCache) -> None:
    for a, b in zip(one.packed_layers(), two.packed_layers(), strict=True):
        for row in range(a.batch_size):
            assert anchors(a, row) == pytest.approx(anchors(b, row), rel=1e-4) and anchors(a, row)


# -- finding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 3, 17, 30])
@pytest.mark.parametrize(("score", "long"), [("mass", 10.0), ("qnorm", 10.0), ("exact:count", 4.0)])
def test_a_heavy_row_is_found_wherever_it_is(place: int, score: str, long: float) -> None:
    """Every query of layer 1 looks along one slow channel, and one key is long there. A row that takes nearly all attention
    has the output for its value, so "exact" does not mind errors of its key: there it takes a third."""
    model = rewritten("llama", "sdpa", "rtn", protect=f"anchors:1:{score}", window=4)
    cache, attention = KVSinkCache.for_model(model), model.model.layers[1].self_attn
    slow = HEAD_DIM // 2 - 1

    def look(module: Any, args: Any, out: Tensor) -> Tensor:
        aimed = torch.zeros_like(out)
        aimed[..., slow::HEAD_DIM] = 3.0
        return aimed

    def stand_out(module: Any, args: Any, out: Tensor) -> Tensor:
        slots = cache.layers[1].get_seq_length() + torch.arange(out.shape[1])
        out[..., slow::HEAD_DIM] = torch.where(slots == place, long, 0.0)[None, :, None]
        return out

    hooks = [attention.q_proj.register_forward_hook(look), attention.k_proj.register_forward_hook(stand_out)]
    feed(model, cache, tokens(1, 50, seed=2), (20, 1, 4, 15, *(1,) * 10))
    for hook in hooks:
        hook.remove()
    assert set(anchors(cache.packed_layers()[1])) == {place}


def test_one_prefill_keeps_the_largest_column_sums() -> None:
    """Against the attention weights of the eager model, padding on the left of the second row."""
    options = dict(key_bits=16, value_bits=16, protect="anchors:20%", window=0)
    model, eager = rewritten("llama", "sdpa", "rtn", **options), build("llama", "eager")
    ids, mask = tokens(2, 30, seed=4), torch.ones(2, 30, dtype=torch.int64)
    mask[1, :7] = 0
    cache = KVSinkCache.for_model(model, 2, max_length=40)
    feed(model, cache, ids, (30,), attention_mask=mask)
    with torch.no_grad():
        weights = eager(ids, attention_mask=mask, output_attentions=True).attentions
    for layer, a in zip(cache.packed_layers(), weights, strict=True):
        mass = (a * mask[:, None, :, None]).sum((1, 2)).masked_fill(mask == 0, -1)
        for row in range(2):
            best, slots = mass[row].topk(6)
            assert set(anchors(layer, row)) == set(slots.tolist())
            assert sorted(anchors(layer, row).values()) == pytest.approx(sorted(best.tolist()), rel=1e-4)


def test_layers_choose_for_themselves_and_may_differ_in_policy() -> None:
    model = rewritten("llama", "sdpa", "rtn", protect="first:1", window=4, layers="1:protect=first:1+anchors:10%")
    cache = KVSinkCache.for_model(model)
    feed(model, cache, tokens(1, 40), (40,))
    plain, anchored = cache.packed_layers()
    assert plain.exact_slot.tolist() == [[0]] and len(anchors(anchored)) == 4 and 0 not in anchors(anchored)


def test_anchors_are_the_rows_and_come_with_a_union(model: Any) -> None:
    stock = build("llama")
    ids = tokens(2, 40, seed=1)
    with torch.no_grad():
        held = stock(ids, use_cache=True).past_key_values
    cache = KVSinkCache.for_model(model, 2, max_length=64)
    feed(model, cache, ids, (40,))
    layer = cache.packed_layers()[0]
    for row in range(2):
        assert layer.exact_slot[row, :2].tolist() == [0, 1] and len(anchors(layer, row)) == 4
        assert not anchors(layer, row).keys() & {0, 1, *range(34, 40)}
        for place, slot in enumerate(layer.exact_slot[row].tolist()):
            if slot >= 0:
                assert torch.equal(layer.exact_k[row, :, place], held.layers[0].keys[row, :, slot])


# -- caches ------------------------------------------------------------------------------------------------------------


def test_static_equals_growing_over_a_block(model: Any) -> None:
    ids = tokens(1, BLOCK + 10, seed=5)
    growing, static = KVSinkCache.for_model(model), KVSinkCache.for_model(model, 1, max_length=2 * BLOCK)
    for cache in (growing, static):
        feed(model, cache, ids, (BLOCK - 2, 1, 1, 1, 9))
    same(growing, static)
    places = [layer.exact_slot.shape[1] for c in (growing, static) for layer in c.packed_layers()]
    assert places == [2 + 52] * 4 and len(anchors(growing.packed_layers()[0])) == 27


def test_batches_follow_their_rows(model: Any) -> None:
    ids = tokens(3, 30, seed=6)
    cache = KVSinkCache.for_model(model)
    feed(model, cache, ids, (20, 1, 9))
    before = [[anchors(layer, row) for row in range(3)] for layer in cache.packed_layers()]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert [[anchors(layer, r) for r in range(3)] for layer in cache.packed_layers()] == [[b[2], b[0], b[0]] for b in before]
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    assert [anchors(cache.packed_layers()[0], r) for r in range(4)] == [before[0][i] for i in (0, 0, 2, 2)]
    other = KVSinkCache.for_model(model)
    feed(model, other, ids[[0, 0, 2, 2]], (20, 1, 9))
    more = tokens(1, 12, seed=7).expand(4, -1)
    assert largest_difference(feed(model, cache, more, (4, 1, 7)), feed(model, other, more, (4, 1, 7))) <= FUSED_FLOAT32 * 10
    same(cache, other)


def test_a_crop_takes_anchors_away(model: Any) -> None:
    ids = tokens(1, 40, seed=8)
    cache, window = KVSinkCache.for_model(model), 6
    feed(model, cache, ids, (40,))
    layer = cache.packed_layers()[0]
    held = anchors(layer)
    keep = sorted(held)[2] + 1  # the last of four anchors goes, three stay
    cache.crop(keep)
    assert anchors(layer) == {s: x for s, x in held.items() if s < keep} and len(anchors(layer)) == 3
    feed(model, cache, tokens(1, 20, seed=9), (1, 19))
    assert all(s < keep + 20 - window for s in anchors(layer)) and len(anchors(layer)) == -(-(keep + 20) // 10)
    cache.reset()
    assert anchors(layer) == {} and int(layer.length) == 0
    feed(model, cache, ids, (40,))
    assert anchors(layer) == pytest.approx(held, rel=1e-5)


@pytest.mark.parametrize("max_length", [None, 64, 48])
def test_a_saved_cache_goes_on(model: Any, tmp_path: Path, max_length: int | None) -> None:
    ids, more = tokens(2, 40, seed=10), tokens(2, 8, seed=11)
    cache = KVSinkCache.for_model(model, 2, max_length=64)
    feed(model, cache, ids, (30, 1, 9))
    cache.save(tmp_path / "cache.safetensors")
    back = KVSinkCache.load(tmp_path / "cache.safetensors", model, max_length)
    same(cache, back)
    assert largest_difference(feed(model, back, more, (1, 7)), feed(model, cache, more, (1, 7))) <= FUSED_FLOAT32 * 10
    same(cache, back)


def test_bytes_are_counted(model: Any) -> None:
    cache = KVSinkCache.for_model(model, 2, max_length=50)
    feed(model, cache, tokens(2, 40), (40,))
    layers = cache.packed_layers()
    bits = sum(counted_bits(layer.codec, KV_HEADS, HEAD_DIM, 50, 2, len(layers))[0] for layer in layers)
    held = sum(t.numel() * t.element_size() for name, t in cache.tensors().items())
    wide = sum(t.numel() * 2 for n, t in cache.tensors().items() if t.dtype == torch.float32 and "score" not in n)
    assert cache.nbytes() == held  # float32 rows here, 16 bit in a report
    assert held - wide == pytest.approx(bits * 2 * 2 * KV_HEADS * 50 * HEAD_DIM / 8)
    assert layers[0].codec.exact_places(50) == 2 + 5 and layers[0].recent_score.shape == (2, 6)


def test_the_sidecar_keeps_them(model: Any, tmp_path: Path) -> None:
    from kvsink.model.runtime import attach, runtime_of

    write_sidecar(tmp_path, model, runtime_of(model), {})
    fresh = build("llama")
    attach(fresh, read_sidecar(fresh, tmp_path / "kvsink.json", tmp_path / "kvsink_calibration.safetensors"))
    assert str(runtime_of(fresh).plans[1].codec.anchors) == "anchors:10%" and fresh.config._attn_implementation == OBSERVED
    detach(fresh)
    assert fresh.config._attn_implementation == "sdpa"


def test_generate_runs_and_reports(model: Any) -> None:
    report = kvsink.rewrite(build("llama"), "rtn", protect="anchors:10%+first:2", window=6)
    assert [layer.protect for layer in report.layers] == ["first:2, anchors:10%"] * 2
    ids = tokens(1, 9, seed=5)
    out = model.generate(ids, max_new_tokens=12, do_sample=False)
    cache, wanted = KVSinkCache.for_model(model), ids
    for _ in range(12):
        last = wanted if wanted.shape[1] == 9 else wanted[:, -1:]
        wanted = torch.cat([wanted, feed(model, cache, last, (last.shape[1],))[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, wanted)


# -- compiled, and what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["mass", pytest.param("exact:count", marks=pytest.mark.slow)])
def test_compiled_graphs_hold_the_choice(score: str) -> None:
    model = rewritten("llama", "sdpa", "rtn", protect=f"anchors:10%:{score}+first:1", window=3)
    run = torch.compile(model, backend="kvsink", options={"kvsink.inner": "aot_eager"}, fullgraph=True)
    caches = [KVSinkCache.for_model(model, 2, max_length=64) for _ in range(2)]
    got, wanted = (feed(m, c, tokens(2, 40), CHUNKS) for m, c in zip((run, model), caches, strict=True))
    assert largest_difference(got, wanted) <= FUSED_FLOAT32 * float(wanted.abs().max())
    same(*caches)
    report = last_report()
    assert report is not None and set(report.left_alone()) == {f"model.layers.{i}.self_attn" for i in range(2)}
    assert all("anchors are chosen by its queries" in reason for reason in report.left_alone().values())


def test_a_cache_that_nobody_observes_says_so(model: Any) -> None:
    cache = KVSinkCache.for_model(model)
    rows = torch.zeros(1, KV_HEADS, 3, HEAD_DIM)
    cache.update(rows, rows, 0)
    with pytest.raises(KvsinkError, match="layer 0 keeps anchors exact but its attention was not observed"):
        cache.update(rows, rows, 0)


# -- random rows and pivots --------------------------------------------------------------------------------------------
