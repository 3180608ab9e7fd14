"""Do the sinks survive the packed cache: D_sink of a rewritten model against its 16-bit self, through the real cache.

Formula    `kvsink.profiling.attention`; p from a stock cache, p' from the packed one, both fed in chunks
Source     Super Experts, arXiv 2507.23279 section 4; as a check of a quantized cache: ours, with 0.02 as the target
Shapes     ids int64 [N, T]
Raises     UnsupportedError where attention cannot be observed, or anchors already watch it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvsink.cache.cache import KVSinkCache
from kvsink.errors import UnsupportedError
from kvsink.evaluate.evaluation import dynamic_cache
from kvsink.model.anatomy import anatomy
from kvsink.model.passing import given_cache
from kvsink.model.runtime import runtime_of
from kvsink.profiling.attention import START, AttentionSums, sink_decay, watching_attention

__all__ = ["TARGET", "SinkHealth", "sink_health"]

TARGET = 0.02


@dataclass(frozen=True)
class SinkHealth:
    """D_sink by layer (None where no head looks at the first token), and the share of (head, query) pairs left out."""

    d_sink: tuple[float | None, ...]
    left_out: float
    windows: int
    window_tokens: int

    @property
    def worst(self) -> float:
        """The D_sink farthest from 0."""
        return max((d for d in self.d_sink if d is not None), key=abs, default=0.0)

    @property
    def mean(self) -> float:
        known = [d for d in self.d_sink if d is not None]
        return sum(known) / len(known) if known else 0.0

    def line(self) -> str:
        """One line for people."""
        layer = self.d_sink.index(self.worst) if self.worst in self.d_sink else -1
        verdict = "within" if abs(self.worst) < TARGET else "beyond"
        return (
            f"sink decay D_sink {self.mean:+.4f} on average, {self.worst:+.4f} in layer {layer}: {verdict} {TARGET:g} "
            f"({self.windows} x {self.window_tokens} tokens, {self.left_out:.0%} of pairs hold no sink)"
        )


def sink_health(model: Any, reference: Any, ids: Tensor, chunk: int = 64, strict: bool = False) -> SinkHealth:
    """D_sink of the packed cache of `model` over windows `ids`; `reference` may be `model` itself, with a stock cache."""
    runtime = runtime_of(model)
    if any(p.codec is not None and p.codec.anchors is not None for p in runtime.plans):
        raise UnsupportedError("sink decay is not measured beside anchors, which watch the attention themselves")
    if ids.shape[1] <= START:
        raise UnsupportedError(f"sink decay needs windows of more than {START} tokens; give --window-tokens {2 * START}")
    before = _first(reference, ids, chunk, None)
    after = _first(model, ids, chunk, strict)
    decay, left_out = sink_decay(before, after)
    return SinkHealth(tuple(decay), left_out, ids.shape[0], ids.shape[1])


def _first(model: Any, ids: Tensor, chunk: int, strict: bool | None) -> Tensor:
    """Attention to the first token [N, L, Hq, T]; strict None is the stock cache."""
    where, sums, out = anatomy(model), AttentionSums(), []
    device = next(model.parameters()).device
    with torch.no_grad(), watching_attention(model, where, sums) as how:
        if how != "sdpa":
            raise UnsupportedError("sink decay is not measured: the attention of this model cannot be observed as SDPA")
        for row in ids:
            packed = strict is not None
            cache = KVSinkCache.for_model(model, batch_size=1, strict=bool(strict)) if packed else dynamic_cache(model, 1, len(row))
            for part in row[None].to(device).split(chunk, dim=1):
                model(part, **given_cache(model, cache), use_cache=True)
            out.append(sums.take(len(where.blocks))[1])
    return torch.stack(out)
