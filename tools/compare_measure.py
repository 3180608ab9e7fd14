"""One row of `kvsink-compare`, measured: the model rewritten as the row says, its record kept for others of the same protection."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from kvsink.calibrate.calibration import calibrate
from kvsink.calibrate.design import gather_needs
from kvsink.calibrate.plan import sides as planned_sides
from kvsink.calibrate.record import Calibration
from kvsink.codecs import SideSpec
from kvsink.codecs.protect import parse_policies
from kvsink.errors import CalibrationError, KvsinkError, UnknownName
from kvsink.evaluate.evaluation import evaluate, packed_cache, versions
from kvsink.evaluate.reference import Reference
from kvsink.evaluate.results import EvalResult
from kvsink.methods import Method, get_method
from kvsink.model.anatomy import anatomy
from kvsink.model.fingerprint import fingerprint
from kvsink.model.runtime import runtime_of
from kvsink.report import STATED_LENGTH, counted_bits
from kvsink.rewrite import rewrite
from kvsink.tools.compare_rows import Row
from kvsink.tools.stock import stock_bits, stock_factory

__all__ = ["Absent", "Bench", "declared", "measure", "protection"]


class Absent(Exception):
    """A row that cannot run here yet: its method, field or package is not there. It is skipped, not written."""


def declared(row: Row) -> Method:
    """The method of a row with the row's changes of its declaration. Raises Absent for what is not there."""
    try:
        method = get_method(row.method)
    except UnknownName as error:
        raise Absent(str(error)) from error
    sides: dict[str, SideSpec] = {"key": method.key, "value": method.value}
    for path, value in row.options:
        side, _, name = path.partition(".")
        if side not in sides or name not in SideSpec.__dataclass_fields__:
            raise Absent(f"the codec has no field {path!r}")
        sides[side] = replace(sides[side], **{name: value})
    others: dict[str, Any] = {}
    for name in ("key_below", "value_below", "key_above", "value_above"):  # changes are meant for whichever the bits choose
        if (other := getattr(method, name)) is not None:
            side = name.partition("_")[0]
            changes = {path.partition(".")[2]: v for path, v in row.options if path.startswith(f"{side}.")}
            others[name] = other[0], replace(other[1], **changes)
    return replace(method, key=sides["key"], value=sides["value"], **others)


