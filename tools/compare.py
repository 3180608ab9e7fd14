"""Measure many methods on one model in one process: `kvsink-eval MODEL --compare`, or `python -m kvsink.tools.compare`.

Every row goes through the real cache in chunks, once as `generate()` reads it and once strictly (the newest rows too come
back from their codes). The 16-bit model's log-probabilities are computed once. One calibration record per protection
serves all methods, because rows that stay exact are left out of every statistic. A finished row is written at once, with a
key of everything that determines it, so that an interrupted run goes on where it stopped.

Units      bits: counted per element of keys and values in a 16-bit model, at 4096 tokens and at the length of a window
Raises     KvsinkError children; a method that refuses a row is a result and is written with its reason

The module needs torch, transformers and safetensors; plots need matplotlib and are left out where it is missing.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsink.calibrate.calibration import calibrate
from kvsink.calibrate.design import gather_needs
from kvsink.calibrate.observing import calibration_windows
from kvsink.calibrate.plan import sides as planned_sides
from kvsink.calibrate.record import Calibration
from kvsink.codecs import SideSpec
from kvsink.codecs.protect import parse_policies
from kvsink.errors import CalibrationError, KvsinkError, UnknownName
from kvsink.evaluate.evaluation import evaluate, packed_cache, token_windows, versions
from kvsink.evaluate.reference import Reference
from kvsink.evaluate.results import EvalResult
from kvsink.evaluate.texts import evaluation_text, read_text
from kvsink.folder.loading import load_model, load_tokenizer
from kvsink.methods import Method, get_method, methods
from kvsink.model.decoder import Decoder
from kvsink.model.fingerprint import fingerprint
from kvsink.model.runtime import anatomy, runtime_of
from kvsink.report import STATED_LENGTH, counted_bits
from kvsink.rewrite import rewrite
from kvsink.tools.compare_report import write_report
from kvsink.tools.compare_rows import Row, RowSet, named_set, read_rows
from kvsink.tools.stock import MissingPackage, stock_bits, stock_factory

__all__ = ["Bench", "Store", "compare", "declared", "python_source"]

Tell = Callable[[str], None]
RECORDS = "compare.jsonl"


class Absent(Exception):
    """A row that cannot run here yet: its method, field or package is not there. It is skipped, not written."""


def declared(row: Row) -> Method:
    """The method of a row with the row's changes of its declaration. Raises Absent for what is not there."""
    if row.method not in methods():
        raise Absent(f"method {row.method} is not registered")
    method = get_method(row.method)
    sides: dict[str, SideSpec] = {"key": method.key, "value": method.value}
    for path, value in row.options:
        side, _, name = path.partition(".")
        if side not in sides or name not in SideSpec.__dataclass_fields__:
            raise Absent(f"the codec has no field {path!r}")
        sides[side] = replace(sides[side], **{name: value})
    below = {"key": method.key_below, "value": method.value_below}
    for side, other in below.items():  # changes are meant for whichever declaration the bits choose
        if other is not None:
            changes = {path.partition(".")[2]: v for path, v in row.options if path.startswith(f"{side}.")}
            below[side] = (other[0], replace(other[1], **changes))
    return replace(method, key=sides["key"], value=sides["value"], key_below=below["key"], value_below=below["value"])


def python_source(tokens: int) -> str:
    """Source files of the standard library in the order of their names, 8 characters per token wanted."""
    import sysconfig

    text, wanted = "", 8 * tokens
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(text) >= wanted:
            break
        text += path.read_text(encoding="utf-8", errors="ignore") + "\n"
    return text


