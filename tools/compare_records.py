"""What finished rows of `kvsink-eval --compare` are to the pages: of which model, of which set, and which replaced which.

Source     records as `kvsink.tools.compare` writes them, those of older versions included: they name their model and method as
           these were called then, and lack what was not written down
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from kvsink.tools.compare_rows import SETS, Row, resolved

__all__ = [
    "NAMES",
    "Record",
    "by_set",
    "by_windows",
    "kvsink_version",
    "latest",
    "models_in",
    "read_records",
    "setting",
    "setting_of",
]

Record = dict[str, Any]

NAMES = {"demo:smollm2": "SmolLM2-135M-Instruct"}
"""The own names of models that commands, and rows of 0.1.0, call otherwise."""

_TEXTS = {"wikitext2": "WikiText-2", "python": "Python"}  # how the texts of sets begin


def read_records(path: Path) -> list[Record]:
    """The records of a file, in its order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def setting(row: Row) -> str:
    """What a row measures, whatever it is called: two rows are the same when these are."""
    return _setting(resolved(row))


def _setting(row: Row) -> str:
    row = replace(row, label="", options=tuple(sorted(row.options)))
    widths = {n: None if (bits := getattr(row, n)) is None else float(bits) for n in ("key_bits", "value_bits")}
    return repr(replace(row, **widths))  # type: ignore[arg-type]


def setting_of(r: Record) -> str:
    """`setting` of a record, with the widths that its method had then; those that it does not say are not taken from today's."""
    known = {f.name for f in fields(Row)}
    row = Row(**{n: v for n, v in r["row"].items() if n in known and n != "options"}, options=tuple(r["row"]["options"].items()))
    kept = {n: r[n] for n in ("key_bits", "value_bits", "protect", "window") if r.get(n) is not None}
    row = replace(row, **kept)
    return _setting(replace(resolved(row), key_bits=row.key_bits, value_bits=row.value_bits))


def kvsink_version(r: Record) -> str:
    """The version that measured a row, or an empty string."""
    return str(r.get("versions", {}).get("kvsink", ""))


def _age(r: Record) -> tuple[tuple[int, ...], bool]:
    """Grows with the version; a version in development comes before its release."""
    release, development, _ = kvsink_version(r).partition(".dev")
    return tuple(map(int, re.findall(r"\d+", release))), not development


def latest(records: Iterable[Record]) -> list[Record]:
    """Of rows of one setting, model and windows the one of the newest version, of those the last; models by their own names."""
    newest: dict[tuple[Any, ...], Record] = {}
    for r in records:
        r = {**r, "model": NAMES.get(r["model"], r["model"])}
        r.setdefault("dtype", _option(r.get("command", ""), "dtype", "float32"))
        name = (r["model"], r["text"], r["windows"], r["window_tokens"], r["chunk"], setting_of(r))
        if name not in newest or _age(r) >= _age(newest[name]):
            newest.pop(name, None)
            newest[name] = r
    return list(newest.values())


def by_windows(records: Iterable[Record]) -> dict[tuple[str, int, int, int], list[Record]]:
    """Rows by text, number of windows, their tokens, and chunk: rows that may stand in one table."""
    found: dict[tuple[str, int, int, int], list[Record]] = {}
    for r in records:
        found.setdefault((r["text"], r["windows"], r["window_tokens"], r["chunk"]), []).append(r)
    return found


def models_in(records: Iterable[Record]) -> list[str]:
    """Their models, in the order in which they came first."""
    return list(dict.fromkeys(r["model"] for r in records))


def by_set(records: Sequence[Record]) -> dict[str, list[list[Record]]]:
    """Lines of tables by set, each the rows of one setting on several models; a set that none was measured for is left out.

    A row belongs to the set that it was measured for, and to every other one on its text that holds the same setting. `default`
    is shown wherever one of its rows is.
    """
    made = {id(r): r.get("set") or _option(r.get("command", ""), "set", "rows") for r in records}
    asked = {"default", *made.values()}
    out: dict[str, list[list[Record]]] = {}
    for name in [*(n for n in SETS if n in asked), *sorted(asked - set(SETS))]:
        lines: dict[str, list[Record]] = {}
        if name in SETS:
            lines = {setting(row): [] for row in SETS[name].rows}
        for r in records:
            own = setting_of(r)
            if made[id(r)] == name or (own in lines and name in SETS and r["text"].startswith(_TEXTS[SETS[name].text])):
                lines.setdefault(own, []).append(r)
        if found := [line for line in lines.values() if line]:
            out[name] = found
    return out


def _option(command: str, name: str, otherwise: str) -> str:
    """What a command of 0.1.0 said of something that its rows do not say."""
    found = re.search(rf"--{name}[ =](\S+)", command)
    return found[1] if found else otherwise
