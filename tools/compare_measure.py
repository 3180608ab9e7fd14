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
from kvsink.calibrate.choices import refusal
from kvsink.calibrate.design import gather_needs
from kvsink.calibrate.plan import sides as planned_sides
from kvsink.calibrate.record import Calibration
from kvsink.codecs import SideSpec
from kvsink.codecs.protect import parse_policies
from kvsink.errors import CalibrationError, KvsinkError, UnknownName
from kvsink.evaluate.evaluation import evaluate, packed_cache, versions
from kvsink.evaluate.reference import Reference, free_bytes
from kvsink.evaluate.results import EvalResult
from kvsink.methods import Method, get_method
from kvsink.model.anatomy import anatomy
from kvsink.model.fingerprint import fingerprint
from kvsink.model.runtime import runtime_of
from kvsink.report import STATED_LENGTH, Report, counted_bits
from kvsink.rewrite import rewrite
from kvsink.tools.compare_rows import Row, resolved
from kvsink.tools.stock import stock_bits, stock_factory

__all__ = ["FAR", "Absent", "Bench", "declared", "measure", "packed_bits", "protection", "rewritten_copy", "windows_at_once"]

FAR = 131_072  # tokens at which exact rows weigh nothing any more: bits are counted there too
_SHARE = 0.25  # of the free memory, for the log-probabilities of one chunk and what is made of them
_COPIES = 6  # logits and log-probabilities of both sides, their difference and the weights of it, in float32


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
        if path == "layers":  # not the method's
            continue
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


def sides_of(row: Row) -> tuple[SideSpec, SideSpec]:
    """Keys and values at the bits of a row."""
    method, row = declared(row), resolved(row)
    assert row.key_bits is not None and row.value_bits is not None
    return method.side("key", row.key_bits), method.side("value", row.value_bits)


def windows_at_once(model: Any, ids: Tensor, chunk: int) -> int:
    """Windows to run as rows of one batch: all on CUDA and 4 on a CPU, fewer where a large vocabulary would fill the memory."""
    device = next(model.parameters()).device
    most = len(ids) if device.type == "cuda" else 4
    each = _COPIES * 4 * max(chunk, 1) * model.config.get_text_config().vocab_size
    free = free_bytes(device)
    return max(1, min(most, int(_SHARE * free / each))) if free else most


