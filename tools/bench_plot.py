"""`kvsink-bench plot`: bars of the speed-up over the fastest 16-bit attention, by length or by model, from JSON rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvsink.errors import KvsinkError

__all__ = ["plot_kernels", "plot_shapes", "read_rows"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file. Raises KvsinkError naming the line that cannot be read."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise KvsinkError(f"{path} line {number} is no row of kvsink-bench ({error}); measure again with --out") from error
    return rows


def plot_kernels(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """One group of bars per batch and length, one bar per method and bits; the last row of each counts."""
    kernels = _timed(rows)
    _bars(
        kernels,
        lambda r: f"B{r['B']} T{r['T']}",
        sorted({(r["B"], r["T"]) for r in kernels}),
        lambda r: (r["B"], r["T"]),
        out,
        "decode attention",
    )


def plot_shapes(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """One group of bars per model, at the batch and length of the most rows there are; the last row of each counts."""
    kernels = [r for r in _timed(rows) if "model" in r and "of_plain" not in r]
    at = Counter((r["B"], r["T"]) for r in kernels).most_common(1)
    kernels = [r for r in kernels if (r["B"], r["T"]) == at[0][0]]
    models = list(dict.fromkeys(r["model"] for r in kernels))
    b, t = at[0][0]
    _bars(kernels, lambda r: r["model"], models, lambda r: r["model"], out, f"decode attention of one layer, B{b} T{t}")


def _timed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    kernels = [r for r in rows if r.get("kind") == "kernel" and r.get("speedup")]
    if not kernels:
        raise KvsinkError("no rows of `kvsink-bench kernels` or `shapes` to plot; run it with --out first")
    return kernels


def _bars(
    kernels: Sequence[dict[str, Any]],
    label: Callable[[dict[str, Any]], str],
    groups: Sequence[Any],
    group: Callable[[dict[str, Any]], Any],
    out: Path,
    title: str,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    codes = sorted({(r["method"], r["bits"]) for r in kernels}, key=str)
    held = {(r["method"], r["bits"], group(r)): r for r in kernels}
    names = {group(r): label(r) for r in kernels}
    top = 1.05 * max(1.0, *(r["speedup"] for r in kernels), *(min(r["byte_limit_speedup"], 8.0) for r in kernels))
    figure, axes = pyplot.subplots(figsize=(max(8, 1.3 * len(groups)), 3.6), layout="constrained")
    width = 0.8 / len(codes)
    for i, code in enumerate(codes):
        found = [(x, held[code + (g,)]) for x, g in enumerate(groups) if code + (g,) in held]
        at = [x + (i - (len(codes) - 1) / 2) * width for x, _ in found]
        bars = axes.bar(at, [r["speedup"] for _, r in found], width * 0.94, label=f"{code[0]}, {code[1]} bit")
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
        limits = [min(r["byte_limit_speedup"], top) for _, r in found]
        axes.hlines(limits, [x - width / 2 for x in at], [x + width / 2 for x in at], color="black", linewidth=1)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [names[g] for g in groups], fontsize=8)
    axes.set_ylim(0, 1.12 * top)
    axes.set_ylabel("times the fastest in fp16")
    axes.set_title(f"{title}, {kernels[-1]['device']}; black: byte limit, or beyond the scale", fontsize=9)
    axes.legend(fontsize=7, ncols=len(codes), loc="upper center")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    pyplot.close(figure)
