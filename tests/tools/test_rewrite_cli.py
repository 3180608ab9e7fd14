"""kvsink-rewrite: options reach the engine, and bad input is one line with OUT_DIR absent or untouched."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import kvsink
from kvsink.cache.layer import KVSinkLayer
from kvsink.errors import KvsinkError
from kvsink.folder.loading import load_model, load_tokenizer
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
        "method": "rtn",
        "key_bits": 3.0,
        "value_bits": 2.5,
        "protect": "first:2",
        "window": 8,
        "calibration": "builtin",
        "calibration_tokens": 99,
        "layers": "0:key_bits=4",
    }
    assert {name: options[name] for name in expected} == expected
    assert rest == {"onnx": "", "device": "cpu", "force": False, "dry_run": True, "by_layer": None}
    assert f"dry run: {out} was not written" in capsys.readouterr().out


def test_unset_options_are_the_methods_own(engine, tiny_dir, tmp_path):
    assert main([str(tiny_dir), str(tmp_path / "out"), "--eval-windows", "0"]) == 0
    options = engine[0][2]
    assert options["method"] == "klt"
    assert [options[name] for name in ("key_bits", "value_bits", "protect", "window", "sliding")] == [None] * 5


def test_methods_without_calibration_are_those_with_it(engine, tiny_dir, tmp_path):
    for i, (more, method) in enumerate((([], "klt"), (["--method", "kvarn"], "kvarn"), (["--onnx-flavour", "gqa"], "static"))):
        argv = [str(tiny_dir), str(tmp_path / "out"), "--eval-windows", "0", "--calibration", "none", *more]
        assert main(argv) == 0
        assert (engine[i][2]["method"], engine[i][2]["calibration"]) == (method, "none")


def test_flavours_for_cuda(tiny_dir, tmp_path, capsys):
    """A dtype behind the flavour; what is not served leaves one line and no folder."""
    argv = [str(tiny_dir), str(tmp_path / "out"), "--eval-windows", "0", "--device", "cpu", "--calibration-tokens", "512"]
    for flavour, said in (("custom:bfloat16", "unknown flavour 'custom:bfloat16'"), ("custom:float16", "head_dim is 16, not one")):
        assert main([*argv, "--onnx-flavour", flavour]) == 2
        assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main([*argv, "--onnx-flavour", "gqa:float16"]) == 0
    manifest = json.loads((tmp_path / "out" / "model.onnx.json").read_text())
    assert (manifest["flavour"], manifest["dtype"], manifest["method"]) == ("gqa", "float16", "static:rotated")


@pytest.mark.parametrize(("flags", "layers"), [([], [1]), (["--no-sliding"], [1]), (["--sliding"], [0, 1])])
def test_sliding_layers_are_packed_where_asked(mixed_dir, tmp_path, flags, layers, capsys):
    """The folder generates what the same rewrite in memory does; its table is measured through the packed windows."""
    out = tmp_path / "out"
    argv = ["--key-bits", "2", "--value-bits", "2", "--calibration-tokens", "512", "--device", "cpu"]
    argv += ["--eval-windows", "1", "--eval-window-tokens", "48"]
    assert main([str(mixed_dir), str(out), *argv, *flags]) == 0
    said = capsys.readouterr().out
    assert f"{len(layers)} of 2 layers packed" in said
    assert ("layer 0 (model.layers.0.self_attn) left alone: sliding attention" in said) == (0 not in layers)
    model, again = load_model(out, "cpu"), load_model(mixed_dir, "cpu")
    options = {"key_bits": 2, "value_bits": 2, "calibration_tokens": 512, "tokenizer": load_tokenizer(mixed_dir)}
    kvsink.rewrite(again, sliding=flags == ["--sliding"], **options)
    ids, outs = torch.randint(5, 90, (1, 30), generator=torch.Generator().manual_seed(0)), []
    for m in (model, again):
        done = m.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
        cache = done["cache"] if "cache" in done else done["past_key_values"]
        assert [i for i, layer in enumerate(cache.layers) if isinstance(layer, KVSinkLayer)] == layers
        outs.append(done.sequences)
    assert torch.equal(*outs)


def test_a_codec_that_cannot_slide_says_so(mixed_dir, tmp_path, capsys):
    argv = [mixed_dir, tmp_path / "out", "--method", "kivi", "--sliding", "--calibration-tokens", "512", "--device", "cpu"]
    assert main([str(part) for part in argv]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "layer 0 (model.layers.0.self_attn): sliding window of 8" in line
    assert "which the end of a moving window would cut" in line
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("flags", [["--key-bits", "two"], ["--calibration-tokens", "0"], ["--nosuch"], ["--eval-windows", "-1"]])
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
