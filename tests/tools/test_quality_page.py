"""docs/quality.md shows what its cells say, the newest of each, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from kvsink.evaluate.intervals import binomial
from kvsink.tools.compare_records import read_records
from kvsink.tools.compare_rows import resolved, row
from kvsink.tools.pages import QUALITY, ROOT
from kvsink.tools.quality_measure import STOCK
from kvsink.tools.quality_page import growth, markdown, summary


def bucket(start: int, stop: int, kl: float) -> dict[str, Any]:
    few = {"start": start, "stop": stop, "tokens": stop - start, "perplexity": 9.0, "baseline_perplexity": 8.0, "change": 0.125}
    return {**few, "kl": kl, "kl_interval": (kl - 0.001, kl + 0.001), "top1": 0.9, "top1_interval": None, "change_interval": None}


def cell(kind: str, asked: Any, length: int, **found: Any) -> dict[str, Any]:
    about = {"kind": kind, "model": "Tiny", "name": asked.name, "row": asked.as_dict(), "length": length, "tokens": length}
    own = {"key_bits": asked.key_bits, "value_bits": asked.value_bits, "protect": resolved(asked).protect, "window": 0}
    where = {"dtype": "float32", "device": "cpu", "versions": {"kvsink": "9"}, "seconds": 1, "packed_layers": 1, "layers": 2}
    return {**about, **own, **where, "status": "measured", "bits": 2.125, "n": 4, "chunk": 64, **found}


KLT = row("klt", 2, 2)
POSITIONS = [bucket(0, 1024, 0.05), bucket(1024, 2048, 0.03), bucket(2048, 4096, 0.06), bucket(4096, 8192, 0.1)]


def test_the_page_is_that_of_its_cells() -> None:
    page, records = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8"), read_records(QUALITY)
    assert markdown(records) == page, "run python -m kvsink.tools.pages"
    assert markdown([{**r, "bits": 7.77} for r in records]) != page


def test_growth_is_that_of_the_last_octave() -> None:
    """0.1 against (1024 · 0.03 + 2048 · 0.06) / 3072 = 0.05."""
    assert growth(POSITIONS) == pytest.approx(2.0)
    assert growth(POSITIONS[:3]) is None
    page = markdown([cell("length", KLT, 8192, positions=POSITIONS)])
    assert "| `klt` 2/2 | 2.12 | 0.0500 [0.0490, 0.0510] |" in page and "| 2.00x | 90.0% | +12.50% |" in page
    assert "1 of 2 layers packed" in page
    once = markdown([cell("length", KLT, 8192, positions=POSITIONS, protect="kvsink:3")])  # rows of another default say so
    assert "| `klt` 2/2 kvsink:3 | 2.12 |" in once


def answers(recall: list[float]) -> dict[str, Any]:
    return {"task": ["single"] * 4, "right": [r == 1 for r in recall], "recall": recall, "valid": [None] * 4}


def test_recall_is_held_against_16_bit_on_the_same_prompts() -> None:
    cells = [
        cell("retrieval", STOCK, 4096, answers=answers([1, 1, 0.5, 0])),
        cell("retrieval", KLT, 4096, answers=answers([1, 0.5, 0.5, 0])),
        cell("retrieval", KLT, 8192, answers=answers([0.5, 0.5, 0, 0])),
    ]
    page = markdown(cells)
    mine = next(line for line in page.splitlines() if line.startswith("| `klt`")).split(" | ")
    assert mine[2].startswith("50% [") and mine[3] == "1/4" and mine[4].startswith("80.0% [")
    assert mine[5].startswith("25% [") and mine[7].startswith("–")  # 16 bit was not asked at this length
    low, high = (float(x.strip("%]")) for x in mine[4].split("[")[1].split(", "))
    assert low < 80 < high == 100  # a draw without the one prompt that was lost


def test_counted_shares_have_wilsons_interval() -> None:
    rows = {"right": [True, False, True, True], "number": [1.0, None, 3.0, 4.0], "finished": [True] * 4, "tokens": [5] * 4}
    rows["repetition"] = [0.0] * 4
    stock = {**rows, "number": [1.0, None, 3.0, 5.0]}
    cells = [cell("arithmetic", STOCK, 400, answers=stock), cell("arithmetic", KLT, 400, answers=rows)]
    line = next(line for line in markdown(cells).splitlines() if line.startswith("| `klt`"))
    low, high = binomial(3, 4)
    assert f"| 3/4, 75% [{low:.0%}, {high:.0%}] | 2/4, 50% [" in line and "| 0/4, 0% [" in line


def test_the_last_cell_of_a_setting_counts_and_what_declined_is_told() -> None:
    old, new = (cell("length", KLT, 8192, positions=[bucket(0, 1024, kl)]) for kl in (0.5, 0.25))
    refused = {**cell("arithmetic", KLT, 400), "status": "declined", "reason": "no chat\n template"}
    page = markdown([old, new, refused])
    assert "0.2500" in page and "0.5000" not in page
    assert "- Tiny, arithmetic of 400, `klt` 2/2: no chat template" in page
    assert summary(refused) == "declined: no chat\n template" and "KL 0-1K 0.2500" in summary(new)


def test_prompts_at_once_and_in_pieces_are_told_apart() -> None:
    cells = [
        cell("retrieval", asked, 4096, answers=answers(recall), chunk=chunk)
        for chunk, recall in ((512, [1, 0, 0, 0]), (0, [1, 1, 1, 0]))
        for asked in (STOCK, KLT)
    ]
    page = markdown(cells)
    pieces, once = (page.index(f"### Tiny, recall, prompts {how}") for how in ("by 512 tokens", "at once"))
    assert "| 1/4 |" in page[pieces:once] and "3/4" not in page[pieces:once] and "| 3/4 |" in page[once:]
    assert "chunks of 512" in page[pieces:once] and "chunks" not in page[once:]
