"""Exported models beside their torch selves: files, round trips of families, the runner, the command lines, bad input."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

import kvsink
from kvsink.export import ExportError, OnnxGenerator, check, flavour_table, onnx
from kvsink.export.flavours import explain_flavours, method_refusal
from kvsink.export.held import BLOCK
from kvsink.folder.loading import load_model
from kvsink.model.runtime import runtime_of
from kvsink.tools.eval import main as eval_main
from kvsink.tools.families import rewritten as of_family
from kvsink.tools.rewrite import main as rewrite_main
from tests.graphs import rewritten
from tests.models import build, tokens
from tests.tools.conftest import tiny_dir  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("mistral", "qwen2", "qwen3", "phi3", "qwen3-moe")
PROMPTS = ([5, 6, 7, 8, 9], [9, 10], [40])


@pytest.fixture(scope="module")
def out(tiny_dir, tmp_path_factory) -> Path:  # noqa: F811
    """A folder that kvsink-rewrite --onnx wrote: transform-coded keys, sinks and first rows exact."""
    folder = tmp_path_factory.mktemp("onnx") / "out"
    flags = "--calibration-tokens 512 --eval-windows 0 --device cpu --onnx --protect kvsink:2+first:1"
    assert rewrite_main([str(tiny_dir), str(folder), *flags.split()]) == 0
    return folder


@pytest.fixture(scope="module")
def runner(out) -> OnnxGenerator:
    return OnnxGenerator(out / "model.onnx")


def greedy(model: Any, count: int) -> list[list[int]]:
    """Of every prompt alone, so that no padding is involved."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        settings = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False)
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist())
    return found


def suppressed(runner: OnnxGenerator, count: int) -> list[list[int]]:
    return runner.generate(PROMPTS, count, eos_token_id=-1)


def test_the_folder_is_complete(out) -> None:
    names = {p.name for p in out.iterdir()}
    assert {"model.onnx", "model.onnx.json", "config.json", "tokenizer.json"} <= names
    assert not [n for n in names if n.endswith(".partial")]
    assert str(ROOT).encode() not in (out / "model.onnx").read_bytes()  # no path of this machine
    record = json.loads((out / "model.onnx.json").read_text())
    assert record["flavour"] == "functions" and record["method"] == "klt" and record["opset"] == 24
    assert record["check"]["different_bytes"] == 0 and record["check"]["packed_bytes"] > 1000
    by_name = {e["name"]: e for e in record["inputs"]}
    assert by_name["past_key_values.1.key"]["dtype"] == "uint8"
    assert by_name["past_key_values.1.key"]["shape"] == ["batch", 2, "slots", 5]  # 16 channels of 2 bits, and a gain
    assert [e["name"].replace("present", "past_key_values") for e in record["outputs"][1:]] == list(by_name)[3:]


def test_greedy_tokens_are_those_of_generate(out, runner) -> None:
    model = load_model(out, "cpu")
    model.generation_config.eos_token_id = None
    assert suppressed(runner, 12) == greedy(model, 12)
    tokens = 5 - 1 + 12  # the longest prompt and all new tokens but the last
    held = runner.arrays(runner.past)
    assert runner.past.tokens == tokens and held["positions"].shape == (3, tokens)
    assert held["1.key"].shape == (3, 2, tokens, 5) and runner.past["1.key"].data_type() == "tensor(uint8)"
    assert runner.past["1.key"].shape() == [3, 2, BLOCK, 5]


def test_a_prompt_in_chunks_reads_what_was_stored(runner) -> None:
    """Rows of an earlier chunk are read from their codes: another text than that of one prefill, the same cache length."""
    one, many = (next(iter(runner.stream(PROMPTS, 1, eos_token_id=-1, chunk=chunk))) for chunk in (5, 2))
    assert len(one) == len(many) == 3 and runner.past.tokens == 5
    assert one[2] == many[2]  # a prompt of one token has nothing stored before it


def test_streaming_stops_at_the_end_token(runner) -> None:
    whole = suppressed(runner, 8)
    end = whole[0][3]
    steps = list(runner.stream(PROMPTS, 8, eos_token_id=end))
    for i, row in enumerate(whole):
        stop = row.index(end) + 1 if end in row else 8
        assert [step[i] for step in steps if step[i] is not None] == row[:stop]


def test_sampling_follows_its_seed_and_limits(runner) -> None:
    draw = dict(temperature=1.5, eos_token_id=-1)
    one, again, other = (runner.generate(PROMPTS, 8, seed=seed, **draw) for seed in (1, 1, 2))
    assert one == again != other
    assert runner.generate(PROMPTS, 8, top_k=1, **draw) == suppressed(runner, 8)
    assert runner.generate(PROMPTS, 8, top_p=1e-9, **draw) == suppressed(runner, 8)


