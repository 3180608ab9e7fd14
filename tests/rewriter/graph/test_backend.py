"""The dynamo backend: options, refusals, a stock cache whose numbers are right and whose warning comes once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import kvsink
from kvsink.cache.storage import BLOCK
from kvsink.errors import CalibrationError, KvsinkError, UnknownName
from kvsink.graph import backend
from kvsink.graph.backend import kvsink_backend, last_report, split_options, stock_plan
from tests.close import FUSED_FLOAT32, largest_difference
from tests.graphs import rewritten
from tests.models import build, stock_cache, tokens


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend._told.clear()
    yield
    torch._dynamo.reset()


def compiled(model: Any, **options: Any) -> Any:
    given = {"inner": "eager", **options}
    return torch.compile(model, backend="kvsink", options={f"kvsink.{name}": value for name, value in given.items()})


def cause(error: BaseException) -> BaseException:
    """What the backend raised, inside whatever dynamo wraps around it."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    return error


def steps(run: Any, cache: Any, *lengths: int) -> list[Tensor]:
    with torch.no_grad():
        return [run(tokens(2, n, seed=n), past_key_values=cache).logits for n in lengths]


def test_the_backend_is_found_by_name() -> None:
    assert "kvsink" in torch._dynamo.list_backends(exclude_tags=())
    assert torch._dynamo.lookup_backend("kvsink") is kvsink_backend


def test_options_are_split() -> None:
    ours, rest = split_options({"kvsink.method": "rtn", "max_autotune": True})
    assert (ours, rest) == ({"method": "rtn"}, {"max_autotune": True}) and split_options(None) == ({}, {})
    with pytest.raises(UnknownName, match="unknown compile option 'kvsink.methd'; nearest known: kvsink.method"):
        split_options({"kvsink.methd": "rtn"})


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"methd": "rtn"}, UnknownName, "unknown compile option 'kvsink.methd'"),
        ({"method": "rtm"}, UnknownName, "unknown method 'rtm'; nearest known: rtn"),
        ({"method": "klt"}, CalibrationError, "method klt needs calibration.*call kvsink.rewrite"),
        ({"method": "rtn", "key_bits": 11}, KvsinkError, "key bits=11 is impossible"),
        ({"method": "rtn", "protect": "top:3"}, UnknownName, "unknown protection 'top'"),
        ({"inner": "triton"}, KvsinkError, "kvsink.inner='triton' is not one of inductor, aot_eager, eager"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[KvsinkError], words: str) -> None:
    model = build("llama")
    with pytest.raises(Exception, match=words) as caught, torch.no_grad():
        compiled(model, **options)(tokens(1, 5), past_key_values=stock_cache("static", model))
    assert isinstance(cause(caught.value), error)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_stock_cache_warns_once_and_keeps_its_numbers(kind: str) -> None:
    model = build("llama")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        run = compiled(model, method="rtn", key_bits=8, value_bits=8)
        got = steps(run, stock_cache(kind, model), 9, 1, 1)
    told = [str(w.message) for w in seen if "stock" in str(w.message)]
    assert len(told) == 1 and f"2 attention layers run on a stock {kind} cache" in told[0] and "no memory is saved" in told[0]
    wanted = steps(model, stock_cache(kind, model), 9, 1, 1)
    for one, two in zip(got, wanted, strict=True):
        assert 0 < largest_difference(one, two) <= 0.05 * float(two.abs().max())  # 8 bits


def test_16_bit_on_a_stock_cache_is_the_model() -> None:
    model = build("llama")
    run = compiled(model, method="rtn", key_bits=16, value_bits=16)
    with pytest.warns(UserWarning, match="no memory is saved"):
        got = steps(run, stock_cache("static", model), 9, 1)
    assert largest_difference(got, steps(model, stock_cache("static", model), 9, 1)) <= FUSED_FLOAT32


