"""docs/quality.md, from rows that `kvsink-eval` measured: `python -m kvsink.tools.quality` writes it, nothing is measured here.

    kvsink-eval OUT --length N --retrieval TASKS --arithmetic N --json row.json
    python -m kvsink.tools.quality row.json --model NAME --label "METHOD BITS"

The second line adds a row to tools/results/quality.jsonl, in place of one of the same model and label, and writes the page anew.
Answers in full and figures of single windows stay out of the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from kvsink.errors import KvsinkError
from kvsink.evaluate.positions import bucket_name
from kvsink.tools.cli import command_line
from kvsink.tools.eval_tables import bounded
from kvsink.tools.readme_table import ROOT

__all__ = ["PAGE", "ROWS", "page", "slim"]

PAGE, ROWS = ROOT / "docs" / "quality.md", ROOT / "tools" / "results" / "quality.jsonl"
Row = dict[str, Any]

_HEAD = """# Quality at long contexts

What a packed cache costs where much of it is read, beside the same model with its own cache. Every figure has n and a 95 % interval
in brackets: of means over windows or problems by bootstrap, of counted answers as a binomial share. The rows are
[quality.jsonl](../tools/results/quality.jsonl), what the columns mean stands in [command lines](commands.md#long-contexts), and
`python -m kvsink.tools.quality --help` says how a row is added.
"""


def slim(record: Row, model: str, label: str) -> Row:
    """A record of `kvsink-eval --json` as the page keeps it."""
    kept = {
        name: value for name, value in record.items() if not name.endswith("window_nll") and name not in ("model", "sink_decay")
    }
    for name in ("retrieval", "baseline_retrieval", "generation", "baseline_generation"):
        if kept[name] is not None:
            kept[name] = {n: v for n, v in kept[name].items() if n != "rows"}
    return {"model": model, "label": label, **kept}


def page(rows: Sequence[Row]) -> str:
    """The page in Markdown: a part for what was measured of any model, a table in it for every model and setting."""
    parts = [
        ("KL to 16 bit by position, in nats", _positions),
        ("Retrieval", _retrieval),
        ("Arithmetic by `generate()`", _arithmetic),
    ]
    return _HEAD + "".join(_part(title, table, rows) for title, table in parts)


def _part(title: str, table: Callable[[Sequence[Row]], str], rows: Sequence[Row]) -> str:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_about(row), []).append(row)
    tables = [(about, text) for about, group in groups.items() if (text := table(group))]
    return f"\n## {title}\n" + "".join(f"\n{about}:\n\n{text}" for about, text in tables) if tables else ""


def _about(row: Row) -> str:
    versions = ", ".join(f"{name} {row['versions'][name]}" for name in ("kvsink", "torch", "transformers"))
    return f"{row['model']}, {row['dtype']}, {row['device']}; {row['text']}; {versions}"


def _positions(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row["positions"]]
    edges = list(dict.fromkeys((b["start"], b["stop"]) for row in rows for b in row["positions"]))
    if not rows:
        return ""
    lines = []
    for row in rows:
        held = {(b["start"], b["stop"]): b for b in row["positions"]}
        cells = [bounded(held[e]["kl"], held[e]["kl_interval"], ".4f") if e in held else "" for e in edges]
        last = row["positions"][-1]
        gap = bounded(last["change"], last["change_interval"], "+.2%")
        lines.append([f"`{row['label']}`", f"{row['bits_per_element']:.2f}", _windows(row), *cells, gap])
    return _grid(["cache", "bits", "windows", *(bucket_name(*e) for e in edges), "perplexity of the last"], lines)


def _windows(row: Row) -> str:
    return f"{row['windows']} x {row['window_tokens']}"


def _retrieval(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row["retrieval"] is not None]
    cells: dict[tuple[str, int, int], dict[str, str]] = {}
    for row in rows:
        for label, found in (("16 bit", row["baseline_retrieval"]), (row["label"], row["retrieval"])):
            for c in found["cells"] if found is not None else ():
                text = bounded(c["right"] / c["n"], c["interval"], ".0%") + f", recall {c['recall']:.0%}"
                text += "" if c["valid"] is None else f", JSON {c['valid']}/{c['n']}"
                _put(cells.setdefault((c["task"], c["length"], c["n"]), {}), label, text)
    labels = list(dict.fromkeys(label for found in cells.values() for label in found))
    lines = [[f"`{task}`", str(length), str(n), *(found.get(x, "") for x in labels)] for (task, length, n), found in cells.items()]
    return _grid(["task", "tokens", "n", *(x if x == "16 bit" else f"`{x}`" for x in labels)], lines) if cells else ""


def _arithmetic(rows: Sequence[Row]) -> str:
    lines: dict[str, list[str]] = {}
    for row in rows:
        for label, f in (("16 bit", row["baseline_generation"]), (f"`{row['label']}`", row["generation"])):
            if f is None:
                continue
            shares = [
                bounded(f[x] / f["n"], f[f"{x}_interval"], ".0%") if x in f else "" for x in ("right", "agreement", "exhausted")
            ]
            means = bounded(f["repetition"], f["repetition_interval"], ".3f"), bounded(f["tokens"], f["tokens_interval"], ".0f")
            how = f"at {f['temperature']:g}" if f["temperature"] else "greedy"
            line = [label, how, str(f["budget"]), str(f["n"]), *shares, *means]
            _put(lines, " ".join(line[:4]), line)
    head = ["cache", "sampled", "budget", "n", "right", "same number as 16 bit", "out of budget", "repetition", "tokens"]
    return _grid(head, lines.values()) if lines else ""


def _put(table: dict[str, Any], name: str, figures: Any) -> None:
    """What 16 bit did must be the same beside every cache of a table."""
    if table.setdefault(name, figures) != figures:
        raise KvsinkError(f"two rows of one table differ in {name}: {table[name]} and {figures}. Measure both with one --baseline")


def _grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (head, rule, *lines))


@click.command("python -m kvsink.tools.quality", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("record", required=False, metavar="ROW.json")
@click.option("--model", metavar="NAME", help="The model by its own name.")
@click.option("--label", metavar="TEXT", help="The method and its bits, as the tables call the cache.")
@click.option("--rows", "rows_path", default=str(ROWS), metavar="FILE", help="Rows of the page.")
@click.option("--out", default=str(PAGE), metavar="FILE", help="The page.")
def command(record: str | None, model: str | None, label: str | None, rows_path: str, out: str) -> None:
    """Add a row of kvsink-eval to docs/quality.md, or write the page anew from the rows there are."""
    file = Path(rows_path)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    if record is not None:
        if not (model and label):
            raise click.UsageError("a row needs --model and --label.")
        found = json.loads(Path(record).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or "positions" not in found:
            raise KvsinkError(f"{record} is no row of kvsink-eval; pass what `kvsink-eval OUT --json {record}` wrote of one OUT")
        rows = [row for row in rows if (row["model"], row["label"]) != (model, label)] + [slim(found, model, label)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path(out).write_text(page(rows), encoding="utf-8")


main = command_line(command)

if __name__ == "__main__":
    sys.exit(main())
