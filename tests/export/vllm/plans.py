"""A tiny model with planted sinks, rewritten, in memory and as a folder, and the objects that vLLM would hand over."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import kvsink
from kvsink.model.runtime import runtime_of
from tests.planted import TRIGGER, add_sinks, build, plant, windows

__all__ = ["engine", "folder", "layer", "planted", "prompt", "text"]


@cache
def planted(method: str = "klt", protect: str = "sinks:0.25+first:1", head_dim: int = 16, **options: Any) -> Any:
    """A Llama of four blocks, whose block 1 writes a massive activation for one token, which later blocks look for."""
    model = add_sinks(plant(build("llama", head_dim=head_dim), "1:dense"), range(2, 4))
    kvsink.rewrite(model, method, protect=protect, calibration=windows(3, 40, 70, 11, 5, 60), check=False, **options)
    return model


def prompt(*triggers: int, length: int = 96, seed: int = 5) -> torch.Tensor:
    """Token ids [1, length] with the token of the massive activation at these places."""
    ids = windows(length - 1, length=length, seed=seed)
    ids[0, -1] = TRIGGER + 1
    ids[0, list(triggers)] = TRIGGER
    return ids


def text(*triggers: int, length: int, seed: int) -> list[int]:
    """The same as a list."""
    return prompt(*triggers, length=length, seed=seed)[0].tolist()


def folder(model: Any, path: Path, **changes: Any) -> Path:
    """The model's folder; changes: of kvsink.json by name, but for places that were counted, which it is saved with."""
    runtime_of(model).extra["pages"] = {"places": changes.pop("places", 0)}
    model.save_pretrained(path)
    plan = path / "kvsink.json"
    if changes:
        plan.write_text(json.dumps(json.loads(plan.read_text()) | changes))
    return path


def engine(**changes: Any) -> Any:
    """What the checks read of a VllmConfig. changes: by `part__name`."""
    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=128),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, decode_context_parallel_size=1),
        model_config=SimpleNamespace(dtype=torch.float32),
        speculative_config=None,
    )
    for name, value in changes.items():
        part, _, field = name.partition("__")
        setattr(getattr(config, part) if field else config, field or part, value)
    return config


def layer(**changes: Any) -> Any:
    """What the checks read of an attention layer of vLLM."""
    impl = {n: changes.pop(n) for n in ("logits_soft_cap", "alibi_slopes") if n in changes}
    plain = {"attn_type": "decoder", "sliding_window": None, "kv_sharing_target_layer_name": None, "has_sink": False}
    names = {"layer_name": "model.layers.2.self_attn.attn", "impl": SimpleNamespace(**impl)}
    return SimpleNamespace(**plain | names | changes)
