"""What `kvsink-eval --compare` measures: rows as data, and named sets of them.

A row names a method, its bits, its protection and, where it departs from the method's declaration, the fields it changes
("key.reorder": False). Methods, fields and packages that are not there are skipped when a set runs, with the reason printed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from kvsink.errors import KvsinkError, UnknownName
from kvsink.methods import get_method

__all__ = ["SETS", "Row", "RowSet", "named_set", "read_rows", "resolved", "row"]

OURS = "kvsink:5+first:1"
Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Row:
    """One configuration. None is the method's own default.

    bits, plan: budget and kind of the plan of `kvsink.rewrite`. options: changes of the declaration ("key.FIELD",
    "value.FIELD") and "layers", which `kvsink.rewrite` takes, or the arguments of a stock cache. label: what the table calls it,
    when the method's name is not enough.
    """

    method: str
    key_bits: float | None = None
    value_bits: float | None = None
    protect: str | None = None
    window: int | None = None
    bits: float | None = None
    plan: str = "uniform"
    options: Options = ()
    label: str = ""

    @property
    def name(self) -> str:
        """What the table calls it."""
        return self.label or self.method

    @property
    def stock(self) -> str:
        """The backend of transformers' QuantizedCache that this row measures, or an empty string."""
        return self.method.removeprefix("stock:") if self.method.startswith("stock:") else ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; options as an object."""
        return {**asdict(self), "options": dict(self.options)}


@dataclass(frozen=True)
class RowSet:
    """Rows and the text they are measured on: "wikitext2" (test split) or "python" (source of the standard library)."""

    rows: tuple[Row, ...]
    text: str = "wikitext2"


def resolved(row: Row) -> Row:
    """The row with its method's own bits, protection and window in place of None; as it is where there is no such method."""
    try:
        m = get_method(row.method)
    except KvsinkError:
        return row
    own: dict[str, Any] = {"key_bits": m.key_bits, "value_bits": m.value_bits, "protect": m.protect, "window": m.window}
    return replace(row, **{name: value for name, value in own.items() if getattr(row, name) is None})


def row(
    method: str,
    key: float | None = None,
    value: float | None = None,
    protect: str | None = None,
    window: int | None = None,
    label: str = "",
    plan: str = "uniform",
    **options: Any,
) -> Row:
    """A row in one line; an option `key_reorder=False` changes the field `reorder` of the key side."""
    changes = tuple((f"{n.split('_', 1)[0]}.{n.split('_', 1)[1]}", v) for n, v in options.items())
    return Row(method, key, value, protect, window, plan=plan, options=changes, label=label)


def _both(**changes: Any) -> dict[str, Any]:
    return {f"{side}_{n}": v for n, v in changes.items() for side in ("key", "value")}


def _kvquant() -> list[Row]:
    out = []
    for share in (0.0, 0.001, 0.005, 0.01):
        for protect in ("none", "first:1", *(("first:5",) if share == 0 else ()), "kvsink:5"):
            out.append(row("kvquant", 2, 2, protect, label=f"kvquant {100 * share:g} %", **_both(outliers=share)))
    return [*out, row("kvquant", 4, 4, "none", label="kvquant 1 %", **_both(outliers=0.01))]


def _cq() -> list[Row]:
    out = []
    for name, bits in (("2c8b", 4), ("4c8b", 2), ("8c8b", 1)):
        out.append(row("cq", bits, bits, label=f"cq {name}"))
        out.append(row("cq", bits, bits, label=f"cq {name}, unweighted", **_both(weights="none")))
    return out


BASELINES = (
    row("cq", 2, 2, label="cq 4c8b"),
    row("kvquant", 2, 2, label="kvquant 1 %", **_both(outliers=0.01)),
    row("rotatekv", 2, 2),
    row("oscar", 2, 2),
    row("kivi", 2, 2),
)

DEFAULT = (*(row("klt", bits, bits) for bits in (4, 3)), row("klt"), row("klt", 2, 2), *BASELINES)

