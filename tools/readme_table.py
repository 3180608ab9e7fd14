"""README's table of methods and what it says below it, from the rows of docs/compare.jsonl; `kvsink.tools.pages` writes it.

The rows themselves are measured by `python -m kvsink.tools.compare --set default`; nothing is measured here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from kvsink import __version__
from kvsink.errors import KvsinkError
from kvsink.tools.compare_page import widths
from kvsink.tools.compare_records import Record, by_windows, kvsink_version, latest, models_in, setting, setting_of
from kvsink.tools.compare_rows import SETS

__all__ = ["ROOT", "table"]

ROOT = Path(__file__).resolve().parents[1]
RELEASE = __version__.partition(".dev")[0]


def table(records: Sequence[Record]) -> str:
    """The set `default` as Markdown, models side by side, over the windows of WikiText-2 with the most rows; then where they ran.

    A row that no model has is left out, as is a model without rows. Raises KvsinkError where there are none at all.
    """
    rows = [r for r in latest(records) if r["status"] == "measured" and r["text"].startswith("WikiText-2")]
    if not rows:
        raise KvsinkError("no rows on WikiText-2 are measured; run python -m kvsink.tools.compare --set default")
    (text, windows, length, chunk), rows = max(by_windows(rows).items(), key=lambda item: len(item[1]))
    wanted: dict[str, list[Record]] = {setting(row): [] for row in SETS["default"].rows}
    for r in rows:
        wanted.get(setting_of(r), []).append(r)
    lines = [line for line in wanted.values() if line]
    models = models_in(r for r in rows if any(r in line for line in lines))
    base = {r["model"]: r["baseline_perplexity"] for line in lines for r in line}
    head = ["method", "keys/values, bits", "kept exact"]
    for model in models:
        head += [f"{model}: bits", f"perplexity, {base[model]:.2f} at 16 bit", "KL"]
    out = [f"| {' | '.join(head)} |", "|---" * 3 + "|---:" * (len(head) - 3) + "|"]
    for line in lines:
        of, any_one = {r["model"]: r for r in line}, line[-1]
        name, _, more = any_one["name"].partition(" ")
        made = sorted({kvsink_version(r) for r in line})
        then = "" if all(v.partition(".dev")[0] == RELEASE for v in made) else f"of {' and '.join(made)}"  # names change meaning
        cells = [" ".join(filter(None, (f"`{name}`", more, then))), widths(any_one), any_one["protect"]]
        for model in models:
            cells += _figures(of[model]) if model in of else ["–"] * 3
        out.append(f"| {' | '.join(cells)} |")
    where = f"{text}, {windows} windows of {length} tokens through the real cache in chunks of {chunk}"
    bits = "bits are counted at 4096 tokens with everything that is stored; behind them, how many times smaller the cache is"
    said = [f"{where}; {bits}."]
    said += [_measured(model, [r for line in lines for r in line if r["model"] == model]) for model in models]
    return "\n".join(out) + "\n\n" + textwrap.fill(" ".join(said), 150, break_on_hyphens=False) + "\n"


def _figures(r: Record) -> list[str]:
    whole = r["cache_bits"] if "cache_bits" in r else r["bits"]
    return [f"{r['bits']:.2f} ({16 / whole:.1f}x)", f"{r['perplexity']:.2f} ({r['gap']:+.1%})", f"{r['kl']:.4f}"]


def _measured(model: str, rows: Sequence[Record]) -> str:
    """Where one model's rows were measured; what rows of older versions do not say is left out."""
    shape = next((r for r in rows if "head_dim" in r), None)
    said = [] if shape is None else [f"head width {shape['head_dim']}"]
    if shape is not None and shape["packed_layers"] < shape["layers"]:
        said.append(f"{shape['packed_layers']} of {shape['layers']} layers packed, which bits are of")
    said += dict.fromkeys(r["dtype"] for r in rows)
    said += dict.fromkeys(r["device"] for r in rows)
    said.append(f"version {' and '.join(sorted({kvsink_version(r) for r in rows}))}")
    return f"{model}: {', '.join(said)}."
