"""Flavour gqa: graphs of GroupQueryAttention beside a strict torch cache, their files, and what they decline."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

from kvsink.export import ExportError, OnnxGenerator, onnx
from kvsink.export.held import BLOCK
from kvsink.export.manifest import manifest_path
from kvsink.kernels.static import best_steps, static_decode, static_encode
from kvsink.tools.eval import main as eval_main
from kvsink.tools.rewrite import main as rewrite_main
from tests.graphs import rewritten
from tests.tools.conftest import tiny_dir  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("qwen2", "phi3", "gemma3", "gpt2", "qwen3-moe")
PROMPTS = ([5, 6, 7, 8, 9], [9, 10], [40])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_steps_round_half_to_even_and_saturate(bits: int) -> None:
    step, half = torch.full((2, 8), 0.5), 2 ** (bits - 1)
    x = torch.tensor([0.0, 0.25, 0.75, -0.25, 1e4, -1e4, 0.5, -0.5]).expand(1, 2, 3, 8)
    codes, scale = static_encode(x, step, bits)
    wanted = torch.tensor([0, 0, 2, 0, half - 1, -half, 1, -1]).clamp(-half, half - 1) * 0.5
    assert codes.shape == (1, 2, 3, bits) and scale.shape == (1, 2, 3, 0)
    assert torch.equal(static_decode(codes, step, bits), wanted.expand_as(x))


def test_the_step_of_least_error_is_near_the_best_of_a_fine_search() -> None:
    x = torch.randn(1, 2000, 1, generator=torch.Generator().manual_seed(0))

    def error(step: torch.Tensor) -> float:
        return float((static_decode(static_encode(x.expand(1, -1, 8)[None], step, 4)[0], step, 4) - x).square().mean())

    found = error(best_steps(x, None, 4).expand(1, 8))
    best = min(error(torch.full((1, 8), s)) for s in torch.linspace(0.1, 0.7, 200).tolist())
    assert found <= 1.02 * best


@pytest.mark.parametrize("method", ["static", pytest.param("static:plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)])
def test_families(family: str, method: str, tmp_path) -> None:
    """The export itself compares prefill, chunks and single tokens, one row padded; four bits leave no tie at this size."""
    manifest = onnx(rewritten(family, method=method), tmp_path / "model.onnx", "gqa")
    found = manifest["check"]
    assert found["different_bytes"] == 0 and found["packed_bytes"] > 1000 and found["largest_logit_difference"] < 1e-5
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.onnx.json", "genai_config.json"}


@pytest.mark.parametrize("bits", [8, 16])
def test_eight_bits_and_none(bits: int, tmp_path) -> None:
    manifest = onnx(rewritten("llama", method="static", key_bits=bits, value_bits=bits), tmp_path / "model.onnx", "gqa")
    by_name = {e["name"]: e for e in manifest["inputs"]}
    assert by_name["past_key_values.0.key"]["dtype"] == {8: "int8", 16: "float"}[bits]
    assert by_name["past_key_values.0.key"]["shape"] == ["batch", 2, "past", 16]
    assert manifest["check"]["packed_bytes"] == (10752 if bits == 8 else 0)


@pytest.mark.parametrize(
    ("bits", "kind"),
    [(4, "uint8"), pytest.param(8, "int8", marks=pytest.mark.slow), pytest.param(16, "float16", marks=pytest.mark.slow)],
)
def test_float16_leaves_without_a_bias_and_writes_in_place(bits: int, kind: str, tmp_path) -> None:
    """What CUDA's kernel takes: no attention bias, one step of all channels, a cache of fixed size."""
    import onnx as onnx_package

    model = rewritten("llama", method="static:rotated", key_bits=bits, value_bits=bits)
    manifest = onnx(model, tmp_path / "model.onnx", "gqa", dtype="float16")
    assert next(model.parameters()).dtype == torch.float32 and manifest["dtype"] == "float16" and not manifest["padding"]
    nodes = onnx_package.load(tmp_path / "model.onnx").graph.node
    made = [n for n in nodes if n.op_type == "GroupQueryAttention"]
    assert len(made) == 2 and not any(name for n in made for name in n.input[7:12])
    if bits < 16:
        assert all(a.s == b"PER_TENSOR" for n in made for a in n.attribute if a.name.endswith("quant_type"))
    runner = OnnxGenerator(tmp_path / "model.onnx")
    ids = np.array([[5, 6, 7, 8, 9, 11]])
    room, grown = runner.empty(1, 8), runner.empty(1)
    begun = room["0.key"]
    assert room["0.key"].data_type() == f"tensor({kind})"
    for a, b in ((0, 4), (4, 5), (5, 6)):
        step = ids[:, a:b], np.ones((1, b)), np.arange(a, b)[None]
        one, room = runner.step(*step, room)
        two, grown = runner.step(*step, grown)
        assert room["0.key"] is begun and np.array_equal(one, two)
    whole, _ = runner.step(ids[:, :4], None, None, runner.empty(1))
    end, past = runner.step(ids[:, :4], None, None, runner.empty(1, 8), last=True)
    assert end.dtype == np.float32 and end.shape == (1, 1, 97) and np.array_equal(end, whole[:, -1:])
    four, past = runner.step(ids[:, 4:5], None, None, past)
    held = four.copy()
    end, past = runner.step(ids[:, 5:], None, None, past, last=True)
    assert np.array_equal(four, held)  # the next step has not written over it
    assert np.array_equal(end, one) and np.array_equal(past["1.value"].numpy(), room["1.value"].numpy())
    ways = [runner.stream([row], 5, eos_token_id=-1) for row in ([5, 6, 7], [40, 9])]  # two texts at a time
    said = list(zip(*([step[0] for step in steps] for steps in zip(*ways, strict=True)), strict=True))
    assert [list(one) for one in said] == [runner.generate([row], 5, eos_token_id=-1)[0] for row in ([5, 6, 7], [40, 9])]
    shutil.copy(tmp_path / "model.onnx", tmp_path / "before.onnx")  # of before last_logits, and lengths that are positions
    manifest["outputs"] = [e for e in manifest["outputs"] if e["name"] != "last_logits"]
    manifest_path(tmp_path / "before.onnx").write_text(json.dumps(manifest))
    before = OnnxGenerator(tmp_path / "before.onnx")
    old = before.empty(1, 8)
    for a, b in ((0, 4), (4, 5), (5, 6)):
        three, old = before.step(ids[:, a:b], None, None, old)
    assert np.array_equal(three, one) and old.bound is None
    for name, value in grown.items():
        assert value.shape()[2] == BLOCK and np.array_equal(room[name].numpy(), value.numpy()[:, :, :8]), name
        assert not room[name].numpy()[:, :, 6:].any()
    with pytest.raises(ExportError, match="no attention bias for padding"):
        runner.generate([[5, 6, 7], [5]], 2)
    step = ids[:, 5:], np.ones((1, 7)), np.array([[6]])
    assert np.array_equal(runner.step(*step, grown)[0], runner.step(*step, room)[0])
    full = onnx(model, tmp_path / "full.onnx", "gqa")
    assert full["padding"] and full["dtype"] == "float32"
    other = OnnxGenerator(tmp_path / "full.onnx")
    wanted = other.step(ids, np.ones((1, 6)), np.arange(6)[None], other.empty(1))[0]
    half = runner.step(ids, np.ones((1, 6)), np.arange(6)[None], runner.empty(1))[0]
    bound = {16: 2e-3, 8: 2e-2, 4: 1e-1}[bits]  # of the largest logit: float16, and codes that it moves by one
    assert np.abs(half - wanted).max() < bound * np.abs(wanted).max()


