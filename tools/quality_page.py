"""docs/quality.md from the cells that `python -m kvsink.tools.quality` measured; nothing is measured here.

Formula    of 16 bit: the ratio of mean recalls over the same prompts, its interval by draws of prompts of both sides together
           growth: KL of the last octave of positions by that of positions 1,024 to 4,095
Units      KL in nats; intervals of 95 % (`kvsink.evaluate.intervals`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvsink.evaluate.intervals import Interval, binomial, bootstrap
from kvsink.evaluate.positions import Bucket
from kvsink.tools.compare_page import widths
from kvsink.tools.compare_records import Record, setting_of
from kvsink.tools.compare_rows import Row, resolved

__all__ = ["growth", "markdown", "summary"]

_ABOUT = """\
# Quality in long contexts

Every cell goes through the real cache: prompts and windows are fed in chunks, so that tokens attend to stored rows. Behind a
figure stands its 95 % interval: over windows or prompts by bootstrap, of counted shares by Wilson's formula. Bits are counted at
the length of the cell, with everything that is stored, in the layers that are packed. `python -m kvsink.tools.quality` measures
the cells and goes on where it was interrupted ([long contexts](commands.md#long-contexts) says what each kind asks),
`python -m kvsink.tools.pages` writes this page; the cells stand in [quality.jsonl](quality.jsonl).
"""
_SECTIONS = {
    "length": """\
## Error by position

KL to the same model in 16 bit, both fed in lockstep through their caches. Growth: the last octave by positions 1K to 4K.""",
    "retrieval": """\
## Retrieval

RULER's needles, chains of variables and common words, all tasks alike: mean recall, exact answers, and recall by that of 16 bit on
the same prompts. A prompt at once is what `generate()` does: its tokens attend to exact rows, only the answer's to stored ones. By
512 tokens is harder: every piece of the prompt attends to stored rows of all before it.""",
    "structured": """\
## Structured output

A function call in JSON whose four arguments stand far back: exact calls, valid JSON, and right arguments by those of 16 bit.""",
    "arithmetic": """\
## Arithmetic

Word problems, greedy answers by `generate()`.""",
    "generation": """\
## Long answers

Articles, sampled from the whole distribution by `generate()`: how many used up all new tokens, the share of runs of four tokens
that occurred before, and how long they are.""",
}


def growth(positions: Sequence[dict[str, Any]]) -> float | None:
    """How much KL grows over a window, or None where it does not reach 8,192 tokens."""
    buckets = [Bucket(**p) for p in positions]
    early = [b for b in buckets if b.start >= 1024 and b.stop <= 4096]
    if not early or buckets[-1].start < 4096 or buckets[-1].kl is None:
        return None
    return buckets[-1].kl / (sum((b.kl or 0) * b.tokens for b in early) / sum(b.tokens for b in early))


def summary(r: Record) -> str:
    """What came of a cell, in a few words."""
    if r["status"] != "measured":
        return f"{r['status']}: {r['reason']}"
    said = f"{r['bits']:.2f} bit, {r['seconds']:.0f} s, "
    if r["kind"] == "length":
        return said + "KL " + ", ".join(f"{Bucket(**p).name} {p['kl']:.4f}" for p in r["positions"])
    a = r["answers"]
    if "recall" in a:
        return said + f"{sum(a['right'])} of {r['n']} exact, recall {sum(a['recall']) / r['n']:.0%}"
    right = f"{sum(a['right'])} of {r['n']} right, " if "right" in a else ""
    return said + f"{right}{r['n'] - sum(a['finished'])} out of budget, {sum(a['tokens']) / r['n']:.0f} tokens"


def markdown(records: Sequence[Record]) -> str:
    """The page; of cells of one model, kind, length, chunk and setting the last that was measured."""
    newest = {(r["kind"], r["model"], setting_of(r), r["length"], r.get("chunk")): r for r in records}
    rows = [r for r in newest.values() if r["status"] == "measured"]
    out = _ABOUT.splitlines()
    for kind, words in _SECTIONS.items():
        mine = [r for r in rows if r["kind"] == kind]
        out += ["", words] if mine else []
        for model, fed in dict.fromkeys((r["model"], _fed(r)) for r in mine):
            cells = [r for r in mine if (r["model"], _fed(r)) == (model, fed)]
            out += ["", f"### {model}, {_HEADINGS[kind]}{fed}", "", *_TABLES[kind](cells), "", _where(cells)]
    if refused := [r for r in newest.values() if r["status"] != "measured"]:
        out += ["", "## Not measured", ""]
        out += [f"- {r['model']}, {r['kind']} of {r['length']}, {_name(r)}: {' '.join(str(r['reason']).split())}" for r in refused]
    if commands := sorted({r["command"] for r in rows if r.get("command")}):
        out += ["", "## Commands", "", "```", *commands, "```"]
    return "\n".join(out) + "\n"


def _by_position(cells: Sequence[Record]) -> list[str]:
    longest = max(r["tokens"] for r in cells)
    cells = [r for r in cells if r["tokens"] == longest]
    names = [Bucket(**p).name for p in cells[0]["positions"]]
    lines = []
    for r in cells:
        last, grown = r["positions"][-1], growth(r["positions"])
        kl = [_with(p["kl"], p["kl_interval"], ".4f") for p in r["positions"]]
        more = [_with(last["top1"], last["top1_interval"], ".1%"), _with(last["change"], last["change_interval"], "+.2%")]
        lines.append([_name(r), f"{r['bits']:.2f}", *kl, "–" if grown is None else f"{grown:.2f}x", *more])
    return _grid(["method", "bits", *names, "growth", f"same top token, {names[-1]}", f"perplexity, {names[-1]}"], lines)


def _by_length(cells: Sequence[Record], shown: Callable[[Record, Record | None], list[str]], heads: Sequence[str]) -> list[str]:
    lengths = sorted({r["tokens"] for r in cells})
    lines: dict[str, dict[int, Record]] = {}
    for r in cells:
        lines.setdefault(setting_of(r), {})[r["tokens"]] = r
    stock = next((line for line in lines.values() if _is_stock(next(iter(line.values())))), {})
    out = []
    for line in lines.values():
        any_one = next(iter(line.values()))
        bits = sorted({f"{r['bits']:.2f}" for r in line.values()}, reverse=True)
        figures = [cell for n in lengths for cell in (shown(line[n], stock.get(n)) if n in line else ["–"] * len(heads))]
        out.append([_name(any_one), " to ".join(dict.fromkeys((bits[0], bits[-1]))), *figures])
    return _grid(["method", "bits", *(f"{n}: {head}" if i == 0 else head for n in lengths for i, head in enumerate(heads))], out)


def _found(r: Record, stock: Record | None) -> list[str]:
    a = r["answers"]
    recall = torch.tensor([a["recall"]], dtype=torch.float64).T
    return [_with(recall.mean().item(), bootstrap(recall), ".0%"), f"{sum(a['right'])}/{r['n']}", _of_stock(r, stock)]


def _called(r: Record, stock: Record | None) -> list[str]:
    right = sum(r["answers"]["right"])
    exact = _with(right / r["n"], binomial(right, r["n"]), ".0%")
    return [f"{right}/{r['n']}, {exact}", f"{sum(r['answers']['valid'])}", _of_stock(r, stock)]


def _of_stock(r: Record, stock: Record | None) -> str:
    """Mean recall by that of 16 bit, over the same prompts."""
    if stock is None or _is_stock(r) or stock["n"] != r["n"] or not any(stock["answers"]["recall"]):
        return "–"
    pairs = torch.tensor([r["answers"]["recall"], stock["answers"]["recall"]], dtype=torch.float64).T  # [n, 2]
    ratio = (pairs[:, 0].mean() / pairs[:, 1].mean()).item()
    return _with(ratio, bootstrap(pairs, lambda m: m[:, 0] / m[:, 1].clamp_min(1e-9)), ".1%")


def _answered(cells: Sequence[Record]) -> list[str]:
    stock = next((r for r in cells if _is_stock(r)), None)
    graded = "right" in cells[0]["answers"]
    lines = []
    for r in cells:
        a, n = r["answers"], r["n"]
        shares = {"out": n - sum(a["finished"])}
        if graded:
            pairs = [] if stock is None else zip(a["number"], stock["answers"]["number"], strict=True)
            alike = sum(x is not None and x == y for x, y in pairs)
            shares = {"right": sum(a["right"]), "alike": alike, **shares}
        counted = [f"{k}/{n}, {_with(k / n, binomial(k, n), '.0%')}" for k in shares.values()]
        means = []
        for name, form in (("repetition", ".3f"), ("tokens", ".0f")):
            values = torch.tensor([a[name]], dtype=torch.float64).T
            means.append(_with(values.mean().item(), bootstrap(values), form))
        lines.append([_name(r), f"{r['bits']:.2f}", *counted, *means])
    heads = ["right", "same number as 16 bit"] if graded else []
    return _grid(["method", "bits", *heads, "out of budget", "repetition", "tokens"], lines)


_HEADINGS = {
    "length": "KL by position",
    "retrieval": "recall",
    "structured": "calls",
    "arithmetic": "problems",
    "generation": "articles",
}
_TABLES: dict[str, Callable[[Sequence[Record]], list[str]]] = {
    "length": _by_position,
    "retrieval": lambda cells: _by_length(cells, _found, ("recall", "exact", "of 16 bit")),
    "structured": lambda cells: _by_length(cells, _called, ("exact", "valid", "of 16 bit")),
    "arithmetic": _answered,
    "generation": _answered,
}


def _where(cells: Sequence[Record]) -> str:
    """What all cells of a table were measured on."""
    said = [f"n = {' or '.join(sorted({str(r['n']) for r in cells}))}"]
    said += [f"chunks of {' or '.join(sorted({str(r['chunk']) for r in cells}))}"] if cells[0].get("chunk") else []
    packed = next((r for r in cells if 0 < r["packed_layers"] < r["layers"]), None)
    said += [f"{packed['packed_layers']} of {packed['layers']} layers packed"] if packed else []
    for words in (lambda r: r["dtype"], lambda r: r["device"], lambda r: f"version {r['versions']['kvsink']}"):
        said.append(" and ".join(sorted({words(r) for r in cells})))
    return f"{'; '.join(said)}."


def _fed(r: Record) -> str:
    """How prompts were fed, in words; empty where that is not asked for."""
    if r["kind"] not in ("retrieval", "structured"):
        return ""
    return f", prompts by {r['chunk']} tokens" if r["chunk"] else ", prompts at once"


def _is_stock(r: Record) -> bool:
    return str(r["row"]["method"]).startswith("stock:")


def _name(r: Record) -> str:
    if _is_stock(r):
        return str(r["name"])
    name, _, more = str(r["name"]).partition(" ")
    protect = r.get("protect", "")
    kept = protect if protect != resolved(Row(r["row"]["method"])).protect else ""  # where it is not the method's own, or was once
    return " ".join(filter(None, [f"`{name}`", more, widths(r), kept, f"window {r['window']}" if r.get("window") else ""]))


def _grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|", *(f"| {' | '.join(line)} |" for line in lines)]


def _with(value: float, interval: Interval | Sequence[float] | None, form: str) -> str:
    """A figure and its interval; only the figure where there is no spread to tell."""
    return f"{value:{form}}" if interval is None else f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"
