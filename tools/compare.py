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
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvsink.calibrate.observing import calibration_windows
from kvsink.errors import KvsinkError, UnknownName
from kvsink.evaluate.evaluation import token_windows
from kvsink.evaluate.texts import evaluation_text, read_text
from kvsink.folder.loading import load_model, load_tokenizer
from kvsink.model.decoder import Decoder
from kvsink.tools.compare_measure import Absent, Bench, declared, measure, protection
from kvsink.tools.compare_report import write_report
from kvsink.tools.compare_rows import Row, RowSet, named_set, read_rows
from kvsink.tools.stock import MissingPackage

__all__ = ["Store", "compare", "python_source"]

Tell = Callable[[str], None]
RECORDS = "compare.jsonl"


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
                    raise KvsinkError(f"{path}, line {i + 1} is damaged ({error!r}); remove that line and run again") from error
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


def compare(
    bench: Bench, rows: Sequence[Row], out: Path, command: str = "", retry: bool = False, tell: Tell = print, report: bool = True
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
            shape = {"windows": len(bench.ids), "window_tokens": bench.ids.shape[1], "chunk": bench.chunk, "command": command}
            store.add({**about, **shape, **found})
            fresh += 1
            left = (time.perf_counter() - begun) / fresh * (count - done)
            tell(f"[{done}/{count}, {left / 60:.0f} min left] {describe(row)}: {outcome(found)}")
    if report:
        for note in write_report(out, list(store.records.values())):
            tell(note)
    keys = [bench.key(row) for row in rows if row.stock or _present(row)]
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
    model: str,
    rows: RowSet,
    device: str = "auto",
    windows: int = 16,
    window_tokens: int = 1024,
    chunk: int = 64,
    batch: int | None = None,
    calibration_tokens: int = 16384,
    text: str | None = None,
    dtype: str = "float32",
    strict: bool = True,
) -> Bench:
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
    parser = argparse.ArgumentParser("python -m kvsink.tools.compare", description=__doc__.splitlines()[0] if __doc__ else "")
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
            o.model,
            rows,
            o.device,
            o.windows,
            o.window_tokens,
            o.chunk,
            o.batch,
            o.calibration_tokens,
            o.text,
            o.dtype,
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
