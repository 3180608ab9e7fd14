"""One cell of docs/quality.md, measured: a cache of one model at one length, on text or at a task.

Formula    length: `kvsink.evaluate.evaluation` by position, in float32; retrieval, structured, arithmetic, generation: what
           `kvsink-eval --retrieval`, `--arithmetic` and `kvsink.evaluate.generating.writing` say, in 16 bit on a GPU
Units      bits: counted per element of the layers that are packed, at the length of the cell
Raises     KvsinkError children; a cell that a model cannot be asked is a result, with its reason
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvsink.calibrate.observing import CALIBRATION_WINDOW, calibration_windows
from kvsink.errors import EvaluationError, KvsinkError
from kvsink.evaluate.evaluation import context_of, device_name, dynamic_cache, evaluate, packed_cache, token_windows, versions
from kvsink.evaluate.generating import arithmetic, writing
from kvsink.evaluate.positions import doubling
from kvsink.evaluate.reference import Reference, free_bytes
from kvsink.evaluate.results import GenerationResult
from kvsink.evaluate.retrieval import TASKS, Question, check_retrieval, questions, retrieval
from kvsink.folder.loading import load_model, load_tokenizer, pick_device
from kvsink.model.decoder import Decoder
from kvsink.model.offload import place_of
from kvsink.model.runtime import runtime_of
from kvsink.tools.compare import describe, free
from kvsink.tools.compare_measure import Bench, packed_bits, protection, rewritten_copy
from kvsink.tools.compare_rows import Row
from kvsink.tools.eval_text import text_of

__all__ = ["KINDS", "STOCK", "Cell", "Models", "Wish"]

KINDS = ("length", "retrieval", "structured", "arithmetic", "generation")
STOCK = Row("stock:dynamic", label="16 bit")
_FOUND = tuple(name for name in TASKS if name != "call")
_AT_ONCE = 131_072  # tokens of all prompts of a batch that one step takes
_KEPT = 0.65  # of a GPU's free memory, for the log-probabilities in 16 bit that all rows are held against


@dataclass(frozen=True)
class Wish:
    """How much is measured. length: tokens of a window, of which there are so many that all models read as many tokens. lengths: of
    prompts; samples, calls: prompts per task, length and depth. answer, words: the most new tokens of an answer and an article."""

    device: str = "auto"
    length: int = 32768
    windows: int = 4
    chunk: int = 256
    lengths: tuple[int, ...] = (4096, 8192, 16384, 30720)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    samples: int = 2
    calls: int = 8
    prompt_chunk: int = 512
    problems: int = 100
    answer: int = 400
    articles: int = 16
    words: int = 2000
    batch: int = 48
    calibration: str = "builtin"
    text: str | None = None
    calibration_tokens: int = 16384
    calibration_window: int = CALIBRATION_WINDOW


@dataclass(frozen=True)
class Cell:
    """What is measured at once; length: of a window, a prompt, or an answer."""

    kind: str
    model: str
    row: Row
    length: int

    @property
    def words(self) -> str:
        """Its name in a line of progress."""
        return f"{self.model}, {describe(self.row)}, {self.kind} {self.length}"


@dataclass
class Models:
    """Models, and what was rewritten of them: on a GPU all of it is kept, on a CPU the last.

    alone: no other process measures beside this one, so that the log-probabilities in 16 bit may fill the GPU.
    """

    folders: dict[str, Path]
    wish: Wish
    rows: Sequence[Row]
    alone: bool = True
    _benches: dict[tuple[str, torch.dtype], Bench] = field(default_factory=dict)
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    _asked: dict[tuple[Any, ...], list[Question]] = field(default_factory=dict)

    def bench(self, name: str, kind: str) -> Bench:
        """A model in the precision of a kind."""
        place = pick_device(self.wish.device)
        exact = kind == "length" or place.type == "cpu"
        key = name, torch.float32 if exact else torch.bfloat16
        if key not in self._benches:
            if place.type == "cpu":
                self._benches.clear()
                self._made.clear()
            w, tokenizer = self.wish, load_tokenizer(self.folders[name])
            net = load_model(self.folders[name], place, key[1])
            length = min(w.length, context_of(net) or w.length)
            words, said = text_of(w.text, None)
            ids = token_windows(words, tokenizer, w.windows * max(1, w.length // length), length)
            text = calibration_windows(Decoder(net), w.calibration, w.calibration_tokens, tokenizer, w.calibration_window)
            self._benches[key] = Bench(net, name, ids, said, text, tokenizer, self.wish.chunk, None, strict=False)
        return self._benches[key]

    def _reference(self, bench: Bench) -> Reference:
        """What a bench's rows are held against; it is kept where most of a GPU bears it."""
        net = bench.model
        if place_of(net).type == "cuda" and not bench.reference.keep:
            whole = 4 * bench.ids.numel() * net.config.get_text_config().vocab_size
            bench.reference = Reference(net, self.alone and whole < _KEPT * free_bytes(place_of(net)))
        return bench.reference

    def rewritten(self, bench: Bench, row: Row) -> Any:
        """The model with the cache of a row; itself for 16 bit."""
        if row.stock:
            return bench.model
        key = bench.name, bench.model.dtype, row
        if key not in self._made:
            if place_of(bench.model).type == "cpu":
                self._made.clear()
            alike = [r for r in self.rows if not r.stock and protection(r) == protection(row)]
            self._made[key] = rewritten_copy(bench, row, alike)[0]
        return self._made[key]

    def forget(self) -> None:
        """Give back what was rewritten; the models as they were stay."""
        self._made.clear()
        free()

    def cells(self, kinds: Sequence[str]) -> list[Cell]:
        """All cells of these kinds, the most telling first: error by position, then tasks of our rows, then those of others."""
        ours = [row for row in self.rows if row.method.startswith("klt")]
        others = [row for row in self.rows if row not in ours]
        first = [("length", tuple(self.rows)), *((kind, (STOCK, *ours)) for kind in KINDS[1:])]
        order = [*first, *((kind, tuple(others)) for kind in KINDS[1:-1])]
        return [
            Cell(kind, name, row, length)
            for kind, rows in order
            if kind in kinds
            for name in self.folders
            for row in rows
            for length in self._lengths(kind)
            if kind != "generation" or row == STOCK or row == ours[0]
        ]

    def units(self, kinds: Sequence[str]) -> list[list[Cell]]:
        """The same cells, those together that one rewritten model serves."""
        found: dict[tuple[bool, str, Row], list[Cell]] = {}
        for cell in self.cells(kinds):
            found.setdefault((cell.kind == "length", cell.model, cell.row), []).append(cell)
        return list(found.values())

    def _lengths(self, kind: str) -> tuple[int, ...]:
        w = self.wish
        by = {"length": (w.length,), "arithmetic": (w.answer,), "generation": (w.words,)}
        return by.get(kind, w.lengths)

    def key(self, cell: Cell) -> str:
        """A name of everything that determines a cell."""
        w = self.wish
        about = {"kind": cell.kind, "length": cell.length, "row": self.bench(cell.model, cell.kind).key(cell.row)}
        how = {
            "retrieval": [w.depths, w.samples, w.prompt_chunk, _FOUND],
            "structured": [w.depths, w.calls, w.prompt_chunk],
            "arithmetic": [w.problems],
            "generation": [w.articles, w.batch],
        }
        return hashlib.sha256(json.dumps([about, how.get(cell.kind)], sort_keys=True).encode()).hexdigest()[:24]

    def measure(self, cell: Cell) -> dict[str, Any]:
        """The figures of a cell, with what they were measured on."""
        begun = time.perf_counter()
        bench = self.bench(cell.model, cell.kind)
        limit = context_of(bench.model)
        if cell.kind in ("retrieval", "structured") and limit and cell.length > limit:
            raise EvaluationError(f"the model has {limit} positions")
        for other in self._benches.values():
            if other is not bench or cell.kind != "length":
                other.reference = Reference(other.model)  # gives back what it kept
        work = self.rewritten(bench, cell.row)
        made = time.perf_counter() - begun
        found: dict[str, Any] = getattr(self, f"_{cell.kind}")(bench, work, cell)
        plans = [] if cell.row.stock else runtime_of(work).plans
        length = found.get("tokens", cell.length)
        return {
            "status": "measured",
            **found,
            "bits": 16.0 if cell.row.stock else packed_bits(work, length),
            "packed_layers": sum(plan.codec is not None for plan in plans),
            "layers": len(getattr(bench.model.config.get_text_config(), "layer_types", None) or plans),
            "device": device_name(place_of(bench.model)),
            "dtype": str(bench.model.dtype).removeprefix("torch."),
            "versions": versions(),
            "seconds": round(time.perf_counter() - begun, 1),
            "rewrite_seconds": round(made, 1),
        }

    def _length(self, bench: Bench, work: Any, cell: Cell) -> dict[str, Any]:
        tokens = bench.ids.shape[1]
        result = evaluate(
            work, self._reference(bench), bench.ids, bench.chunk, packed_cache, batch=bench.batch or 1, edges=doubling(tokens)
        )
        shape = {"tokens": tokens, "n": len(bench.ids), "chunk": bench.chunk, "text": bench.text}
        return {**shape, "positions": [dataclasses.asdict(bucket) for bucket in result.positions]}

    def _asks(self, bench: Bench, work: Any, cell: Cell, tasks: tuple[str, ...], samples: int) -> dict[str, Any]:
        most = max(TASKS[task][1] for task in tasks)
        length = min(cell.length, (context_of(bench.model) or cell.length + most) - most)
        check_retrieval(bench.model, bench.tokenizer, tasks, (length,))
        key = bench.name, tasks, length
        if key not in self._asked:
            self._asked[key] = questions(bench.tokenizer, tasks, (length,), self.wish.depths, samples)
        cache = dynamic_cache if cell.row.stock else packed_cache
        fed = self.wish.prompt_chunk or length
        how: dict[str, Any] = {"chunk": fed, "batch": max(1, min(self.wish.batch, _AT_ONCE // fed)), "asked": self._asked[key]}
        rows = retrieval(work, bench.tokenizer, cache, tasks, (length,), self.wish.depths, samples, **how).rows
        columns = {name: [row[name] for row in rows] for name in ("task", "right", "recall", "valid")}
        return {"tokens": length, "n": len(rows), "chunk": self.wish.prompt_chunk, "answers": columns}

    def _retrieval(self, bench: Bench, work: Any, cell: Cell) -> dict[str, Any]:
        return self._asks(bench, work, cell, _FOUND, self.wish.samples)

    def _structured(self, bench: Bench, work: Any, cell: Cell) -> dict[str, Any]:
        return self._asks(bench, work, cell, ("call",), self.wish.calls)

    def _arithmetic(self, bench: Bench, work: Any, cell: Cell) -> dict[str, Any]:
        cache = dynamic_cache if cell.row.stock else packed_cache
        w = self.wish
        return _answers(arithmetic(work, bench.tokenizer, cache, w.problems, cell.length, batch=w.batch))

    def _generation(self, bench: Bench, work: Any, cell: Cell) -> dict[str, Any]:
        cache = dynamic_cache if cell.row.stock else packed_cache
        w = self.wish
        return _answers(writing(work, bench.tokenizer, cache, w.articles, cell.length, batch=w.batch))


def _answers(found: GenerationResult) -> dict[str, Any]:
    """What answers were, a column each, without their words."""
    names = [name for name in found.rows[0] if name != "said"]
    answers = {name: [row[name] for row in found.rows] for name in names}
    return {"n": len(found.rows), "temperature": found.temperature, "answers": answers}


def outcome(measure: Callable[[Cell], dict[str, Any]], cell: Cell) -> dict[str, Any]:
    """What came of a cell: figures, or in words why there are none."""
    try:
        return measure(cell)
    except KvsinkError as reason:
        return {"status": "declined", "reason": str(reason)}
    except Exception as error:  # one cell must not end a run of many; it runs again next time
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:400]}