def test_float16_declines_what_needs_a_bias(tmp_path) -> None:
    for family, method, words in (("llama", "static", "the mean of keys comes back"), ("gemma3", "static:rotated", "its window")):
        with pytest.raises(ExportError, match=words):
            onnx(rewritten(family, method=method), tmp_path / "model.onnx", "gqa", dtype="float16")
    with pytest.raises(ExportError, match="flavour custom in float16: head_dim is 16"):
        onnx(rewritten("llama"), tmp_path / "model.onnx", "custom", dtype="float16")
    with pytest.raises(ExportError, match="none of float32, float16, float64"):
        onnx(rewritten("llama"), tmp_path / "model.onnx", "gqa", dtype="int8")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def out(tiny_dir, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("gqa") / "out"
    flags = "--calibration-tokens 512 --eval-windows 0 --device cpu --onnx-flavour gqa"
    assert rewrite_main([str(tiny_dir), str(folder), *flags.split()]) == 0
    return folder


def test_the_graph_has_standard_names_and_operators(out) -> None:
    import onnx as onnx_package

    proto = onnx_package.load(out / "model.onnx", load_external_data=False)
    assert {node.domain for node in proto.graph.node} == {"", "com.microsoft"} and not proto.functions
    found = [n.op_type for n in proto.graph.node if n.domain]
    assert found.count("GroupQueryAttention") == 2 and set(found) == {"GroupQueryAttention", "SkipSimplifiedLayerNormalization"}
    past = [f"past_key_values.{i}.{what}" for i in range(2) for what in ("key", "value")]
    assert [i.name for i in proto.graph.input] == ["input_ids", "attention_mask", "position_ids", *past]
    decoder = json.loads((out / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key" and decoder["head_size"] == 8


def test_rows_of_a_padded_batch_say_what_they_say_alone(out) -> None:
    runner = OnnxGenerator(out / "model.onnx")
    together = runner.generate(PROMPTS, 8, eos_token_id=-1)
    assert runner.past["0.key"].data_type() == "tensor(uint8)" and runner.past["0.key"].shape() == [3, 2, 12, 8]
    assert together == [runner.generate([p], 8, eos_token_id=-1)[0] for p in PROMPTS]
    assert runner.generate(PROMPTS[:1], 8, eos_token_id=-1, chunk=2) == together[:1]  # new rows are read from codes too


def test_the_runner_counts_bits_and_says_what_the_operator_refuses(out, capsys) -> None:
    runner = OnnxGenerator(out / "model.onnx")
    runner.generate(PROMPTS, 3, eos_token_id=-1)
    assert runner.bits_per_element(runner.past) == 4.0
    ids = np.full((2, 3), 5)
    past = runner.step(ids, np.ones((2, 3)), np.arange(3)[None].repeat(2, 0), runner.empty(2))[1]
    with pytest.raises(ExportError, match="for one row only, not for 2"):
        runner.step(ids, np.ones((2, 6)), np.arange(3, 6)[None].repeat(2, 0), past)
    flags = ["--windows", "2", "--window-tokens", "48", "--chunk", "16", "--no-passkey", "--no-sinks", "--device", "cpu"]
    flags += ["--json", "-"]
    rows = []
    for model, more in ((out, ["--strict"]), (out / "model.onnx", [])):
        assert eval_main([str(model), *flags, *more]) == 0
        rows.append(json.loads(capsys.readouterr().out))
    assert abs(rows[1]["perplexity"] / rows[0]["perplexity"] - 1) < 1e-3 and rows[1]["bits_per_element"] == 4.0


def test_the_example_needs_no_kvsink(out, capsys) -> None:
    import onnxruntime

    text = (ROOT / "examples" / "onnx_gqa.py").read_text(encoding="utf-8")
    assert "import kvsink" not in text and "from kvsink" not in text
    example = runpy.run_path(str(ROOT / "examples" / "onnx_gqa.py"))
    tokens, past = example["generate"](onnxruntime.InferenceSession(str(out / "model.onnx")), PROMPTS[0], 8)
    runner = OnnxGenerator(out / "model.onnx")
    assert tokens == runner.generate(PROMPTS[:1], 8, eos_token_id=-1)[0]
    assert [f"past_key_values.{n}" for n in runner.past] == list(past)
    assert all(np.array_equal(mine.numpy(), theirs) for mine, theirs in zip(runner.past.values(), past.values(), strict=True))
    example["main"](str(out / "model.onnx"), "abc", new_tokens=3)
    assert "bytes of uint8" in capsys.readouterr().out


def test_a_cache_of_another_model_is_refused(out) -> None:
    runner, one = OnnxGenerator(out / "model.onnx"), np.ones((1, 1), dtype=np.int64)
    for array, words in (
        (np.zeros((1, 2, 0, 16), dtype=np.int8), "0.key is int8, the model takes uint8; begin with empty"),
        (np.zeros((1, 2, 0, 16), dtype=np.float32), "0.key is float32, the model takes uint8"),
        (np.zeros((1, 2, 0, 16), dtype=np.uint8), r"0.key is \[1, 2, 0, 16\], the model takes \['batch', 2, 'past', 8\]"),
        (np.zeros((0, 2, 1, 8), dtype=np.uint8).transpose(0, 2, 1, 3), r"0.key is \[0, 1, 2, 8\]"),
        (np.zeros(1, dtype=np.uint8), r"0.key is \[1\], the model takes"),
    ):
        with pytest.raises(ExportError, match=words):
            runner.step(one, one, one * 0, {**runner.empty(1), "0.key": runner.value(np.ascontiguousarray(array))})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(method="klt:best"), "scales of their own in every row"),
        (dict(method="klt"), r"keys have scales of their own in every row \(trellis\)"),
        (dict(method="static", key_bits=4, value_bits=8), "one width for keys and values"),
        (dict(method="static", key_bits=2, value_bits=2), "4 or 8 bits, not 2"),
        (dict(method="static", protect="first:2"), "use --protect none"),
        (dict(method="static", window=4), "use --window 0"),
    ],
)
def test_what_it_cannot_express(options, words, tmp_path) -> None:
    options = {"protect": "none", **options}
    with pytest.raises(ExportError, match=words):
        onnx(rewritten("llama", **options), tmp_path / "m.onnx", "gqa")
    assert not list(tmp_path.iterdir())


