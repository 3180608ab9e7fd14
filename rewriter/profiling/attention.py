"""How much attention each token receives, per layer and head, and how much of it a change of the model takes away.

Formula    mass[h, j] = sum over queries i of p^h_ij;  first[h, i] = p^h_i0
           D_sink = 1 - mean over windows, i >= 32 and heads of p'^h_i0 / p^h_i0
Source     Super Experts, arXiv 2507.23279 section 4, equation 7, with the first token as the sink set
Differs    the text states no averaging over i: positions from 32 on count, and a head only where p is at least 1e-3. The
           share of (head, query) pairs left out is reported
Shapes     q [1, Hq, S, D], k [1, H, T, D], in chunks of 128 queries → mass float32 [Hq, T], first float32 [Hq, S]
           A model whose attention SDPA cannot stand in for (softcap, learned sinks) runs eager, and its probabilities
           [1, Hq, S, T] are read layer by layer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvsink.errors import UnsupportedError
from kvsink.model.anatomy import Anatomy
from kvsink.model.observed import check_observable, watching

__all__ = ["LEAST", "START", "AttentionSums", "attention_rows", "sink_decay", "watching_attention"]

START, LEAST, _QUERIES = 32, 1e-3, 128


class AttentionSums:
    """mass and first of the window that is running, by layer; maps: the corner of the first window, mean of all heads."""

    def __init__(self, corner: int = 0) -> None:
        self.mass: dict[int, Tensor] = {}
        self.first: dict[int, list[Tensor]] = {}
        self.maps: dict[int, Tensor] = {}
        self.corner = corner

    def add(self, layer: int, probabilities: Tensor) -> None:
        """Some rows [Hq, n, T] of one layer, in the order of their queries."""
        p = probabilities.detach().float()
        if self.corner and layer not in self.maps:
            self.maps[layer] = p.mean(0)[: self.corner, : self.corner].cpu()
        total = p.sum(1).cpu()
        held = self.mass.get(layer)
        if held is not None:
            total[:, : held.shape[1]] += held  # a cache has grown since
        self.mass[layer] = total
        self.first.setdefault(layer, []).append(p[:, :, 0].cpu())

    def take(self, layers: int) -> tuple[Tensor, Tensor]:
        """mass [L, Hq, T] and first [L, Hq, S]; starts over."""
        mass, first = zip(*(self.take_layer(i) for i in range(layers)), strict=True)
        return torch.stack(mass), torch.stack(first)

    def take_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """mass [Hq, T] and first [Hq, S] of one layer, which starts over. Raises UnsupportedError when it was not seen."""
        if layer not in self.mass:
            raise UnsupportedError(f"layer {layer} shows no attention probabilities to find sinks in; profile with --no-attention")
        return self.mass.pop(layer), torch.cat(self.first.pop(layer), 1)


def attention_rows(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Iterator[Tensor]:
    """softmax(scale · q k + mask) [Hq, n, T] in chunks of queries; without a mask the last query sees the last key."""
    s, slots, r = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    keys = k[0].float().repeat_interleave(r, dim=0)  # [Hq, T, D]
    columns = torch.arange(slots, device=k.device)
    for begin in range(0, s, _QUERIES):
        rows = torch.arange(begin, min(begin + _QUERIES, s), device=q.device)
        scores = q[0, :, rows].float() @ keys.mT * scale
        if mask is None:
            scores = scores.masked_fill(columns > rows[:, None] + slots - s, float("-inf"))
        else:
            part = mask[0, :, rows, :slots]
            scores = scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part.float()
        yield scores.softmax(-1).nan_to_num(0.0)


@contextmanager
def watching_attention(model: Any, where: Anatomy, sums: AttentionSums) -> Iterator[str]:
    """Within the block, `sums` sees every attention layer; yields how: "sdpa" or "eager"."""
    if _plain(model, where):

        def see(layer: int) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], None]:
            def look(q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None, scale: float) -> None:
                for rows in attention_rows(q, k, mask, scale):
                    sums.add(layer, rows)

            return look

        with watching(model, where.attentions, see):
            yield "sdpa"
        return
    before = model.config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation("eager")
    handles = [model.get_submodule(n).register_forward_hook(_eager(i, n, sums)) for i, n in enumerate(where.attentions)]
    try:
        yield "eager"
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)


def _plain(model: nn.Module, where: Anatomy) -> bool:
    if not getattr(model, "_supports_attention_backend", False):
        return False  # its attention does not go through transformers' functions
    try:
        check_observable(model)
    except UnsupportedError:
        return False
    return not any(getattr(model.get_submodule(n), "sinks", None) is not None for n in where.attentions)


def _eager(layer: int, name: str, sums: AttentionSums) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            raise UnsupportedError(f"{name} gives no attention probabilities to find sinks in; profile with --no-attention")
        sums.add(layer, weights[0])

    return hook


def sink_decay(before: Tensor, after: Tensor) -> tuple[list[float | None], float]:
    """D_sink of every layer from first [N, L, Hq, S] of two runs, and the share of pairs left out."""
    p, changed = before[..., START:].double(), after[..., START:].double()
    counted = p >= LEAST
    ratio = torch.where(counted, changed / p.clamp_min(LEAST), 0.0)
    n = counted.sum((0, 2, 3))
    mean = ratio.sum((0, 2, 3)) / n.clamp_min(1)
    return [1 - float(m) if c else None for m, c in zip(mean, n, strict=True)], 1 - float(counted.double().mean())
