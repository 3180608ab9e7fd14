"""What an evaluation found: one row with what was measured, on what and with what, and tables of rows.

Units      perplexity per token, KL in nats, bits per element as the cache counts its own bytes
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvsink.evaluate.intervals import binomial, bootstrap
from kvsink.evaluate.positions import Bucket


@dataclass(frozen=True)
class RetrievalResult:
    """What was found again. A row: task, length and depth of a prompt, right, recall, valid (of calls alone), said."""

    rows: tuple[dict[str, Any], ...]

    @property
    def right(self) -> int:
        return sum(row["right"] for row in self.rows)

    @property
    def total(self) -> int:
        return len(self.rows)

    @property
    def fraction(self) -> float:
        return self.right / self.total if self.total else math.nan

    def cells(self) -> list[dict[str, Any]]:
        """Figures of every task and length: n prompts, exact answers with the interval of their share, mean recall, valid JSON."""
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault((row["task"], row["length"]), []).append(row)
        return [
            {
                "task": task,
                "length": length,
                "n": len(rows),
                "right": (right := sum(row["right"] for row in rows)),
                "interval": binomial(right, len(rows)),
                "recall": sum(row["recall"] for row in rows) / len(rows),
                "valid": None if rows[0]["valid"] is None else sum(row["valid"] for row in rows),
            }
            for (task, length), rows in found.items()
        ]


@dataclass(frozen=True)
class GenerationResult:
    """Answers of `generate()`. A row: said, tokens, finished, repetition; of problems also wanted, number (None where none was
    given), right."""

    budget: int
    temperature: float
    rows: tuple[dict[str, Any], ...]

    def figures(self, other: GenerationResult | None = None) -> dict[str, Any]:
        """Shares with their intervals: right; exhausted, which used up the budget; agreement, the same number as `other` gave.
        Means over problems with theirs: repetition (share of runs of four tokens that occurred before) and tokens."""
        n = len(self.rows)
        shares = {"exhausted": [not row["finished"] for row in self.rows]}
        if all("right" in row for row in self.rows):
            shares = {"right": [row["right"] for row in self.rows], **shares}
        if other is not None:
            pairs = zip(self.rows, other.rows, strict=True)
            shares["agreement"] = [a["number"] is not None and a["number"] == b["number"] for a, b in pairs]
        found: dict[str, Any] = {"n": n}
        for name, cases in shares.items():
            found |= {name: sum(cases), f"{name}_interval": binomial(sum(cases), n)}
        for name in ("repetition", "tokens"):
            values = torch.tensor([[row[name]] for row in self.rows], dtype=torch.float64)
            found |= {name: values.mean().item(), f"{name}_interval": bootstrap(values)}
        return found


@dataclass(frozen=True)
class EvalResult:
    """One row: what was measured, on what, and with what."""

    model: str
    method: str
    text: str
    windows: int
    window_tokens: int
    chunk: int
    batch: int
    tokens: int  # tokens that were predicted: windows * (window_tokens - 1)
    perplexity: float
    bits_per_element: float
    cache_nbytes: int  # of one batch of `batch` rows at `window_tokens` tokens
    baseline: str | None = None
    baseline_perplexity: float | None = None
    baseline_bits_per_element: float | None = None
    baseline_cache_nbytes: int | None = None
    kl: float | None = None
    top1: float | None = None
    window_nll: tuple[float, ...] = ()
    baseline_window_nll: tuple[float, ...] = ()
    retrieval: RetrievalResult | None = None
    baseline_retrieval: RetrievalResult | None = None
    generation: GenerationResult | None = None
    baseline_generation: GenerationResult | None = None
    harness: tuple[dict[str, Any], ...] = ()  # rows of `kvsink.evaluate.harness`
    baseline_harness: tuple[dict[str, Any], ...] = ()
    device: str = ""
    dtype: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    sink_decay: tuple[float | None, ...] | None = None  # D_sink by layer, of the packed cache against the reference
    spread: tuple[tuple[float | None, float | None], ...] | None = None  # by `kvsink.evaluate.spread`, of a text of the user's
    positions: tuple[Bucket, ...] = ()  # the same figures by position, where they were asked for

    @property
    def perplexity_change(self) -> float | None:
        """Relative change against the reference: 0.05 is five per cent worse."""
        return None if self.baseline_perplexity is None else self.perplexity / self.baseline_perplexity - 1

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`, with the derived numbers included."""
        record = dataclasses.asdict(self)
        for name in ("retrieval", "baseline_retrieval"):
            if (found := getattr(self, name)) is not None:
                record[name] |= {"right": found.right, "total": found.total, "cells": found.cells()}
        if self.generation is not None:
            record["generation"] |= self.generation.figures(self.baseline_generation)
        if self.baseline_generation is not None:
            record["baseline_generation"] |= self.baseline_generation.figures()
        return {**record, "perplexity_change": self.perplexity_change}

    def table(self) -> Any:
        """The row and its reference as a rich table."""
        from rich.table import Table

        table = Table(
            title=f"{self.model}: {self.windows} windows of {self.window_tokens} tokens in chunks of {self.chunk}",
            caption=self.provenance(),
        )
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "cache" else "right")
        for row in self.rows():
            table.add_row(*row)
        return table

    def rows(self) -> list[tuple[str, ...]]:
        """Cells under HEADINGS: the reference first, where there is one."""
        change, kl, top1 = self.perplexity_change, self.kl, self.top1
        compared = ("", "", "")
        rows: list[tuple[str, ...]] = []
        if change is not None and kl is not None and top1 is not None and self.baseline_perplexity is not None:
            compared = (f"{change:+.2%}", f"{kl:.4f}", f"{top1:.1%}")
            held = self._held(self.baseline_bits_per_element, self.baseline_cache_nbytes)
            quality = (f"{self.baseline_perplexity:.3f}", "", "", "", _share(self.baseline_retrieval))
            rows.append((f"{self.baseline} (reference)", *held, *quality))
        held = self._held(self.bits_per_element, self.cache_nbytes)
        rows.append((self.method, *held, f"{self.perplexity:.3f}", *compared, _share(self.retrieval)))
        return rows

    def _held(self, bits: float | None, nbytes: int | None) -> tuple[str, str]:
        if bits is None or nbytes is None:
            return "", ""
        return f"{bits:.2f}", f"{nbytes / (self.batch * self.window_tokens) / 1e3:.2f}"

    def provenance(self) -> str:
        """Text, tokens, device and versions in one line."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.text}; {self.tokens} tokens predicted; {self.batch} rows at a time; {self.device}, {self.dtype};"
            f" {versions}; {self.seconds:.0f} s"
        )


HEADINGS = ("cache", "bits", "KB/token", "perplexity", "change", "KL (nats)", "top-1", "retrieval")


def markdown_table(results: Sequence[EvalResult]) -> str:
    """The rows of several results as one Markdown table; a reference that appears twice is listed once."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
    for result in results:
        for row in result.rows():
            line = "| " + " | ".join(cell or " " for cell in row) + " |"
            if line not in lines:
                lines.append(line)
    return "\n".join(lines)


def _share(result: RetrievalResult | None) -> str:
    return "" if result is None else f"{result.right}/{result.total}"
