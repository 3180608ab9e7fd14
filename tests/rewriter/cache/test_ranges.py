"""Keys and values of any size: v_proj·s with o_proj / s, and k_proj·s with q_proj / s, are the same model and cost the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.cache.ranges import exponent
from kvsink.codecs import Codec
from kvsink.errors import KvsinkError
from kvsink.kernels.backends import Shape
from kvsink.kernels.cpu import attend as attend_cpu
from kvsink.kernels.cuda import backend as cuda_tiles
from kvsink.kernels.triton import attend as attend_triton
from kvsink.model.passing import given_cache
from kvsink.model.runtime import runtime_of
from tests.close import FUSED_FLOAT32, largest_difference
from tests.graphs import text_for
from tests.models import HEAD_DIM, KV_HEADS, build, tokens
from tests.states import CPU, GPU, shape_of

_PAIRS = {"k": ("k_proj", "q_proj"), "v": ("v_proj", "o_proj")}
_EIGHT_BITS = 0.05  # of the largest logit, at any size


def scaled(side: str, factor: float) -> Any:
    """The same function with keys or values `factor` times as large."""
    model = build("llama")
    for layer in model.model.layers:
        grown, shrunk = (getattr(layer.self_attn, name).weight.data for name in _PAIRS[side])
        grown.mul_(factor)
        shrunk.div_(factor)
    return model


def rewritten(side: str, factor: float, method: str, **options: Any) -> Any:
    model = scaled(side, factor)
    if kvsink.get_method(method).protect.startswith("first:"):
        options["protect"] = "first:1"  # not all of a tiny text
    kvsink.rewrite(model, method, calibration=text_for(method, **options), **options)
    return model


def fed(model: Any, cache: Any) -> Tensor:
    """Logits of a chunk and two steps that read earlier rows from the cache."""
    with torch.no_grad():
        outs = [model(tokens(2, n, seed=n), **given_cache(model, cache), use_cache=True).logits for n in (38, 2, 1, 1)]
    return torch.cat(outs[1:], 1)


@pytest.mark.sample(3)
@pytest.mark.parametrize("factor", [1e6, 1e-7, *(pytest.param(f, marks=pytest.mark.slow) for f in (1e5, 1e-5))])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("method", ["rtn", "klt", "centred"])
def test_8_bits_cost_the_same_at_every_size(method: str, side: str, factor: float) -> None:
    for max_length in (None, 64):
        one, off = (error(side, size, method, max_length) for size in (1.0, factor))
        assert one <= _EIGHT_BITS and off <= 2 * one


def error(side: str, factor: float, method: str, max_length: int | None) -> float:
    """How far logits at 8 bits are off those of the stock model, in units of the largest."""
    stock, model = scaled(side, factor), rewritten(side, factor, method, key_bits=8, value_bits=8)
    wanted = fed(stock, DynamicCache(config=stock.config))
    return largest_difference(fed(model, KVSinkCache.for_model(model, 2, max_length)), wanted) / float(wanted.abs().max())


@pytest.mark.sample(3)
@pytest.mark.parametrize("power", [20, pytest.param(-20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", sorted({*kvsink.methods()} - {"kvarn"}))  # which clamps deviations and scales at fixed sizes
def test_powers_of_two_change_no_code(method: str, power: int) -> None:
    for side in _PAIRS:
        one, two = (rewritten(side, factor, method) for factor in (1.0, 2.0**power))
        plans = [runtime_of(m).plans for m in (one, two)]
        specs = [[getattr(p.codec, "key" if side == "k" else "value") for p in each] for each in plans]
        assert all(s.exponent == 0 for s in specs[0]) and all(abs(s.exponent - power) <= 3 for s in specs[1])
        caches = [KVSinkCache.for_model(m, 2) for m in (one, two)]
        logits = [fed(m, c) for m, c in zip((one, two), caches, strict=True)]
        for a, b in zip(caches[0].packed_layers(), caches[1].packed_layers(), strict=True):
            assert torch.equal(a.k_codes, b.k_codes) and torch.equal(a.v_codes, b.v_codes)
        assert largest_difference(*logits) <= FUSED_FLOAT32 * float(logits[0].abs().max())


def test_common_sizes_are_left_as_they_are() -> None:
    assert [exponent(s) for s in (0.0, 2.0**-10, 1.0, 2.0**10)] == [0, 0, 0, 0]
    assert [exponent(s) for s in (2.0**20, 1.2 * 2.0**-30, 1e300, float("inf"))] == [20, -30, 120, 0]


@pytest.mark.parametrize("method", ["rtn", "klt"])
def test_a_compiled_step_reads_the_same_rows(method: str) -> None:
    model = rewritten("v", 1e6, method).double()  # in float32, sums in another order turn a gain by one rounding
    torch._dynamo.reset()
    run = torch.compile(model, backend="kvsink", options={"kvsink.inner": "eager"})
    caches = [KVSinkCache.for_model(model, 2, 64) for _ in range(2)]
    outs = []
    with torch.no_grad():
        for call, cache in ((run, caches[0]), (model, caches[1])):
            outs.append([call(tokens(2, n, seed=n), **given_cache(model, cache)).logits for n in (20, 1, 1)])
    torch._dynamo.reset()
    assert largest_difference(*outs) <= FUSED_FLOAT32 * float(outs[1][0].abs().max())


def test_kernels_decline_other_units_in_words() -> None:
    plan = runtime_of(rewritten("v", 1e6, "centred:even", key_bits=2, value_bits=2)).plans[0]
    codec: Codec = plan.codec
    row = torch.zeros(1, KV_HEADS, 1, HEAD_DIM)
    assert codec.value.exponent and codec.opaque
    assert attend_cpu.declines(codec.format, shape_of(row), CPU) == "rows beyond the range of float16"
    assert attend_triton.declines(codec.format, shape_of(row), GPU) == "rows beyond the range of float16"
    shape = Shape(4, 2, 128, 128, 128, torch.float16)
    assert cuda_tiles.declines(codec.format.in_tiles(), shape, None) == "values beyond the range of float16"


@pytest.mark.parametrize(("factor", "words"), [(1e7, r"\S+e\+07, above the 6.55e\+04"), (1e-8, r"\S+e-08, below the 7.63e-06")])
@pytest.mark.parametrize("side", ["k", "v"])
def test_a_prompt_beyond_the_rewritten_range_is_refused(side: str, factor: float, words: str) -> None:
    model = rewritten(side, 1.0, "rtn", protect="none")
    getattr(model.model.layers[1].self_attn, _PAIRS[side][0]).weight.data.mul_(factor)
    name = "keys" if side == "k" else "values"
    with pytest.raises(KvsinkError, match=f"layer 1: {name} of this prompt reach {words}"):
        fed(model, KVSinkCache.for_model(model, 2))


def test_rows_that_stay_exact_may_have_any_size() -> None:
    stock, model = build("llama"), rewritten("v", 1.0, "rtn", key_bits=16, value_bits=8, protect="first:1")
    for m in (stock, model):
        attention = m.model.layers[0].self_attn
        attention.v_proj.register_forward_hook(lambda module, args, out: _first_row_times(out, 1e7))
    cache = KVSinkCache.for_model(model, 2)
    wanted = fed(stock, DynamicCache(config=stock.config))
    assert largest_difference(fed(model, cache), wanted) <= _EIGHT_BITS * float(wanted.abs().max())


def _first_row_times(out: Tensor, factor: float) -> Tensor:
    """Values of a prompt with the first row made large; later rows are not touched."""
    if out.shape[1] == 38:
        out = out.clone()
        out[:, 0] *= factor
    return out