class Store:
    """Finished rows, one JSON object per line; a line cut short by an interruption is dropped."""

    def __init__(self, path: Path) -> None:
        self.path, self.records = path, dict[str, dict[str, Any]]()
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for i, line in enumerate(lines):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                if i + 1 < len(lines):
                    raise KvsinkError(
                        f"{path}, line {i + 1} is damaged ({error!r}); remove that line and run again"
                    ) from error
                self._write_all()

    def _write_all(self) -> None:
        partial_file = self.path.with_suffix(".partial")
        partial_file.write_text("".join(json.dumps(r) + "\n" for r in self.records.values()), encoding="utf-8")
        partial_file.replace(self.path)

    def finished(self, key: str, retry: bool = False) -> bool:
        """Whether a row need not run again: measured, or declined unless `retry`."""
        status = self.records.get(key, {}).get("status")
        return status == "measured" or (status == "declined" and not retry)

    def add(self, record: dict[str, Any]) -> None:
        """Write one row now; a row that is there already is replaced."""
        again = record["key"] in self.records
        self.records.pop(record["key"], None)
        self.records[record["key"]] = record
        if again:
            self._write_all()
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


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
            "weights": digest(fingerprint(self.model)), "dtype": str(self.model.dtype), "ids": digest(self.ids),
            "shape": list(self.ids.shape), "chunk": self.chunk, "calibration": digest(self.calibration_ids),
            "kvsink": versions().get("kvsink", ""),
        }  # fmt: skip

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
            about["codec"] = {
                **sides,
                "protect": protection(row),
                "window": m.window if row.window is None else row.window,
            }
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
        evaluate, baseline=bench.reference, ids=bench.ids, chunk=bench.chunk, batch=bench.batch or 4, model_name=bench.name,
        method=row.method, text_name=bench.text,
    )  # fmt: skip
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
            rewrite, work, method, key_bits=row.key_bits, value_bits=row.value_bits, protect=row.protect, window=row.window,
            bits=row.bits, plan=row.plan, plan_ids=bench.calibration_ids, tokenizer=bench.tokenizer,
        )  # fmt: skip
        try:
            report = wish(calibration=bench.record(protect, rows), designs=bench.designs)
        except CalibrationError:  # it needs what the shared record lacks: calibrate for this row alone, or say why not
            report = wish(calibration=bench.calibration_ids)
        where, plans = anatomy(work), runtime_of(work).plans
        packed = sum(p.codec is not None for p in plans)

        def counted(length: int) -> float:
            sides = [
                counted_bits(p.codec, where.kv_heads, where.head_dim, length, layers=packed)
                if p.codec
                else (16.0, 16.0)
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
        "status": "measured", "protect": protect, "bits": bits[STATED_LENGTH], "bits_at_window": bits[tokens],
        "table_bytes": tables, "codec": codec, "perplexity": result.perplexity, "gap": change, "kl": result.kl,
        "top1": result.top1, "strict_perplexity": strict.perplexity if strict else None, "strict_gap": strict_change,
        "strict_kl": strict.kl if strict else None, "strict_top1": strict.top1 if strict else None,
        "baseline_perplexity": result.baseline_perplexity, "device": result.device, "versions": result.versions,
        "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip


def compare(
    bench: Bench,
    rows: Sequence[Row],
    out: Path,
    command: str = "",
    retry: bool = False,
    tell: Tell = print,
    report: bool = True,
) -> list[dict[str, Any]]:
    """Measure every row that is not finished in `out`, write tables and plots, and return the records of `rows` in order.

    retry: also run rows again that declined. Rows of one protection run together, so that they share one record.
    """
    out.mkdir(parents=True, exist_ok=True)
    store = Store(out / RECORDS)
    groups: dict[str, list[tuple[Row, str]]] = {}
    for row in rows:
        try:
            protect = "" if row.stock else protection(row)
            groups.setdefault(protect, []).append((row, bench.key(row)))
        except Absent as reason:
            tell(f"skipped {describe(row)}: {reason}")
        except UnknownName as reason:
            tell(f"skipped {describe(row)}: {reason}")
    count = sum(len(g) for g in groups.values())
    done, begun, fresh = 0, time.perf_counter(), 0
    for group in groups.values():
        share = [row for row, key in group if not row.stock and not store.finished(key, retry)]
        for row, key in group:
            done += 1
            if store.finished(key, retry):
                continue
            try:
                found = measure(bench, row, share)
            except (MissingPackage, UnknownName) as reason:
                tell(f"skipped {describe(row)}: {reason}")
                continue
            except KvsinkError as reason:
                found = {"status": "declined", "reason": str(reason)}
            except Exception as error:  # one row must not end a run of hours; it runs again next time
                found = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:400]}
            finally:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            about = {"key": key, "row": row.as_dict(), "name": row.name, "model": bench.name, "text": bench.text}
            shape = {
                "windows": len(bench.ids),
                "window_tokens": bench.ids.shape[1],
                "chunk": bench.chunk,
                "command": command,
            }
            store.add({**about, **shape, **found})
            fresh += 1
            left = (time.perf_counter() - begun) / fresh * (count - done)
            tell(f"[{done}/{count}, {left / 60:.0f} min left] {describe(row)}: {outcome(found)}")
    if report:
        for note in write_report(out, list(store.records.values())):
            tell(note)
    keys = [bench.key(row) for row in rows if row.stock or (row.method in methods() and _present(row))]
    return [store.records[key] for key in keys if key in store.records]


