"""kvsink-eval on a plain model folder."""

from __future__ import annotations

import json
import sys

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


def test_a_text_unlike_that_of_calibration_is_told(tiny_dir, tmp_path, capsys):
    """Calibrated on one line again and again, evaluated on another; the text that ships is not compared."""
    from kvsink import RewriteOptions, rewrite_dir

    out, row, mine = tmp_path / "out", tmp_path / "row.json", tmp_path / "mine.txt"
    (tmp_path / "calibration.txt").write_text("one two three four five six seven eight nine ten\n" * 200)
    mine.write_text(" ".join(f"{n * 7919 % 1000} {chr(97 + n % 26)}x!" for n in range(400)))
    seen = {"calibration": str(tmp_path / "calibration.txt"), "calibration_tokens": 512}
    rewrite_dir(tiny_dir, out, RewriteOptions(method="klt", protect="none", check=False, **seen), device="cpu")
    args = [str(out), *SMALL, "--no-sinks", "--json", str(row)]
    for text, told in ((["--text", str(mine)], True), ([], False)):
        assert main([*args, *text]) == 0
        said, spread = " ".join(capsys.readouterr().out.split()), json.loads(row.read_text())["spread"]
        assert ("spreads farther than the one of calibration" in said) == told
        assert (max(x for pair in spread for x in pair) > 1.2) if told else spread is None


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


