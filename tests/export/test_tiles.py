"""Flavour custom for CUDA: its graph beside the torch cache in tiles, its library, and what it declines."""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

import onnxruntime as ort

import kvsink
from kvsink import KVSinkCache
from kvsink.codecs import STATE_NAMES
from kvsink.errors import KvsinkError
from kvsink.export import ExportError, OnnxGenerator, onnx, tiles
from kvsink.export.bodies import DOMAIN, OPSET
from kvsink.export.graph import _exporting, append_functions, build_graph
from kvsink.export.manifest import manifest_path
from kvsink.export.session import _kernels
from kvsink.export.state import STATE_OF
from kvsink.export.wide import parameters_as
from kvsink.model.passing import given_cache
from kvsink.model.runtime import runtime_of
from kvsink.tools import build_ort_ops
from tests.graphs import rewritten

# Heads, heads of keys, channels, method, bits, protection.
KINDS = {
    "trellis": (4, 2, 64, "klt", 2, "massive:3+first:1"),
    "eight-heads": (8, 1, 128, "klt", 2, "first:2"),
    "even": (4, 1, 128, "klt:even", 4, "massive:2+first:3"),
    "mean": (4, 2, 64, "centred:even", 2, "none"),
    "many": (4, 2, 64, "klt", 2, "first:12"),
    "wide": (2, 1, 256, "klt", 2, "first:1"),
}
TOKENS = 512


def stock_of(kind: str, layers: int = 1, of: Any = (LlamaConfig, LlamaForCausalLM), **more: Any) -> Any:
    heads, kv_heads, dim = KINDS[kind][:3]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 97, "num_hidden_layers": layers, "head_dim": dim}
    config = of[0](num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=TOKENS, **sizes, **more)
    return of[1](config).eval()


def rewritten_as(kind: str, model: Any, bits: int | None = None) -> Any:
    method, found, protect = KINDS[kind][3:]
    text = torch.randint(0, 97, (8, 128), generator=torch.Generator().manual_seed(1))
    kvsink.rewrite(model, method, key_bits=bits or found, value_bits=bits or found, protect=protect, calibration=text)
    return model


def model_of(kind: str, layers: int = 1, **more: Any) -> Any:
    return rewritten_as(kind, stock_of(kind, layers, **more))


def gpt2() -> Any:
    model = GPT2LMHeadModel(GPT2Config(n_embd=128, n_head=2, n_layer=1, vocab_size=97, n_positions=TOKENS)).eval()
    kvsink.rewrite(model, "klt:even", key_bits=4, value_bits=4, calibration=torch.randint(0, 97, (8, 128)))
    return model


@pytest.mark.parametrize("kind", ["trellis", "even", "mean"])
def test_the_model_that_is_traced_is_the_torch_model_over_a_cache_in_tiles(kind: str) -> None:
    model = model_of(kind, layers=2)
    ids = torch.randint(0, 97, (1, 150), generator=torch.Generator().manual_seed(2))
    cache, traced = KVSinkCache.for_model(model, 1, 256, tiles=True), tiles.TileModel(model, TOKENS).eval()
    past = tiles.empty_tiles(runtime_of(model), 1, 256, torch.float32)
    with torch.no_grad():
        for a, b in ((0, 120), (120, 141), *((i, i + 1) for i in range(141, 150))):
            wanted = model(input_ids=ids[:, a:b], **given_cache(model, cache), use_cache=True).logits
            with _exporting(model, tiles.TILES):
                found, last, *left = traced(ids[:, a:b], torch.ones(1, b, dtype=torch.int64), torch.arange(a, b)[None], past)
            past = dict(zip(past, left, strict=True))
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
            assert torch.equal(last, found[:, -1:])
    for i, layer in enumerate(cache.packed_layers()):
        held = dict(zip(STATE_NAMES, layer.state(), strict=True))
        for name, of in STATE_OF.items():
            if f"{i}.{name}" in past:
                torch.testing.assert_close(past[f"{i}.{name}"], held[of], rtol=0, atol=1e-6, msg=name)  # codes are whole numbers


