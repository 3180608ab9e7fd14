"""Rows for quantizers that learn, drawn while calibration runs, and how much each of them matters.

Formula    fisher  (dL / dx)^2 of every entry, L the summed next-token loss of the row's window, x the key before RoPE or the
                   value: the gradient after RoPE is turned back by the transpose of the rotation
           error   f^K_j = scale sum_i A_ij ||V_j - O_i||_1 ||Q_i||_2,   f^V_j = sum_i A_ij, over the queries i >= j of all
                   query heads of the KV head, A the causal softmax, O = A V
Source     fisher: KVQuant, arXiv 2401.18079 section 3; CQ, arXiv 2405.03917
           error: AnTKV, arXiv 2506.19505 theorem 3.1 (its inner vector V^T Diag(A_i)(I - 1 A_i)_{:,j} is A_ij (V_j - O_i))
Shapes     q [B, Hq, S, D], k, v [B, H, S, D] → f [B, S, H]; kept rows as in kvsink.calibrate.statistics.Samples
Exact      yes, float32 sums
Cost       error: 2·D flops per pair of tokens and query head, beside attention; one window at a time
Raises     CalibrationError where attention cannot be watched, for NaN, and for too few rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvsink.calibrate.statistics import SAMPLE_ROWS, SampleNeed, Samples
from kvsink.errors import CalibrationError
from kvsink.model.attention import NOTES
from kvsink.model.decoder import Decoder

__all__ = ["Collector", "error_factors", "frozen", "watched"]

WATCH = "kvsink_watch"  # the name transformers knows our attention function by
_CHUNK = 128


def error_factors(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, chunk: int = _CHUNK
) -> tuple[Tensor, Tensor]:
    """f^K and f^V [B, S, H] of one window. mask: bool or additive [B or 1, 1, S, S]; None is causal. chunk: queries whose distances
    to all values are held at once."""
    b, h, n, _ = k.shape
    q, k, v = (t.float() for t in (q, k, v))
    hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    key, value = q.new_zeros(b, h, n), q.new_zeros(b, h, n)
    group = q.shape[1] // h
    for row in range(b):
        bias = None if mask is None else mask[min(row, mask.shape[0] - 1), 0, :, :n]
        for head in range(h):
            query = q[row, head * group : (head + 1) * group]  # [G, n, D]
            logits = query @ k[row, head].mT * scale
            if bias is not None:
                logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias.float()
            a = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
            out, size = a @ v[row, head], query.norm(dim=-1)
            value[row, head] = a.sum((0, 1))
            for at in range(0, n, chunk):
                end = min(at + chunk, n)  # a query sees no key behind it
                apart = torch.cdist(out[:, at:end], v[row, head, :end].expand(group, -1, -1), p=1.0)
                key[row, head, :end] += (a[:, at:end, :end] * apart * size[:, at:end, None]).sum((0, 1))
    return scale * key.transpose(1, 2), value.transpose(1, 2)


class Collector:
    """Draws the rows of every layer that asked for them, window by window, and weighs them."""

    def __init__(self, needs: Mapping[int, SampleNeed], windows: int, most: int = SAMPLE_ROWS) -> None:
        self.needs, self.windows, self.most = needs, windows, most
        self.fisher = any(n.fisher for n in needs.values())
        self.error = any(n.error for n in needs.values())
        self.parts: dict[int, list[Samples]] = {layer: [] for layer in needs}
        self.tracked: dict[int, tuple[Tensor, Tensor]] = {}
        self.drawn: dict[int, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}  # keep [B, S] after drawing, `back`
        self.start = 0

    @property
    def weighs(self) -> bool:
        """Whether windows must come one at a time."""
        return self.fisher or self.error

    def begin(self, start: int) -> None:
        """A forward pass over the windows from `start` on begins."""
        self.start = start
        self.tracked.clear()
        self.drawn.clear()

    def track(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same keys and values; where gradients are wanted, as tensors that have one."""
        need = self.needs.get(layer)
        if need is None or not need.fisher:
            return k, v
        k, v = (t if t.requires_grad else t.detach().requires_grad_() for t in (k, v))
        self.tracked[layer] = (k, v)
        return k, v

    def draw(self, layer: int, keys: Tensor, v: Tensor, positions: Tensor, keep: Tensor, back: Callable[[Tensor], Tensor]) -> None:
        """Keep some rows of keys before RoPE and values [B, H, S, D] where keep [B, S]: as many of every window. back: from the
        gradient of the model's keys to that of `keys`."""
        if layer not in self.needs:
            return
        chosen = torch.zeros_like(keep)
        for row in range(keep.shape[0]):
            window = self.start + row
            quota = self.most * (window + 1) // self.windows - self.most * window // self.windows
            found = keep[row].nonzero().flatten()
            order = torch.randperm(len(found), generator=torch.Generator().manual_seed(window))[:quota]
            chosen[row, found[order.to(found.device)]] = True
        self.drawn[layer] = (chosen, back)
        windows = (self.start + torch.arange(keep.shape[0], device=keep.device))[:, None].expand_as(keep)
        self.parts[layer].append(
            Samples(
                keys=self._rows(keys, chosen),
                values=self._rows(v, chosen),
                positions=positions[chosen].long().cpu(),
                windows=windows[chosen].cpu(),
            )
        )

    @staticmethod
    def _rows(x: Tensor, chosen: Tensor) -> Tensor:
        return x.transpose(1, 2)[chosen].float().cpu()  # [n, H, D]

    def watch(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> None:
        """Attention of a layer is about to run: weigh its rows."""
        need = self.needs.get(layer)
        if need is None or not need.error:
            return
        chosen = self.drawn[layer][0]
        key, value = error_factors(q, k, v, scale, mask)
        part = self.parts[layer][-1]
        part.key_error, part.value_error = key[chosen].cpu(), value[chosen].cpu()

    def backward(self, logits: Tensor, ids: Tensor) -> None:
        """The squared gradients of the rows drawn in this pass."""
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        layers = sorted(self.tracked)
        flat = [t for layer in layers for t in self.tracked[layer]]
        gradients = torch.autograd.grad(loss, flat, allow_unused=True)
        for i, layer in enumerate(layers):
            chosen, back = self.drawn[layer]
            k, v = (
                torch.zeros_like(flat[2 * i + j]) if g is None else g.float() for j, g in enumerate(gradients[2 * i : 2 * i + 2])
            )
            part = self.parts[layer][-1]
            part.key_fisher, part.value_fisher = self._rows(back(k), chosen).square(), self._rows(v, chosen).square()
        self.tracked.clear()

    def samples(self, tokens: int) -> dict[int, Samples]:
        """What was drawn, layer by layer."""
        out = {}
        for layer, parts in self.parts.items():
            out[layer] = rows = Samples.join(parts, self.most)
            for name, tensor in rows.tensors().items():
                if not torch.isfinite(tensor).all():
                    raise CalibrationError(
                        f"layer {layer}: {name.replace('_', ' ')} of the samples are not finite; check the weights or "
                        "calibrate in float32"
                    )
            if len(rows) < (need := self.needs[layer].rows):
                more = need + tokens - len(rows)
                raise CalibrationError(
                    f"layer {layer}: {len(rows)} rows are fewer than the {need} centroids of its codebook; calibrate on at "
                    f"least {more} tokens"
                )
        return out


@contextmanager
def frozen(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """No weight wants a gradient, for the length of the context."""
    held = [p for p in weights if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_(True)


@contextmanager
def watched(decoder: Decoder, collector: Collector | None) -> Iterator[None]:
    """Every attention call of a model is shown to the collector, if it weighs errors."""
    if collector is None or not collector.error:
        yield
        return
    model, config = decoder.model, decoder.model.config
    earlier = config._attn_implementation
    attentions = [model.get_submodule(name) for name in decoder.where.attentions]
    AttentionInterface.register(WATCH, _watching)
    AttentionMaskInterface.register(WATCH, sdpa_mask)
    model.set_attn_implementation(WATCH)
    try:
        if config._attn_implementation != WATCH:
            raise CalibrationError(
                f"{type(model).__name__} does not let its attention be watched, which error weights need; use a method with "
                "Fisher weights or none"
            )
        for layer, attention in enumerate(attentions):
            attention._kvsink_watch = _see(collector, layer)
        yield
    finally:
        for attention in attentions:
            attention.__dict__.pop("_kvsink_watch", None)
        model.set_attn_implementation(earlier)


def _see(collector: Collector, layer: int) -> Callable[..., None]:
    @torch.no_grad()
    def see(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> None:
        collector.watch(layer, q.detach(), k.detach(), v.detach(), scale, mask)

    return see


def _watching(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention by `scaled_dot_product_attention`, shown to the module's watcher first."""
    if odd := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise CalibrationError(f"attention with {odd[0]} cannot be weighed by its error; use a method with other weights")
    if (note := NOTES.found(key)) is not None:
        note(module, query, value)
    see = module.__dict__.get("_kvsink_watch")
    if see is not None:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        see(query, key, value, scale, attention_mask)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
