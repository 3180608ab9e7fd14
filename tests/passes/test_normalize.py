"""Eager attention becomes SDPA with the same outputs and cache writes; routers and softcap keep their softmax."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from kvsink.graph.pipeline import run_passes
from kvsink.graph.targets import kind

from ..close import EXACT_FLOAT64, SOFTMAX_IN_FLOAT32, largest_difference
from ..graphs import run, stock_graph
from ..models import FAMILIES

WRITES = ("index_copy_", "add_", "copy_", "setitem", "cat")


def kinds(gm: torch.fx.GraphModule) -> Counter[str]:
    return Counter(kind(node) for node in gm.graph.nodes)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("cache", "length", "dtype"),
    [
        ("none", 5, torch.float32),
        ("static", 1, torch.float32),
        ("dynamic", 1, torch.float32),
        pytest.param("static", 1, torch.float64, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_caches_are_kept(family: str, cache: str, length: int, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and "moe" in family:
        pytest.skip("torch multiplies experts in float32 or narrower only")
    gm = stock_graph(family, "eager", cache, length, dtype)
    before, writes = run(gm), {name: kinds(gm)[name] for name in WRITES}
    report = run_passes(gm, ("normalize", "locate"))
    assert len(report.done("normalize")) == 2
    after = kinds(gm)
    assert after["scaled_dot_product_attention"] == 2 and after["softmax"] == ("moe" in family) * 2
    assert {name: after[name] for name in WRITES} == writes
    exact = dtype == torch.float64 and family == "gpt2"  # the only family whose eager softmax stays in the model's dtype
    assert largest_difference(before, run(gm)) <= (EXACT_FLOAT64 if exact else SOFTMAX_IN_FLOAT32)


def test_sdpa_is_left_alone() -> None:
    report = run_passes(stock_graph("llama", "sdpa", "none", 5), ("normalize",))
    assert [record.reason for record in report.records] == ["already scaled_dot_product_attention"] * 2


def test_softcap_keeps_its_softmax() -> None:
    gm = stock_graph("gemma2", "eager", "none", 5)
    report = run_passes(gm)
    assert not report.sites and kinds(gm)["softmax"] == 2
    assert all("softcap" in reason for reason in report.left_alone().values()) and len(report.left_alone()) == 2