@pytest.fixture(scope="module")
def long_dirs(tiny_dir, tmp_path_factory):
    """The tiny model with 2,048 positions and a chat template, and two folders rewritten from it: 8 bits and 2."""
    import shutil

    from kvsink import RewriteOptions, rewrite_dir

    root = tmp_path_factory.mktemp("long")
    plain = root / "plain"
    shutil.copytree(tiny_dir, plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    (plain / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    for bits in (8, 2):
        options = RewriteOptions(method="rtn", key_bits=bits, value_bits=bits, protect="none")
        rewrite_dir(plain, root / f"bits{bits}", options, device="cpu")
    return plain, root / "bits8", root / "bits2"


def test_length_tells_positions_apart_for_several_models(long_dirs, tmp_path, capsys):
    from kvsink.evaluate.evaluation import evaluate, packed_cache, token_windows
    from kvsink.evaluate.texts import evaluation_text
    from kvsink.folder.loading import load_model, load_tokenizer

    _, eight, two = long_dirs
    rows, plot = tmp_path / "rows.json", tmp_path / "plots" / "length.png"
    args = ["--length", "1280", "--windows", "2", "--chunk", "640", "--no-sinks", "--device", "cpu", "--text", "{text}"]
    text = tmp_path / "t.txt"
    text.write_text(evaluation_text()[:40_000])
    args = [a.format(text=text) for a in args]
    assert main([str(eight), str(two), *args, "--plot", str(plot), "--json", str(rows)]) == 0
    out = capsys.readouterr().out
    assert out.count("0-1K") == 2 and out.count("1024-1280") == 2 and "[" in out
    assert plot.read_bytes()[:4] == b"\x89PNG"
    good, bad = json.loads(rows.read_text())
    assert [(p["start"], p["stop"], p["tokens"]) for p in bad["positions"]] == [(0, 1024, 2048), (1024, 1280, 510)]
    assert all(0 < g["kl"] < b["kl"] for g, b in zip(good["positions"], bad["positions"], strict=True))
    assert good["retrieval"] is None

    model = load_model(two, "cpu")  # one window of each bucket alone is the figure over that part of it
    ids = token_windows(text.read_text(), load_tokenizer(two), 2, 1280)
    short = evaluate(model, model, ids[:, :1025], chunk=640, cache_factory=packed_cache)
    assert bad["positions"][0]["kl"] == pytest.approx(short.kl, rel=1e-5)


def test_a_plot_without_matplotlib_is_left_out_in_one_line(long_dirs, tmp_path, capsys, monkeypatch):
    import kvsink.tools.eval as tool

    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    args = ["--length", "64", "--windows", "2", "--device", "cpu", "--no-sinks", "--plot", str(tmp_path / "p.png")]
    assert main([str(long_dirs[1]), *args]) == 0
    captured = capsys.readouterr()
    assert captured.err.strip() == "kvsink-eval: no plot: matplotlib is missing; pip install 'kvsink[plot]'"
    assert not (tmp_path / "p.png").exists() and "0-64" in captured.out


def test_retrieval_and_arithmetic_beside_16_bit(long_dirs, tmp_path, capsys):
    rows = tmp_path / "rows.json"
    asked = ["--retrieval", "single,call", "--lengths", "1100", "--depths", "0.5", "--arithmetic", "2", "--budget", "8"]
    args = [*SMALL, "--no-sinks", "--chunk", "550", "--json", str(rows)]
    args.remove("--no-passkey")
    assert main([str(long_dirs[1]), *args, *asked]) == 0
    out = capsys.readouterr().out
    assert "0 [0%, 79%]" in out and "0 valid, 0 at 16 bit" in out and "Arithmetic by generate(), greedy, at most 8 tokens" in out
    record = json.loads(rows.read_text())
    for name in ("retrieval", "baseline_retrieval"):
        assert [(c["task"], c["length"], c["n"]) for c in record[name]["cells"]] == [("single", 1100, 1), ("call", 1100, 1)]
    packed, stock = record["generation"], record["baseline_generation"]
    assert (packed["n"], packed["exhausted"], stock["budget"]) == (2, 2, 8) and "agreement" in packed


def test_tasks_of_lm_eval_beside_16_bit(long_dirs, tmp_path, capsys, monkeypatch):
    from kvsink.tools import eval_text

    asked = []

    def harness(model, tokenizer, tasks, factory, limit, batch):
        asked.append((tasks, type(factory(model, 1, 64)).__name__, limit))
        return ({"task": "t", "metric": "exact_match", "n": 2, "value": 0.5, "interval": (0.1, 0.9)},)

    monkeypatch.setattr(eval_text, "load_tasks", list)
    monkeypatch.setattr(eval_text, "harness", harness)
    row = tmp_path / "row.json"
    args = [str(long_dirs[1]), *SMALL, "--no-sinks", "--tasks", "one,two.yaml", "--limit", "2", "--json", str(row)]
    assert main(args) == 0
    assert asked == [(["one", "two.yaml"], "KVSinkCache", 2), (["one", "two.yaml"], "DynamicCache", 2)]
    assert capsys.readouterr().out.count("0.500 [0.100, 0.900]") == 2
    assert json.loads(row.read_text())["baseline_harness"][0]["n"] == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{long}", "--length", "4096"], "windows of 4096 tokens exceed the model's 2048 positions. Pass --length 2048 or fewer"),
        (["{plain}", "--length", "64"], "plain is not a rewritten folder"),
        (["{plain}", "--arithmetic", "2"], "plain is not a rewritten folder"),
        (["{tiny}", "--baseline", "{tiny}", "--no-passkey", "--arithmetic", "2"], "no chat template"),
        (["{long}", "--retrieval", "needles"], "unknown retrieval task 'needles'; nearest known: single"),
        (["{long}", "--retrieval", "single", "--lengths", "2000"], "Pass --lengths up to 1920"),
        (["{long}", "--retrieval", "single", "--lengths", "90"], "needs at least"),
        (["{long}", "--lengths", "many"], "'many' is not a list with commas of numbers"),
        (["{long}", "--depths", "0.5,1.5"], "numbers from 0 to 1"),
        (["{long}", "--window-tokens", "64", "--length", "64"], "pass one of them"),
        (["{long}", "{plain}"], "several go with --length"),
        (["{long}", "--plot", "p.png"], "--plot goes with --length"),
        (["{long}", "--compare", "--length", "64"], "--length does not go with --compare"),
        (["{long}", "--images", "drawn", "--arithmetic", "2"], "--arithmetic does not go with --images"),
        (["{long}", "--tasks", "gsm8k", "--no-passkey"], "pip install 'kvsink[eval]'"),
        (["{plain}", "--tasks", "gsm8k"], "plain is not a rewritten folder"),
        (["{long}", "--limit", "2"], "--limit goes with --tasks"),
        (["{long}", "--length", "64", "--lengths", "64"], "--lengths goes with --retrieval"),
        (["{long}", "--arithmetic", "2", "--budget", "2048", "--no-passkey"], "exceed the model's 2048 positions. Pass --budget"),
    ],
)
def test_bad_input_for_long_contexts_is_one_line(tiny_dir, long_dirs, argv, words, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    paths = {"tiny": tiny_dir, "plain": long_dirs[0], "long": long_dirs[1]}
    small = ["--windows", "2", "--device", "cpu", "--no-sinks"]
    small += [] if {"--length", "--window-tokens"} & {*argv} else ["--window-tokens", "32"]
    assert main([*(part.format(**paths) for part in argv), *small]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    assert words in captured.err
    assert captured.out == ""