def test_a_cache_of_the_wrong_kind_is_refused(runner) -> None:
    one = np.ones((1, 1), dtype=np.int64)
    good = runner.empty(1)
    wide = runner.value(np.zeros((1, 2, 0, 4), dtype=np.float32))
    long = runner.value(np.zeros((1, 2, 3, 4), dtype=np.uint8))
    lacking = {name: value for name, value in good.items() if name != "1.key"}
    for past, words in (
        ({**good, "1.key": wide}, "1.key is float32, the model takes uint8"),
        ({**good, "1.key": long}, r"is \[1, 2, 3, 4\]"),
        (lacking, "disagree about past_key_values.1.key"),
        ({**good, "1.key": wide.numpy()}, "1.key is a ndarray, not a value of onnxruntime"),
    ):
        with pytest.raises(ExportError, match=words):
            runner.step(one, one, one * 0, past)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: r.generate([[]]), "every prompt needs a token"),
        (lambda r: r.generate([[97]]), "outside the vocabulary"),
        (lambda r: r.generate([[5] * 100], 64), "exceed the 128 positions"),
        (lambda r: r.generate([[5]], top_p=0.0), "out of range"),
        (
            lambda r: r.step([[5]], [[1]], [[128]], r.empty(1)),
            "the cache is full: position 128 is beyond the 128 that model.onnx serves; begin a new text",
        ),
        (lambda r: r.step([[5.5]], [[1]], [[0]], r.empty(1)), "token ids are float64"),
        (lambda r: r.step([[97]], [[1]], [[0]], r.empty(1)), "token 97 is outside the vocabulary of 97"),
        (lambda r: r.step([[5, -1]], [[1, 1]], [[0, 1]], r.empty(1)), "token -1 is outside"),
        (lambda r: r.step([5], [1], [0], r.empty(1)), r"takes token ids \[B, S\], not an array of shape \[1\]"),
        (lambda r: r.step([[5]], [[1, 1]], [[0]], r.empty(1)), r"mask of shape \[1, 2\] with 1 rows of 1 new tokens behind"),
        (lambda r: r.step([[5], [6]], [[1], [1]], [[0], [0]], r.empty(1)), "2 rows of 1 new tokens behind a cache of 1 rows of 0"),
        (lambda r: r.step([[5]], [[1]], [[0, 1]], r.empty(1)), r"shapes \[1, 1\], \[1, 1\] and \[1, 2\]"),
        (lambda r: OnnxGenerator("nowhere.onnx"), "does not exist"),
        (lambda r: OnnxGenerator(r.path, providers=["NoSuchProvider"]), "has no NoSuchProvider"),
    ],
)
def test_the_runner_says_what_is_wrong(runner, call, words) -> None:
    with pytest.raises(ExportError, match=words):
        call(runner)


def test_perplexity_is_that_of_the_torch_model(out, capsys) -> None:
    flags = ["--windows", "2", "--window-tokens", "48", "--chunk", "16", "--no-passkey", "--device", "cpu", "--json", "-"]
    assert eval_main([str(out), *flags]) == 0
    torch_row = json.loads(capsys.readouterr().out)
    assert eval_main([str(out / "model.onnx"), *flags]) == 0
    row = json.loads(capsys.readouterr().out)
    assert abs(row["perplexity"] / torch_row["perplexity"] - 1) < 1e-3
    assert row["method"] == "kvsink klt, onnx" and row["bits_per_element"] < 16
    assert eval_main([str(out / "model.onnx"), "--strict"]) == 2
    assert "--strict is not for an ONNX model" in capsys.readouterr().err
    assert eval_main([str(out / "none.onnx")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_example_runs(out, capsys) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "onnx_generate.py"))
    example["main"](str(out / "model.onnx"), "abc", "d", new_tokens=3)
    assert "bits per element" in capsys.readouterr().out


