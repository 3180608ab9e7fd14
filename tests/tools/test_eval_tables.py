"""Tables of an evaluation: every figure with its bounds, 16 bit beside it, nothing where there is nothing to tell."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from kvsink.evaluate.evaluation import evaluate
from kvsink.evaluate.results import GenerationResult, RetrievalResult
from kvsink.tools.eval_tables import generation_table, harness_table, positions_table, retrieval_table
from tests.models import build, tokens


def lines(table):
    """The cells of every line that has any."""
    console = Console(width=300, record=True, file=StringIO())
    console.print(table)
    rows = [line for line in console.export_text().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]


def prompts(task, length, *right, valid=None):
    row = {"task": task, "length": length, "depth": 0.5, "valid": valid, "said": ""}
    return [{**row, "right": r, "recall": 1.0 if r else 0.5} for r in right]


def test_retrieval_counts_stand_beside_16_bit():
    found = RetrievalResult((*prompts("single", 1024, True, False), *prompts("call", 1024, True, valid=True)))
    stock = RetrievalResult((*prompts("single", 1024, True, True), *prompts("call", 1024, False, valid=False)))
    assert lines(retrieval_table(found, stock)) == [
        ["single", "1024", "2", "1 [9%, 91%]", "75%", "2 [34%, 100%]", "100%", ""],
        ["call", "1024", "1", "1 [21%, 100%]", "100%", "0 [0%, 79%]", "50%", "1 valid, 0 at 16 bit"],
    ]
    assert lines(retrieval_table(found, None))[1][-3:] == ["", "", "1 valid"]


def test_generation_counts_agreement_with_16_bit():
    row = {"wanted": 4, "said": "", "tokens": 10, "finished": True, "repetition": 0.25, "number": 4.0, "right": True}
    stock = GenerationResult(30, 0.0, (row, row))
    found = GenerationResult(30, 0.0, (row, {**row, "number": 5.0, "right": False, "finished": False, "tokens": 30}))
    mean = "0.250 [0.250, 0.250]"
    assert lines(generation_table(found, stock, "kvsink x")) == [
        ["16 bit", "2", "100% [34%, 100%]", "", "0% [0%, 66%]", mean, "10 [10, 10]"],
        ["kvsink x", "2", "50% [9%, 91%]", "50% [9%, 91%]", "50% [9%, 91%]", mean, "20 [10, 30]"],
    ]
    assert len(lines(generation_table(found, None, "kvsink x"))) == 1


@pytest.mark.parametrize("windows", [1, 3])
def test_positions_have_bounds_where_windows_spread(windows):
    model, other = build("llama"), build("llama")
    other.lm_head.weight.data *= 1.3
    result = evaluate(other, model, tokens(windows, 40), edges=(0, 8, 40), model_name="m", method="x")
    rows = lines(positions_table([result, result]))
    assert len(rows) == 4 and [row[2] for row in rows[:2]] == ["0-8", "8-40"]
    assert all(("[" in cell) == (windows > 1) for row in rows for cell in row[5:])
    assert rows[0][6].split(" ")[0] == f"{result.positions[0].kl:.4f}"
    alone = evaluate(model, None, tokens(windows, 40), edges=(0, 40))
    assert lines(positions_table([alone]))[0][5:] == ["", "", ""]


def test_tasks_of_the_harness_stand_beside_16_bit():
    rows = [{"task": "t", "metric": "exact_match", "n": 4, "value": 0.75, "interval": (0.3, 0.95)}]
    stock = [{**rows[0], "value": 1.0, "interval": None}]
    assert lines(harness_table(rows, stock, "kvsink x")) == [["t", "exact_match", "4", "1.000", "0.750 [0.300, 0.950]"]]
    assert lines(harness_table(rows, (), "kvsink x"))[0][3] == ""
