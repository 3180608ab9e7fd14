"""Chunks into a packed cache, and what it then holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvsink.cache.cache import KVSinkCache
from tests.close import FUSED_FLOAT32, largest_difference

__all__ = ["close", "feed", "states"]


def feed(model: Any, cache: Any, *chunks: Tensor, **inputs: Any) -> Tensor:
    """Logits of all chunks, fed one after the other."""
    with torch.no_grad():
        return torch.cat([model(c, past_key_values=cache, **inputs).logits for c in chunks], dim=1)


def states(cache: KVSinkCache, row: int | slice = slice(None), slots: slice = slice(None)) -> list[Tensor]:
    """Codes and scales of the given rows and slots."""
    return [
        getattr(layer, name)[row][..., slots, :]
        for layer in cache.packed_layers()
        for name in ("k_codes", "k_scale", "v_codes", "v_scale")
    ]


def close(one: Tensor, two: Tensor) -> bool:
    """Equal up to float32 sums in another order."""
    return largest_difference(one, two) <= FUSED_FLOAT32 * float(two.abs().max())
