"""Order, reports and text of the pipeline."""

from __future__ import annotations

import pytest

from kvsink.errors import KvsinkError, UnknownName
from kvsink.graph.pipeline import DEFAULT, explain_graph, make_passes, run_passes
from kvsink.passes.base import RewritePass
from tests.graphs import packed_graph, stock_graph


def test_the_default_order_is_accepted() -> None:
    assert tuple(rewrite.name for rewrite in make_passes()) == DEFAULT


@pytest.mark.parametrize("names", [("quantize", "center"), ("fuse", "preserve"), ("locate", "normalize"), ("reorder", "rotate")])
def test_a_wrong_order_is_refused(names: tuple[str, str]) -> None:
    with pytest.raises(KvsinkError, match=r"must come (after|before)"):
        make_passes(names)


def test_an_unknown_pass_names_its_neighbours() -> None:
    with pytest.raises(UnknownName, match="unknown pass 'quantise'; nearest known: quantize"):
        make_passes(("quantise",))


@pytest.mark.parametrize("where", ["after", "before"])
def test_a_pass_that_names_no_pass_is_refused(where: str) -> None:
    late = type("Late", (RewritePass,), {"name": "late", "exact": True, where: ("quantise",)})()
    with pytest.raises(UnknownName, match=r"unknown pass 'quantise'; nearest known: quantize.*\. Pass 'late' names it"):
        make_passes((late,))


def test_every_site_left_alone_has_a_reason() -> None:
    for gm in (
        stock_graph("llama", "eager", "static", 1),
        packed_graph("gemma3", "sdpa", "klt", 1),
        stock_graph("gemma2", "eager", "none", 5),
    ):
        report = run_passes(gm)
        assert all(record.reason for record in report.records if not record.done)
        assert all(not record.reason for record in report.records if record.done)


def test_the_graph_is_executable_after_each_pass_by_name_only() -> None:
    seen: list[str] = []
    run_passes(packed_graph("llama", "sdpa", "rtn", 1), watch=lambda name, gm: seen.append(name))
    assert tuple(seen) == DEFAULT


def test_explain_shows_before_parts_and_fused() -> None:
    text = explain_graph(packed_graph("gemma3", "sdpa", "klt:best", 1))
    assert "model.layers.1.self_attn, before" in text and "after, as plain operators" in text and "after, fused" in text
    before, parts, fused = (text.index(mark) for mark in ("kvsink.read(", "kvsink.quantize(", "kvsink.attend("))
    assert before < parts < fused
    assert text.endswith("left alone: model.layers.0.self_attn: a stock static cache and no codec for it")


def test_the_text_of_a_site_does_not_change_from_run_to_run() -> None:
    first, second = (explain_graph(packed_graph("llama", "sdpa", "klt", 1)) for _ in range(2))
    assert first == second
