"""A packed cache as one safetensors file, and back: codes, scales, exact rows and what all layers share, as bytes.

Source     ours
Differs    spare slots come along; a file names the codecs it was made with and a digest of its tensors
Exact      yes
Raises     KvsinkError for a cache that cannot be saved or does not fit; SidecarError for a file of another plan, or damaged
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from kvsink.cache.layer import KVSinkLayer
from kvsink.cache.new_rows import reached
from kvsink.cache.storage import HELD
from kvsink.codecs import SHARED_NAMES, Codec
from kvsink.errors import KvsinkError, SidecarError
from kvsink.model.digest import DIGEST, check_digest, digest
from kvsink.model.offload import place_of
from kvsink.model.runtime import runtime_of

__all__ = ["load_cache", "save_cache"]


def save_cache(cache: Any, path: str | Path) -> None:
    """Write the packed state to one safetensors file, to be loaded by `KVSinkCache.load` with the same model."""
    if any(not isinstance(layer, KVSinkLayer) for layer in cache.layers):
        raise KvsinkError("a cache with layers that kvsink leaves alone cannot be saved; save the prompt instead")
    if (ranks := cache.shared.runtime.ranks) > 1:
        raise KvsinkError(f"a cache of a model split over {ranks} processes cannot be saved; save the prompt instead")
    if cache.sliding is not None:
        raise KvsinkError("a cache with packed sliding-window layers cannot be saved; save the prompt instead")
    if not all(layer.is_initialized for layer in cache.packed_layers()):
        raise KvsinkError("an empty cache cannot be saved; prefill a prompt first")
    meta = {
        "format": "kvsink-cache-1",
        "codecs": json.dumps([layer.stored_text() for layer in cache.packed_layers()]),
        "length": str(int(cache.get_seq_length())),
        "dtype": str(cache.packed_layers()[0].dtype).removeprefix("torch."),
    }
    tensors = {n: t.contiguous() for n, t in cache.tensors().items()}
    meta[DIGEST] = digest(tensors, meta)
    partial = Path(f"{path}.partial")  # a full disk or a killed process leaves no half of a cache under its name
    try:
        save_file(tensors, str(partial), metadata=meta)
        partial.replace(path)
    except SafetensorError as error:
        raise KvsinkError(f"the cache cannot be written to {path} ({error}); choose another place") from error
    finally:
        partial.unlink(missing_ok=True)


def load_cache(make: Callable[..., Any], path: str | Path, model: nn.Module, max_length: int | None = None) -> Any:
    """Read a cache saved by `save`. Raises SidecarError when it was made by another plan or cannot be read."""
    runtime = runtime_of(model)
    if (ranks := runtime.ranks) > 1:
        raise KvsinkError(f"a cache file holds all heads, and this model is split over {ranks} processes; run the prompt again")
    device = place_of(model)
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = json.loads(meta.get("codecs", "[]"))
        known = isinstance(found, list) and all(isinstance(text, str) for text in found)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise SidecarError(f"cache file {path} cannot be read ({error}); save it again") from error
    if not known:
        raise SidecarError(f"cache file {path} does not say what it holds; save it again")
    cache = make(runtime, max_length, tiles=any(Codec.parse(text).tiles for text in found))
    if found and all(Codec.parse(text).strict for text in found):
        cache._make_strict()
    texts = [layer.codec_text for layer in cache.packed_layers()]
    if meta.get("format") != "kvsink-cache-1" or found != texts:
        raise SidecarError(f"cache file {path} was made by another plan or version; prefill the prompt again")
    wanted = {f"layers.{i}.{n}" for i in range(len(texts)) for n in HELD} | set(SHARED_NAMES)
    if missing := wanted - set(tensors):
        raise SidecarError(f"cache file {path} lacks {min(missing)}; save it again")
    check_digest(tensors, meta, f"cache file {path}", SidecarError, "save it again")
    length = int(meta["length"])
    if max_length is not None and length > max_length:
        raise KvsinkError(f"cache file {path} holds {length} tokens, more than max_length={max_length}")
    dtype = getattr(torch, meta["dtype"])
    for i, layer in enumerate(cache.packed_layers()):
        k = tensors[f"layers.{i}.exact_k"]
        v = tensors[f"layers.{i}.exact_v"]
        layer.lazy_initialization(k[:, :, :0].to(dtype), v[:, :, :0].to(dtype))
        if max_length is None:
            layer._grow(length)
        for name in HELD:
            saved, held = tensors[f"layers.{i}.{name}"], getattr(layer, name)
            both = tuple(slice(min(a, b)) for a, b in zip(saved.shape, held.shape, strict=True))
            held[both] = saved[both]
        layer._held = length
        if length:
            reach, ahead = reached(tensors["positions"][:, :length], 0)
            layer._note_positions(ahead, reach)
    for name in SHARED_NAMES:
        getattr(cache.shared, name)[:, :length] = tensors[name][:, :length]
    for name, held in cache.shared.tables().items():
        if name not in tensors:
            raise SidecarError(f"cache file {path} lacks {name}; save it again")
        held.copy_(tensors[name])
    return cache