def test_a_copy_without_its_manifest(out, tmp_path) -> None:
    shutil.copyfile(out / "model.onnx", tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="is missing; copy it beside"):
        OnnxGenerator(tmp_path / "model.onnx")
    (tmp_path / "model.onnx.json").write_text('{"format": "kvsink-onnx-1"}')
    with pytest.raises(ExportError, match="is not kvsink-onnx-2"):
        OnnxGenerator(tmp_path / "model.onnx")
    (tmp_path / "model.onnx.json").write_text('{"format": "kvsink-onnx-2"}')
    with pytest.raises(ExportError, match="cannot be read \\(it has no flavour\\)"):
        OnnxGenerator(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(dict(method="rotatekv"), marks=pytest.mark.slow),
        pytest.param(dict(method="static", key_bits=16, value_bits=16), marks=pytest.mark.slow),
    ],
)
def test_float16_keeps_codes_and_logits_near(options, tmp_path) -> None:
    """Weights and attention in 16 bit, rows coded in float32: exact rows and rows without codes are float16 in the cache."""
    model, made = rewritten("llama", **options), []
    ids, ones, at = np.arange(5, 17)[None], np.ones((1, 12)), np.arange(12)[None]
    for dtype in ("float32", "float16"):
        (tmp_path / dtype).mkdir()
        manifest = onnx(model, tmp_path / dtype / "model.onnx", dtype=dtype)
        assert manifest["dtype"] == dtype and manifest["padding"]
        kinds = {e["dtype"] for e in manifest["inputs"] if e["name"].endswith(("exact_key", ".key"))} - {"uint8"}
        assert kinds == ({"float16"} if dtype == "float16" else {"float"})
        made.append(OnnxGenerator(tmp_path / dtype / "model.onnx"))
    logits, held = zip(*(runner.step(ids, ones, at, runner.empty(1)) for runner in made), strict=True)
    assert np.abs(logits[0] - logits[1]).max() < 2e-2 * np.abs(logits[0]).max()
    for name, value in held[0].items():
        if value.data_type() == "tensor(uint8)":
            assert (value.numpy() != held[1][name].numpy()).mean() < 0.02, name


def test_custom_nodes_and_external_data(tmp_path) -> None:
    import onnx as onnx_package

    model = rewritten("llama", method="rotatekv", protect="massive:3+first:2")
    manifest = onnx(model, tmp_path / "m.onnx", "custom", tokens=64, external_data=True)
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data", "m.onnx.json"}
    proto = onnx_package.load(tmp_path / "m.onnx")
    assert not proto.functions and manifest["max_positions"] == 64
    ops = {node.op_type for node in proto.graph.node if node.domain == "com.kvsink"}
    assert {"HadamardRotate", "ChannelReorder", "QuantizeKV", "DequantizeKV", "SelectSinks", "PreserveSinks", "Attend"} <= ops
    with pytest.raises(ExportError, match="nodes without bodies; pass library="):
        OnnxGenerator(tmp_path / "m.onnx")


@pytest.mark.parametrize("family", ["gemma3", "gpt2", *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)])
def test_families(family: str, tmp_path) -> None:
    model = rewritten(family, protect="kvsink:2+first:1")
    manifest = onnx(model, tmp_path / "model.onnx")
    assert manifest["check"]["different_bytes"] == 0
    model.generation_config.eos_token_id = None
    assert suppressed(OnnxGenerator(tmp_path / "model.onnx"), 8) == greedy(model, 8)


@pytest.mark.parametrize("family", ["bloom", *(pytest.param(f, marks=pytest.mark.slow) for f in ("falcon-mqa", "mpt"))])
def test_attention_that_is_spelled_out(family: str, tmp_path) -> None:
    """Attention that is no function of transformers, with ALiBi or without, leaves as the operators it is written in."""
    model = of_family(family, "rtn", torch.float32, protect="massive:1")[0]
    manifest = onnx(model, tmp_path / "model.onnx")
    assert manifest["check"]["different_bytes"] == 0 and manifest["check"]["packed_bytes"] > 0
    static = of_family(family, "static", torch.float32, protect="none")[0]
    with pytest.raises(ExportError, match="flavour gqa: its attention does not go through transformers' attention functions"):
        onnx(static, tmp_path / "gqa.onnx", "gqa")


@pytest.mark.parametrize(
    ("family", "words"),
    [("falcon-alibi", "is computed in bfloat16"), ("llama-dynamic", "rope type dynamic computes its angles anew")],
)
def test_what_onnxruntime_or_torch_would_refuse_is_named_before(family: str, words: str, tmp_path) -> None:
    with pytest.raises(ExportError, match=words) as raised:
        onnx(of_family(family, "rtn", torch.float32)[0], tmp_path / "m.onnx")
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "flavour"), [("rtn", "functions"), ("klt", "functions"), ("klt:best", "custom")])
def test_values_beyond_float16_leave_in_their_units(method: str, flavour: str, tmp_path) -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data *= 1e6
        layer.self_attn.o_proj.weight.data /= 1e6
    kvsink.rewrite(model, method, calibration=tokens(8, 64, seed=1))
    assert runtime_of(model).plans[0].codec.value.exponent >= 20
    record = onnx(model, tmp_path / "model.onnx", flavour)
    assert record["check"]["different_bytes"] == 0 and record["check"]["packed_bytes"] > 100


