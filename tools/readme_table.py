"""README's table of methods, from the rows of the comparison in docs/compare.jsonl; `kvsink.tools.pages` writes it.

The rows themselves are measured by `python -m kvsink.tools.compare`; nothing is measured here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["ROOT", "WANTED", "table"]

ROOT = Path(__file__).resolve().parents[1]
OURS = "kvsink:5+first:1"
WANTED: tuple[tuple[str, float, float, str], ...] = (
    ("klt", 4, 4, OURS),
    ("klt", 3, 4, OURS),
    ("klt", 2, 4, OURS),
    ("klt", 2, 2, OURS),
    ("cq 4c8b", 2, 2, "none"),
    ("kvquant 1 %", 2, 2, "first:1"),
    ("rotatekv", 2, 2, "massive:20"),
    ("kivi", 2, 2, "none"),
)


def table(records: list[dict[str, Any]]) -> str:
    """The wanted rows as Markdown. Raises KeyError for a row that was not measured."""
    found = {}
    for r in records:
        about = (r["name"], r["row"]["key_bits"], r["row"]["value_bits"], r.get("protect"))
        if r["status"] == "measured" and (r["row"]["window"] is None) and r["text"].startswith("WikiText-2"):
            found[about] = r
    base = next(iter(found.values()))["baseline_perplexity"]
    lines = [
        "| method | keys/values, bits | kept exact | bits counted | cache smaller | perplexity | KL | same top token |",
        "|---|---|---|---:|---:|---:|---:|---:|",
        f"| 16 bit | 16/16 | all | 16.00 | 1.0x | {base:.2f} | | |",
    ]
    for want in WANTED:
        r = found[want]
        name, key, value, protect = want
        lines.append(
            f"| `{name.split()[0]}`{name[len(name.split()[0]) :]} | {key:g}/{value:g} | {protect} | {r['bits']:.2f} | "
            f"{16 / r['bits']:.1f}x | {r['perplexity']:.2f} ({r['gap']:+.1%}) | {r['kl']:.4f} | {r['top1']:.1%} |"
        )
    return "\n".join(lines) + "\n"
