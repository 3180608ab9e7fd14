"""Measure every cell of docs/quality.md: `python -m kvsink.tools.quality --model NAME=FOLDER ... --out docs/quality.jsonl`.

A finished cell is written at once, with a key of everything that determines it, so that the same command goes on where it was
interrupted. `python -m kvsink.tools.pages` writes the page from the rows.

Units      seconds of `--budget` are of the clock; a cell that would end after it, as the longest of its kind did, is not begun
Raises     KvsinkError children, in one line; a cell that cannot be measured is a result and is written with its reason
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvsink.errors import KvsinkError, UnknownName
from kvsink.tools.compare import Store, free, named_models
from kvsink.tools.compare_rows import SETS, named_set, read_rows, resolved
from kvsink.tools.quality_measure import KINDS, Cell, Models, Wish, outcome
from kvsink.tools.quality_page import summary

__all__ = ["main", "measured"]

Tell = Callable[[str], None]
Result = tuple[dict[str, Any] | None, str]
"""A record, if there is one, and a line of progress."""
NUMBERS = (
    *("length", "windows", "chunk", "samples", "calls", "prompt_chunk", "problems", "answer", "articles", "words", "batch"),
    *("calibration_tokens", "calibration_window"),
)
"""Options that are numbers of `Wish`."""


def measured(
    models: Models,
    kinds: Sequence[str],
    out: Path,
    budget: float | None = None,
    command: str = "",
    tell: Tell = print,
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """Measure every cell that is not finished in `out`, as long as `budget` seconds last; returns the records there are.

    jobs: processes beside each other, each with the cells of one model, precision and row at a time: a step of a small model is
    bound by its launches, so that one process leaves most of a GPU idle.
    """
    store, begun = Store(out), time.monotonic()
    done = frozenset(key for key in store.records if store.finished(key))
    find = partial(_found, done=done, end=None if budget is None else begun + budget, begun=begun)
    results = find(models, models.cells(kinds)) if jobs == 1 else _beside(models, kinds, jobs, find)
    for record, words in results:
        if record is not None:
            store.add({**record, "command": command})
        tell(words)
    return list(store.records.values())


def _found(models: Models, cells: Sequence[Cell], done: Collection[str], end: float | None, begun: float) -> Iterator[Result]:
    """Records of those cells that are not `done`, and what to tell of each; none is begun that would last beyond `end`."""
    longest: dict[str, float] = {}
    for at, cell in enumerate(cells, 1):
        key = models.key(cell)
        if key in done:
            continue
        now = time.monotonic()
        if end is not None and now + longest.get(cell.kind, 0.0) > end:
            left = len(cells) - at + 1
            yield None, f"{now - begun:.0f} s are over or nearly so; {left} cells were not looked at, run the same command to go on"
            return
        found = outcome(models.measure, cell)
        free()
        longest[cell.kind] = max(longest.get(cell.kind, 0.0), time.monotonic() - now)
        about = {"key": key, "kind": cell.kind, "model": cell.model, "name": cell.row.name, "row": cell.row.as_dict()}
        own = {n: getattr(resolved(cell.row), n) for n in ("key_bits", "value_bits", "protect", "window")}  # as they are today
        record = {**about, **own, "length": cell.length, **found}
        yield record, f"[{at}/{len(cells)}, {time.monotonic() - begun:.0f} s] {cell.words}: {summary(record)}"


def _beside(models: Models, kinds: Sequence[str], jobs: int, find: Callable[..., Iterator[Result]]) -> Iterator[Result]:
    """What `jobs` processes find."""
    start = multiprocessing.get_context("spawn")
    tasks, results = start.Queue(), start.Queue()
    for cells in [*models.units(kinds), *[None] * jobs]:
        tasks.put(cells)
    threads = max(1, (os.cpu_count() or jobs) // jobs)
    workers = [start.Process(target=_worker, args=(models, find, threads, tasks, results), daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers) or not results.empty():
            with suppress(queue.Empty):
                found = results.get(timeout=1)
                if isinstance(found, KvsinkError):
                    raise found
                yield found
    finally:
        for worker in workers:
            worker.terminate()
    if broken := [worker.exitcode for worker in workers if worker.exitcode]:
        said = f"{len(broken)} of {jobs} processes ended with {broken[0]}"
        raise KvsinkError(f"{said}; what is finished is kept. Go on with fewer --jobs")


def _worker(models: Models, find: Callable[..., Iterator[Result]], threads: int, tasks: Any, results: Any) -> None:
    """Cells of one model, precision and row after the other, until there are none."""
    torch.set_num_threads(threads)
    _exactly()
    try:
        with torch.no_grad():
            while (cells := tasks.get()) is not None:
                for found in find(models, cells):
                    results.put(found)
                models.forget()
    except KvsinkError as error:
        results.put(error)


def _exactly() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    w = Wish()
    parser = argparse.ArgumentParser("python -m kvsink.tools.quality", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", required=True, action="append", help="NAME=FOLDER, a hub id or demo:smollm2; again for more.")
    parser.add_argument("--only", default=",".join(KINDS), help="Kinds of cells, with commas.")
    parser.add_argument("--set", default="quality", help=f"Rows: {', '.join(SETS)}.")
    parser.add_argument("--rows", help="A JSON file with rows, instead of a set.")
    parser.add_argument("--out", default="docs/quality.jsonl", type=Path, help="Where cells go, a line each.")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="Begin no cell that would end later.")
    parser.add_argument("--jobs", default=1, type=int, metavar="N", help="Processes beside each other on one GPU.")
    parser.add_argument("--device", default=w.device)
    for name in NUMBERS:
        parser.add_argument(f"--{name.replace('_', '-')}", default=getattr(w, name), type=int)
    parser.add_argument("--calibration", default=w.calibration, help="builtin, mix, or a file, as kvsink-rewrite takes it.")
    parser.add_argument("--text", help="A text of yours to read windows from. Default: WikiText-2's test split.")
    parser.add_argument("--lengths", default=",".join(map(str, w.lengths)), help="Tokens of prompts, with commas.")
    o = parser.parse_args(argv)
    try:
        kinds = o.only.split(",")
        for kind in kinds:
            if kind not in KINDS:
                raise UnknownName("kind of cell", kind, KINDS)
        try:
            lengths = tuple(int(n) for n in o.lengths.split(","))
        except ValueError as error:
            raise KvsinkError(f"--lengths {o.lengths!r} is not a list of numbers with commas; write 4096,8192") from error
        wish = Wish(
            o.device, lengths=lengths, calibration=o.calibration, text=o.text, **{name: getattr(o, name) for name in NUMBERS}
        )
        rows = read_rows(o.rows) if o.rows else named_set(o.set)
        folders = named_models(o.model)
        if o.jobs < 1:
            raise KvsinkError(f"--jobs {o.jobs}: at least one process measures")
        if o.prompt_chunk < 0:
            raise KvsinkError(f"--prompt-chunk {o.prompt_chunk}: write tokens, or 0 for whole prompts")
        _exactly()
        models = Models(folders, wish, rows.rows, alone=o.jobs == 1)
        with torch.no_grad():
            measured(models, kinds, o.out, o.budget, _command(o, folders), partial(print, flush=True), o.jobs)
    except KvsinkError as error:
        print("kvsink quality:", *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kvsink quality: interrupted; finished cells are kept, run the same command to go on", file=sys.stderr)
        return 130
    return 0


def _command(o: argparse.Namespace, folders: dict[str, Path]) -> str:
    """The command without the folders of this machine, and without how much of it one run was to do."""
    w = Wish()
    own = {**vars(w), "set": "quality", "rows": None, "lengths": ",".join(map(str, w.lengths))}
    asked = {n: v for n, v in vars(o).items() if n in own and v != own[n]}
    parts = [f'--model "{name}={folder.name}"' for name, folder in folders.items()]
    parts += [f"--{n.replace('_', '-')} {Path(v).name if n in ('rows', 'text', 'calibration') else v}" for n, v in asked.items()]
    return " ".join(["python -m kvsink.tools.quality", *parts])


if __name__ == "__main__":
    sys.exit(main())