def test_an_unknown_flavour(tiny_dir, tmp_path, capsys) -> None:  # noqa: F811
    assert rewrite_main([str(tiny_dir), str(tmp_path / "out"), "--onnx-flavour", "gka"]) == 2
    assert "nearest known: gqa" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_learned_sinks_leave_as_the_operators_own(tmp_path) -> None:
    """A cache that is not coded says what transformers says; coded, the graph is compared with the torch cache."""
    import onnx as onnx_package

    from kvsink.tools.families import rewritten as of_family
    from kvsink.tools.tiny_models import build_family

    torch.manual_seed(0)
    stock = build_family("gpt-oss")
    sinks = {name: torch.randn_like(p) * 2 for name, p in stock.named_parameters() if name.endswith("sinks")}
    stock.load_state_dict(sinks, strict=False)
    assert len(sinks) == 2
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted = stock(ids).logits.numpy()
        stock.load_state_dict({name: p - 100 for name, p in sinks.items()}, strict=False)
        without = stock(ids).logits.numpy()
    assert np.abs(wanted - without).max() > 1e-2
    for bits in (16, 4):
        model, _ = of_family("gpt-oss", "static:rotated", torch.float32, protect="none", key_bits=bits, value_bits=bits)
        model.load_state_dict({**stock.state_dict(), **sinks} if bits == 16 else sinks, strict=False)
        found = onnx(model, tmp_path / "model.onnx", "gqa")["check"]
        assert found["different_bytes"] == 0 and found["largest_logit_difference"] < 1e-5
        nodes = [n for n in onnx_package.load(tmp_path / "model.onnx").graph.node if n.op_type == "GroupQueryAttention"]
        assert len(nodes) == 2 and all(n.input[11] for n in nodes)
        if bits == 16:
            runner = OnnxGenerator(tmp_path / "model.onnx")
            logits, past = runner.step(ids[:, :12].numpy(), np.ones((1, 12)), np.arange(12)[None], runner.empty(1))
            more, _ = runner.step(ids[:, 12:].numpy(), np.ones((1, 17)), np.arange(12, 17)[None], past)
            assert np.abs(np.concatenate([logits, more], axis=1) - wanted).max() < 1e-5
    with pytest.raises(ExportError, match="Attend node does not; use --onnx-flavour gqa"):
        onnx(model, tmp_path / "other.onnx")
    with pytest.raises(ExportError, match="takes in float32 only"):
        onnx(model, tmp_path / "other.onnx", "gqa", dtype="float16")
    centred, _ = of_family("gpt-oss", "static", torch.float32, protect="none", key_bits=8, value_bits=8)
    with pytest.raises(ExportError, match="do not sum to one, so means cannot come back"):
        onnx(centred, tmp_path / "other.onnx", "gqa")


@pytest.mark.parametrize(("flavour", "method"), [("gqa", "static"), pytest.param("functions", "rotatekv", marks=pytest.mark.slow)])
def test_rotations_that_are_not_their_own_inverse(flavour: str, method: str, tmp_path) -> None:
    """At powers of two the matrix is symmetric, and the way back is the way in; at 24 and 48 it is not."""
    manifest = onnx(rewritten("llama-24", method=method, fold=False), tmp_path / "model.onnx", flavour)
    assert manifest["check"]["largest_logit_difference"] < 1e-5 and manifest["check"]["packed_bytes"] > 1000
