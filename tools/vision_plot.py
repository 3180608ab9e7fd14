"""Draw how much attention pictures, text and the first token receive in every layer: one bar per layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["plot_shares"]

_COLORS = {"visual": "#1f77b4", "text": "#ff7f0e", "first": "#7f7f7f"}
_NAMES = {"visual": "pictures", "text": "text", "first": "first token"}


def plot_shares(shares: Sequence[dict[str, float]], rows: dict[str, float], path: Path, title: str) -> None:
    """shares: of every layer, as `kvsink.evaluate.vision.attention_shares` gives them; rows: the share of tokens of each kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.6))
    layers = range(len(shares))
    bottom = [0.0] * len(shares)
    for kind, color in _COLORS.items():
        heights = [s[kind] for s in shares]
        axes.bar(layers, heights, bottom=bottom, color=color, label=f"{_NAMES[kind]} ({rows[kind]:.0%} of the rows)")
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set(xlabel="layer", ylabel="share of attention", title=title, ylim=(0, 1))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