def test_the_model_that_is_traced_is_near_the_stock_model() -> None:
    """At 4 bits, a text in pieces and single tokens; the stock model has never met kvsink."""
    stock = stock_of("trellis", layers=2)
    model = rewritten_as("trellis", stock_of("trellis", layers=2), bits=4)
    ids = torch.randint(0, 97, (1, 150), generator=torch.Generator().manual_seed(2))
    traced, past = tiles.TileModel(model, TOKENS).eval(), tiles.empty_tiles(runtime_of(model), 1, 256, torch.float32)
    found = []
    with torch.no_grad(), _exporting(model, tiles.TILES):
        for a, b in ((0, 60), (60, 121), *((i, i + 1) for i in range(121, 150))):
            logits, _, *left = traced(ids[:, a:b], torch.ones(1, b, dtype=torch.int64), torch.arange(a, b)[None], past)
            past = dict(zip(past, left, strict=True))
            found.append(logits)
    with torch.no_grad():
        wanted = stock(ids).logits
    off = (torch.cat(found, dim=1) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert off[:, :60].max() < 1e-5 < off[:, 60:].max() < 0.1


def test_a_step_is_one_node_a_layer() -> None:
    model = model_of("trellis", layers=2)
    with parameters_as(model, torch.float16):
        graph = build_graph(model, OPSET, TOKENS, "custom", lean=True)
    found = Counter(node.op_type for node in graph.graph if node.domain == DOMAIN)
    assert found == {"AttendTiles": 2, "SelectFirst": 1, "SelectSinks": 2}
    append_functions(graph, OPSET)
    sizes: set[Any] = set()  # what is computed of shapes stays on the CPU: a copy to the device in the graph forbids CUDA graphs
    for node in graph.graph:
        of_shapes = {i for i, value in enumerate(node.inputs) if value in sizes}
        fixed = (
            {i for i, v in enumerate(node.inputs) if v.producer() is None or v.producer().op_type == "Constant"}
            if of_shapes
            else set()
        )
        if node.op_type == "Shape" or (of_shapes and node.op_type != "Expand" and len(of_shapes | fixed) == len(node.inputs)):
            sizes |= set(node.outputs)
        elif of_shapes:
            assert (node.op_type, *of_shapes) in {("Reshape", 1), ("Expand", 1), ("TopK", 1)}, node


def test_files_and_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    manifest = onnx(model_of("trellis"), path, "custom", dtype="float16")
    assert len(manifest["kernels"]) == 1
    assert manifest["check"]["packed_bytes"] > 1000 and manifest["dtype"] == "float16" and not manifest["padding"]
    keys = next(e for e in manifest["inputs"] if e["name"] == "past_key_values.0.key")
    assert keys["shape"] == ["batch", 2, "slots", 17] and keys["dtype"] == "uint8"
    with pytest.raises(ExportError, match="kernels run on CUDA alone, not on CPUExecutionProvider; pass providers="):
        OnnxGenerator(path, library="ops.so")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(ExportError, match="runs on NVIDIA GPUs alone, .* pip install onnxruntime-gpu, or export float32"):
            build_ort_ops.runner_for(path)
    with pytest.raises(KvsinkError, match="unknown device 'cuda:1'"):
        build_ort_ops.runner_for(path, "cuda:1")
    if build_ort_ops.compiler() is None:
        pytest.skip("no C++ compiler")
    plain = build_ort_ops.build(tmp_path / "ops.so")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(ExportError, match=rf"pass library= with what `python -m .*build_ort_ops ops.so --cuda {path}` builds"):
        OnnxGenerator(path, providers=("CUDAExecutionProvider",))
    with pytest.raises(ExportError, match=rf"no kernels for the layers of model.onnx; build .* --cuda {path}"):
        OnnxGenerator(path, providers=("CUDAExecutionProvider",), library=plain.name)  # a name is of this folder
    assert _kernels(ctypes.CDLL(None)) == set()  # a library of before has no such function
    with pytest.raises(ExportError, match="caches are made on the first GPU"):
        OnnxGenerator(path, providers=(("CUDAExecutionProvider", {"device_id": 1}),), library=plain)


def test_a_library_names_the_machine_code_it_was_built_with(tmp_path: Path) -> None:
    if build_ort_ops.compiler() is None:
        pytest.skip("no C++ compiler")
    path = tmp_path / "model.onnx"
    manifest = onnx(model_of("mean"), path, "custom", dtype="float16")
    try:
        library = build_ort_ops.build(tmp_path / "ops.so", [path], ["9.0"])
    except build_ort_ops.module.NativeError as error:
        pytest.skip(str(error))
    loaded = ctypes.CDLL(str(library))
    loaded.kvsink_kernels.restype = ctypes.c_char_p
    assert loaded.kvsink_kernels().decode().split() == ["prompt", *manifest["kernels"]]
    onnx(rewritten("llama"), path, "custom")  # its operators for CUDA trouble nobody where there is no such provider
    assert len(OnnxGenerator(path, library=library).generate([[5, 6, 7]], 3, eos_token_id=-1)[0]) == 3


def test_what_a_library_cannot_be_built_for_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    onnx(rewritten("llama", method="klt"), path)
    for given, said in (
        ([str(path), "--cuda", str(path)], "names no kernels for CUDA; export flavour custom with"),
        (["--cuda", str(tmp_path / "none.onnx")], "does not exist"),
    ):
        assert build_ort_ops.main(given) == 2
        assert said in capsys.readouterr().err
    onnx(model_of("mean"), path, "custom", dtype="float16")
    for capability, said in (("nine", "is not a compute capability"), ("7.5", "the kernels need 8.0")):
        assert build_ort_ops.main(["--cuda", str(path), "--capability", capability]) == 2
        assert said in capsys.readouterr().err
    assert build_ort_ops.main(["--capability", "9.0"]) == 2
    assert "name a model that needs them with --cuda" in capsys.readouterr().err
    record = json.loads(manifest_path(path).read_text())
    ((name, fields),) = record["kernels"].items()
    for kernels, said in (
        ({"other": fields}, "names other layers than it describes"),
        ({name: fields | {"lanes": 3}}, "names layers that these kernels do not know"),
        ([name], "its kernels are no layers by name"),
        ({}, "its kernels are no layers by name"),
    ):
        manifest_path(path).write_text(json.dumps(record | {"kernels": kernels}))
        assert build_ort_ops.main(["--cuda", str(path), "--capability", "9.0"]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: rewritten("llama", method="klt"), "head_dim is 16"),
        (lambda: rewritten("llama", method="klt", window=16), "its window of 16 recent rows"),
        (lambda: rewritten("llama", method="cq"), "head_dim is 16"),
        (lambda: gpt2(), "none of 64 channels carry RoPE"),
        (lambda: model_of("mean", of=(MistralConfig, MistralForCausalLM), sliding_window=64), "kind sliding attention"),
    ],
)
def test_what_does_not_leave(model: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=said):
        onnx(model(), tmp_path / "model.onnx", "custom", dtype="float16")
    assert not list(tmp_path.iterdir())
