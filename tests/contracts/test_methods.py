"""What every registered method promises, derived from its declaration; a new method file is tested by being there."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.codecs.quantizers import QUANTIZERS
from kvsink.graph.backend import last_report
from kvsink.kernels import stages
from kvsink.kernels.packing import unpack_bits, unpack_codes
from kvsink.kernels.quantize import segments
from kvsink.model.runtime import runtime_of
from kvsink.report import counted_bits
from tests.close import FUSED_FLOAT32, SOFTMAX_IN_FLOAT32, largest_difference
from tests.graphs import rewritten, text_for
from tests.models import HEAD_DIM, KV_HEADS, build, tokens
from tests.states import read_codes

METHODS = sorted(kvsink.methods())
KINDS_OF_BITS = (2, 3, 4, 6, 8)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def observes(method: str) -> bool:
    """Whether a method protects rows by the attention they receive."""
    return "anchors" in kvsink.get_method(method).protect


@cache
def rows_of_the_model() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """True keys before and after RoPE and values of layer 1, with positions and angles, over 100 tokens of 4 texts."""
    model = rewritten("llama", "sdpa", "rtn", key_bits=16, value_bits=16)
    cache = KVSinkCache.for_model(model, 4, max_length=100)
    with torch.no_grad():
        model(tokens(4, 100, seed=2), past_key_values=cache)
    layer, positions = cache.packed_layers()[1], torch.arange(100)[None]
    cos, sin = runtime_of(model).angles(1, positions)
    return stages.unrope_rows(layer.k_codes, cos, sin), layer.k_codes, layer.v_codes, positions, cos, sin


def codec_of(method: str, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """The codec of layer 1 and its tables; values are not folded, so that they are the model's own."""
    model = rewritten("llama", "sdpa", method, fold=False, **options)
    runtime = runtime_of(model)
    codec = runtime.plans[1].codec
    return codec, dict(zip(codec.param_names(), runtime.params(1, codec, 128, torch.device("cpu")), strict=True))


