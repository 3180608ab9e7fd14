"""The plot of KL against position draws the figures of the row, with or without intervals."""

from __future__ import annotations

import pytest

from kvsink.evaluate.evaluation import evaluate
from tests.models import build, tokens

pytest.importorskip("matplotlib", reason="plots need matplotlib")


@pytest.mark.parametrize("windows", [1, 3])
def test_lines_are_the_figures(tmp_path, monkeypatch, windows):
    from matplotlib import pyplot

    from kvsink.tools.length_plot import plot_lengths

    model, other = build("llama"), build("llama")
    other.lm_head.weight.data *= 1.3
    results = [
        evaluate(other, model, tokens(windows, 100), edges=(0, 16, 32, 64, 100), model_name=f"folder/{name}", method="kvsink x")
        for name in ("one", "two")
    ]
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    plot_lengths(results, tmp_path / "deep" / "plot.png")
    (axes,) = drawn[0].axes
    assert [line.get_label().split(",")[0] for line in axes.lines] == ["one", "two"]
    for line, result in zip(axes.lines, results, strict=True):
        at, kl = line.get_data()
        assert list(kl) == [b.kl for b in result.positions]
        assert all(max(b.start, 1) <= x < b.stop for x, b in zip(at, result.positions, strict=True))
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0-16", "16-32", "32-64", "64-100"]
    assert len(axes.collections) == (2 if windows > 1 else 0)  # bands
    assert (tmp_path / "deep" / "plot.png").read_bytes()[:4] == b"\x89PNG"
