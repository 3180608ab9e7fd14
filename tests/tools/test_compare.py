"""The comparison of methods: rows run once, refusals are results, tables say what was measured."""

from __future__ import annotations

import csv
import json
import shutil
import weakref

import pytest
import torch

from kvsink.errors import KvsinkError
from kvsink.evaluate.evaluation import evaluate
from kvsink.evaluate.reference import Reference
from kvsink.methods import get_method
from kvsink.tools import compare as tool
from kvsink.tools import compare_measure, compare_report
from kvsink.tools.compare import Store, compare, main, named_models, python_source
from kvsink.tools.compare_measure import Bench, measure
from kvsink.tools.compare_rows import SETS, Row, read_rows, resolved, row
from kvsink.tools.eval import main as eval_main
from kvsink.tools.stock import tensor_bytes
from tests.models import build, tokens

ROWS = (row("rtn", 4, 4), row("klt", 2, 2, "first:1"), row("centred", 2, 2, "first:1"))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Plots take longer than tiny models; tests of them stand with compare_report's."""
    monkeypatch.setattr(compare_report, "plot", lambda out, records: [])


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
    [
        {"name": "other"},
        {"chunk": 8},
        {"ids": tokens(2, 48, seed=4)},
        {"calibration_ids": tokens(8, 64, seed=2)},
        {"model": build("mistral")},
    ],
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


def test_a_row_and_the_same_with_its_methods_own_settings_are_one(bench, tmp_path, counted):
    m = get_method("centred")
    named = row("centred", m.key_bits, m.value_bits, m.protect, m.window)
    assert bench.key(row("centred")) == bench.key(named) and resolved(row("no-such-method")) == row("no-such-method")
    found = compare(bench, (row("centred"), named), tmp_path, tell=lambda words: None)
    assert len(counted) == 1 and found[0] == found[1]
    assert (found[0]["key_bits"], found[0]["protect"]) == (m.key_bits, m.protect) and found[0]["row"]["key_bits"] is None


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
    rows = (row("no-such-method", 2, 2), row("rtn", 2, 2, key_nosuch=1), Row("stock:nosuch", 4, 4), row("kvquant-99%", 2, 2))
    assert compare(bench, rows, tmp_path, tell=said.append) == []
    assert "unknown method 'no-such-method'; nearest known" in said[0]
    assert "no field 'key.nosuch'" in said[1]
    assert "outliers are a share of 0 to 10 %" in said[2]
    assert "not installed" in said[3]


def test_a_bug_does_not_end_the_run_and_is_tried_again(bench, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(tool, "measure", broken)
        assert compare(bench, ROWS[:1], tmp_path, tell=lambda words: None)[0]["status"] == "failed"
    assert compare(bench, ROWS[:1], tmp_path, tell=lambda words: None)[0]["status"] == "measured"


def test_a_row_gives_back_the_model_that_it_rewrote(bench, tmp_path, monkeypatch):
    made: list[weakref.ref] = []
    rewrite = compare_measure.rewrite
    monkeypatch.setattr(
        compare_measure, "rewrite", lambda model, *a, **k: made.append(weakref.ref(model)) or rewrite(model, *a, **k)
    )
    alive: list[int] = []
    compare(bench, ROWS, tmp_path, tell=lambda words: alive.append(sum(model() is not None for model in made)))
    assert len(made) == len(ROWS) and alive == [0] * len(ROWS)


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


@pytest.fixture(scope="module")
def wide_dir(tiny_dir, tmp_path_factory):
    """A model with the tokenizer of `tiny_dir`, heads of 24 channels and a larger vocabulary."""
    folder = tmp_path_factory.mktemp("wide") / "wide-model"
    shutil.copytree(tiny_dir, folder)
    model = build("llama-24")
    model.resize_token_embeddings(130)
    model.save_pretrained(folder)
    return folder


SMALL = ["--windows", "2", "--window-tokens", "32", "--chunk", "16", "--calibration-tokens", "512", "--device", "cpu"]


def test_several_models_share_rows_and_page(tiny_dir, wide_dir, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"method": "rtn", "key_bits": 4, "value_bits": 4}, {"method": "centred", "key_bits": 2}]))
    asked = [f"One model={tiny_dir}", str(wide_dir), "--compare", "--rows", str(rows), "--out", str(tmp_path), *SMALL]
    assert eval_main(asked) == 0
    said = capsys.readouterr().err
    assert "[One model, 1/2] [2/2, 0 min left] centred" in said and "[wide-model, 2/2]" in said
    records = [json.loads(line) for line in (tmp_path / "compare.jsonl").read_text().splitlines()]
    assert [(r["model"], r["name"], r["head_dim"]) for r in records] == [
        *(("One model", n, 16) for n in ("rtn", "centred")),
        *(("wide-model", n, 24) for n in ("rtn", "centred")),
    ]
    for r in records[::2]:  # 4 bits, scale and zero point of each row, positions
        assert r["bits"] == pytest.approx(4 + 32 / r["head_dim"] + 40 / 2 / (2 * 2 * r["head_dim"]), abs=2e-3)
    page = (tmp_path / "compare.md").read_text()
    head = "| kept exact | One model: bits | gap | KL | strict KL | wide-model: bits | gap | KL | strict KL | measured |"
    line = next(line for line in page.splitlines() if line.startswith("| rtn |"))
    assert head in page and line.count("|") == head.count("|") + 2
    for r in records[::2]:
        assert f"| {r['bits']:.3f} |" in line and f"| {r['kl']:.4f} | {r['strict_kl']:.4f} |" in line
    assert str(tmp_path) not in page and f"--model 'One model={tiny_dir.name}' --model wide-model" in page
    with (tmp_path / "compare.csv").open() as file:
        assert [r["model"] for r in csv.DictReader(file)] == ["One model"] * 2 + ["wide-model"] * 2


