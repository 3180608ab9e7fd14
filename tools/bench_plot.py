"""`kvsink-bench plot`: bars of the speed-up over the fastest 16-bit attention, with the byte limit above each, from JSON rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsink.errors import KvsinkError

__all__ = ["plot_kernels", "read_rows"]


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
    """One group of bars per shape, one bar per method and bits; the last row of each counts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kernels = [r for r in rows if r.get("kind") == "kernel" and r.get("speedup")]
    if not kernels:
        raise KvsinkError("no rows of `kvsink-bench kernels` to plot; run it with --out first")
    shapes = sorted({(r["B"], r["T"]) for r in kernels})
    codes = sorted({(r["method"], r["bits"]) for r in kernels})
    held = {(r["method"], r["bits"], r["B"], r["T"]): r for r in kernels}
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.8 / len(codes)
    for i, (method, bits) in enumerate(codes):
        found = [(x, held[(method, bits, b, t)]) for x, (b, t) in enumerate(shapes) if (method, bits, b, t) in held]
        at = [x + (i - (len(codes) - 1) / 2) * width for x, _ in found]
        bars = axes.bar(at, [r["speedup"] for _, r in found], width * 0.94, label=f"{method}, {bits} bit")
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
        limits = [min(r["byte_limit_speedup"], 8.5) for _, r in found]
        axes.hlines(limits, [x - width / 2 for x in at], [x + width / 2 for x in at], color="black", linewidth=1)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), [f"B{b} T{t}" for b, t in shapes])
    axes.set_ylim(0, 8.6)
    axes.set_ylabel("times the fastest fp16 SDPA")
    axes.set_title(f"decode attention, {kernels[-1]['device']}; black: byte limit (T1024: beyond the scale)", fontsize=9)
    axes.legend(fontsize=7, ncols=len(codes), loc="upper center")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    pyplot.close(figure)
