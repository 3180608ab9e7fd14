"""`python -m kvsink.tools.quality`: cells are written as they end, a run goes on where it stopped, and budgets are kept."""

from __future__ import annotations

import json
import os

import pytest

from kvsink.tools import quality
from kvsink.tools.compare import named_models
from kvsink.tools.compare_rows import read_rows
from kvsink.tools.quality import main, measured
from kvsink.tools.quality_measure import Models, Wish


@pytest.fixture
def command(tiny_dir, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"method": "rtn", "key_bits": bits, "value_bits": bits} for bits in (8, 4)]))
    about = ["--model", f"tiny={tiny_dir}", "--rows", str(rows), "--device", "cpu", "--length", "64", "--chunk", "16"]
    return [*about, "--calibration-tokens", "512", "--out", str(tmp_path / "rows.jsonl")]


def read(command):
    with open(command[-1]) as file:
        return [json.loads(line) for line in file]


def test_a_run_goes_on_where_it_was_interrupted(command, monkeypatch, capsys):
    whole = Models.measure
    asked = []

    def interrupted(self, cell):
        asked.append(cell)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(self, cell)

    monkeypatch.setattr(Models, "measure", interrupted)
    assert main([*command, "--only", "length"]) == 130 and len(read(command)) == 1
    assert "interrupted" in capsys.readouterr().err
    assert main([*command, "--only", "length"]) == 0
    assert len(asked) == 3 and asked[1] == asked[2]
    rows = read(command)
    assert [r["key_bits"] for r in rows] == [8, 4] and rows[0]["positions"][0]["kl"] < rows[1]["positions"][0]["kl"]
    asked = '--model "tiny=model" --rows rows.json --device cpu --length 64 --chunk 16 --calibration-tokens 512'
    assert rows[0]["command"] == f"python -m kvsink.tools.quality {asked}"


def test_no_cell_is_begun_that_would_end_too_late(command, monkeypatch, tmp_path):
    clock = iter((0, 0, 30, 30, 30, 30))
    monkeypatch.setattr(quality.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(
        Models, "measure", lambda self, cell: {"status": "measured", "kind": "length", "positions": [], "bits": 1, "seconds": 30}
    )
    said = []
    models = Models(
        named_models([command[1]]), Wish("cpu", length=64, windows=2, calibration_tokens=512), read_rows(command[3]).rows
    )
    assert len(measured(models, ("length",), tmp_path / "out.jsonl", budget=50, tell=said.append)) == 1
    assert "1 cells were not looked at" in said[-1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--only", "lengths"], "nearest known: length"),
        (["--lengths", "4K"], "write 4096,8192"),
        (["--jobs", "0"], "--jobs 0: at least one process measures"),
        (["--prompt-chunk", "-5"], "--prompt-chunk -5: write tokens, or 0 for whole prompts"),
        (["--rows", "nowhere.json"], "nowhere.json cannot be read"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_what_is_refused_takes_one_line(command, capsys, more, words):
    assert main([*command, *more]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_processes_beside_each_other_measure_the_same(command, tmp_path, capsys):
    """Greedy answers and sums of one model do not depend on which process asks; a second run has nothing left to do."""
    more = ["--only", "length,retrieval", "--lengths", "900", "--samples", "1", "--windows", "2"]
    assert main([*command, *more]) == 0
    alone = read(command)
    beside = [*command[:-1], str(tmp_path / "beside.jsonl")]
    assert main([*beside, *more, "--jobs", "2"]) == 0
    found = read(beside)
    same = ("key", "command", "status", "bits", "positions", "answers", "reason")
    assert sorted(([r.get(n) for n in same] for r in found), key=str) == sorted(([r.get(n) for n in same] for r in alone), key=str)
    assert len(found) == 5  # 16 bit is asked, not held against itself
    capsys.readouterr()
    assert main([*beside, *more, "--jobs", "2"]) == 0 and capsys.readouterr().out == "" and read(beside) == found


def test_a_process_that_breaks_is_said_in_one_line(command, monkeypatch, capsys):
    monkeypatch.setattr(quality, "_worker", os._exit)  # more arguments than it takes
    assert main([*command, "--only", "length", "--jobs", "2"]) == 2
    assert "of 2 processes ended with" in capsys.readouterr().err
