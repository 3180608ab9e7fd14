"""Attention shapes of models that people run, by name or from a config.json, for `kvsink-bench shapes`.

Source     the models' own config.json, as their publishers give it; qwen3.5: the defaults of `Qwen3_5MoeTextConfig` in transformers
Differs    one layer with random weights stands for each: its hidden size is smaller, which attention does not see, and all its
           channels turn unless `partial_rotary_factor` says otherwise
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvsink.errors import KvsinkError
from kvsink.tools.bench_model import Shape

__all__ = ["MODELS", "shapes_of"]


def _shape(heads: int, kv_heads: int, head_dim: int, rotary: float = 1.0) -> Shape:
    return Shape(512, 1024, kv_heads, 5e5, hidden=1024, heads=heads, head_dim=head_dim, rotary=rotary)


MODELS = {
    "llama-3-8b": _shape(32, 8, 128),
    "llama-3-70b": _shape(64, 8, 128),
    "qwen3-30b-a3b": _shape(32, 4, 128),
    "llama-3.2-1b": _shape(32, 8, 64),
    "gpt-oss-20b": _shape(64, 8, 64),
    "gemma-3-4b": _shape(8, 4, 256),
    "phi-3-mini": _shape(32, 32, 96),
    "one-kv-head": _shape(16, 1, 128),
    "qwen3.5": _shape(16, 2, 256, 0.25),
}
"""Query heads, key-value heads, channels, and the share of channels that RoPE turns."""


def shapes_of(text: str) -> dict[str, Shape]:
    """Comma-separated names of `MODELS` or paths of config.json (or of folders that hold one); raises KvsinkError."""
    found: dict[str, Shape] = {}
    sources: dict[str, Path] = {}
    for name in filter(None, text.split(",")):
        path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
        if name in MODELS:
            called, shape = name, MODELS[name]
        elif path.suffix == ".json":
            called, shape = path.absolute().parent.name if path.name == "config.json" else path.stem, _read(path)
        else:
            raise KvsinkError(f"unknown shape {name!r}; known: {', '.join(MODELS)}; or give the path of a config.json")
        if sources.setdefault(called, path.resolve()) != path.resolve():
            raise KvsinkError(f"{name} and another one before it would both be called {called!r}; rename one")
        found[called] = shape
    if not found:
        raise KvsinkError(f"no shape is named; known: {', '.join(MODELS)}; or give the path of a config.json")
    return found


def _read(path: Path) -> Shape:
    """The shape of the first full-attention layer that a config.json describes."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        text: Mapping[str, Any] = config.get("text_config", config)
        if text.get("kv_lora_rank"):
            raise ValueError("kv_lora_rank: what it keeps of a token is compressed, for all heads at once")
        heads, kv_heads, dim = _sizes(text)
        rope = text.get("rope_parameters") or {}
        rope = rope.get("full_attention", rope)
        shares = (held.get("partial_rotary_factor") for held in (text, rope))
        rotary = float(next((share for share in shares if share is not None), 1.0))
        if not 0 <= rotary <= 1:
            raise ValueError(f"partial_rotary_factor {rotary:g} is no share of a head's channels")
        return _shape(heads, kv_heads, dim, rotary)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise KvsinkError(f"{path} gives no attention shape ({said}); pass the config.json of a decoder") from error


def _sizes(text: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, key-value heads and channels. Raises ValueError for what no attention has."""
    heads, kv_heads = int(text["num_attention_heads"]), text.get("num_key_value_heads")
    kv_heads = heads if kv_heads is None else int(kv_heads)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key-value heads")
    dim = text.get("head_dim")
    dim = int(text["hidden_size"]) // heads if dim is None else int(dim)
    if dim < 1:
        raise ValueError(f"heads of {dim} channels")
    return heads, kv_heads, dim