def test_a_failed_check_leaves_nothing(out, tmp_path, monkeypatch) -> None:
    import onnx_ir

    import kvsink.export.model as module

    def fails(*args: Any) -> None:
        raise ExportError("it differs")

    monkeypatch.setattr(module, "check_run", fails)
    monkeypatch.setattr(module, "build_graph", lambda *rest: onnx_ir.load(out / "model.onnx"))
    with pytest.raises(ExportError, match="it differs"):
        onnx(out, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_of_another_model_fails_the_check(out) -> None:
    model = load_model(out, "cpu")
    model.lm_head.weight.data[5] += 0.01
    ids = torch.arange(3, 61).reshape(2, 29)
    with pytest.raises(ExportError, match="logits of the exported graph differ"):
        check.check_run(out / "model.onnx", model, ids)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(path="m.onnx", opset=18), "opset 18 is not one of flavour functions, which has 24"),
        (dict(path="m.onnx", flavour="function"), "nearest known: functions"),
        (dict(path="m.bin"), "not the name of an ONNX file"),
        (dict(path="none/m.onnx"), "not a folder that can be written to"),
        (dict(path="m.onnx", tokens=999), "outside 29 to the 128 positions"),
    ],
)
def test_bad_arguments(arguments, words, tmp_path) -> None:
    model = rewritten("llama", method="rtn")
    with pytest.raises(kvsink.KvsinkError, match=words):
        onnx(model, tmp_path / arguments.pop("path"), **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", dict(method="kivi"), "blocks of"),
        ("llama", dict(method="rtn", window=4), "use --window 0"),
        ("llama", dict(method="rtn", protect="anchors:2"), "anchors are chosen"),
        ("llama", dict(method="rtn", protect="random:2"), "random has no node"),
        ("gemma2", dict(method="rtn"), "caps its attention logits"),
    ],
)
def test_what_cannot_leave_says_why(family, options, words, tmp_path) -> None:
    attention = "eager" if family == "gemma2" else "sdpa"
    with pytest.raises(ExportError, match=words):
        onnx(rewritten(family, attention, **options), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_plain_model_is_refused(tiny_dir, tmp_path) -> None:  # noqa: F811
    with pytest.raises(kvsink.KvsinkError, match="is not rewritten"):
        onnx(tiny_dir, tmp_path / "m.onnx")


def test_a_refusal_leaves_no_folder(tiny_dir, tmp_path, capsys) -> None:  # noqa: F811
    argv = [str(tiny_dir), str(tmp_path / "out"), "--method", "kivi", "--calibration-tokens", "512", "--onnx", "--device", "cpu"]
    assert rewrite_main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot be exported to ONNX" in error and not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(tiny_dir, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else found(name, *rest))
    assert rewrite_main([str(tiny_dir), str(tmp_path / "out"), "--onnx"]) == 2
    assert "onnxscript is not installed" in (error := capsys.readouterr().err) and "kvsink[onnx]" in error


def test_a_missing_runtime_is_named(out, monkeypatch, capsys) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert eval_main([str(out / "model.onnx")]) == 2
    said = capsys.readouterr().err
    assert "onnxruntime is not installed; pip install 'kvsink[onnx]'" in said and said.count("\n") == 1


def test_a_path_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for path, words in ((tmp_path / "file" / "m.onnx", "not a folder that can be written to"), (tmp_path, "not the name of an")):
        with pytest.raises(ExportError, match=words):
            onnx(rewritten("llama", method="rtn"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch) -> None:
    import onnx_ir

    def full(model: Any, path: Path, **rest: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(onnx_ir, "save", full)
    with pytest.raises((OSError, kvsink.KvsinkError), match="No space left"):
        onnx(rewritten("llama", method="rtn"), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_explain_says_what_leaves() -> None:
    said = kvsink.explain(rewritten("llama", method="rtn"), onnx=True)
    assert "onnx: leaves as functions, custom\nonnx: not as gqa, 2 times: keys have scales of their own" in said
    assert "onnx: not as custom:float16, 2 times: head_dim is 16" in said
    refused = explain_flavours(model := rewritten("llama", method="kivi"), runtime_of(model))
    assert refused.startswith("onnx: no flavour\nonnx: not as functions, custom, 2 times: keys are coded by blocks")


def test_the_table_knows_every_method() -> None:
    table = flavour_table()
    for name in kvsink.methods():
        assert f"| `{name}` |" in table
    assert not any(method_refusal(name) for name in ("klt", "klt:best", "klt:codebooks", "centred", "rotatekv", "rtn", "cq"))
    assert all(method_refusal(name) for name in ("kivi", "antkv", "kvquant"))
    assert not any(method_refusal(name, "gqa") for name in ("static", "static:rotated", "static:plain"))
    assert table in (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8"), "run python -m kvsink.tools.methods_doc"
