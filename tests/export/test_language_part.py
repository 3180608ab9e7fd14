"""The language part of a vision-language model as a graph: embeddings of text and pictures in, the packed cache in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.export import ExportError, OnnxGenerator, onnx
from kvsink.export.state import STATE_OF, past_names
from kvsink.model.passing import cache_name
from tests.vision import build, prompt

IMAGES = (1, 2)
SLOW = ("internvl", "smolvlm")


def seeing(family: str, method: str = "klt") -> Any:
    model = build(family)
    given = [prompt(family, (2, 1), seed=i) for i in range(8)]
    kvsink.rewrite(model, method, calibration=given, protect="first:1")
    return model


def embedded(model: Any, given: dict[str, Any]) -> torch.Tensor:
    """What the decoder of a model is given for a prompt: projected pictures in the places of its image tokens."""
    seen: list[torch.Tensor] = []
    inner = getattr(model.model, "language_model", None) or model.model.text_model
    hook = inner.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    with torch.no_grad():
        model(**given)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("family", "method"),
    [("llava", "klt"), ("llava", "akvq-vl:even"), *(pytest.param(f, "klt", marks=pytest.mark.slow) for f in SLOW)],
)
def test_pictures_and_steps_are_those_of_the_torch_model(family: str, method: str, tmp_path: Path) -> None:
    model, given = seeing(family, method), prompt(family, IMAGES)
    manifest = onnx(model, tmp_path / "model.onnx", embeds=True)
    assert manifest["check"]["different_bytes"] == 0 and manifest["check"]["packed_bytes"] > 0
    runner, cache = OnnxGenerator(tmp_path / "model.onnx"), KVSinkCache.for_model(model, 2)
    mask, rows = given["attention_mask"], embedded(model, given)
    table = model.get_input_embeddings()
    assert not torch.allclose(rows, table(given["input_ids"]), atol=1e-3)  # the pictures are in
    past, positions, told = runner.empty(2), (mask.cumsum(1) - 1).clamp_min(0), given
    for _ in range(4):
        logits, past = runner.step(rows.numpy(), mask.numpy(), positions.numpy(), past)
        with torch.no_grad():
            wanted = model(**{**told, "attention_mask": mask, "position_ids": positions, cache_name(model): cache}).logits
        seen = mask[:, -rows.shape[1] :].bool().numpy()
        assert np.abs(logits - wanted.numpy())[seen].max() < 1e-4
        token = torch.from_numpy(logits[:, -1].argmax(-1))[:, None]
        assert torch.equal(token, wanted[:, -1].argmax(-1)[:, None])
        held, arrays = mask.bool(), runner.arrays(past)
        for i, layer in enumerate(cache.packed_layers()):
            for name in past_names(layer.codec):
                if name in ("key", "value", "key_scale", "value_scale"):
                    there = getattr(layer, STATE_OF[name])[:, :, : held.shape[1]].transpose(1, 2)[held]
                    mine = arrays[f"{i}.{name}"].swapaxes(1, 2)[held.numpy()].astype(np.float32)
                    # Codes are equal; a scale is rounded to float16 from float32 numbers that differ in their last bits.
                    step = 2.0**-10 if name.endswith("scale") else 0.0
                    assert (np.abs(mine - there.float().numpy()) <= step * there.float().abs().numpy()).all(), (i, name)
            assert np.array_equal(past[f"{i}.exact_slot"].numpy(), layer.exact_slot.numpy())
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        told, rows, positions = {"input_ids": token}, table(token).detach(), positions[:, -1:] + 1


def test_what_embeddings_do_not_tell_is_named(tmp_path: Path) -> None:
    for family, words in (("qwen2-vl", "positions in three axes"), ("gemma3", "rows of a picture see each other")):
        with pytest.raises(ExportError, match=words):
            onnx(seeing(family, "rtn"), tmp_path / "m.onnx", embeds=True)
    model = seeing("llava", "rtn")
    with pytest.raises(ExportError, match="it takes images, and the graph has no input for them"):
        onnx(model, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="flavour gqa takes token ids"):
        onnx(model, tmp_path / "m.onnx", "gqa", embeds=True)
    assert not list(tmp_path.iterdir())
    manifest = onnx(model, tmp_path / "m.onnx", embeds=True)
    assert manifest["inputs"][0]["name"] == "inputs_embeds" and manifest["inputs"][0]["shape"] == ["batch", "sequence", 64]
    runner, one = OnnxGenerator(tmp_path / "m.onnx"), np.ones((1, 1), dtype=np.int64)
    with pytest.raises(ExportError, match="takes embeddings .* not an array of shape"):
        runner.step(one, one, one, runner.empty(1))
    with pytest.raises(ExportError, match="embed tokens and pictures"):
        runner.generate([[5]])