PUBLISHED = (
    row("rtn", 4, 4),
    row("rtn", 2, 2),
    row("kivi", 4, 4),
    row("kivi", 2, 2),
    *_kvquant(),
    *_cq(),
    row("rotatekv", 4, 4),
    row("rotatekv", 4, 4, label="rotatekv, no reorder", key_reorder=False),
    row("rotatekv", 2, 2),
    row("rotatekv", 2, 2, label="rotatekv, no reorder", key_reorder=False),
    row("rotatekv", 2, 2, "none"),
    row("rotatekv", 2, 2, "kvsink:5"),
    row("oscar", 2, 2),
    row("oscar", 4, 4),
    row("oscar", 2, 2, "kvsink:5"),
    row("kivi", 2, 2, "kvsink:5"),
    *(row("antkv", b, b, protect) for b in (2, 1, 0.75, 0.375) for protect in ("anchors:1%", "none")),
    row("antkv", 1, 1, "random:11"),
    row("akvq-vl", 2, 2),
    row("centred", 2, 2, OURS),
    row("centred", 4, 4, OURS),
    row("centred", 2, 2, "none"),
    *(row("klt", k, v) for k, v in ((4, 4), (3, 3), (2, 4), (2, 2), (1.25, 1))),
    *(row(f"klt:{levels}", 2, 2, OURS) for levels in ("best", "codebooks", "even")),
    row("klt", 2, 2, OURS, 16),
    row("klt", 0.75, 0.75, OURS, 96),
    *(row("klt", 2, 2, protect) for protect in ("none", "first:5", "kvsink:5", "massive:20", "kvsink:5+anchors:1%")),
)

PLAN = tuple(
    row("klt", k, v, plan=plan, label="klt, automatic plan" if plan == "auto" else "")
    for k, v in ((2, 4), (2, 2))
    for plan in ("uniform", "auto")
)

OLD = "klt:codebooks"
DESIGN = (
    # what the values' codebooks are learnt from
    row(OLD, 2, 2, OURS, value_weights="none", label="klt, values unweighted"),
    row(OLD, 2, 2, OURS, value_weights="fisher", label="klt, values Fisher-weighted"),
    row(OLD, 2, 2, OURS, value_weights="fisher", value_transform="none", value_center=False, label="klt keys, cq values"),
    row(OLD, 2, 2, OURS, value_transform="klt", label="klt, values in their eigenbasis"),
    # keys
    row(OLD, 2, 2, OURS, key_block=1, label="klt, dense"),
    row(OLD, 2, 2.25, OURS, key_gain=False, label="klt without gain, 4c9b values"),
    row(OLD, 2, 2, OURS, key_kind="vector", label="klt, keys in codebooks"),
    row(OLD, 2, 2, OURS, key_kind="vector", key_block=1, label="klt, dense, keys in codebooks"),
    row(OLD, 2, 16, OURS, label="klt, keys alone"),
    row(OLD, 16, 2, OURS, label="klt, values alone"),
    row("cq", 2, 16, OURS, label="cq, keys alone"),
    row("cq", 2, 2, OURS, label="cq 4c8b"),
    row("cq", 2.25, 2, OURS, label="cq 4c9b keys, 4c8b values"),
    # about one bit
    row(OLD, 1, 1, OURS, key_kind="lloyd", key_gain=True, label="klt, no codebooks for keys"),
    row(OLD, 1, 1, OURS, key_gain=True, label="klt, keys with gain"),
    row(OLD, 1, 1, OURS, 32),
    row(OLD, 0.375, 0.375, OURS, 192),
    row("cq", 1, 1, OURS, label="cq 8c8b"),
    row("cq", 1.25, 1, OURS, label="cq 8c10b keys, 8c8b values"),
    row("cq", 0.75, 0.75, OURS, 96, label="cq 16c12b"),
    row("antkv", 0.75, 0.75, OURS, 0),
)

STOCK = tuple(
    Row(f"stock:{backend}", bits, bits, options=options, label=f"transformers {backend}{label}")
    for bits in (4, 2)
    for backend, label, options in (
        ("quanto", "", ()),
        ("quanto", ", keys per channel", (("axis_key", -1),)),
        ("hqq", "", ()),
        ("hqq", ", per token", (("axis_key", 1), ("axis_value", 1))),
        ("hqq", ", keys per channel", (("axis_key", 0), ("axis_value", 1))),
    )
)

