"""Graphs in float64: equal to the torch model in float64 to the last byte and token, where float32 leaves ties open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

from kvsink.cache.layer import KVSinkLayer
from kvsink.export import ExportError, OnnxGenerator, in_float64, onnx
from kvsink.export.state import FIXED, STATE_OF, past_names
from kvsink.folder.loading import load_model, load_tokenizer
from kvsink.tools.families import rewritten as of_family
from kvsink.tools.rewrite import main as rewrite_main
from tests.graphs import rewritten
from tests.test_acceptance import PROMPTS

COUNT = 64
ROUNDING = 1e-13  # relative, of logits: some 2**-52 for every sum of two layers


def free_run(path: Path, model: Any, prompts: list[list[int]], count: int) -> tuple[Any, Any, dict[str, Any]]:
    """Greedy tokens of a graph and of the torch model in float64, a cache each, one padded batch; and where the caches differ.

    Counts bytes of codes, and every number that differs: codes, scales, slots of exact rows; of exact rows, the largest difference.
    """
    model.generation_config.eos_token_id = None
    runner = OnnxGenerator(path)
    here = runner.generate(prompts, count, eos_token_id=-1)
    ids, mask = runner._pad(prompts, count)
    with in_float64(model):
        out = model.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
    there = out.sequences[:, ids.shape[1] :].tolist()
    seen = np.concatenate([mask, np.ones((len(ids), count - 1))], axis=1).astype(bool)
    held = runner.arrays(runner.past)
    found: dict[str, Any] = {"bytes": 0, "different": 0, "exact": 0.0}
    for i, layer in enumerate(out.past_key_values.layers):
        if not isinstance(layer, KVSinkLayer):
            continue
        for name in past_names(layer.codec):
            one, two = held[f"{i}.{name}"], getattr(layer, STATE_OF[name]).numpy()
            if name in ("exact_key", "exact_value"):
                kept = (held[f"{i}.exact_slot"] != -1)[:, None, :, None]
                found["exact"] = max(found["exact"], float(np.abs(np.where(kept, one - two, 0)).max()))
                continue
            if name not in FIXED:
                one, two = (x[:, :, : seen.shape[1]].transpose(0, 2, 1, 3)[seen] for x in (one, two))
                found["bytes"] += one.size if one.dtype == np.uint8 else 0
            found["different"] += int((one != two).sum()) if name != "exact_score" else 0
    return here, there, found


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gpt2", dict(protect="kvsink:2+first:1")),
        pytest.param("qwen3", dict(method="cq", protect="first:2"), marks=pytest.mark.slow),
        *(
            pytest.param("llama", dict(method=m), marks=pytest.mark.slow)
            for m in ("rtn", "centred", "static", "klt:best", "klt:even")
        ),
        pytest.param("gemma3", dict(method="rotatekv"), marks=pytest.mark.slow),
        pytest.param("qwen3-moe", {}, marks=pytest.mark.slow),
    ],
    ids=lambda v: v if isinstance(v, str) else v.get("method", "klt"),
)
def test_in_float64_a_graph_is_the_torch_model(family: str, options: dict[str, Any], tmp_path) -> None:
    model = rewritten(family, **options)
    before = {name: p.clone() for name, p in model.named_parameters()}
    manifest = onnx(model, tmp_path / "model.onnx", dtype="float64")
    assert manifest["dtype"] == "float64" and manifest["check"]["different_bytes"] == 0
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in model.named_parameters())
    kinds = {e["name"].rpartition(".")[2]: e["dtype"] for e in manifest["inputs"]}
    assert {kind for name, kind in kinds.items() if name.startswith("exact_") and name[6:] in ("key", "value")} <= {"double"}
    assert kinds["key"] == "uint8" and kinds.get("key_scale", "float16") == "float16"
    here, there, found = free_run(tmp_path / "model.onnx", model, [[5, 6, 7, 8, 9], [9, 10], [40]], 12)
    assert here == there and found["different"] == 0 and found["bytes"] > 500 and found["exact"] < 1e-12
    ids = torch.arange(5, 25)[None]
    one = OnnxGenerator(tmp_path / "model.onnx")
    logits, _ = one.step(ids.numpy(), np.ones((1, 20)), np.arange(20)[None], one.empty(1))
    with in_float64(model), torch.no_grad():
        wanted = model(ids).logits.numpy()
    assert logits.dtype == wanted.dtype == np.float64
    assert np.abs(logits - wanted).max() <= ROUNDING * np.abs(wanted).max()


def test_norms_and_angles_are_wide_only_inside() -> None:
    """`.double()` alone leaves float32 in norms and angles: its logits are a thousand times further from those of `in_float64`."""
    model, ids = rewritten("llama", method="rtn"), torch.arange(5, 25)[None]
    with torch.no_grad():
        narrow = model(ids, use_cache=False).logits
        with in_float64(model):
            wide = model(ids, use_cache=False).logits
        assert torch.equal(model(ids, use_cache=False).logits, narrow)
        half = model.double()(ids, use_cache=False).logits
    off = (half - wide).abs().max() / wide.abs().max()
    assert wide.dtype == torch.float64 and 1e3 * ROUNDING < off < 1e-5 > (narrow - wide).abs().max() / wide.abs().max()


@pytest.mark.parametrize(
    ("flavour", "options", "words"),
    [
        ("custom", {}, "flavour custom computes in float32 or float16"),
        ("gqa", dict(method="static", protect="none"), "flavour gqa computes in float32 or float16"),
    ],
)
def test_what_has_no_float64(flavour: str, options: dict[str, Any], words: str, tmp_path) -> None:
    with pytest.raises(ExportError, match=words):
        onnx(rewritten("llama", **options), tmp_path / "m.onnx", flavour, dtype="float64")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "words"),
    [("bloom", "spells its attention out, in float32 whatever it is"), ("llama", "onnxruntime has Erf in float32 alone")],
)
def test_models_that_have_no_float64(family: str, words: str, tmp_path) -> None:
    model = of_family(family, "rtn", torch.float32)[0]
    if family == "llama":
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.GELU()
    with pytest.raises(ExportError, match=words):
        onnx(model, tmp_path / "m.onnx", dtype="float64")
    assert not list(tmp_path.iterdir()) and next(model.parameters()).dtype == torch.float32


@pytest.mark.slow
def test_smollm2_says_the_same_token_for_token(smollm2_dir: Path, tmp_path) -> None:
    """Eight prompts, 64 greedy tokens each, both sides left to themselves: every token and every packed byte."""
    flags = "--calibration-tokens 2048 --eval-windows 0 --device cpu"
    assert rewrite_main([str(smollm2_dir), str(tmp_path / "out"), *flags.split()]) == 0
    model, tokenizer = load_model(tmp_path / "out", "cpu", torch.float32), load_tokenizer(tmp_path / "out")
    onnx(model, tmp_path / "model.onnx", tokens=256, dtype="float64")
    prompts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    here, there, found = free_run(tmp_path / "model.onnx", model, prompts, COUNT)
    print(found)
    assert here == there and len(here) == 8 and {len(row) for row in here} == {COUNT}
    assert found["different"] == 0 and found["bytes"] > 2_000_000
