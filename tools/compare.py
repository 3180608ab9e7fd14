"""Measure many methods on one model after another: `kvsink-eval MODEL ... --compare`, or `python -m kvsink.tools.compare`.

Every row goes through the real cache in chunks, once as `generate()` reads it and once strictly (the newest rows too come
back from their codes). The 16-bit model's log-probabilities are computed once where they fit. One calibration record per protection
serves all methods, because rows that stay exact are left out of every statistic. A finished row is written at once, with a
key of everything that determines it, so that an interrupted run goes on where it stopped.

Units      bits: counted per element of keys and values in a 16-bit model, at 4096 tokens and at the length of a window
Raises     KvsinkError children; a method that refuses a row is a result and is written with its reason

The module needs torch, transformers and safetensors; plots need matplotlib and are left out where it is missing.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
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
from kvsink.folder.loading import load_model, load_tokenizer, read_config
from kvsink.model.decoder import Decoder
from kvsink.tools.compare_measure import Absent, Bench, measure, protection
from kvsink.tools.compare_records import NAMES
from kvsink.tools.compare_report import write_report
from kvsink.tools.compare_rows import SETS, Row, RowSet, named_set, read_rows, resolved
from kvsink.tools.stock import MissingPackage

__all__ = ["Store", "compare", "free", "named_models", "python_source"]

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
    bench: Bench, rows: Sequence[Row], out: Path, command: str = "", retry: bool = False, tell: Tell = print, of: str = ""
) -> list[dict[str, Any]]:
    """Measure every row that is not finished in `out`, write tables and plots, and return the records of `rows` in order.

    retry: also run rows again that declined. of: the set that the rows are of. Rows of one protection run together, so that they
    share one record; rows that are the same with their methods' own settings filled in run once.
    """
    out.mkdir(parents=True, exist_ok=True)
    store = Store(out / RECORDS)
    groups: dict[str, list[tuple[Row, str]]] = {}
    keys: list[str] = []
    for row in rows:
        try:
            key, protect = bench.key(row), "" if row.stock else protection(row)
        except (Absent, KvsinkError) as reason:
            tell(f"skipped {describe(row)}: {reason}")
            continue
        if key not in keys:
            groups.setdefault(protect, []).append((row, key))
        keys.append(key)
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
                free()
            about = {"key": key, "set": of, "row": row.as_dict(), "name": row.name, "model": bench.name, "text": bench.text}
            own = {n: getattr(resolved(row), n) for n in ("key_bits", "value_bits", "window")}  # as its method has them today
            shape = {"windows": len(bench.ids), "window_tokens": bench.ids.shape[1], "chunk": bench.chunk, "command": command}
            store.add({**about, **own, **shape, **found})
            fresh += 1
            left = (time.perf_counter() - begun) / fresh * (count - done)
            tell(f"[{done}/{count}, {left / 60:.0f} min left] {describe(row)}: {outcome(found)}")
    for note in write_report(out, list(store.records.values())):
        tell(note)
    return [store.records[key] for key in keys if key in store.records]


def free() -> None:
    """Give back what a row or a model took: a rewritten model and its hooks hold each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe(row: Row) -> str:
    """A row in a few words."""
    row = resolved(row)
    bits = "/".join(f"{b:g}" for b in (row.key_bits, row.value_bits) if b is not None)
    return " ".join(filter(None, (row.name, bits, row.protect or "", f"window {row.window}" if row.window else "")))


def outcome(found: dict[str, Any]) -> str:
    """What came of a row, in a few words."""
    if found["status"] != "measured":
        return f"{found['status']}: {found['reason']}"
    return f"{found['bits']:.2f} bit, perplexity {found['perplexity']:.3f} ({found['gap']:+.2%}), KL {found['kl']:.4f}"


