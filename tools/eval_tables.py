"""Tables of `kvsink-eval` beside its row: figures by position, retrieval, answers of generate(); every cell with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsink.evaluate.intervals import Interval
from kvsink.evaluate.results import EvalResult, GenerationResult, RetrievalResult

__all__ = ["generation_table", "harness_table", "positions_table", "retrieval_table"]


def positions_table(results: Sequence[EvalResult]) -> Any:
    """One line per model and bucket of positions."""
    one = results[0]
    title = f"By position: {one.windows} windows of {one.window_tokens} tokens; in brackets 95 % by windows"
    table = _table(title, "model", "bits", "positions", "tokens", "perplexity", "change", "KL (nats)", "same top token")
    for result in results:
        for b in result.positions:
            change, kl, top1 = (
                _with(b.change, b.change_interval, "+.2%"),
                _with(b.kl, b.kl_interval, ".4f"),
                _with(b.top1, b.top1_interval, ".1%"),
            )
            held = (Path(result.model).name, f"{result.bits_per_element:.2f}")
            table.add_row(*held, b.name, str(b.tokens), f"{b.perplexity:.3f}", change, kl, top1)
    return table


def retrieval_table(found: RetrievalResult, reference: RetrievalResult | None) -> Any:
    """One line per task and length, 16 bit beside the model."""
    table = _table(
        "Retrieval: exact answers, in brackets 95 % of their share",
        "task",
        "tokens",
        "n",
        "exact",
        "recall",
        "16 bit",
        "recall",
        "JSON",
    )
    beside = reference.cells() if reference is not None else [None] * len(found.cells())
    for cell, stock in zip(found.cells(), beside, strict=True):
        valid = "" if cell["valid"] is None else f"{cell['valid']} valid" + (f", {stock['valid']} at 16 bit" if stock else "")
        table.add_row(
            cell["task"], str(cell["length"]), str(cell["n"]), *_counted(cell), *(_counted(stock) if stock else ("", "")), valid
        )
    return table


def generation_table(found: GenerationResult, reference: GenerationResult | None, method: str) -> Any:
    """Two lines: 16 bit, where there is one, and the model."""
    how = f"sampled at {found.temperature:g}" if found.temperature else "greedy"
    title = f"Arithmetic by generate(), {how}, at most {found.budget} tokens; in brackets 95 %"
    table = _table(title, "cache", "n", "right", "same number", "out of budget", "repetition", "tokens")
    rows = [] if reference is None else [("16 bit", reference.figures())]
    for name, f in [*rows, (method, found.figures(reference))]:
        shares = [_with(f[x] / f["n"], f[f"{x}_interval"], ".0%") if x in f else "" for x in ("right", "agreement", "exhausted")]
        means = _with(f["repetition"], f["repetition_interval"], ".3f"), _with(f["tokens"], f["tokens_interval"], ".0f")
        table.add_row(name, str(f["n"]), *shares, *means)
    return table


def harness_table(found: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]], method: str) -> Any:
    """One line per task and metric of lm-eval, 16 bit beside the model."""
    table = _table("Tasks of lm-eval by generate(); in brackets 95 %", "task", "metric", "n", "16 bit", method)
    beside = reference if reference else [None] * len(found)
    for row, stock in zip(found, beside, strict=True):
        held = "" if stock is None else _with(stock["value"], stock["interval"], ".3f")
        table.add_row(row["task"], row["metric"], str(row["n"]), held, _with(row["value"], row["interval"], ".3f"))
    return table


def _table(title: str, *headings: str) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("model", "cache", "task") else "right")
    return table


def _counted(cell: dict[str, Any]) -> tuple[str, str]:
    low, high = cell["interval"]
    return f"{cell['right']} [{low:.0%}, {high:.0%}]", f"{cell['recall']:.0%}"


def _with(value: float | None, interval: Interval | None, form: str) -> str:
    """A figure and its interval; only the figure where there is no spread to tell."""
    if value is None:
        return ""
    return f"{value:{form}}" if interval is None else f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"