@dataclass
class Bench:
    """One model, one set of windows, and what all rows share.

    ids [N, T]; calibration_ids [n, t]; batch: windows run as rows of one batch, None for as many as `windows_at_once` says.
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
        if self.batch is None:
            self.batch = windows_at_once(self.model, self.ids, self.chunk)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines every row of this bench."""

        def digest(t: Tensor) -> str:
            return hashlib.sha256(t.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]

        return {
            "model": self.name,
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
        row = resolved(row)
        about: dict[str, Any] = {**self.identity, **{n: v for n, v in row.as_dict().items() if n != "label"}}
        if not row.stock:
            sides: dict[str, Any]
            try:
                sides = {n: side.as_dict() for n, side in zip(("key", "value"), sides_of(row), strict=True)}
            except KvsinkError as error:
                sides = {"refused": str(error)}
            about["codec"] = sides
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
                planned = planned_sides(declared(row), where.kv_heads, where.head_dim) if row.plan == "auto" else ()
                wanted = [sides_of(row), *planned]
                _, need = gather_needs(wanted, where.kv_heads, where.head_dim)
            except (Absent, KvsinkError):
                continue  # the row itself will say so
            if need is None or need.rows <= self.calibration_ids.numel():
                pairs += wanted
        blocks, need = gather_needs(pairs, where.kv_heads, where.head_dim)
        every = range(len(where.attentions))
        config = self.model.config.get_text_config(decoder=True)
        layers = [i for i in every if not refusal(config, where, i)] or every  # a model that has none but sliding ones packs those
        policies = [parse_policies(protect)] * len(every)
        samples = {} if need is None else dict.fromkeys(layers, need)
        statistics = dict.fromkeys(layers, blocks) if blocks or need is not None else {}
        record = calibrate(self.model, self.calibration_ids, policies, statistics, 1, None, samples)
        self._record = (protect, record)
        return record


def protection(row: Row) -> str:
    """The protection a row asks for, in words."""
    return declared(row).protect if row.protect is None else row.protect


def packed_bits(model: Any, length: int) -> float:
    """Counted bits per element of the layers of a rewritten model that are packed, at `length` tokens."""
    runtime = runtime_of(model)
    found = [(heads, p.codec) for heads, p in zip(runtime.anatomy.layers, runtime.plans, strict=True) if p.codec is not None]
    bits = 0.0
    for heads, codec in found:
        sides = counted_bits(codec, heads.kv, heads.key_dim, length, layers=len(found), value_dim=heads.value_dim)
        bits += heads.elements * sum(sides) / 2
    return bits / sum(heads.elements for heads, _ in found)


def rewritten_copy(bench: Bench, row: Row, rows: Sequence[Row]) -> tuple[Any, Report]:
    """A copy of the bench's model, rewritten as the row says; `rows` are those that share its calibration record."""
    work = copy.deepcopy(bench.model)
    wish = partial(
        rewrite,
        work,
        declared(row),
        key_bits=row.key_bits,
        value_bits=row.value_bits,
        protect=row.protect,
        window=row.window,
        layers=dict(row.options).get("layers", ""),
        bits=row.bits,
        plan=row.plan,
        plan_ids=bench.calibration_ids,
        tokenizer=bench.tokenizer,
    )
    try:
        return work, wish(calibration=bench.record(protection(row), rows), designs=bench.designs)
    except CalibrationError:  # it needs what the shared record lacks: calibrate for this row alone, or say why not
        return work, wish(calibration=bench.calibration_ids)


def measure(bench: Bench, row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """One row: rewrite a copy of the model, count bits, evaluate. `rows` are those that share its calibration record.

    bits: of the layers that are packed, at 4096 tokens, bits_far at 131,072; cache_bits: of the whole cache at 4096 tokens, with
    layers left in 16 bit; seconds: in all, and of them until the model was rewritten.
    """
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
    where = anatomy(bench.model)
    strict: EvalResult | None = None
    if row.stock:
        factory = stock_factory(row.stock, int(row.key_bits or 4), dict(row.options))
        rewritten = time.perf_counter() - begun
        result = run(bench.model, cache_factory=factory)
        bits = {n: stock_bits(factory, bench.model, n, bench.chunk) for n in (STATED_LENGTH, tokens)}
        about: dict[str, Any] = {"protect": "none", "cache_bits": bits[STATED_LENGTH], "table_bytes": 0, "codec": ""}
    else:
        work, report = rewritten_copy(bench, row, rows)
        rewritten = time.perf_counter() - begun
        plans = runtime_of(work).plans
        bits = {n: packed_bits(work, n) for n in (STATED_LENGTH, tokens, FAR)}
        about = {
            "protect": protection(row),
            "cache_bits": report.bits,
            "table_bytes": report.table_bytes,
            "codec": hashlib.sha256("".join(p.codec.text() if p.codec else "-" for p in plans).encode()).hexdigest()[:16],
            "packed_layers": sum(p.codec is not None for p in plans),
        }
        result = run(work, cache_factory=packed_cache)
        if bench.strict:
            strict = run(work, cache_factory=partial(packed_cache, strict=True))
    return {
        "status": "measured",
        **about,
        "bits": bits[STATED_LENGTH],
        "bits_at_window": bits[tokens],
        "bits_far": bits.get(FAR),
        "layers": len(where.attentions),
        "kv_heads": where.kv_heads,
        "head_dim": where.head_dim,
        "perplexity": result.perplexity,
        "gap": result.perplexity_change,
        "kl": result.kl,
        "top1": result.top1,
        "strict_perplexity": strict.perplexity if strict else None,
        "strict_gap": strict.perplexity_change if strict else None,
        "strict_kl": strict.kl if strict else None,
        "strict_top1": strict.top1 if strict else None,
        "baseline_perplexity": result.baseline_perplexity,
        "device": result.device,
        "dtype": result.dtype,
        "versions": result.versions,
        "seconds": round(time.perf_counter() - begun, 1),
        "rewrite_seconds": round(rewritten, 1),
    }