def named_models(asked: Sequence[str]) -> dict[str, Path]:
    """Folders of models by the names that pages call them; each is asked for as FOLDER, NAME=FOLDER, a hub id or demo:smollm2.

    A folder that brings no name is called as its config.json says it was loaded, or as itself. Raises KvsinkError.
    """
    found: dict[str, Path] = {}
    for text in asked:
        name, given, model = text.partition("=")
        if not given or Path(text).is_dir():
            name, model = "", text
        elif not name.strip() or "|" in name:
            raise KvsinkError(f"{text!r} does not name a model; write NAME=FOLDER, without a bar in the name")
        folder = Path(model)
        if not folder.is_dir():
            from kvsink.folder.demo import resolve_model_dir

            folder = resolve_model_dir(model)
            name = name or NAMES.get(model) or model.rpartition("/")[2]
        config = read_config(folder)
        name = name or Path(config.get("_name_or_path") or "").name or folder.resolve().name
        if name in found:
            raise KvsinkError(f"two models are called {name!r} ({found[name]} and {folder}); give one another name: OTHER={model}")
        found[name] = folder
    return found


def make_bench(
    name: str,
    folder: Path,
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
    tokenizer = load_tokenizer(folder)
    if text is not None:
        words, said = read_text(text), Path(text).name
    elif rows.text == "python":
        words, said = (
            python_source(windows * window_tokens),
            f"Python {sys.version_info[0]}.{sys.version_info[1]} standard library",
        )
    else:
        words, said = evaluation_text(), "WikiText-2 test, detokenized"
    ids = token_windows(words, tokenizer, windows, window_tokens)
    net = load_model(folder, device, dtype)
    calibration_ids = calibration_windows(Decoder(net), "builtin", calibration_tokens, tokenizer)
    return Bench(net, name, ids, said, calibration_ids, tokenizer, chunk, batch, strict)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; `kvsink-eval MODEL --compare` calls it too."""
    parser = argparse.ArgumentParser("python -m kvsink.tools.compare", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--model", required=True, action="append", help="FOLDER, NAME=FOLDER, a hub id or demo:smollm2; again for more models."
    )
    parser.add_argument("--set", default="published", help=f"{', '.join(SETS)}.")
    parser.add_argument("--rows", help="A JSON file with rows, instead of a set.")
    parser.add_argument("--text", help="A text to measure on, instead of the set's own.")
    parser.add_argument("--out", default="docs", type=Path, help="Where records, tables and plots go.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    for name, default in (("windows", 16), ("window-tokens", 1024), ("chunk", 64), ("calibration-tokens", 16384)):
        parser.add_argument(f"--{name}", default=default, type=int)
    parser.add_argument(
        "--batch", type=int, help="Windows at a time. Default: all on CUDA, 4 on a CPU, fewer where memory is short."
    )
    parser.add_argument("--no-strict", action="store_true", help="Leave the strict reading out: half the time.")
    parser.add_argument("--retry", action="store_true", help="Run rows again that declined.")
    o = parser.parse_args(argv)
    given = [a for a in (argv if argv is not None else sys.argv[1:]) if a != "--retry"]
    which: list[str] = []
    try:
        rows = read_rows(o.rows) if o.rows else named_set(o.set)
        shown = " ".join(["python -m kvsink.tools.compare", *map(_portable, given)])
        models = named_models(o.model)
        for at, (name, folder) in enumerate(models.items()):
            which = [f"[{name}, {at + 1}/{len(models)}]"] if len(models) > 1 else []
            bench = make_bench(
                name,
                folder,
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
            tell = partial(print, *which, file=sys.stderr, flush=True)
            with torch.no_grad():
                compare(bench, rows.rows, o.out, shown, o.retry, tell, Path(o.rows).stem if o.rows else o.set)
            del bench
            free()
    except KvsinkError as error:
        print("kvsink compare:", *which, *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kvsink compare: interrupted; finished rows are kept, run the same command to go on", file=sys.stderr)
        return 130
    return 0


def _portable(argument: str) -> str:
    """An argument without the folders of this machine, in quotes where a shell needs them."""
    name, given, path = argument.rpartition("=")
    return shlex.quote(name + given + Path(path).name if path.startswith("/") else argument)


if __name__ == "__main__":
    sys.exit(main())
