"""From the records of `kvsink-eval --compare` to compare.csv, compare.md and compare.png / compare.svg."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsink.tools.compare_page import markdown, pareto, widths
from kvsink.tools.compare_records import Record, by_windows, kvsink_version, latest, models_in

__all__ = ["COLUMNS", "write_report"]

COLUMNS = (
    "model",
    "text",
    "set",
    "method",
    "key_bits",
    "value_bits",
    "plan",
    "protect",
    "window",
    "status",
    "bits_at_4096",
    "bits_at_window",
    "bits_at_131072",
    "cache_bits_at_4096",
    "tables_mb",
    "perplexity",
    "gap_percent",
    "kl",
    "top1",
    "strict_perplexity",
    "strict_gap_percent",
    "strict_kl",
    "strict_top1",
    "seconds",
    "device",
    "windows",
    "window_tokens",
    "chunk",
    "head_dim",
    "layers",
    "packed_layers",
    "dtype",
    "version",
    "versions",
    "reason",
)


def cells(r: Record) -> dict[str, Any]:
    """One record under COLUMNS."""
    row, measured = r["row"], r["status"] == "measured"

    def percent(name: str) -> float | str:
        return round(100 * r[name], 3) if measured and r.get(name) is not None else ""

    def number(name: str, digits: int) -> float | str:
        return round(r[name], digits) if measured and r.get(name) is not None else ""

    return {
        "model": r["model"],
        "text": r["text"],
        "set": r.get("set", ""),
        "method": r["name"],
        "key_bits": r.get("key_bits", row["key_bits"]),
        "value_bits": r.get("value_bits", row["value_bits"]),
        "plan": row["plan"],
        "protect": r.get("protect", row["protect"]),
        "window": r.get("window", row["window"]),
        "status": r["status"],
        "bits_at_4096": number("bits", 4),
        "bits_at_window": number("bits_at_window", 4),
        "bits_at_131072": number("bits_far", 4),
        "cache_bits_at_4096": number("cache_bits", 4),
        "tables_mb": round(r["table_bytes"] / 1e6, 3) if measured else "",
        "perplexity": number("perplexity", 4),
        "gap_percent": percent("gap"),
        "kl": number("kl", 5),
        "top1": number("top1", 5),
        "strict_perplexity": number("strict_perplexity", 4),
        "strict_gap_percent": percent("strict_gap"),
        "strict_kl": number("strict_kl", 5),
        "strict_top1": number("strict_top1", 5),
        "seconds": r.get("seconds", ""),
        "device": r.get("device", ""),
        "windows": r["windows"],
        "window_tokens": r["window_tokens"],
        "chunk": r["chunk"],
        **{name: r.get(name, "") for name in ("head_dim", "layers", "packed_layers", "dtype")},
        "version": kvsink_version(r),
        "versions": " ".join(f"{k}={v}" for k, v in r.get("versions", {}).items()),
        "reason": r.get("reason", ""),
    }


def write_report(out: Path, records: Sequence[Record]) -> list[str]:
    """Write every form of the table into `out`; returns notes on what was left out."""
    rows = sorted(latest(records), key=lambda r: (r["model"], r["text"], r["name"], r.get("bits", math.inf), r.get("gap", 0.0)))
    with (out / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells(r) for r in rows)
    (out / "compare.md").write_text(markdown(records), encoding="utf-8")
    return plot(out, latest(records))


def plot(out: Path, records: Sequence[Record]) -> list[str]:
    """Gap and KL against counted bits, a line of panels for each model, for the windows with the most rows; a note when matplotlib
    is missing."""
    try:
        import matplotlib
    except ImportError:
        return ["no plot: matplotlib is not installed (pip install 'kvsink[plot]')"]
    found = by_windows(r for r in records if r["status"] == "measured" and math.isfinite(r["gap"]))
    if not found:
        return ["no plot: nothing was measured"]
    (text, windows, length, chunk), rows = max(found.items(), key=lambda item: len(item[1]))
    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "kvsink"  # the same records give the same file
    models = models_in(rows)
    tall = 6.5 if len(models) == 1 else 4.5
    figure, panels = pyplot.subplots(len(models), 2, figsize=(15, 0.5 + tall * len(models)), constrained_layout=True, squeeze=False)
    names = sorted({r["row"]["method"] for r in rows})
    looks = {n: (matplotlib.colormaps["tab20"](i % 20), "osD^vP*X<>ph"[i % 12]) for i, n in enumerate(names)}
    for model, pair in zip(models, panels, strict=True):
        mine = [r for r in rows if r["model"] == model]
        _panel(pair[0], mine, [max(100 * r["gap"], 0.01) for r in mine], looks, "perplexity gap to 16 bit, %")
        _panel(pair[1], mine, [max(r["kl"], 1e-4) for r in mine], looks, "KL to 16 bit, nats")
        pair[0].set_title(model, loc="left")
    panels[0, 0].legend(fontsize=8, ncols=2)
    figure.suptitle(f"{text}, {windows} windows of {length} tokens, chunks of {chunk}")
    figure.savefig(out / "compare.png", dpi=130 if len(models) == 1 else 90)
    figure.savefig(out / "compare.svg", metadata={"Date": None})
    pyplot.close(figure)
    return []


def _panel(axes: Any, rows: Sequence[Record], heights: Sequence[float], looks: dict[str, tuple[Any, str]], label: str) -> None:
    """One model's rows by method, with those named that no other row beats."""
    points = [(r["bits"], y) for r, y in zip(rows, heights, strict=True)]
    for name, (colour, mark) in looks.items():
        xs, ys = [[p[i] for p, r in zip(points, rows, strict=True) if r["row"]["method"] == name] for i in (0, 1)]
        axes.scatter(xs, ys, color=colour, marker=mark, s=36, label=name, zorder=3, alpha=0.85)
    front = pareto(points)
    axes.plot(*zip(*[points[i] for i in front], strict=True), color="0.25", lw=1.2, ls="--", zorder=2, label="Pareto front")
    for k, i in enumerate(front):
        words, place = f"{rows[i]['name']} {widths(rows[i])}", (7, 7 if k % 2 else -12)
        axes.annotate(words, points[i], textcoords="offset points", xytext=place, fontsize=8)
    axes.set(xlabel="counted bits per element at 4096 tokens", ylabel=label, yscale="log")
    axes.grid(True, which="both", lw=0.3, alpha=0.6)