@dataclass
class Bench:
    """One model, one set of windows, and what all rows share.

    ids [N, T]; calibration_ids [n, t]; batch: windows run as rows of one batch, None for all on CUDA and 4 on a CPU.
    """

    model: Any
    name: str
    ids: Tensor
    text: str
    calibration_ids: Tensor
    tokenizer: Any = None
    chunk: int = 64
    batch: int | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        self.reference = Reference(self.model)
        self._record: tuple[str, Calibration] | None = None
        self.designs: dict[Any, Any] = {}  # of the record's rows: a side that two rows share is learnt once
        device = next(self.model.parameters()).device
        if self.batch is None:
            self.batch = len(self.ids) if device.type == "cuda" else 4

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines every row of this bench."""

        def digest(t: Tensor) -> str:
            return hashlib.sha256(t.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]

        return {
            "weights": digest(fingerprint(self.model)),
            "dtype": str(self.model.dtype),
            "ids": digest(self.ids),
            "shape": list(self.ids.shape),
            "chunk": self.chunk,
            "calibration": digest(self.calibration_ids),
            "kvsink": versions().get("kvsink", ""),
        }

    def key(self, row: Row) -> str:
        """A name of everything that determines a row: model, text, windows, method, and the codec as it is declared."""
        about: dict[str, Any] = {**self.identity, **{n: v for n, v in row.as_dict().items() if n != "label"}}
        if not row.stock:
            m = declared(row)
            sides: dict[str, Any]
            try:
                sides = {
                    "key": m.side("key", m.key_bits if row.key_bits is None else row.key_bits).as_dict(),
                    "value": m.side("value", m.value_bits if row.value_bits is None else row.value_bits).as_dict(),
                }
            except KvsinkError as error:
                sides = {"refused": str(error)}
            about["codec"] = {**sides, "protect": protection(row), "window": m.window if row.window is None else row.window}
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:24]

    def record(self, protect: str, rows: Iterable[Row]) -> Calibration:
        """The calibration record that serves all `rows`, which keep the same rows exact; the last one is remembered."""
        if self._record is not None and self._record[0] == protect:
            return self._record[1]
        self._record, self.designs = None, {}
        where = anatomy(self.model)
        pairs = []
        for row in rows:
            try:
                m = declared(row)
                pair = (
                    m.side("key", m.key_bits if row.key_bits is None else row.key_bits),
                    m.side("value", m.value_bits if row.value_bits is None else row.value_bits),
                )
                wanted = [pair, *(planned_sides(m, where.kv_heads, where.head_dim) if row.plan == "auto" else ())]
                _, need = gather_needs(wanted, where.kv_heads, where.head_dim)
            except (Absent, KvsinkError):
                continue  # the row itself will say so
            if need is None or need.rows <= self.calibration_ids.numel():
                pairs += wanted
        blocks, need = gather_needs(pairs, where.kv_heads, where.head_dim)
        layers = range(len(where.attentions))
        policies = [parse_policies(protect)] * len(layers)
        samples = {} if need is None else dict.fromkeys(layers, need)
        statistics = dict.fromkeys(layers, blocks) if blocks or need is not None else {}
        record = calibrate(self.model, self.calibration_ids, policies, statistics, 1, None, samples)
        self._record = (protect, record)
        return record


def protection(row: Row) -> str:
    """The protection a row asks for, in words."""
    return declared(row).protect if row.protect is None else row.protect


def measure(bench: Bench, row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """One row: rewrite a copy of the model, count bits, evaluate. `rows` are those that share its calibration record."""
    begun = time.perf_counter()
    tokens = bench.ids.shape[1]
    run = partial(
        evaluate,
        baseline=bench.reference,
        ids=bench.ids,
        chunk=bench.chunk,
        batch=bench.batch or 4,
        model_name=bench.name,
        method=row.method,
        text_name=bench.text,
    )
    strict: EvalResult | None = None
    if row.stock:
        factory = stock_factory(row.stock, int(row.key_bits or 4), dict(row.options))
        result = run(bench.model, cache_factory=factory)
        bits = {n: stock_bits(factory, bench.model, n, bench.chunk) for n in (STATED_LENGTH, tokens)}
        tables, codec, protect = 0, "", "none"
    else:
        method, protect = declared(row), protection(row)
        work = copy.deepcopy(bench.model)
        wish = partial(
            rewrite,
            work,
            method,
            key_bits=row.key_bits,
            value_bits=row.value_bits,
            protect=row.protect,
            window=row.window,
            bits=row.bits,
            plan=row.plan,
            plan_ids=bench.calibration_ids,
            tokenizer=bench.tokenizer,
        )
        try:
            report = wish(calibration=bench.record(protect, rows), designs=bench.designs)
        except CalibrationError:  # it needs what the shared record lacks: calibrate for this row alone, or say why not
            report = wish(calibration=bench.calibration_ids)
        where, plans = anatomy(work), runtime_of(work).plans
        packed = sum(p.codec is not None for p in plans)

        def counted(length: int) -> float:
            sides = [
                counted_bits(p.codec, where.kv_heads, where.head_dim, length, layers=packed) if p.codec else (16.0, 16.0)
                for p in plans
            ]
            return sum(k + v for k, v in sides) / (2 * len(sides))

        bits = {n: counted(n) for n in (STATED_LENGTH, tokens)}
        tables = report.table_bytes
        codec = hashlib.sha256("".join(p.codec.text() if p.codec else "-" for p in plans).encode()).hexdigest()[:16]
        result = run(work, cache_factory=packed_cache)
        if bench.strict:
            strict = run(work, cache_factory=partial(packed_cache, strict=True))
    change, strict_change = result.perplexity_change, strict.perplexity_change if strict else None
    return {
        "status": "measured",
        "protect": protect,
        "bits": bits[STATED_LENGTH],
        "bits_at_window": bits[tokens],
        "table_bytes": tables,
        "codec": codec,
        "perplexity": result.perplexity,
        "gap": change,
        "kl": result.kl,
        "top1": result.top1,
        "strict_perplexity": strict.perplexity if strict else None,
        "strict_gap": strict_change,
        "strict_kl": strict.kl if strict else None,
        "strict_top1": strict.top1 if strict else None,
        "baseline_perplexity": result.baseline_perplexity,
        "device": result.device,
        "versions": result.versions,
        "seconds": round(time.perf_counter() - begun, 1),
    }