def test_models_go_on_where_they_were_interrupted(tiny_dir, wide_dir, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"method": "rtn"}, {"method": "rtn", "key_bits": 3}]))
    asked = ["--model", f"A={tiny_dir}", "--model", f"B={wide_dir}", "--rows", str(rows), "--out", str(tmp_path), *SMALL]
    seen: list[tuple[str, float]] = []

    def stopped(bench, row, rows):
        if bench.name == "B" and row.key_bits == 3 and not again:
            raise KeyboardInterrupt
        seen.append((bench.name, row.key_bits))
        return measure(bench, row, rows)

    def made(name, *loaded, **how):
        return Bench(build({"A": "llama", "B": "llama-24"}[name]), name, tokens(2, 32), "", tokens(8, 64), chunk=16)

    monkeypatch.setattr(tool, "measure", stopped)
    monkeypatch.setattr(tool, "make_bench", made)
    again = False
    assert main(asked) == 130 and seen == [("A", None), ("A", 3), ("B", None)]
    assert "finished rows are kept" in capsys.readouterr().err
    again = True
    assert main(asked) == 0 and seen[3:] == [("B", 3)]
    assert len((tmp_path / "compare.jsonl").read_text().splitlines()) == 4


def test_a_model_is_called_by_its_own_name(tiny_dir, wide_dir, tmp_path, monkeypatch):
    renamed = tmp_path / "a=b"
    shutil.copytree(tiny_dir, renamed)
    named = tmp_path / "folder"
    shutil.copytree(tiny_dir, named)
    config = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps({**config, "_name_or_path": "someone/Their-Model-1B"}))
    monkeypatch.setattr("kvsink.folder.demo.resolve_model_dir", lambda name: tiny_dir)
    assert named_models([f"X 1={tiny_dir}", str(wide_dir), str(renamed), str(named), "demo:smollm2", "org/Hub-Model"]) == {
        "X 1": tiny_dir,
        "wide-model": wide_dir,
        "a=b": renamed,
        "Their-Model-1B": named,
        "SmolLM2-135M-Instruct": tiny_dir,
        "Hub-Model": tiny_dir,
    }


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--model", "{tiny}", "--model", "/no/such/folder"], "model folder /no/such/folder does not exist"),
        (["--model", "{tiny}", "--model", "X={tiny}", "--model", "X={wide}"], "two models are called 'X'"),
        (["--model", "{tiny}", "--model", "{tiny}"], "two models are called 'model'"),
        (["--model", "={tiny}"], "does not name a model; write NAME=FOLDER"),
        (["--model", "{out}"], "is not a model folder (no config.json)"),
        (["--model", "{tiny}", "--set", "defualt"], "unknown set of rows 'defualt'; nearest known: default"),
    ],
)
def test_bad_models_and_sets_are_one_line_before_anything_runs(asked, words, tiny_dir, wide_dir, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    asked = [a.format(tiny=tiny_dir, wide=wide_dir, out=tmp_path / "empty") for a in asked]
    assert main([*asked, "--out", str(out), *SMALL]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1 and not out.exists()


def test_several_models_are_for_the_comparison(tiny_dir, capsys):
    assert eval_main([str(tiny_dir), str(tiny_dir)]) == 2
    assert "is a second MODEL; several go with --length or --compare" in capsys.readouterr().err
