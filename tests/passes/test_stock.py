"""On a stock cache new rows are coded and decoded on their way in; the cache keeps the model's own basis."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvsink.graph.capture import capture, capture_export
from kvsink.graph.pipeline import run_passes
from kvsink.graph.sites import find_sites
from kvsink.graph.targets import kind

from ..close import FUSED_FLOAT32, largest_difference
from ..graphs import PAST, plan_of, rewritten, run, values_of
from ..models import stock_cache, tokens

METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("klt", {"protect": "none"}),
    ("klt", {"protect": "first:2"}),
    ("centred", {"protect": "first:15"}),
    ("rotatekv", {"protect": "none"}),
    ("rtn", {}),
    ("cq", {}),
    ("kvquant", {}),
)


def step(model: Any, cache: str, length: int) -> torch.fx.GraphModule:
    held = stock_cache(cache, model)
    if held is not None and length == 1:
        with torch.no_grad():
            model(tokens(length=PAST), past_key_values=held)
    return capture(model, tokens(length=length, seed=5), held)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("cache", "length"), [("static", 1), ("static", 6), ("dynamic", 1), pytest.param("none", 6, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda case: str(case))
def test_the_first_layer_receives_decoded_rows(method: str, options: dict[str, Any], cache: str, length: int) -> None:
    model = rewritten("llama", "sdpa", method, **options)
    gm, plan = step(model, cache, length), plan_of(model)
    before = values_of(gm)
    site = find_sites(gm)[0]
    codec, tables = plan(site).codec, plan(site).tables
    k, v, positions = before[site.k_rope], before[site.v_new], before[site.positions]
    codes, scale = codec.encode_keys(before[site.k_pre], before[site.cos], before[site.sin], positions, tables, False)
    if not (codec.key.domain == "block" or codec.key.center):
        codes, scale = codec.encode_keys(k, before[site.cos], before[site.sin], positions, tables, True)
    wanted_k = codec.decode_keys(codes, scale, positions, tables)
    wanted_v = codec.decode_values(*codec.encode_values(v, tables), tables)
    kept = sum(s.count for s in plan(site).segments if s.source == "first")
    keep = (positions < kept)[:, None, :, None]
    wanted_k, wanted_v = torch.where(keep, k, wanted_k), torch.where(keep, v, wanted_v)

    report = run_passes(gm, plan=plan)
    assert len(report.done("quantize")) == len(report.done("verify")) == 2 and not report.done("fuse")
    after = values_of(gm)
    core = next(node for node in gm.graph.nodes if kind(node) == "scaled_dot_product_attention")
    group = torch.arange(core.meta["example_value"].shape[1]) // site.repeats
    for operand, wanted in ((core.args[1], wanted_k), (core.args[2], wanted_v)):
        rows = after[operand]
        first = 0 if length > 1 else PAST
        seen = rows[:, :, first : first + length]
        wanted = wanted if seen.shape[1] == wanted.shape[1] else wanted[:, group]
        assert largest_difference(seen, wanted) <= FUSED_FLOAT32


def test_16_bit_changes_nothing() -> None:
    model = rewritten("llama", "sdpa", "rtn", key_bits=16, value_bits=16)
    gm = step(model, "dynamic", 1)
    before = run(gm)
    report = run_passes(gm, plan=plan_of(model))
    assert largest_difference(before, run(gm)) == 0.0
    assert all("16 bit" in reason for reason in report.left_alone().values()) and len(report.left_alone()) == 2


@pytest.mark.parametrize("family", ["phi3", "qwen3"])
@pytest.mark.parametrize("method", ["klt", "rotatekv"])
def test_eight_bits_stay_near(family: str, method: str) -> None:
    model = rewritten(family, "eager", method, key_bits=8, value_bits=8)
    gm = step(model, "static", 1)
    before = run(gm)[0]
    run_passes(gm, plan=plan_of(model))
    assert 0.0 < largest_difference(before, run(gm)[0]) <= 0.05  # logits of order one, rows within 1 % of their range


def test_sinks_of_a_prefill_stay_exact() -> None:
    model = rewritten("llama", "sdpa", "rotatekv", protect="massive:3", fold=False)
    gm, plan = step(model, "static", 6), plan_of(model)
    site = find_sites(gm)[0]
    k = values_of(gm)[site.k_rope]
    run_passes(gm, plan=plan)
    hidden = values_of(gm)[site.hidden_in]
    rows = hidden.abs().flatten(1).topk(3).indices // hidden.shape[-1]
    core = next(node for node in gm.graph.nodes if kind(node) == "scaled_dot_product_attention")
    stored = values_of(gm)[core.args[1]][:, :, :6]
    stored = stored[:, :: stored.shape[1] // k.shape[1]]  # some versions repeat the heads before attention
    exact = (stored == k).all(-1).all(1)[0]
    assert exact.nonzero().flatten().tolist() == sorted(set(rows[0].tolist()))


def test_without_cache_and_plan_nothing_is_done() -> None:
    model = rewritten("llama", "sdpa", "rtn")
    gm = step(model, "none", 6)
    before = str(gm.graph)
    report = run_passes(gm)
    assert str(gm.graph) == before
    assert set(report.left_alone().values()) == {"no cache, so nothing is stored"}


def test_an_exported_graph() -> None:
    model = rewritten("llama", "sdpa", "klt", key_bits=8, value_bits=8)
    gm = capture_export(model)
    with torch.no_grad():
        before = gm(**gm.meta["kvsink_inputs"])
        report = run_passes(gm, plan=plan_of(model))
        after = gm(**gm.meta["kvsink_inputs"])
    assert len(report.done("quantize")) == 2
    assert 0.0 < largest_difference(before[0], after[0]) <= 0.05
