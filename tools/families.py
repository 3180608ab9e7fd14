"""Write docs/families.md, what works in every family of models, by running it: `python -m kvsink.tools.families`.

Every cell but the last holds klt at 8 bits for keys and values against the stock model, an untouched twin of the same seed with
its own cache, fed the same tokens (`kvsink.tools.against_stock` says how far apart they may be, and why):

8 bits     a prompt in one chunk, then token by token
chunked    a prompt in chunks of 7, 5, 1, 1 and more
padded     `generate()` on a left-padded batch of two, its tokens forced
compiled   the same through dynamo and all passes; every packed layer fused
folder     saved, rewritten by `kvsink-rewrite`'s engine, and loaded by `from_pretrained`
onnx       4-bit rtn leaves as model.onnx, whose run beside the torch model passes its check

Every family runs in a process of its own, and the record is written as they come, so that a run can be stopped and gone on with.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import transformers

from kvsink.errors import UnknownName
from kvsink.tools.against_stock import BOUND
from kvsink.tools.cache_share import BITS, TOKENS, table
from kvsink.tools.family_cells import CELLS, CHUNKS, LENGTH, PADS, PROMPT, check_family, ids, rewritten
from kvsink.tools.tiny_models import FAMILIES

__all__ = ["CELLS", "check_family", "ids", "page", "rewritten"]

DOCS = Path(__file__).resolve().parents[1] / "docs" / "families.md"
RECORD = DOCS.with_suffix(".json")
COMMAND = "python -m kvsink.tools.families"


def page(record: dict[str, dict[str, str]]) -> str:
    """The file."""
    kinds = ("right", "declined", "wrong", "not judged", "not run")
    built = {f: row for f, row in record.items() if f in FAMILIES and not row[CELLS[0]].startswith("not judged")}
    count = {kind: sum(c.startswith(kind) for row in built.values() for c in row.values()) for kind in kinds}
    counted = ", ".join(f"{n} {kind}" for kind, n in count.items() if n or kind in ("right", "declined", "wrong"))
    lines = [
        "# Families of models",
        "",
        f"Made by `{COMMAND}`, which runs every cell on a tiny random model of the family; change that, not this file.",
        "",
        "Every cell but the last is `klt` at 8 bits for keys and values, rewritten on random tokens and held against the stock "
        "model: an untouched twin with its own cache, fed the same tokens. The number is the largest error over token positions, "
        f"relative to the size of the stock logits; {BOUND:g} is allowed, and [the file that measures it]"
        "(../tools/against_stock.py) says why. Each model has been seen to show a fault planted in its keys.",
        "",
        f"- 8 bits: {PROMPT} tokens in one chunk, {LENGTH - PROMPT} one by one; how many layers are packed, and why others are not",
        f"- chunked: the prompt in chunks of {', '.join(map(str, CHUNKS))}",
        f"- padded: `generate()` on a batch of two, one left-padded by {PADS} tokens, made to say given tokens",
        "- compiled: that through dynamo and all passes, operator by operator (no Inductor); how many sites are fused",
        "- folder: saved, rewritten, and loaded by `from_pretrained`, in float32",
        "- ONNX: `rtn` at 4 bits leaves, and runs beside the torch model in onnxruntime within the export's own check",
        "",
        f"{len(built)} families; cells: {counted}. Last run: torch {torch.__version__}, "
        f"transformers {transformers.__version__}, CPU.",
        "",
        "| family | 8 bits | chunked | padded | compiled | folder | ONNX |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join([FAMILIES[f][0], *_row(record[f])]) + " |" for f in FAMILIES if f in built]
    left = [f for f in FAMILIES if f in record and f not in built]
    lines += ["", "## Not judged", "", "No tiny model of these runs on text alone here, or shows a fault that is planted:", ""]
    lines += [f"- {FAMILIES[f][0]}: {record[f][CELLS[0]].removeprefix('not judged (').removesuffix(')')}" for f in left]
    lines += [
        "",
        "## What stays in 16 bit",
        "",
        f"Of the cache of one sequence of {TOKENS:,} tokens, by the layers that each model's published configuration gives it, "
        "as `tools/cache_share.py` has them: typed in, not read from the files. "
        "Layers that slide over a window are packed with `--sliding`, or where a model has no others; recurrent states never "
        f"are. Of the packed cache: of its bytes, where the other layers take {BITS:g} bits, the default of `klt`.",
        "",
        *table(),
    ]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, str]) -> list[str]:
    """The cells; a refusal that the first one gives the reason of is said once."""
    first = row[CELLS[0]]
    return [first, *("declined" if row[c] == first and first.startswith("declined") else row[c] for c in CELLS[1:])]


def _each(families: Sequence[str], cells: Sequence[str], jobs: int, timeout: float) -> Iterator[tuple[str, dict[str, str], float]]:
    """Outcomes as they come, each family in a process of its own, which may die or be stopped without harm to the others."""
    context: Any = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    torch.set_num_threads(1)
    check_family("llama", ("8 bits",))  # what takes long to import is imported once, before the processes part
    waiting = list(families)
    running: dict[Any, tuple[str, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, waiting[0], cells))
            process.start()
            theirs.close()
            running[mine] = waiting.pop(0), process, time.monotonic()
        ready = wait(list(running), timeout=1.0)
        for pipe, (family, process, begun) in list(running.items()):
            spent = time.monotonic() - begun
            if pipe not in ready and spent < timeout:
                continue
            found = dict.fromkeys(cells, f"wrong (stopped after {timeout:.0f} s)")
            if pipe in ready:
                try:
                    found = pipe.recv()
                except EOFError:
                    process.join()
                    found = dict.fromkeys(cells, f"wrong (its process ended with {process.exitcode})")
            process.kill()
            process.join()
            pipe.close()
            del running[pipe]
            yield family, found, spent


def _child(pipe: Any, family: str, cells: Sequence[str]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pipe.send(check_family(family, cells))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the asked cells and write the record and the page; exits with 1 when a cell is wrong."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", "--family", default="", help="families, by comma")
    parser.add_argument("--cells", default=",".join(CELLS), help="cells, by comma")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one family")
    parser.add_argument("--resume", action="store_true", help="leave out what the record has")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--out", type=Path, default=DOCS)
    o = parser.parse_args(argv)
    chosen, cells = [f for f in o.only.split(",") if f] or list(FAMILIES), o.cells.split(",")
    for kind, asked, known in (("family", chosen, FAMILIES), ("cell", cells, CELLS)):
        for name in asked:
            if name not in known:
                parser.error(str(UnknownName(kind, name, known)))
    kept = json.loads(o.record.read_text(encoding="utf-8")) if o.record.is_file() else {}
    record = {f: {c: row.get(c, "not run") for c in CELLS} for f, row in kept.items() if f in FAMILIES}
    if o.resume:
        chosen = [f for f in chosen if f not in record or any(record[f][c] == "not run" for c in cells)]
    for family, found, seconds in _each(chosen, cells, o.jobs, o.timeout):
        record[family] = {**dict.fromkeys(CELLS, "not run"), **record.get(family, {}), **found}
        print(f"{family} ({seconds:.0f} s): " + "; ".join(f"{c} {t}" for c, t in found.items()), flush=True)
        o.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    o.out.write_text(page(record), encoding="utf-8")
    return int(any(c.startswith("wrong") for row in record.values() for c in row.values()))


if __name__ == "__main__":
    sys.exit(main())
