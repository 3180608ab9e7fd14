"""The cache of one call of `generate()` serves the next call of the same shape, so that no tensors are made for it.

Behind a short prompt the GPU waits for the host, which would make all tensors of every layer.

Source     ours
Exact      yes: a cache is handed on after `reset()`, and only where nobody else can see it: neither a caller who was given it by
           `return_dict_in_generate`, nor another thread
Declines   caches with a layer that is not packed or slides; caches of more than 1/16 of the GPU's memory, which would lie there
           between two calls; another shape, dtype, device or inference mode. `detach` lets go of what a plan left
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from kvsink.cache.cache import KVSinkCache
from kvsink.cache.layer import KVSinkLayer
from kvsink.model.offload import number_of, place_of

__all__ = ["fixed_cache"]

_NAME = "_kvsink_last_cache"  # in vars() of the model
_SHARE = 16  # of the GPU's memory


class _Last:
    """A cache beside the model it was made for; a copy of the model, or what is read back from a file, has none."""

    def __init__(self, *made: Any) -> None:
        self.made = made  # cache, rows, length

    def __deepcopy__(self, memo: dict[int, Any]) -> _Last:
        return _Last()

    def __reduce__(self) -> tuple[type[_Last], tuple[()]]:
        return _Last, ()


def fixed_cache(model: nn.Module, rows: int, length: int) -> KVSinkCache:
    """An empty cache of a fixed length for a call of `generate()`: the one of the call before where that is possible."""
    cache = _last(model, rows, length)
    if cache is None:
        cache = KVSinkCache.for_model(model, rows, length)
    else:
        cache.reset()
    if _small(cache, place_of(model)):
        vars(model)[_NAME] = _Last(cache, rows, length)
    return cache


def _last(model: nn.Module, *asked: int) -> KVSinkCache | None:
    """The cache of the call before, if it is what is asked for and nobody else's; what is not is let go."""
    last = vars(model).pop(_NAME, None)
    if last is None or not last.made:
        return None
    (cache, *had), last.made = last.made, ()
    weight, alike = number_of(model), SimpleNamespace(layers=[SimpleNamespace() for _ in cache.layers])
    fits = (
        had == list(asked)
        and (cache.layers[0].dtype, cache.layers[0].device) == (weight.dtype, place_of(model))
        and all(layer.is_initialized and layer.batch_size == had[0] for layer in cache.layers)
        and cache.layers[0].k_codes.is_inference() == torch.is_inference_mode_enabled()
    )
    return cache if fits and all(a <= b for a, b in zip(_holders(cache), _holders(alike), strict=True)) else None


def _holders(cache: Any) -> list[int]:
    """How many refer to a cache and to each of its layers."""
    return [sys.getrefcount(cache), *(sys.getrefcount(layer) for layer in cache.layers)]


def _small(cache: KVSinkCache, device: torch.device) -> bool:
    """Whether a cache may lie there between two calls: every layer packed, none sliding, and little of the GPU's memory."""
    if any(type(layer) is not KVSinkLayer for layer in cache.layers):
        return False
    if device.type != "cuda":
        return True
    return cache.nbytes() * _SHARE <= torch.cuda.get_device_properties(device).total_memory
