"""kvsink-rewrite: options reach the engine, and bad input is one line with OUT_DIR absent or untouched."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

import kvsink
from kvsink.errors import KvsinkError
from kvsink.tools import rewrite
from kvsink.tools.rewrite import main


@pytest.fixture
def engine(monkeypatch):
    """Record the call instead of rewriting."""
    calls = []

    def fake(source, out_dir, options, **rest):
        rest.pop("progress")("calibrate", 1, 2)
        calls.append((source, out_dir, asdict(options), rest))
        return kvsink.Report(model="tiny", method=options.method, protect=options.protect or "none")

    monkeypatch.setattr(kvsink, "rewrite_dir", fake, raising=False)
    return calls


def test_options_reach_the_engine(engine, tiny_dir, tmp_path, capsys):
    out = tmp_path / "out"
    flags = "--method rtn --key-bits 3 --value-bits 2.5 --protect first:2 --window 8 --calibration-tokens 99"
    flags += " --layers 0:key_bits=4"
    assert main([str(tiny_dir), str(out), *flags.split(), "--device", "cpu", "--dry-run"]) == 0
    source, target, options, rest = engine[0]
    assert (source, target) == (tiny_dir, out)
    expected = {
        "method": "rtn", "key_bits": 3.0, "value_bits": 2.5, "protect": "first:2", "window": 8,
        "calibration": "builtin", "calibration_tokens": 99, "layers": "0:key_bits=4",
    }  # fmt: skip
    assert {name: options[name] for name in expected} == expected
    assert rest == {"onnx": "", "device": "cpu", "force": False, "dry_run": True, "by_layer": None}
    assert f"dry run: {out} was not written" in capsys.readouterr().out


def test_unset_options_are_the_methods_own(engine, tiny_dir, tmp_path):
    assert main([str(tiny_dir), str(tmp_path / "out"), "--eval-windows", "0"]) == 0
    options = engine[0][2]
    assert options["method"] == "klt"
    assert [options[name] for name in ("key_bits", "value_bits", "protect", "window")] == [None] * 4


def refused(argv, words, capsys):
    assert main([str(part) for part in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert words in lines[0]
    assert captured.out == ""


def test_missing_and_non_model_folders(engine, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    refused([tmp_path / "none", tmp_path / "out"], "does not exist", capsys)
    refused([tmp_path / "empty", tmp_path / "out"], "no config.json", capsys)
    refused(["demo:gpt5", tmp_path / "out"], "nearest known: demo:smollm2", capsys)
    assert not engine
    assert not (tmp_path / "out").exists()


def test_existing_out_dir(engine, tiny_dir, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    refused([tiny_dir, out], "Pass --force", capsys)
    refused([tiny_dir, out / "precious", "--force"], "not a folder", capsys)
    assert (out / "precious").read_text() == "mine"
    assert not engine
    assert main([str(tiny_dir), str(out), "--force", "--eval-windows", "0"]) == 0
    assert engine[0][3]["force"] is True


@pytest.mark.parametrize("out", ["", "inside", ".."])
def test_out_dir_must_not_touch_its_source(engine, tiny_dir, out, capsys):
    refused([tiny_dir, tiny_dir / out, "--force"], "overlap", capsys)
    assert not engine


@pytest.mark.parametrize(
    "flags", [["--key-bits", "two"], ["--calibration-tokens", "0"], ["--nosuch"], ["--eval-windows", "-1"]]
)
def test_bad_options(engine, tiny_dir, tmp_path, flags, capsys):
    refused([tiny_dir, tmp_path / "out", *flags], "See kvsink-rewrite --help", capsys)


def test_engine_errors_are_one_line(engine, tiny_dir, tmp_path, capsys, monkeypatch):
    def fails(*args, **kwargs):
        raise KvsinkError("calibration text has 3 tokens.\nGive a longer one")

    monkeypatch.setattr(kvsink, "rewrite_dir", fails)
    assert main([str(tiny_dir), str(tmp_path / "out")]) == 2
    assert "kvsink-rewrite: calibration text has 3 tokens. Give a longer one\n" in capsys.readouterr().err


def test_quality_goes_into_both_reports(tiny_dir, tmp_path):
    """The measuring half, on a plain model: its row lands in the JSON and the Markdown report."""
    import shutil

    out = Path(shutil.copytree(tiny_dir, tmp_path / "out"))
    (out / "kvsink_report.json").write_text('{"method": "rtn"}')
    (out / "kvsink_report.md").write_text("# report\n")
    steps = []
    result = rewrite.measure(out, "tiny", 2, 32, "cpu", lambda *step: steps.append(step))
    record = json.loads((out / "kvsink_report.json").read_text())
    assert record["method"] == "rtn"
    assert record["quality"]["perplexity"] == result.perplexity
    assert record["quality"]["kl"] == 0
    page = (out / "kvsink_report.md").read_text()
    assert page.startswith("# report\n\n## Quality\n\n| cache |")
    assert "WikiText-2 test, detokenized" in page
    assert steps == [("evaluate", 2, 2)]
    assert not list(out.glob("*.partial"))


def test_automatic_plan(tiny_dir, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [str(tiny_dir), str(out), "--method", "rtn", "--calibration-tokens", "512", "--eval-windows", "0", "--device", "cpu"]
    assert main([*argv, "--plan", "auto", "--bits", "5.0"]) == 0
    assert "automatic plan" in capsys.readouterr().out
    record = json.loads((out / "kvsink_report.json").read_text())
    assert record["bits_per_element"] <= 5.0
    plan = json.loads((out / "kvsink.json").read_text())
    assert plan["options"]["plan"] == "auto" and len(plan["layers"]) == 2
    assert main([*argv, "--force", "--plan", "auto", "--bits", "1.0"]) == 2
    assert "need at least" in capsys.readouterr().err
    assert main([*argv, "--force", "--bits", "5.0"]) == 2
    assert "--plan auto" in capsys.readouterr().err
