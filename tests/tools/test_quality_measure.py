"""One cell of docs/quality.md: its figures are those of an evaluation alone; cells come in the order that tells most."""

from __future__ import annotations

import pytest

import kvsink
from kvsink.evaluate.evaluation import evaluate
from kvsink.folder.loading import load_model
from kvsink.tools.compare_measure import packed_bits
from kvsink.tools.compare_rows import row
from kvsink.tools.quality_measure import KINDS, STOCK, Cell, Models, Wish, outcome

ROWS = (row("rtn", 4, 4), row("klt", 2, 2, "first:1"), row("klt", 4, 4, "first:1"))
WISH = Wish("cpu", length=64, windows=2, chunk=16, lengths=(32, 96), problems=2, articles=2, words=12, calibration_tokens=512)


@pytest.fixture
def models(tiny_dir):
    return Models({"tiny": tiny_dir}, WISH, ROWS)


def test_error_by_position_is_that_of_the_evaluation(models, tiny_dir):
    found = models.measure(Cell("length", "tiny", ROWS[0], 64))
    bench, model = models.bench("tiny", "length"), load_model(tiny_dir, "cpu", "float32")
    kvsink.rewrite(model, "rtn", key_bits=4, value_bits=4, calibration="none")
    result = evaluate(model, load_model(tiny_dir, "cpu", "float32"), bench.ids, chunk=16, batch=2)
    assert [b["kl"] for b in found["positions"]] == [pytest.approx(result.kl, rel=1e-4)] and result.kl > 0
    assert found["bits"] == packed_bits(model, 64) and (found["tokens"], found["n"], found["packed_layers"]) == (64, 2, 2)


def test_windows_hold_as_many_tokens_whatever_the_model_reaches(tiny_dir):
    """A model of 128 positions reads two windows of them for every one of 256."""
    wish = Wish("cpu", length=256, windows=2, calibration_tokens=512)
    assert Models({"tiny": tiny_dir}, wish, ROWS).bench("tiny", "length").ids.shape == (4, 128)


def test_articles_are_written_through_both_caches(models):
    told = {asked.name: models.measure(Cell("generation", "tiny", asked, 12)) for asked in (STOCK, ROWS[1])}
    assert told["16 bit"]["bits"] == 16 and told["klt"]["bits"] < 6
    assert all(len(found["answers"]["tokens"]) == 2 and "right" not in found["answers"] for found in told.values())
    assert "said" not in told["klt"]["answers"]


@pytest.mark.parametrize(
    ("kind", "length", "words"),
    [("retrieval", 96, "needs at least"), ("structured", 200, "has 128 positions"), ("arithmetic", 8, "no chat template")],
)
def test_what_cannot_be_asked_is_told(models, kind, length, words):
    found = outcome(models.measure, Cell(kind, "tiny", ROWS[1], length))
    assert found["status"] == "declined" and words in found["reason"]


def test_a_cell_that_breaks_is_no_result():
    def broken(cell):
        raise RuntimeError("out of memory")

    assert outcome(broken, Cell("length", "tiny", ROWS[0], 64)) == {"status": "failed", "reason": "RuntimeError: out of memory"}


def test_the_most_telling_cells_come_first(models):
    cells = models.cells(KINDS)
    assert [c.row for c in cells[:3]] == list(ROWS) and {c.kind for c in cells[:3]} == {"length"}
    ours = [c for c in cells[3:] if c.row != ROWS[0]]
    assert cells[3 : 3 + len(ours)] == ours and [c.row.name for c in ours[:4]] == ["16 bit", "16 bit", "klt", "klt"]
    assert [c.row for c in cells if c.kind == "generation"] == [STOCK, ROWS[1]]
    assert len(set(cells)) == len(cells) == 3 + 4 * 2 + 4 * 2 + 4 + 2  # by kind: rows and 16 bit, two lengths of prompts
    assert models.cells(("arithmetic",)) == [c for c in cells if c.kind == "arithmetic"]


def test_keys_tell_apart_what_was_asked(models, tiny_dir):
    cell = Cell("structured", "tiny", ROWS[1], 96)
    others = [
        Cell("retrieval", "tiny", ROWS[1], 96),
        Cell("structured", "tiny", ROWS[2], 96),
        Cell("structured", "tiny", ROWS[1], 32),
    ]
    more = Models({"tiny": tiny_dir}, Wish("cpu", length=64, windows=2, chunk=16, calls=3, calibration_tokens=512), ROWS)
    keys = [models.key(cell), *map(models.key, others), more.key(cell)]
    assert len(set(keys)) == 5 and models.key(cell) == keys[0]
