"""KVQuant with outliers through the cache: exact where kept, counted, moved with its rows, the same compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.codecs import Codec, SideSpec
from kvsink.errors import KvsinkError, UnknownName, UnsupportedError
from kvsink.graph.pipeline import run_passes
from kvsink.kernels.stages import unrope_rows
from kvsink.report import counted_bits
from tests.close import FUSED_FLOAT32, largest_difference
from tests.graphs import packed_graph, rewritten, run
from tests.models import HEAD_DIM, KV_HEADS, build, tokens
from tests.states import append_arguments, filled, layer_of, method_named, rows

NAME = "kvquant-10%/8"
RECORDS = ("k_sparse", "k_sparse_at", "v_sparse", "v_sparse_at")


@pytest.fixture(scope="module")
def model() -> Any:
    return rewritten("llama", "sdpa", method_named(NAME), protect="first:1")


def feed(model: Any, cache: Any, *chunks: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(c, past_key_values=cache, **inputs).logits for c in chunks], dim=1)


def close(one: Tensor, two: Tensor) -> bool:
    return largest_difference(one, two) <= FUSED_FLOAT32 * float(two.abs().max())


def records(cache: KVSinkCache, layer: int = 0) -> list[Tensor]:
    return [getattr(cache.packed_layers()[layer], name) for name in RECORDS]


def test_kept_entries_are_exact_and_the_others_are_dense() -> None:
    layer, k, v = filled(NAME, (), batch=2, lengths=(11, 1, 7))
    c, p = layer.codec, dict(zip(layer.codec.param_names(), layer.params, strict=True))
    st, total = c.named(layer.state()), 19
    cos, sin = layer.shared.runtime.angles(1, torch.arange(total)[None])
    for prefix, spec, x in (("k", c.key, unrope_rows(k, cos, sin)), ("v", c.value, v)):
        got = c._stored(st, spec, p, prefix, 0, total)
        dense = c.dequantize(prefix, st[f"{prefix}_codes"][:, :, :total], st[f"{prefix}_scale"][:, :, :total], p)
        at = st[f"{prefix}_sparse_at"].long()
        kept = torch.zeros(2, 24 * KV_HEADS * HEAD_DIM, dtype=torch.bool)
        for b in range(2):
            for block in range(3):
                kept[b, (at[b, block][at[b, block] >= 0] + block * 8 * KV_HEADS * HEAD_DIM)] = True
        kept = kept.view(2, 24, KV_HEADS, HEAD_DIM).transpose(1, 2)[:, :, :total]
        assert 20 < int(kept.sum()) <= 2 * 3 * c.record_size(prefix, KV_HEADS * HEAD_DIM)
        assert torch.equal(got[~kept], dense[~kept])
        assert (got[kept] - x[kept]).abs().max() <= 2.0**-10 * float(x[kept].abs().max())
        assert (got - x).square().mean() < 0.9 * (dense - x).square().mean()


def test_more_outliers_less_error() -> None:
    k, v = rows(1, 64)
    errors = []
    for name in ("kvquant", "kvquant-1%", "kvquant-10%"):
        layer = layer_of(name, (("protect", "none"),))
        kvsink.kernels.append_(**append_arguments(layer, 1.5 * k, 1.5 * v))
        c, p = layer.codec, dict(zip(layer.codec.param_names(), layer.params, strict=True))
        errors.append(float((c.read_keys(c.named(layer.state()), p, 0, 64) - 1.5 * k).square().mean()))
    assert errors[2] < 0.8 * errors[0]


def test_exact_rows_and_padding_take_no_places() -> None:
    k, v = rows(2, 24)
    k[:, :, 3] *= 100.0
    k[1, :, :2] *= 100.0

    def fed(options: tuple, pad: list[int]) -> Any:
        layer = layer_of(NAME, options, 2)
        given = append_arguments(layer, k, v)
        given["positions"] = (torch.arange(24) - torch.tensor(pad)[:, None]).clamp_min(0)
        layer.shared.real[:, :24] = torch.arange(24) >= torch.tensor(pad)[:, None]
        given["cos"], given["sin"] = layer.shared.runtime.angles(1, torch.zeros(1, 24, dtype=torch.int64))
        if layer.segments:
            given["candidates"] = [torch.ones(2, 1), torch.full((2, 1), 3)]
        kvsink.kernels.append_(**given)
        return (layer.k_sparse_at[:, 0].long() // (KV_HEADS * HEAD_DIM)).masked_fill(layer.k_sparse_at[:, 0] < 0, -1)

    loud = fed((("protect", "none"),), [0, 0])
    assert (loud[0] == 3).sum() >= 20 and {0, 1, 3} <= set(loud[1].tolist())
    quiet = fed((("protect", "first:1"),), [0, 2])
    assert 3 not in quiet[0].tolist() and not {0, 1, 3} & set(quiet[1].tolist())


def test_counted_bits_are_the_formula() -> None:
    heads, dim, n = 3, 64, 4096
    plain, some, few = (kvsink.get_method(name) for name in ("kvquant", "kvquant-1%", "kvquant-0.5%"))

    def bits(m: Any) -> tuple[float, float]:
        return counted_bits(Codec(m.side("key", 2).resolved(heads, dim), m.side("value", 2).resolved(heads, dim)), heads, dim, n)

    record = 32 * 246 / (128 * 192)  # ceil(1 % of 128 · 192) entries of 32 bits
    assert bits(some)[0] - bits(plain)[0] == pytest.approx(record) == pytest.approx(0.32, abs=0.001)
    assert bits(some)[1] - bits(plain)[1] == pytest.approx(record)
    assert bits(few)[0] - bits(plain)[0] == pytest.approx(32 * 123 / (128 * 192))
    assert bits(few)[1] == bits(plain)[1]  # half a per cent of 192 channels is no whole entry on either side


def test_the_record_does_not_depend_on_chunks(model: Any) -> None:
    ids, states = tokens(2, 40, seed=7), []
    for chunks in ((40,), (7, 1, 16, 6, 10), (1,) * 40):
        cache = KVSinkCache.for_model(model, 2, max_length=64)
        feed(model, cache, *ids.split(chunks, dim=1))
        states.append(records(cache))
    for other in states[1:]:  # inputs of the first layer are the same up to the rounding of a matmul
        for value, index in ((0, 1), (2, 3)):
            same = states[0][index] == other[index]
            assert same.float().mean() > 0.95
            assert torch.allclose(states[0][value][same].float(), other[value][same].float(), rtol=2.0**-9)
    assert (states[0][1][:, :5] >= 0).float().mean() > 0.5 and (states[0][1][:, 5:] < 0).all()


def test_crops_growth_and_reset(model: Any) -> None:
    growing, static = KVSinkCache.for_model(model), KVSinkCache.for_model(model, 1, max_length=512)
    ids = tokens(1, 300, seed=1)
    assert close(feed(model, growing, ids[:, :250], ids[:, 250:]), feed(model, static, ids[:, :250], ids[:, 250:]))
    for one, two in zip(records(growing), records(static), strict=True):
        assert torch.equal(one, two)
    growing.crop(-40)
    before = [t.clone() for t in records(growing)]
    feed(model, growing, tokens(1, 3, seed=2))
    for one, two in zip(before, records(growing), strict=True):
        assert torch.equal(one[:, :32], two[:, :32])  # 260 rows: the 33rd block was cut
    assert {int(i) // (KV_HEADS * HEAD_DIM) for i in records(growing)[1][0, 32] if i >= 0} <= set(range(7))
    static.reset()
    fresh = KVSinkCache.for_model(model, 1, max_length=512)
    chunks = (tokens(1, 9, seed=3), tokens(1, 1, seed=4))
    assert largest_difference(feed(model, static, *chunks), feed(model, fresh, *chunks)) == 0
    for one, two in zip(records(static), records(fresh), strict=True):
        assert torch.equal(one[:, :2], two[:, :2])


def test_rows_of_a_batch_and_files(model: Any, tmp_path: Path) -> None:
    prompt, later = tokens(3, 21, seed=1), tokens(3, 5, seed=2)
    moved, fresh = KVSinkCache.for_model(model, 3, max_length=48), KVSinkCache.for_model(model, 3, max_length=48)
    feed(model, moved, prompt)
    moved.reorder_cache(torch.tensor([2, 0, 0]))
    feed(model, fresh, prompt[[2, 0, 0]])
    moved.save(tmp_path / "cache.safetensors")
    loaded = KVSinkCache.load(tmp_path / "cache.safetensors", model, max_length=30)
    wanted = feed(model, fresh, later)
    assert close(feed(model, moved, later), wanted) and close(feed(model, loaded, later), wanted)
    for one, two in zip(records(loaded), records(moved), strict=True):
        assert torch.equal(one, two[:, : one.shape[1]])


@pytest.mark.parametrize("length", [1, 13])
def test_every_pass_keeps_outputs_and_bytes(length: int) -> None:
    gm = packed_graph("llama", "sdpa", method_named(NAME), length, batch=2, protect="first:2")
    runs = {"before": run(gm)}
    report = run_passes(gm, watch=lambda name, rewritten: runs.__setitem__(name, run(rewritten)))
    assert len(report.done("fuse")) == 2 and not report.left_alone()
    for name, (outputs, state) in runs.items():
        fused = name in ("fuse", "verify")  # keys before RoPE there, undone RoPE here: they differ in the last bits
        assert largest_difference(outputs, runs["before"][0]) <= (0.01 if fused else 0.0), name
        pairs = [pair for pair in zip(state, runs["before"][1], strict=True) if isinstance(pair[0], Tensor)]
        same = [bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in pairs]  # a table of angles ends in NaN
        assert fused or all(same), name


def test_compiled_equals_uncompiled(model: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="kvsink", options={"kvsink.inner": "eager"})
    one, two = (KVSinkCache.for_model(model, 2, max_length=40) for _ in range(2))
    for n in (9, 1, 1, 14, 1):
        ids = tokens(2, n, seed=n)
        left, right = feed(compiled, one, ids), feed(model, two, ids)
        assert largest_difference(left, right) <= 0.01 * float(right.abs().max())  # float16 entries round once in a while
    for left, right in zip(records(one), records(two), strict=True):
        if left.dtype == torch.int16:
            assert (left.sort(-1).values != right.sort(-1).values).float().mean() <= 0.02
    torch._dynamo.reset()


def test_names_of_shares() -> None:
    m = kvsink.get_method("kvquant-0.5%")
    assert (m.name, m.key.outliers, m.value.outliers) == ("kvquant-0.5%", 0.005, 0.005)
    assert kvsink.get_method("kvquant-0%").key.outliers == 0
    for name in ("kvquant-x%", "kvquant-11%", "rtn-1%"):
        with pytest.raises(KvsinkError, match="write for example kvquant-1%"):
            kvsink.get_method(name)
    with pytest.raises(UnknownName):
        kvsink.get_method("kvquan-1%")
    model = build("llama")
    report = kvsink.rewrite(model, "kvquant-1%", calibration=tokens(8, 64, seed=1))
    assert report.method == "kvquant-1%" and "1 % outliers" in report.layers[0].key
    assert "kvsink.append_" in kvsink.explain(model)


def test_declines() -> None:
    with pytest.raises(UnsupportedError, match="outliers need kind='nuq'"):
        SideSpec(bits=2, kind="uniform", outliers=0.01)
    with pytest.raises(UnsupportedError, match="not a power of two"):
        SideSpec(bits=2, kind="nuq", outliers=0.01, outlier_tokens=12)
    spec = SideSpec(bits=2, kind="nuq", outliers=0.01)
    assert [spec.resolved(h, 128).outlier_tokens for h in (2, 8, 32, 256)] == [128, 32, 8, 1]
    with pytest.raises(UnsupportedError, match="more than the 32768 an outlier's index can name; use outliers=0"):
        spec.resolved(512, 128)