def unpacked(codes: Tensor, side: Any) -> Tensor:
    if side.couple:
        return unpack_codes(codes, side.code_bits, HEAD_DIM // side.couple)
    return torch.cat(
        [unpack_bits(codes[..., byte : byte + (b - a) * w // 8], w, b - a) for a, b, byte, w in segments(side.widths)], dim=-1
    ).int()


def takes(method: str, bits: float) -> bool:
    """Whether both sides of a method have a setting for so many bits."""
    m = kvsink.get_method(method)
    try:
        return all(m.side(which, bits).resolved(KV_HEADS, HEAD_DIM) for which in ("key", "value"))
    except kvsink.KvsinkError:
        return False


def greedy(model: Any, run: Any, ids: Tensor, count: int = 8) -> list[list[int]]:
    """Tokens of a greedy loop over a static cache: one prefill, then one token at a time."""
    cache = KVSinkCache.for_model(model, ids.shape[0], max_length=32)
    out = []
    with torch.no_grad():
        for _ in range(count):
            ids = run(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            out.append(ids.flatten().tolist())
    return out


@pytest.mark.parametrize("method", METHODS)
def test_the_declaration_is_complete(method: str) -> None:
    m = kvsink.get_method(method)
    assert m.name == method and m.summary and m.source.arxiv
    assert m.source.arxiv == "ours" or (re.fullmatch(r"\d{4}\.\d{5}", m.source.arxiv) and m.source.title)
    assert all(claim.source and claim.setting for claim in m.claims)
    assert m.key.packed and m.value.packed and 0 < m.key_bits <= 8 and 0 < m.value_bits <= 8
    kvsink.rewrite(build("llama"), method, calibration=text_for(method))  # with its own defaults


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", METHODS)
def test_the_error_falls_with_every_bit(method: str) -> None:
    _, k, v, positions, cos, sin = rows_of_the_model()
    errors = []
    chosen = [bits for bits in KINDS_OF_BITS if takes(method, bits)]
    if len(chosen) < 2:
        pytest.skip(f"{method} has no two of {KINDS_OF_BITS} bits")
    for bits in chosen:
        codec, p = codec_of(method, key_bits=bits, value_bits=bits)
        k_back, v_back = read_codes(replace(codec, segments=()), p, k, v, positions, cos, sin)
        assert k_back.shape == k.shape and v_back.shape == v.shape
        errors.append([float((back - x).square().mean() / x.square().mean()) for back, x in ((k_back, k), (v_back, v))])
    for fewer, more in pairwise(errors):
        assert more[0] < 0.7 * fewer[0] and more[1] < 0.7 * fewer[1], errors
    assert max(errors[0]) < 0.5, errors
    if chosen[-1] == 8:
        # A thousandth of the range and less; where the ranges of channels are calibrated, what lies outside saturates.
        assert max(errors[-1]) < (1e-3 if QUANTIZERS[codec.key.kind].learns(codec.key) else 2e-4), errors


@pytest.mark.parametrize("method", METHODS)
def test_codes_do_not_depend_on_where_the_key_is_taken(method: str) -> None:
    """Before RoPE in a compiled graph, after it uncompiled: the same codes, but for rounding at a threshold."""
    pre, _, _, positions, cos, sin = rows_of_the_model()
    codec, p = codec_of(method, **({"key_bits": 4} if takes(method, 4) else {}))
    roped = stages.rope_rows(pre, cos, sin)
    (one, one_scale), (two, two_scale) = (
        codec.encode_keys(k, cos, sin, positions, p, after) for k, after in ((pre, False), (roped, True))
    )
    left, right = unpacked(one, codec.key), unpacked(two, codec.key)
    assert left.numel() >= 4 * 100 * KV_HEADS * HEAD_DIM // 2
    assert (left != right).float().mean() <= 0.001
    if not codec.key.couple:  # neighbouring levels are neighbouring codes
        assert (left - right).abs().max() <= 1
    if one_scale.numel():
        assert (one_scale.float() - two_scale.float()).abs().max() <= 2.0**-10 * one_scale.float().abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_16_bit_changes_nothing(method: str) -> None:
    plain, model = build("llama"), rewritten("llama", "sdpa", method, key_bits=16, value_bits=16)
    first, second = tokens(2, 21, seed=3), tokens(2, 1, seed=4)
    for max_length in (None, 64):
        cache = KVSinkCache.for_model(model, 2, max_length=max_length)
        stock: Any = None
        with torch.no_grad():
            for ids in (first, second, second):
                wanted = plain(ids, past_key_values=stock, use_cache=True)
                stock = wanted.past_key_values
                got = model(ids, past_key_values=cache).logits
                assert largest_difference(got, wanted.logits) <= SOFTMAX_IN_FLOAT32 * float(wanted.logits.abs().max())
    ids = tokens(1, 9, seed=5)
    settings = dict(max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_those_of_the_tensors_and_of_the_report(method: str) -> None:
    model = build("llama", dtype=torch.bfloat16)  # reports count exact rows as 16 bit
    protect = "massive:3+first:2"
    kvsink.rewrite(model, method, calibration=text_for(method, protect=protect), window=6, protect=protect)
    for batch, length in ((1, 64), (3, 32)):
        cache = KVSinkCache.for_model(model, batch, max_length=length)
        with torch.no_grad():
            for step in (length - 2, 1, 1):  # more tokens than exact rows and window
                model(tokens(batch, step, seed=step), past_key_values=cache)
        held = {t.data_ptr(): t for layer in cache.packed_layers() for t in layer.state() if t.numel()}
        assert cache.nbytes() == sum(t.numel() * t.element_size() for t in held.values())
        per_layer = []
        for layer in cache.packed_layers():
            bits = counted_bits(layer.codec, KV_HEADS, HEAD_DIM, tokens=length, batch=batch, layers=len(cache.packed_layers()))
            per_layer.append(sum(bits) * batch * KV_HEADS * HEAD_DIM * length / 8)
        assert abs(cache.nbytes() - sum(per_layer)) < 1e-6 * cache.nbytes()
        elements = 2 * len(per_layer) * batch * KV_HEADS * HEAD_DIM * length
        assert abs(cache.bits_per_element() - 8 * cache.nbytes() / elements) < 1e-9


@pytest.mark.sample(3)
@pytest.mark.parametrize("max_length", [None, 64])
@pytest.mark.parametrize("method", METHODS)
def test_chunks_equal_one_prefill_when_strict(method: str, max_length: int | None) -> None:
    model, ids = rewritten("llama", "sdpa", method, protect="first:2"), tokens(2, 30, seed=7)
    logits, states = [], []
    for chunks in ((30,), (7, 1, 16, 6)):
        cache = KVSinkCache.for_model(model, 2, max_length=max_length, strict=True)
        with torch.no_grad():
            logits.append(torch.cat([model(c, past_key_values=cache).logits for c in ids.split(chunks, dim=1)], dim=1))
        states.append([t for layer in cache.packed_layers() for t in layer.state()])
    assert largest_difference(states[0][:4], states[1][:4]) == 0  # codes and scales of the first layer
    assert largest_difference(logits[0], logits[1]) <= FUSED_FLOAT32 * float(logits[0].abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_new_rows_are_exact_unless_strict(method: str) -> None:
    bits = {"key_bits": 2, "value_bits": 2} if takes(method, 2) else {}
    plain, model = build("llama"), rewritten("llama", "sdpa", method, fold=False, **bits)
    codec = runtime_of(model).plans[1].codec
    ids = tokens(1, 20 + codec.ring + codec.exact_rows, seed=8)  # recent and protected rows are exact even then
    with torch.no_grad():
        wanted = plain(ids).logits
        loose, strict = (model(ids, past_key_values=KVSinkCache.for_model(model, strict=s)).logits for s in (False, True))
    assert largest_difference(loose, wanted) <= SOFTMAX_IN_FLOAT32 * float(wanted.abs().max())
    assert largest_difference(strict, wanted) > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_folding_keeps_the_function(method: str) -> None:
    plain, model = build("llama"), rewritten("llama", "sdpa", method)
    ids = tokens(1, 20, seed=8)
    with torch.no_grad():
        assert largest_difference(model(ids).logits, plain(ids).logits) <= SOFTMAX_IN_FLOAT32 * float(plain(ids).logits.abs().max())


LIKE = ("centred", "kvarn", "kvquant", "nova", "oscar", "oscar-int2", "rotated", "rtn", "static", "tasq", "wush")
SAMPLED = [pytest.param(m, marks=pytest.mark.slow) if m in LIKE else m for m in METHODS]
"""Methods, and among the slow tests those that put nothing into a graph that another one of them does not."""


@pytest.mark.sample(3)
@pytest.mark.parametrize("window", [5, pytest.param(0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", SAMPLED)
def test_compiled_equals_uncompiled(method: str, window: int) -> None:
    model = rewritten("llama", "sdpa", method, window=window)
    compiled = torch.compile(model, backend="kvsink", options={"kvsink.inner": "eager"})
    ids = tokens(2, 9, seed=9)
    assert greedy(model, compiled, ids) == greedy(model, model, ids)
    report = last_report()
    assert report is not None
    if observes(method):  # its anchors need queries, so its operators stay as they are, and that is said
        assert all("anchors" in reason for reason in report.left_alone().values()) and len(report.left_alone()) == 2
    else:
        assert len(report.done("fuse")) == 2 and not report.left_alone()


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", SAMPLED)
def test_explain_shows_the_fused_site(method: str) -> None:
    text = kvsink.explain(rewritten("llama", "sdpa", method, **({"protect": "first:1"} if observes(method) else {})))
    assert "kvsink.append_" in text and "kvsink.attend" in text
