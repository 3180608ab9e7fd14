"""transformers' QuantizedCache as a row of the comparison: its cache, and the bytes it really holds.

Formula    bits = 8 · bytes of every tensor of one layer / elements stored, after rows came in chunks; floating-point tensors
           count 16 bit each, as in a 16-bit model, also where the run itself is float32
Source     transformers.cache_utils.QuantizedCache with the backends optimum-quanto and hqq
Raises     MissingPackage when the backend is not installed
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["MissingPackage", "stock_bits", "stock_factory", "tensor_bytes"]

_PACKAGES = {"quanto": "optimum", "hqq": "hqq"}


class MissingPackage(Exception):
    """A backend that is not installed here; its rows are skipped, not declined."""


def stock_factory(backend: str, bits: int, options: dict[str, Any]) -> Callable[[Any, int, int], Any]:
    """(model, batch, length) -> an empty QuantizedCache. options: axis_key, axis_value, q_group_size, residual_length.

    Axes mean different things: quanto's 0 is one range per run of channels of a token (the default), -1 per channel over tokens;
    hqq's 0 (the default) takes channels over tokens, 1 runs of channels of a token.
    """
    if backend not in _PACKAGES or importlib.util.find_spec(_PACKAGES[backend]) is None:
        raise MissingPackage(f"the {backend} backend of transformers' QuantizedCache is not installed")
    from transformers.cache_utils import QuantizedCache

    def make(model: Any, batch: int, length: int) -> Any:
        del batch, length
        return QuantizedCache(backend, model.config, nbits=bits, **options)

    return make


def stock_bits(factory: Callable[[Any, int, int], Any], model: Any, tokens: int, chunk: int) -> float:
    """Bits per element that one layer of the cache holds after `tokens` random rows came in chunks."""
    layer = factory(model, 1, tokens).layers[0]
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    for start in range(0, tokens, chunk):
        shape = (1, heads, min(chunk, tokens - start), dim)
        rows = [torch.randn(shape, generator=generator).to(device) for _ in "kv"]
        layer.update(*rows)
    return 8.0 * tensor_bytes(vars(layer)) / (2 * heads * tokens * dim)


def tensor_bytes(held: Any, seen: set[int] | None = None) -> int:
    """Bytes of all tensors inside nested containers and packed tensor types, each once; floating point counts 2 bytes."""
    seen = set() if seen is None else seen
    if id(held) in seen:
        return 0
    seen.add(id(held))
    if isinstance(held, Tensor):
        names = getattr(held, "__tensor_flatten__", None)
        if names is not None:  # a subclass made of other tensors
            return sum(tensor_bytes(getattr(held, name), seen) for name in names()[0])
        size = 2 if held.is_floating_point() else held.element_size()
        return held.numel() * size
    if isinstance(held, dict):
        return sum(tensor_bytes(v, seen) for v in held.values())
    if isinstance(held, list | tuple):
        return sum(tensor_bytes(v, seen) for v in held)
    return 0
