"""What stands in for text where none is given: tokens drawn at random, as many as the statistics of the layers ask for.

A table need not know what a model is told, but how its projections lie towards each other and what they add: means, directions and
sizes of keys and queries, and which rows become sinks. Random tokens show that.

Source     ours
Shapes     ids int64 [N, T], the same at every call; the first of a window is what the config says begins a text, if anything
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kvsink.methods import DEFAULT, Method
from kvsink.model.anatomy import Heads
from kvsink.model.rows import visual_tokens

__all__ = ["BITS", "TOKENS", "WINDOW", "default_bits", "is_none", "random_ids", "tokens_for"]

BITS = 4.0  # of keys and of values by the default method: at 2 bits text takes a third of the error away, above next to nothing

TOKENS, WINDOW = 512, 256  # of calibration="none": no fewer, and of a window
_ROWS, _EVERY = 8, 8  # rows for every channel of a key; one query of so many is looked at, and two are for every channel


def is_none(calibration: Any) -> bool:
    """Whether the user gives no text, ids or record at all."""
    return isinstance(calibration, str) and calibration == "none"


def default_bits(m: Method, calibration: Any) -> tuple[float, float]:
    """Bits of keys and of values where the user names none."""
    return (BITS, BITS) if is_none(calibration) and m.name == DEFAULT else (m.key_bits, m.value_bits)


def tokens_for(layers: Iterable[Heads], centroids: int = 0) -> int:
    """How many tokens do without text: enough for the widest heads, for those whose queries are fewest, and for codebooks of so
    many centroids."""
    least = max((max(_ROWS, 2 * _EVERY * h.kv // h.query) * h.key_dim for h in layers), default=0)
    least = max(least, 2 * centroids)
    return max(TOKENS, -(-least // WINDOW) * WINDOW)


def random_ids(config: Any, tokens: int) -> Tensor:
    """Token ids [tokens] of the whole vocabulary, none of which stands for a picture. config: of the model."""
    count = config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(0, count, (tokens,), generator=torch.Generator().manual_seed(0))
    return torch.where(torch.isin(ids, torch.tensor(visual_tokens(config), dtype=ids.dtype)), 0, ids)