SHIFT = (row("klt", 2, 2), row("klt:best", 2, 4), row("centred", 2, 2), row("rtn", 4, 4), *BASELINES)

FIELD_2026 = (
    row("kivi", 2, 2),
    *(row("kivi", 2, 2, f"first:{n}") for n in (32, 64)),  # as many first rows as Kitty and the others keep
    *(row(name, 2, 2) for name in ("kvarn", "wush", "nova", "oscar-int2")),
    *(row(name, 2, 2, OURS, 0) for name in ("kvarn", "wush", "nova", "oscar-int2")),
    row("tasq"),
    row("tasq", 1.25, 1.25, OURS, 0),
    row("klt", 2, 2),
    row("klt", 2, 2, OURS),
    row("klt", 2, 2, "first:64", 256),
    row("klt", 1.25, 1.25, OURS),
    row("klt", 1.25, 1.25, "none", 64),
)
"""The methods of 2026 with the exact rows of their papers, with ours, and ours with theirs."""

QUALITY = (
    row("klt"),
    row("klt", 4, 4),
    row("klt", 3, 3),
    row("kivi", 2, 2),
    row("kvquant", 2, 2, "first:1", label="kvquant 1 %", **_both(outliers=0.01)),
    row("cq", 2, 2, label="cq 4c8b"),
)
"""Rows of docs/quality.md: ours, and of those published at 2 bits the best of docs/compare.md and those all compare with."""

LENGTH = (
    *(row("klt", protect=f"kvsink:{n}+first:1") for n in (16, 64, 256)),
    row("klt", protect="kvsink:5+first:64"),
    row("klt", window=128),
    *(row("klt", k, v) for k, v in ((16, 2), (2, 16), (2.5, 2), (2, 2.5))),
)
"""What more bits may be spent on in long contexts, beside the default, and what each side costs alone."""

UNCALIBRATED = (
    *(row("rotated", bits, bits) for bits in (4, 3, 2)),
    *(row("kvarn", bits, bits, "first:4") for bits in (4, 3, 2)),
    *(row("centred", b, b, "first:4", label="centred without means", **_both(center=False)) for b in (4, 3, 2)),
    *(row("klt", bits, bits) for bits in (4, 3, 2)),  # what text is worth
)

FRAMES = (
    row("klt", 2, 2, OURS),
    row("klt", 2, 2, OURS, key_domain="post", label="klt, keys after RoPE"),
    *(row(name, 2, 2, OURS, 0) for name in ("nova", "wush")),
)
"""Keys in the frames of their blocks and after RoPE: for windows of several lengths."""

QUICK = (row("rtn", 4, 4), row("klt", 2, 2), row("centred", 2, 2))

SETS: dict[str, RowSet] = {
    "default": RowSet(DEFAULT),
    "published": RowSet(PUBLISHED),
    "design": RowSet(DESIGN),
    "plan": RowSet(PLAN),
    "stock": RowSet(STOCK),
    "shift": RowSet(SHIFT, "python"),
    "2026": RowSet(FIELD_2026),
    "quality": RowSet(QUALITY),
    "length": RowSet(LENGTH),
    "uncalibrated": RowSet(UNCALIBRATED),
    "frames": RowSet(FRAMES),
    "quick": RowSet(QUICK),
}


def named_set(name: str) -> RowSet:
    """A set by name. Raises UnknownName."""
    if name not in SETS:
        raise UnknownName("set of rows", name, SETS, "Or pass --rows FILE.")
    return SETS[name]


def read_rows(path: str | Path) -> RowSet:
    """Rows from a JSON file: a list of objects with the fields of `Row`, options as an object."""
    known = {f.name for f in fields(Row)}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = []
        for i, record in enumerate(found):
            if unknown := set(record) - known:
                raise KvsinkError(f"{path}, row {i}: unknown field {min(unknown)!r}; a row has {', '.join(sorted(known))}")
            rows.append(replace(Row(record["method"]), **{**record, "options": tuple(sorted(record.get("options", {}).items()))}))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise KvsinkError(
            f'rows {path} cannot be read ({error!r}); write a list such as [{{"method": "klt", "key_bits": 2}}]'
        ) from error
    if not rows:
        raise KvsinkError(f"rows {path} is an empty list; name at least one method")
    return RowSet(tuple(rows))