def test_left_out_steps_are_named() -> None:
    with pytest.warns(UserWarning, match="centred runs without its calibrated steps .center."):
        stock_plan({"method": "centred"})
    with pytest.warns(UserWarning, match="rotatekv runs without its calibrated steps .reorder."):
        stock_plan({"method": "rotatekv"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stock_plan({"method": "rtn"})


def test_without_fuse_the_plain_operators_run() -> None:
    model = rewritten("llama", "sdpa", "klt")
    runs = [(compiled(model), True), (compiled(model, fuse=False), False)]
    outs = []
    for run, fused in runs:
        torch._dynamo.reset()
        outs.append(steps(run, kvsink.KVSinkCache.for_model(model, 2, max_length=32), 9, 1))
        report = last_report()
        assert report is not None and bool(report.done("fuse")) == fused and len(report.sites) == 2
    assert largest_difference(outs[0], outs[1]) <= FUSED_FLOAT32 * float(outs[0][0].abs().max())


def test_a_model_without_cache_passes_through() -> None:
    model = build("llama")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        got = compiled(model)(tokens(1, 9), use_cache=False).logits
        assert largest_difference(got, model(tokens(1, 9)).logits) <= FUSED_FLOAT32


def test_aot_eager_is_another_inner() -> None:
    model = rewritten("llama", "sdpa", "rtn")
    run = torch.compile(model, backend="kvsink", options={"kvsink.inner": "aot_eager"})
    caches = [kvsink.KVSinkCache.for_model(model, 2, max_length=32) for _ in range(2)]
    got, wanted = steps(run, caches[0], 9, 1, 1), steps(model, caches[1], 9, 1, 1)
    assert largest_difference(got, wanted) <= FUSED_FLOAT32 * float(wanted[0].abs().max())
    assert largest_difference(list(caches[0].tensors().values()), list(caches[1].tensors().values())) <= FUSED_FLOAT32


@pytest.mark.parametrize(
    ("method", "dynamic"),
    [
        ("rtn", None),
        *(pytest.param(m, d, marks=pytest.mark.slow) for m in ("klt", "kivi", "antkv") for d in (None, False)),
        pytest.param("klt", True, marks=pytest.mark.slow),
    ],
)
def test_a_growing_cache_is_the_uncompiled_model(method: str, dynamic: bool | None) -> None:
    model = rewritten("llama", "sdpa", method)
    run = torch.compile(model, backend="kvsink", options={"kvsink.inner": "eager"}, dynamic=dynamic)
    caches = [kvsink.KVSinkCache.for_model(model) for _ in range(2)]
    lengths = (BLOCK - 2, 1, 1, 1, 1)  # storage is made in the first graph and longer in the fourth
    got, wanted = steps(run, caches[0], *lengths), steps(model, caches[1], *lengths)
    assert not torch._dynamo.utils.counters["graph_break"]
    report = last_report()
    assert report is not None and len(report.done("fuse")) == (0 if method == "antkv" else 2)
    assert largest_difference(got, wanted) <= FUSED_FLOAT32 * float(wanted[0].abs().max())
    for a, b in zip(caches[0].packed_layers(), caches[1].packed_layers(), strict=True):
        assert torch.equal(a.k_codes[:, :, : a._held], b.k_codes[:, :, : b._held]) and a._held == b._held == BLOCK + 2


@pytest.mark.parametrize("max_length", [None, 32])
def test_another_batch_after_a_reset_is_compiled_too(max_length: int | None) -> None:
    model = rewritten("llama", "sdpa", "rtn")
    run, cache = compiled(model), kvsink.KVSinkCache.for_model(model, 2, max_length)
    steps(run, cache, 9, 1)
    one = tokens(1, 9, seed=3)
    with torch.no_grad():
        with pytest.raises(KvsinkError, match="holds 2 sequences and is given 1"):
            run(one, past_key_values=cache)
        cache.reset()
        wanted = model(one, past_key_values=kvsink.KVSinkCache.for_model(model)).logits
        assert largest_difference(run(one, past_key_values=cache).logits, wanted) <= FUSED_FLOAT32 * float(wanted.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(kvsink.methods()))
def test_inductor_equals_uncompiled(method: str) -> None:
    model = rewritten("llama", "sdpa", method, window=3)
    run = torch.compile(model, backend="kvsink")
    caches = [kvsink.KVSinkCache.for_model(model, 2, max_length=32) for _ in range(2)]
    got, wanted = steps(run, caches[0], 9, 1, 1, 1), steps(model, caches[1], 9, 1, 1, 1)
    assert largest_difference(got, wanted) <= FUSED_FLOAT32 * float(wanted[0].abs().max())
    for a, b in zip(caches[0].packed_layers(), caches[1].packed_layers(), strict=True):
        assert torch.equal(a.k_codes, b.k_codes) and torch.equal(a.v_codes, b.v_codes)
        assert torch.equal(a.exact_slot, b.exact_slot) and int(a.length) == int(b.length) == 12
