"""From the records of `kvsink-eval --compare` to compare.csv, compare.md and compare.png / compare.svg.

Figures that others published stand in a table of their own, with model and source; they are never mixed with ours.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsink.methods import methods

__all__ = ["BUDGETS", "COLUMNS", "latest", "markdown", "pareto", "write_report"]

Record = dict[str, Any]

BUDGETS = (1.2, 2.25, 3.25, 4.3, math.inf)
COLUMNS = (
    "model",
    "text",
    "method",
    "key_bits",
    "value_bits",
    "plan",
    "protect",
    "window",
    "status",
    "bits_at_4096",
    "bits_at_window",
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
    "versions",
    "reason",
)
_HEADINGS = (
    "method",
    "keys/values",
    "kept exact",
    "bits at 4096",
    "bits at {length}",
    "tables, MB",
    "perplexity",
    "gap",
    "KL",
    "top-1",
    "strict gap",
    "strict KL",
    "strict top-1",
)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in both coordinates (smaller is better), by the first coordinate."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not math.isnan(points[i][1]) and (not front or points[i][1] < points[front[-1]][1]):
            front.append(i)
    return front


def latest(records: Sequence[Record]) -> list[Record]:
    """The last record of every row, model and text: an older one was made with another declaration."""
    newest: dict[str, Record] = {}
    for r in records:
        row = r["row"]
        name = repr((r["model"], r["text"], r["name"], r["windows"], r["window_tokens"], sorted(row.items(), key=str)))
        newest.pop(name, None)
        newest[name] = r
    return sorted(newest.values(), key=lambda r: (r["model"], r["text"], r["name"], r.get("bits", math.inf), r.get("gap", 0.0)))


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
        "method": r["name"],
        "key_bits": row["key_bits"],
        "value_bits": row["value_bits"],
        "plan": row["plan"],
        "protect": r.get("protect", row["protect"]),
        "window": row["window"],
        "status": r["status"],
        "bits_at_4096": number("bits", 4),
        "bits_at_window": number("bits_at_window", 4),
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
        "versions": " ".join(f"{k}={v}" for k, v in r.get("versions", {}).items()),
        "reason": r.get("reason", ""),
    }


def write_report(out: Path, records: Sequence[Record]) -> list[str]:
    """Write every form of the table into `out`; returns notes on what was left out."""
    rows = latest(records)
    with (out / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells(r) for r in rows)
    (out / "compare.md").write_text(markdown(rows), encoding="utf-8")
    return plot(out, rows)


def markdown(records: Sequence[Record]) -> str:
    """A page: per model and text a table for every budget, then what declined, then published figures."""
    lines = [
        "# Methods side by side",
        "",
        "Every row goes through the real cache, fed in chunks, so that tokens attend to stored rows; the newest chunk is",
        "exact, as in `generate()`. The strict columns read even that one back from its codes. Bits are counted from every",
        "tensor that grows with tokens or sequences (scales, exact rows, windows, positions), at 4096 tokens and at the",
        "length of a window; static tables (codebooks, bases, means) are listed apart. A row in bold is on the Pareto front",
        "of its text: no other row has fewer bits and a smaller gap.",
    ]
    sections: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        sections.setdefault((r["model"], r["text"], str(r["windows"]), str(r["window_tokens"]), str(r["chunk"])), []).append(r)
    for (model, text, windows, length, chunk), rows in sections.items():
        measured = [r for r in rows if r["status"] == "measured"]
        lines += ["", f"## {model} on {text}", "", f"{windows} windows of {length} tokens in chunks of {chunk}."]
        if commands := sorted({r["command"] for r in rows if r.get("command")}):
            lines += ["", "```", *commands, "```"]
        if measured:
            bases = sorted({round(r["baseline_perplexity"], 3) for r in measured})
            devices = sorted({r["device"] for r in measured})
            lines += ["", f"16 bit: perplexity {' / '.join(f'{b:.3f}' for b in bases)}. Measured on {', '.join(devices)}."]
        front = {id(measured[i]) for i in pareto([(r["bits"], r["gap"]) for r in measured])}
        low = -math.inf
        for high in BUDGETS:
            inside = sorted((r for r in measured if low < r["bits"] <= high), key=lambda r: r["gap"])
            if inside:
                title = f"More than {low:g} bits" if math.isinf(high) else f"At most {high:g} bits"
                head = [h.format(length=length) for h in _HEADINGS]
                lines += ["", f"### {title}", "", "| " + " | ".join(head) + " |", "|---|---|---" + "|---:" * (len(head) - 3) + "|"]
                lines += [_line(r, id(r) in front) for r in inside]
            low = high
        if refused := [r for r in rows if r["status"] != "measured"]:
            lines += ["", "### Not measured", ""]
            lines += [f"- {_title(r)}: {r['status']}, {' '.join(str(r['reason']).split())}" for r in refused]
    return "\n".join([*lines, *_claims(records)]) + "\n"


def _title(r: Record) -> str:
    return f"`{r['name']}` {_bits(r)}"


def _bits(r: Record) -> str:
    row = r["row"]
    sides = [("own" if b is None else f"{b:g}") for b in (row["key_bits"], row["value_bits"])]
    return "default" if sides == ["own", "own"] else "/".join(sides)


def _line(r: Record, bold: bool) -> str:
    window = r["row"]["window"]
    kept = (r["protect"] or "none") + (f", window {window}" if window else "")
    name = f"**{r['name']}**" if bold else r["name"]

    def optional(key: str, form: str) -> str:
        return format(r[key], form) if r.get(key) is not None else "-"

    found = (
        name,
        _bits(r),
        kept,
        f"{r['bits']:.3f}",
        f"{r['bits_at_window']:.3f}",
        f"{r['table_bytes'] / 1e6:.2f}",
        f"{r['perplexity']:.3f}",
        f"{r['gap']:+.2%}",
        f"{r['kl']:.4f}",
        f"{r['top1']:.1%}",
        optional("strict_gap", "+.2%"),
        optional("strict_kl", ".4f"),
        optional("strict_top1", ".1%"),
    )
    return "| " + " | ".join(found) + " |"


def _claims(records: Sequence[Record]) -> list[str]:
    known = methods()
    names = sorted({r["row"]["method"] for r in records} & set(known))
    rows = [
        f"| {name} | {claim.metric} | {claim.value:g} | {claim.setting} | {claim.source} |"
        for name in names
        for claim in known[name].claims
    ]
    if not rows:
        return []
    note = "Measured by others, on other models and texts. They cannot be compared with the rows above."
    return [
        "",
        "## Published figures",
        "",
        note,
        "",
        "| method | metric | value | setting | source |",
        "|---|---|---:|---|---|",
        *rows,
    ]


def plot(out: Path, records: Sequence[Record]) -> list[str]:
    """Gap and KL against counted bits for the model and text with the most rows; a note when matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return ["no plot: matplotlib is not installed (pip install 'kvsink[plot]')"]
    sections: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        if r["status"] == "measured" and math.isfinite(r["gap"]):
            sections.setdefault((r["model"], r["text"]), []).append(r)
    if not sections:
        return ["no plot: nothing was measured"]
    (model, text), rows = max(sections.items(), key=lambda item: len(item[1]))
    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "kvsink"  # the same records give the same file
    figure, panels = pyplot.subplots(1, 2, figsize=(15, 7), constrained_layout=True)
    names = sorted({r["row"]["method"] for r in rows})
    colours = {n: matplotlib.colormaps["tab20"](i % 20) for i, n in enumerate(names)}
    marks = "osD^vP*X<>ph"
    for axes, what, label in zip(panels, ("gap", "kl"), ("perplexity gap to 16 bit, %", "KL to 16 bit, nats"), strict=True):
        scale = 100.0 if what == "gap" else 1.0
        least = 0.01 if what == "gap" else 1e-4
        points = [(r["bits"], max(scale * r[what], least)) for r in rows]
        for i, n in enumerate(names):
            mine = [p for p, r in zip(points, rows, strict=True) if r["row"]["method"] == n]
            axes.scatter(
                *zip(*mine, strict=True), color=colours[n], marker=marks[i % len(marks)], s=36, label=n, zorder=3, alpha=0.85
            )
        front = pareto(points)
        axes.plot(*zip(*[points[i] for i in front], strict=True), color="0.25", lw=1.2, ls="--", zorder=2, label="Pareto front")
        for k, i in enumerate(front):
            words = f"{rows[i]['name']} {_bits(rows[i])}"
            axes.annotate(words, points[i], textcoords="offset points", xytext=(7, 7 if k % 2 else -12), fontsize=8)
        axes.set(xlabel="counted bits per element at 4096 tokens", ylabel=label, yscale="log")
        axes.grid(True, which="both", lw=0.3, alpha=0.6)
    panels[0].legend(fontsize=8, ncols=2)
    length = rows[0]["window_tokens"]
    figure.suptitle(f"{model}, {text}, {rows[0]['windows']} windows of {length} tokens, chunks of {rows[0]['chunk']}")
    figure.savefig(out / "compare.png", dpi=130)
    figure.savefig(out / "compare.svg", metadata={"Date": None})
    pyplot.close(figure)
    return []
