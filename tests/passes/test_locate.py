"""The pass reports every site and every refusal, and edits nothing."""

from __future__ import annotations

from kvsink.graph.pipeline import run_passes

from ..graphs import stock_graph


def test_every_site_is_recorded() -> None:
    gm = stock_graph("llama", "sdpa", "static", 1)
    before = str(gm.graph)
    report = run_passes(gm, ("normalize", "locate"))
    assert [record.layer for record in report.done("locate")] == [0, 1]
    assert str(gm.graph) == before


def test_every_refusal_is_recorded_with_its_reason() -> None:
    report = run_passes(stock_graph("gemma2", "eager", "none", 5), ("normalize", "locate"))
    assert [record.path for record in report.declined("locate")] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert all(record.reason for record in report.declined())
