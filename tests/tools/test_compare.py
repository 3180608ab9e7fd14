"""The comparison of methods: rows run once, refusals are results, tables say what was measured."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch

from kvsink.errors import KvsinkError
from kvsink.evaluate.evaluation import evaluate
from kvsink.evaluate.reference import Reference
from kvsink.methods import Claim, methods
from kvsink.tools import compare as tool
from kvsink.tools import compare_measure
from kvsink.tools.compare import Store, compare, main, python_source
from kvsink.tools.compare_measure import Bench, measure
from kvsink.tools.compare_report import COLUMNS, markdown, pareto
from kvsink.tools.compare_rows import SETS, Row, read_rows, row
from kvsink.tools.stock import tensor_bytes
from tests.models import build, tokens

ROWS = (row("rtn", 4, 4), row("klt", 2, 2, "first:1"), row("centred", 2, 2, "first:1"))


@pytest.fixture
def bench():
    return Bench(build("llama"), "tiny", tokens(2, 48, seed=3), "random tokens", tokens(8, 64, seed=1), chunk=16, batch=2)


@pytest.fixture
def counted(monkeypatch):
    """Calls of `measure`, by row."""
    seen: list[Row] = []

    def counting(bench, row, rows):
        seen.append(row)
        return measure(bench, row, rows)

    monkeypatch.setattr(tool, "measure", counting)
    return seen


def test_finished_rows_are_not_measured_again(bench, tmp_path, counted):
    first = compare(bench, ROWS[:2], tmp_path, tell=lambda words: None)
    assert [r["status"] for r in first] == ["measured", "measured"]
    again = compare(bench, ROWS, tmp_path, tell=lambda words: None)
    assert counted == list(ROWS)
    assert again[:2] == first
    assert len((tmp_path / "compare.jsonl").read_text().splitlines()) == 3


def test_a_line_cut_short_is_measured_again(bench, tmp_path, counted):
    compare(bench, ROWS[:2], tmp_path, tell=lambda words: None)
    file = tmp_path / "compare.jsonl"
    file.write_text(file.read_text()[:-40])
    compare(bench, ROWS[:2], tmp_path, tell=lambda words: None)
    assert counted == [*ROWS[:2], ROWS[1]]
    assert all(json.loads(line)["status"] == "measured" for line in file.read_text().splitlines())


def test_a_damaged_line_in_the_middle_is_an_error(bench, tmp_path):
    (tmp_path / "compare.jsonl").write_text("{\n{}\n")
    with pytest.raises(KvsinkError, match="line 1 is damaged"):
        Store(tmp_path / "compare.jsonl")


@pytest.mark.parametrize(
    "change",
    [{"chunk": 8}, {"ids": tokens(2, 48, seed=4)}, {"calibration_ids": tokens(8, 64, seed=2)}, {"model": build("mistral")}],
)
def test_the_key_holds_what_determines_a_row(bench, change):
    about = {n: getattr(bench, n) for n in ("model", "name", "ids", "text", "calibration_ids", "chunk", "batch")}
    other = Bench(**{**about, **change})
    assert bench.key(ROWS[0]) == Bench(**about).key(ROWS[0]) != other.key(ROWS[0])


def test_the_key_holds_the_codec(bench):
    keys = {
        bench.key(r)
        for r in (
            row("klt", 2, 2),
            row("klt", 3, 2),
            row("klt", 2, 2, "none"),
            row("klt", 2, 2, window=8),
            row("klt", 2, 2, key_gain=False),
            row("klt", 2, 2, plan="auto"),
        )
    }
    assert len(keys) == 6
    assert bench.key(row("klt", 2, 2, label="another name")) in keys


def test_a_refusal_is_a_result_with_its_reason(bench, tmp_path, counted):
    odd = row("rtn", 2.5, 2)
    found = compare(bench, (odd, ROWS[0]), tmp_path, tell=lambda words: None)
    assert [r["status"] for r in found] == ["declined", "measured"]
    assert "use 2 or 3" in found[0]["reason"]
    compare(bench, (odd,), tmp_path, tell=lambda words: None)
    assert counted.count(odd) == 1
    compare(bench, (odd,), tmp_path, retry=True, tell=lambda words: None)
    assert counted.count(odd) == 2
    page = (tmp_path / "compare.md").read_text()
    assert "### Not measured" in page and "`rtn` 2.5/2: declined" in page


def test_what_is_not_there_is_skipped_and_said(bench, tmp_path):
    said: list[str] = []
    rows = (row("no-such-method", 2, 2), row("rtn", 2, 2, key_nosuch=1), Row("stock:nosuch", 4, 4))
    assert compare(bench, rows, tmp_path, tell=said.append) == []
    assert "method no-such-method is not registered" in said[0]
    assert "no field 'key.nosuch'" in said[1]
    assert "not installed" in said[2]


def test_a_bug_does_not_end_the_run_and_is_tried_again(bench, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(tool, "measure", broken)
        assert compare(bench, ROWS[:1], tmp_path, tell=lambda words: None)[0]["status"] == "failed"
    assert compare(bench, ROWS[:1], tmp_path, tell=lambda words: None)[0]["status"] == "measured"


def test_figures_are_those_of_the_evaluation(bench):
    import kvsink

    found = measure(bench, ROWS[0], ROWS)
    model = build("llama")
    report = kvsink.rewrite(model, "rtn", key_bits=4, value_bits=4, calibration=bench.calibration_ids)
    result = evaluate(model, build("llama"), bench.ids, chunk=16, batch=2)
    assert found["perplexity"] == pytest.approx(result.perplexity, rel=1e-6)
    assert found["kl"] == pytest.approx(result.kl, rel=1e-4)
    assert found["bits"] == pytest.approx(report.bits, abs=1e-3)
    assert found["bits_at_window"] != found["bits"]
    assert found["strict_kl"] > found["kl"] > 0


@pytest.mark.parametrize("keep", [True, False])
def test_the_reference_runs_once_when_it_is_kept(keep):
    model, calls = build("llama"), []
    model.register_forward_hook(lambda *args: calls.append(1))
    reference = Reference(model, keep=keep)
    ids = tokens(2, 32, seed=5)
    results = [evaluate(build("llama"), reference, ids, chunk=8, batch=1) for _ in range(2)]
    assert len(calls) == (8 if keep else 16)
    assert results[0].kl == results[1].kl == 0 and results[0].baseline_perplexity == results[1].baseline_perplexity
    assert results[0].baseline_bits_per_element == results[1].baseline_bits_per_element
    before = len(calls)
    evaluate(build("llama"), reference, tokens(2, 32, seed=6), chunk=8, batch=1)  # other windows
    assert len(calls) == before + 8


def test_every_form_of_the_table_is_well_formed(bench, tmp_path):
    compare(bench, (*ROWS, row("rtn", 2.5, 2)), tmp_path, "the command", tell=lambda words: None)
    with (tmp_path / "compare.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 4 and tuple(found[0]) == COLUMNS
    by = {(r["method"], r["key_bits"]): r for r in found}
    assert float(by["klt", "2"]["kl"]) > 0 and by["rtn", "2.5"]["status"] == "declined" and by["rtn", "2.5"]["kl"] == ""
    page = (tmp_path / "compare.md").read_text()
    assert "the command" in page and "## tiny on random tokens" in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith("| ") and "KL" in line}
    assert widths == {14}
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "compare.svg").read_text()


def test_published_figures_stand_apart(bench, tmp_path):
    record = compare(bench, (row("rotatekv", 2, 2, "none"),), tmp_path, tell=lambda words: None)
    page = markdown(record)
    claim: Claim = methods()["rotatekv"].claims[0]
    ours, theirs = page.split("## Published figures")
    assert claim.setting in theirs and claim.source in theirs and claim.setting not in ours


def test_pareto_front():
    points = [(2.0, 5.0), (1.0, 9.0), (3.0, 5.0), (3.0, 1.0), (2.0, 4.0), (0.5, math.nan)]
    assert pareto(points) == [1, 4, 3]
    assert pareto([]) == []


def test_rows_from_a_file(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"method": "rotatekv", "key_bits": 2, "value_bits": 2, "options": {"key.reorder": False}}]))
    assert read_rows(file).rows == (row("rotatekv", 2, 2, key_reorder=False),)
    for text, words in (("[]", "empty"), ("{", "cannot be read"), ('[{"method": "rtn", "key": 2}]', "unknown field 'key'")):
        file.write_text(text)
        with pytest.raises(KvsinkError, match=words):
            read_rows(file)


def test_sets_are_distinct_rows():
    for rows in SETS.values():
        assert len({json.dumps(r.as_dict()) for r in rows.rows}) == len(rows.rows)


def test_python_source_is_the_same_twice_and_long_enough():
    text = python_source(1000)
    assert text == python_source(1000) and len(text) >= 8000 and "import" in text


def test_stock_bytes_count_every_tensor_once():
    t, half = torch.zeros(10), torch.zeros(4, dtype=torch.float16)
    held = {"a": t, "same": t, "nested": [(torch.zeros(3, dtype=torch.uint8), {"scale": half})], "n": 7}
    assert tensor_bytes(held) == 10 * 2 + 3 + 4 * 2  # floating point as in a 16-bit model


def test_command_line(tiny_dir, tmp_path, capsys):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"method": "rtn"}]))
    small = ["--windows", "2", "--window-tokens", "32", "--chunk", "16", "--calibration-tokens", "512", "--device", "cpu"]
    argv = ["--model", str(tiny_dir), "--rows", str(file), "--out", str(tmp_path / "out"), *small]
    assert main(argv) == 0
    assert "[1/1" in capsys.readouterr().err
    page = (tmp_path / "out" / "compare.md").read_text()
    assert "python -m kvsink.tools.compare --model model" in page and str(tmp_path) not in page
    assert main([*argv[:2], "--set", "nosuch", "--out", str(tmp_path)]) == 2
    assert "unknown set of rows 'nosuch'" in capsys.readouterr().err


def test_eval_hands_over(tiny_dir, tmp_path, capsys):
    from kvsink.tools.eval import main as eval_main

    small = ["--windows", "2", "--window-tokens", "32", "--chunk", "16", "--device", "cpu", "--calibration-tokens", "512"]
    assert eval_main([str(tiny_dir), "--compare", "--set", "quick", "--out", str(tmp_path), *small]) == 0
    assert len((tmp_path / "compare.jsonl").read_text().splitlines()) == 3
    capsys.readouterr()
    assert eval_main([str(tiny_dir), "--set", "quick", *small]) == 2
    assert "--compare" in capsys.readouterr().err


def test_a_row_that_asks_too_much_does_not_stop_its_neighbours(bench, tmp_path):
    """12-bit codes need 4096 calibration rows; the others of the same protection share a record all the same."""
    found = compare(bench, (row("antkv", 0.75, 0.75, "none"), row("cq", 2, 2, "none")), tmp_path, tell=lambda words: None)
    assert [r["status"] for r in found] == ["declined", "measured"]
    assert "4096" in found[0]["reason"]


def test_rows_of_one_protection_share_one_record(bench, tmp_path, monkeypatch):
    calls = []
    calibrate = compare_measure.calibrate
    monkeypatch.setattr(compare_measure, "calibrate", lambda *a, **k: calls.append(1) or calibrate(*a, **k))
    rows = (
        row("klt", 2, 4, "first:1"),
        row("rotatekv", 2, 2, "none"),
        row("klt", 3, 4, "first:1"),
        row("centred", 2, 4, "first:1"),
    )
    assert all(r["status"] == "measured" for r in compare(bench, rows, tmp_path, tell=lambda words: None))
    assert len(calls) == 2