def _present(row: Row) -> bool:
    try:
        declared(row)
    except Absent:
        return False
    return True


def describe(row: Row) -> str:
    """A row in a few words."""
    bits = "/".join(f"{b:g}" for b in (row.key_bits, row.value_bits) if b is not None)
    return " ".join(filter(None, (row.name, bits, row.protect or "", f"window {row.window}" if row.window else "")))


def outcome(found: dict[str, Any]) -> str:
    """What came of a row, in a few words."""
    if found["status"] != "measured":
        return f"{found['status']}: {found['reason']}"
    return f"{found['bits']:.2f} bit, perplexity {found['perplexity']:.3f} ({found['gap']:+.2%}), KL {found['kl']:.4f}"


def make_bench(
    model: str, rows: RowSet, device: str = "auto", windows: int = 16, window_tokens: int = 1024, chunk: int = 64,
    batch: int | None = None, calibration_tokens: int = 16384, text: str | None = None, dtype: str = "float32",
    strict: bool = True,
) -> Bench:  # fmt: skip
    """Load a model folder and the text of a set of rows."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if model.startswith("demo:") or not Path(model).is_dir():
        from kvsink.folder.demo import resolve_model_dir

        folder = Path(resolve_model_dir(model))
    else:
        folder = Path(model)
    tokenizer = load_tokenizer(folder)
    if text is not None:
        words, name = read_text(text), Path(text).name
    elif rows.text == "python":
        words, name = (
            python_source(windows * window_tokens),
            f"Python {sys.version_info[0]}.{sys.version_info[1]} standard library",
        )
    else:
        words, name = evaluation_text(), "WikiText-2 test, detokenized"
    ids = token_windows(words, tokenizer, windows, window_tokens)
    net = load_model(folder, device, dtype)
    calibration_ids = calibration_windows(Decoder(net), "builtin", calibration_tokens, tokenizer)
    label = model if model.startswith("demo:") else folder.name
    return Bench(net, label, ids, name, calibration_ids, tokenizer, chunk, batch, strict)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; `kvsink-eval MODEL --compare` calls it too."""
    parser = argparse.ArgumentParser(
        "python -m kvsink.tools.compare", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--model", required=True, help="A model folder, or demo:smollm2.")
    parser.add_argument("--set", default="published", help="published, design, plan, stock, shift or quick.")
    parser.add_argument("--rows", help="A JSON file with rows, instead of a set.")
    parser.add_argument("--text", help="A text to measure on, instead of the set's own.")
    parser.add_argument("--out", default="docs", type=Path, help="Where records, tables and plots go.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    for name, default in (("windows", 16), ("window-tokens", 1024), ("chunk", 64), ("calibration-tokens", 16384)):
        parser.add_argument(f"--{name}", default=default, type=int)
    parser.add_argument("--batch", default=None, type=int, help="Windows at a time. Default: all on CUDA, 4 on a CPU.")
    parser.add_argument("--no-strict", action="store_true", help="Leave the strict reading out: half the time.")
    parser.add_argument("--retry", action="store_true", help="Run rows again that declined.")
    o = parser.parse_args(argv)
    given = [a for a in (argv if argv is not None else sys.argv[1:]) if a != "--retry"]
    try:
        rows = read_rows(o.rows) if o.rows else named_set(o.set)
        bench = make_bench(
            o.model, rows, o.device, o.windows, o.window_tokens, o.chunk, o.batch, o.calibration_tokens, o.text, o.dtype,
            strict=not o.no_strict,
        )
        shown = " ".join(["python -m kvsink.tools.compare", *_portable(given)])
        with torch.no_grad():
            compare(bench, rows.rows, o.out, shown, o.retry, partial(print, file=sys.stderr, flush=True))
    except KvsinkError as error:
        print(f"kvsink compare: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kvsink compare: interrupted; finished rows are kept, run the same command to go on", file=sys.stderr)
        return 130
    return 0


def _portable(argv: Sequence[str]) -> list[str]:
    """Arguments without the folders of this machine."""
    return [Path(a).name if a.startswith("/") else a for a in argv]


if __name__ == "__main__":
    sys.exit(main())
