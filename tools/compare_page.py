"""The page of `kvsink-eval --compare`: per text and set a table of models side by side, and one for each with every column.

Figures that others published stand in a table of their own, with model and source; they are never mixed with ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from kvsink.methods import methods
from kvsink.tools.compare_records import Record, by_set, by_windows, kvsink_version, latest, models_in

__all__ = ["BUDGETS", "markdown", "pareto", "widths"]

BUDGETS = (1.2, 2.25, 3.25, 4.3, math.inf)

_ABOUT = """\
# Methods side by side

Every row goes through the real cache, fed in chunks, so that tokens attend to stored rows; the newest chunk is
exact, as in `generate()`. The strict columns read even that one back from its codes. A window begins with the token that
the model's tokenizer puts before every text, where it puts one; calibration does not. Bits are counted from every
tensor that grows with tokens or sequences (scales, exact rows, windows, positions), at 4096 tokens, at the
length of a window and, in newer rows, at 131072 tokens, in the layers that are packed; where layers stay in 16 bit, those of the
whole cache stand behind. Static tables (codebooks, bases, means) are listed apart. A gap in bold is on the Pareto front of its
model and text: no other row has fewer bits and a smaller gap. Each row was measured with the version of kvsink that stands at its
end, under the name that the method had then; a row of a newer version takes the place of an older one of the same setting.
"""
_HEADINGS = (
    *("method", "keys/values", "kept exact", "bits at 4096", "bits at {length}", "tables, MB", "perplexity", "gap", "KL", "top-1"),
    *("strict gap", "strict KL", "strict top-1", "measured"),
)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in both coordinates (smaller is better), by the first coordinate."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not math.isnan(points[i][1]) and (not front or points[i][1] < points[front[-1]][1]):
            front.append(i)
    return front


def markdown(records: Sequence[Record]) -> str:
    """The page: per text its models, per set the tables, then what declined, then published figures."""
    records = latest(records)
    lines = _ABOUT.splitlines()
    for (text, windows, length, chunk), rows in by_windows(records).items():
        measured = [r for r in rows if r["status"] == "measured"]
        models = models_in(measured)
        front: set[int] = set()
        for model in models:
            mine = [r for r in measured if r["model"] == model]
            front |= {id(mine[i]) for i in pareto([(r["bits"], r["gap"]) for r in mine])}
        lines += ["", f"## {text}, {windows} windows of {length} tokens", "", f"In chunks of {chunk} tokens.", ""]
        lines += [_model(model, [r for r in measured if r["model"] == model]) for model in models]
        if commands := sorted({r["command"] for r in rows if r.get("command")}):
            lines += ["", "```", *commands, "```"]
        for name, found in by_set(measured).items():
            lines += ["", f"### Set `{name}`", *_side_by_side(found, models, front)]
            for model in models:
                mine = [r for line in found for r in line if r["model"] == model]
                if mine:
                    lines += ["", f"#### {model}, set `{name}`", "", *_every_column(mine, front, length)]
        if refused := [r for r in rows if r["status"] != "measured"]:
            lines += ["", "### Not measured", ""]
            lines += [f"- {r['model']}, {_title(r)}: {r['status']}, {' '.join(str(r['reason']).split())}" for r in refused]
    return "\n".join([*lines, *_claims(records)]) + "\n"


def _model(model: str, rows: Sequence[Record]) -> str:
    """What a model is and where it was measured; what rows of older versions do not say is left out."""
    bases = sorted({f"{r['baseline_perplexity']:.3f}" for r in rows})
    said = [f"perplexity {' / '.join(bases)} at 16 bit"]
    if shape := next((r for r in rows if "head_dim" in r), None):
        packed = {r["packed_layers"] for r in rows if "packed_layers" in r}
        some = "" if packed <= {shape["layers"]} else f", {min(packed)} of them packed and the others left in 16 bit"
        said.append(
            f"{shape['layers']} attention layers{some}, {shape['kv_heads']} key-value heads of {shape['head_dim']} channels"
        )
    said += sorted({r["dtype"] for r in rows})
    return f"- {model}: {', '.join(said)}; measured on {', '.join(sorted({r['device'] for r in rows}))}."


def _budget(bits: float) -> float:
    return next(b for b in BUDGETS if bits <= b)


def _sorted_lines(lines: Iterable[tuple[float, float, Sequence[str]]], columns: int) -> list[str]:
    """Lines of a table, each with its bits and what it is sorted by, in parts by bits."""
    out, at = [], 0.0
    for bits, _, cells in sorted(lines, key=lambda line: (_budget(line[0]), line[1])):
        if (budget := _budget(bits)) != at:
            at = budget
            words = f"more than {BUDGETS[-2]:g} bits" if math.isinf(at) else f"at most {at:g} bits"
            out.append(f"| *{words}* |" + " |" * (columns - 1))
        out.append("| " + " | ".join(cells) + " |")
    return out


def _head(cells: Sequence[str], words: int) -> list[str]:
    """Heading of a table whose first columns, and the last, hold words."""
    return ["| " + " | ".join(cells) + " |", "|---" * words + "|---:" * (len(cells) - words - 1) + "|---|"]


def _side_by_side(lines: Sequence[Sequence[Record]], models: Sequence[str], front: set[int]) -> list[str]:
    """One line per setting, columns by model; nothing for rows of one model, whose own table says it all."""
    models = [m for m in models if any(r["model"] == m for line in lines for r in line)]
    if len(models) < 2:
        return []
    head = ["method", "keys/values", "kept exact", *(f"{m}: {what}" if what == "bits" else what for m in models for what in _SHOWN)]
    rows = []
    for line in lines:
        of = {r["model"]: r for r in line}
        cells = [cell for m in models for cell in (_figures(of[m], id(of[m]) in front) if m in of else ["–"] * len(_SHOWN))]
        measured = "; ".join(dict.fromkeys(map(_measured, line)))
        gap = sum(r["gap"] for r in line) / len(line)
        rows.append((min(r["bits"] for r in line), gap, [line[-1]["name"], widths(line[-1]), _kept(line[-1]), *cells, measured]))
    return ["", *_head([*head, "measured"], 3), *_sorted_lines(rows, len(head) + 1)]


_SHOWN = ("bits", "gap", "KL", "strict KL")


def _figures(r: Record, bold: bool) -> list[str]:
    return [_bits(r), _gap(r, bold), f"{r['kl']:.4f}", _optional(r, "strict_kl", ".4f")]


def _every_column(rows: Sequence[Record], front: set[int], length: int) -> list[str]:
    """One model's rows with all that was measured; bits at 131072 tokens where any of them was counted there."""
    found, far = [], any(r.get("bits_far") is not None for r in rows)
    for r in rows:
        cells = (
            r["name"],
            widths(r),
            _kept(r),
            _bits(r),
            f"{r['bits_at_window']:.3f}",
            *([_optional(r, "bits_far", ".3f")] if far else []),
            f"{r['table_bytes'] / 1e6:.2f}",
            f"{r['perplexity']:.3f}",
            _gap(r, id(r) in front),
            f"{r['kl']:.4f}",
            f"{r['top1']:.1%}",
            _optional(r, "strict_gap", "+.2%"),
            _optional(r, "strict_kl", ".4f"),
            _optional(r, "strict_top1", ".1%"),
            _measured(r),
        )
        found.append((r["bits"], r["gap"], cells))
    head = [h.format(length=length) for h in (*_HEADINGS[:5], *(["bits at 131072"] if far else []), *_HEADINGS[5:])]
    return [*_head(head, 3), *_sorted_lines(found, len(head))]


def _title(r: Record) -> str:
    return f"`{r['name']}` {widths(r)}"


def widths(r: Record) -> str:
    """Bits of keys and values; those of a row that asked for its method's own as they were then, where it says them."""
    sides = [r["row"][n] if r.get(n) is None else r[n] for n in ("key_bits", "value_bits")]
    return "default" if sides == [None, None] else "/".join("own" if b is None else f"{b:g}" for b in sides)


def _kept(r: Record) -> str:
    window = r.get("window") or r["row"]["window"]
    return (r["protect"] or "none") + (f", window {window}" if window else "")


def _bits(r: Record) -> str:
    """Bits of the packed layers, and of the whole cache where others stay in 16 bit."""
    whole = r.get("cache_bits", r["bits"])
    return f"{r['bits']:.3f}" + (f" ({whole:.2f})" if abs(whole - r["bits"]) > 0.01 * r["bits"] else "")


def _gap(r: Record, bold: bool) -> str:
    return f"**{r['gap']:+.2%}**" if bold else f"{r['gap']:+.2%}"


def _measured(r: Record) -> str:
    return f"{kvsink_version(r)}, {r['device']}"


def _optional(r: Record, key: str, form: str) -> str:
    return format(r[key], form) if r.get(key) is not None else "-"


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
