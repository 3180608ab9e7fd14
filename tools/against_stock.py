"""How far a rewritten model is from the stock one: an untouched twin of the same seed, with its own cache, fed the same tokens.

Source     ours
Error      the largest over token positions of |logits - stock logits|, relative to the mean |stock logits|, Euclidean over
           the vocabulary
Bound      0.1 at 8 bits. A row of 16 numbers spans 3.5 deviations, so a step is 3.5 / 255 of one and rounding 0.004 of a
           key or value. Attention scores of deviation s make that 0.004 (1 + s^2)^0.5 of a layer's output; with s = 1.5 and
           four layers 0.015 at the mean position, and at the worst of a hundred, where a score stands out, some times that.
           What is wrong and not rounded (a pair of channels, a head, a row, a position) moves scores by their own size;
           `planted` measures by how much
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

__all__ = ["BOUND", "cached_logits", "distance", "forced_logits", "planted"]

BOUND = 0.1


def distance(found: Tensor, wanted: Tensor) -> float:
    """The error of logits [B, S, V] against those of the stock model; infinite where they are not numbers."""
    apart = (found.double() - wanted.double()).norm(dim=-1)
    error = float(apart.max() / wanted.double().norm(dim=-1).mean())
    return error if error == error else float("inf")


def cached_logits(model: Any, ids: Tensor, chunks: tuple[int, ...], cache: Any = None) -> Tensor:
    """Logits [B, S, V] of ids [B, S] given in chunks and then token by token, through `cache` or the one the model makes."""
    names = inspect.signature(type(model).forward).parameters
    takes = "cache" if "cache" in names else "past_key_values"  # since transformers 5.24, and before
    parts, at = [], 0
    for size in (*chunks, *[1] * (ids.shape[1] - sum(chunks))):
        given = {} if cache is None else {takes: cache}
        out = model(input_ids=ids[:, at : at + size], use_cache=True, **given)
        parts.append(out.logits)
        if cache is None:
            cache = getattr(out, "cache", None) or out.past_key_values
        at += size
    return torch.cat(parts, 1)


class _Forced(LogitsProcessor):
    """Makes `generate()` say given tokens [B, N] after a prompt of `start` tokens, whatever the model thinks."""

    def __init__(self, tokens: Tensor, start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = self.tokens[:, input_ids.shape[1] - self.start, None]
        return torch.full_like(scores, float("-inf")).scatter(1, said, 0.0)


def forced_logits(model: Any, ids: Tensor, mask: Tensor, tokens: Tensor, **options: Any) -> tuple[Tensor, Any]:
    """The logits [B, N, V] with which `generate()` meets each of the tokens [B, N] after ids and mask [B, S], and its output."""
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens.shape[1],
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=[_Forced(tokens, ids.shape[1])],
        **options,
    )
    return torch.stack(out.logits, 1), out


class _Planted(DynamicCache):
    def __init__(self, layers: Collection[int], **options: Any) -> None:
        super().__init__(**options)
        self.faulty = layers

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self.faulty:
            held = keys.shape[-2] - key_states.shape[-2]
            keys = torch.cat([keys[..., :held, :].roll(1, -1), keys[..., held:, :]], -2)
        return keys, values


def planted(model: Any, layers: Collection[int]) -> DynamicCache:
    """A cache for a stock model with a fault in some layers: keys it holds come back with their channels moved by one, as if
    RoPE had been undone in the wrong pairs."""
    return _Planted(layers, config=model.config.get_text_config(decoder=True))
