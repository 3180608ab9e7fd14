"""One model of `kvsink-eval` on text: its row beside 16 bit, and what else was asked for, in the order it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kvsink.errors import EvaluationError, UnsupportedError
from kvsink.evaluate import evaluation
from kvsink.evaluate.generating import arithmetic, check_arithmetic
from kvsink.evaluate.harness import harness, load_tasks
from kvsink.evaluate.positions import doubling
from kvsink.evaluate.results import EvalResult
from kvsink.evaluate.retrieval import TASKS, check_retrieval, retrieval
from kvsink.evaluate.spread import spread, spread_line
from kvsink.evaluate.texts import detokenize_wikitext, evaluation_text, looks_like_wikitext, read_text
from kvsink.folder.demo import resolve_model_dir
from kvsink.folder.loading import load_model, load_tokenizer
from kvsink.profiling.health import sink_health

__all__ = ["Wishes", "measure", "text_of"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Wishes:
    """What the command line asked for. length: windows of so many tokens, told apart by position; lengths: of retrieval's prompts,
    None for the window and its half and quarter; problems: of arithmetic, 0 for none; harness: tasks of lm-eval, of each so many
    documents as limit says."""

    baseline: str | None
    text: tuple[str, str]
    own_text: bool
    windows: int
    window_tokens: int
    length: int | None
    chunk: int
    batch: int
    strict: bool
    sinks: bool
    device: str
    dtype: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...] | None
    depths: tuple[float, ...]
    samples: int
    problems: int
    budget: int
    temperature: float
    harness: tuple[str, ...]
    limit: int | None


def measure(model: str, wish: Wishes, bar: Callable[[str], Progress]) -> tuple[EvalResult, str]:
    """The row of a model folder, and lines about its text and sinks. What cannot be measured is refused before anything is."""
    folder = resolve_model_dir(model)
    baseline = None if wish.baseline is None else resolve_model_dir(wish.baseline)
    tokenizer = load_tokenizer(folder)
    net = load_model(folder, wish.device, wish.dtype)
    packed = evaluation.is_rewritten(net)
    if (wish.length or wish.problems or wish.harness) and not packed and baseline is None:
        raise EvaluationError(
            f"{model} is not a rewritten folder, so that there is nothing to hold against 16 bit. Run kvsink-rewrite {model} OUT"
            " and pass OUT, or pass --baseline DIR"
        )
    if wish.length:
        evaluation.check_length(net, wish.length, "--length")
    ids = evaluation.token_windows(wish.text[0], tokenizer, wish.windows, wish.window_tokens)
    evaluation.check_length(net, wish.window_tokens)
    lengths = wish.lengths or _lengths(net, wish)
    check_retrieval(net, tokenizer, wish.tasks, lengths, wish.text[0])
    if wish.problems:
        check_arithmetic(net, tokenizer, wish.problems, wish.budget)
    tasks = load_tasks(wish.harness) if wish.harness else []
    reference = load_model(baseline, wish.device, wish.dtype) if baseline is not None else net if packed else None
    factory = partial(evaluation.packed_cache, strict=wish.strict) if packed else evaluation.dynamic_cache
    result = evaluation.evaluate(
        net,
        reference,
        ids,
        chunk=wish.chunk,
        cache_factory=factory,
        batch=wish.batch,
        model_name=model,
        method=evaluation.method_name(net) + (", strict" if wish.strict and packed else ""),
        text_name=wish.text[1],
        progress=bar("perplexity"),
        edges=doubling(wish.length) if wish.length else None,
    )
    sides = [("", net, factory)] + ([] if reference is None else [("baseline_", reference, evaluation.dynamic_cache)])
    more: dict[str, Any] = {}
    for side, one, cache in sides:
        beside = ", reference" if side else ""
        if wish.tasks:
            ask = partial(retrieval, tasks=wish.tasks, lengths=lengths, depths=wish.depths, samples=wish.samples)
            ask = partial(ask, text=wish.text[0], chunk=wish.chunk, batch=wish.batch, progress=bar(f"retrieval{beside}"))
            more[f"{side}retrieval"] = ask(one, tokenizer, cache_factory=cache)
        if wish.problems:
            solve = partial(arithmetic, count=wish.problems, budget=wish.budget, temperature=wish.temperature, batch=wish.batch)
            more[f"{side}generation"] = solve(one, tokenizer, cache_factory=cache, progress=bar(f"arithmetic{beside}"))
        if tasks:
            more[f"{side}harness"] = harness(one, tokenizer, tasks, cache, wish.limit, wish.batch)
    lines = []
    if packed and wish.own_text:
        more["spread"] = spread(net, ids[:2, :1024])
        lines.append(spread_line(more["spread"]))
    if packed and wish.sinks:
        try:
            health = sink_health(net, reference, ids[:1, :512], wish.chunk, wish.strict)
            more["sink_decay"] = health.d_sink
            lines.append(health.line())
        except UnsupportedError as error:
            lines.append(str(error))
    return replace(result, **more), "\n".join(filter(None, lines))


def text_of(path: str | None, detokenize: bool | None) -> tuple[str, str]:
    """The text and the name a row gives it."""
    if path is None:
        return evaluation_text(), "WikiText-2 test, detokenized"
    text = read_text(path)
    if detokenize if detokenize is not None else looks_like_wikitext(text):
        return detokenize_wikitext(text), f"{Path(path).name}, detokenized"
    return text, Path(path).name


def _lengths(net: Any, wish: Wishes) -> tuple[int, ...]:
    """A quarter of a window, its half and all of it, as far as they hold prompts and leave positions for answers."""
    whole, limit = wish.window_tokens, evaluation.context_of(net)
    most = whole if limit is None else min(whole, limit - max((TASKS[task][1] for task in wish.tasks), default=0))
    least = 256 if wish.tasks == ("single",) else 1024
    return tuple(n for n in (whole // 4, whole // 2, most) if n >= least) or (least,)
