"""The page about long contexts says what its rows say, row by row, and nothing when it has none."""

from __future__ import annotations

import copy
import json

import pytest

from kvsink.errors import KvsinkError
from kvsink.evaluate.evaluation import evaluate
from kvsink.evaluate.results import GenerationResult, RetrievalResult
from kvsink.tools.quality import PAGE, ROWS, main, page, slim
from tests.models import build, tokens


@pytest.fixture(scope="module")
def record():
    """A row as kvsink-eval writes it, with every part."""
    import dataclasses

    model, other = build("llama"), build("llama")
    other.lm_head.weight.data *= 1.3
    result = evaluate(
        other, model, tokens(3, 100), edges=(0, 32, 100), model_name="/tmp/folder", method="kvsink x", text_name="noise"
    )
    prompt = {"task": "call", "length": 512, "depth": 0.5, "recall": 0.5, "valid": True, "said": "secret"}
    answer = {"wanted": 4, "said": "secret", "tokens": 10, "finished": True, "repetition": 0.0, "number": 4.0, "right": True}
    result = dataclasses.replace(
        result,
        retrieval=RetrievalResult(({**prompt, "right": False}, {**prompt, "right": True})),
        baseline_retrieval=RetrievalResult(({**prompt, "right": True}, {**prompt, "right": True})),
        generation=GenerationResult(30, 0.0, (answer, {**answer, "number": 3.0, "right": False})),
        baseline_generation=GenerationResult(30, 0.0, (answer, answer)),
    )
    return json.loads(json.dumps(result.to_json()))


def test_the_page_is_that_of_its_rows():
    if not ROWS.is_file():
        pytest.skip("nothing has been measured for the page yet")
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    assert PAGE.read_text(encoding="utf-8") == page(rows), "run python -m kvsink.tools.quality"


def test_every_part_of_a_row_has_its_cell(record):
    text = page([slim(record, "Tiny", "x 2/2")])
    kl = record["positions"][1]["kl"]
    low, high = record["positions"][1]["kl_interval"]
    assert "| cache | bits | windows | 0-32 | 32-100 | perplexity of the last |" in text
    assert f"| {kl:.4f} [{low:.4f}, {high:.4f}] |" in text and "| `x 2/2` | 32.00 | 3 x 100 |" in text
    assert "| `call` | 512 | 2 | 100% [34%, 100%], recall 50%, JSON 2/2 | 50% [9%, 91%], recall 50%, JSON 2/2 |" in text
    assert "| 16 bit | greedy | 30 | 2 | 100% [34%, 100%] |  | 0% [0%, 66%] | 0.000 [0.000, 0.000] | 10 [10, 10] |" in text
    assert "| `x 2/2` | greedy | 30 | 2 | 50% [9%, 91%] | 50% [9%, 91%] | 0% [0%, 66%] |" in text
    assert "Tiny, float32" in text and "noise" in text and "secret" not in text and "/tmp/folder" not in text


def test_parts_that_were_not_measured_are_left_out(record):
    bare = {**record, "positions": [], "retrieval": None, "baseline_retrieval": None}
    text = page([slim({**bare, "generation": None, "baseline_generation": None}, "Tiny", "x")])
    assert "##" not in text.removeprefix("# ")
    assert [line for line in page([slim(bare, "Tiny", "x")]).splitlines() if line.startswith("## ")] == [
        "## Arithmetic by `generate()`"
    ]


def test_16_bit_is_the_same_beside_every_cache(record):
    other = copy.deepcopy(slim(record, "Tiny", "y"))
    assert page([slim(record, "Tiny", "x"), other]).count("| 16 bit | greedy") == 1
    other["baseline_retrieval"]["cells"][0]["right"] = 0
    with pytest.raises(KvsinkError, match="differ in 16 bit: .* Measure both with one --baseline"):
        page([slim(record, "Tiny", "x"), other])


def test_rows_are_added_and_replaced(record, tmp_path, capsys):
    row, rows, out = tmp_path / "row.json", tmp_path / "rows.jsonl", tmp_path / "page.md"
    where = ["--rows", str(rows), "--out", str(out)]
    row.write_text(json.dumps(record))
    for label in ("x", "y", "x"):
        assert main([str(row), "--model", "Tiny", "--label", label, *where]) == 0
    held = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [r["label"] for r in held] == ["y", "x"] and out.read_text() == page(held)
    assert main(where) == 0 and out.read_text() == page(held)
    for text, argv, words in (
        ("[]", ["--model", "a", "--label", "b"], "is no row of kvsink-eval"),
        ("{}", [], "a row needs --model and --label"),
    ):
        row.write_text(text)
        assert main([str(row), *argv, *where]) == 2
        assert words in capsys.readouterr().err
