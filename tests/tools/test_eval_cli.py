"""kvsink-eval on a plain model folder."""

from __future__ import annotations

import json

import pytest

from kvsink.tools.eval import main

SMALL = ["--windows", "2", "--window-tokens", "32", "--chunk", "8", "--no-passkey", "--device", "cpu"]


def test_plain_model_and_its_baseline(tiny_dir, tmp_path, capsys):
    row = tmp_path / "row.json"
    assert main([str(tiny_dir), *SMALL, "--baseline", str(tiny_dir), "--json", str(row)]) == 0
    assert "perplexity" in capsys.readouterr().out
    record = json.loads(row.read_text())
    assert record["kl"] == 0
    assert record["top1"] == 1
    assert record["model"] == str(tiny_dir)
    assert record["text"] == "WikiText-2 test, detokenized"
    assert (record["windows"], record["window_tokens"], record["chunk"]) == (2, 32, 8)


def test_json_on_standard_output_is_only_json(tiny_dir, capsys):
    assert main([str(tiny_dir), *SMALL, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["baseline"] is None


def test_the_sinks_of_a_packed_cache_are_a_line_and_a_list(tiny_dir, tmp_path, capsys):
    from kvsink import RewriteOptions, rewrite_dir

    out, row = tmp_path / "out", tmp_path / "row.json"
    rewrite_dir(tiny_dir, out, RewriteOptions(method="rtn", key_bits=8, value_bits=8, protect="none"), device="cpu")
    args = [str(out), *SMALL, "--window-tokens", "64", "--json", str(row)]
    assert main(args) == 0
    assert "sink decay D_sink" in capsys.readouterr().out
    decay = json.loads(row.read_text())["sink_decay"]
    assert len(decay) == 2 and all(0 < abs(d) < 0.02 for d in decay)
    assert main([*args, "--no-sinks"]) == 0
    assert "sink decay" not in capsys.readouterr().out and json.loads(row.read_text())["sink_decay"] is None


@pytest.mark.parametrize(("flags", "name"), [([], "t.txt, detokenized"), (["--no-detokenize"], "t.txt")])
def test_text_is_detokenized_when_it_needs_it(tiny_dir, tmp_path, capsys, flags, name):
    text = tmp_path / "t.txt"
    text.write_text("a well @-@ known text , which is long enough . " * 20)
    assert main([str(tiny_dir), *SMALL, "--text", str(text), "--json", "-", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == name


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["./nowhere"], "does not exist"),
        (["demo:smollm"], "nearest known: demo:smollm2"),
        (["{tiny}", "--text", "./none.txt"], "text file none.txt does not exist"),
        (["{tiny}", "--windows", "9999999"], "Pass --windows"),
        (["{tiny}", "--window-tokens", "1024"], "exceed the model's 128 positions"),
        (["{tiny}", "--device", "nosuch"], "not available"),
        (["{tiny}", "--dtype", "int3"], "not one of auto"),
        (["{tiny}", "--baseline", "./nowhere"], "does not exist"),
        (["{tiny}", "--windows", "0"], "--windows"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_line(tiny_dir, argv, words, capsys):
    assert main([part.format(tiny=tiny_dir) for part in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert words in lines[0]
    assert captured.out == ""
