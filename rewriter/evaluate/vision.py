"""Measure a vision-language model through its real cache: answers right, perplexity of what is asked, bits by modality.

A prompt is fed in pieces that end behind each picture, its text in chunks, so that every word reads its pictures from stored
rows. Models whose positions or pictures cannot be cut are given all pictures in one piece.

Formula    accuracy   = share of asked pieces (an answer) whose every token the model prefers, the right ones before it given
           perplexity = exp(mean of -log q over asked tokens);  KL over the same tokens, to the 16-bit model, in nats
           bits of a modality = mean over its slots of 8 · bytes of codes and scales + 16 bit per element of what is held
           exactly, over elements of keys and values; the whole cache as it counts itself stands beside them
           share of a modality = attention its keys receive, over queries and heads, / all attention
Source     ours
Raises     EvaluationError for prompts without anything asked, and for logits that are not finite
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvsink.cache.cache import KVSinkCache
from kvsink.errors import EvaluationError
from kvsink.evaluate.evaluation import STOCK, CacheFactory, dynamic_cache, is_rewritten, method_name, packed_cache, versions
from kvsink.evaluate.imagetext import Prompt
from kvsink.kernels import observe
from kvsink.model.anatomy import anatomy
from kvsink.model.observed import See, watching
from kvsink.model.offload import place_of
from kvsink.model.passing import given_cache

__all__ = ["PictureResult", "attention_shares", "bits_by_modality", "evaluate_pictures", "remember"]

Progress = Callable[[int, int], None]
_SPLITTABLE = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values")


@dataclass(frozen=True)
class PictureResult:
    """One row: what was measured, on what, and with what."""

    model: str
    method: str
    data: str
    prompts: int
    visual_tokens: int
    text_tokens: int
    asked_tokens: int
    right: int
    answers: int
    perplexity: float
    bits_per_element: float
    visual_bits: float | None
    text_bits: float | None
    kl: float | None
    top1: float | None
    chunk: int
    versions: dict[str, str]
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of the answers that are right."""
        return self.right / self.answers

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`, the accuracy included."""
        return {**dataclasses.asdict(self), "accuracy": self.accuracy}

    def line(self) -> str:
        """The row in one line."""
        parts = [
            f"{self.method} on {self.data}: {self.right}/{self.answers} answers right ({self.accuracy:.1%})",
            f"perplexity {self.perplexity:.3f}",
            f"{self.bits_per_element:.2f} bits",
        ]
        if self.visual_bits is not None and self.text_bits is not None:
            parts.append(f"visual rows {self.visual_bits:.2f} bits, text rows {self.text_bits:.2f}")
        if self.kl is not None and self.top1 is not None:
            parts.append(f"KL {self.kl:.4f}, same top token {self.top1:.1%}")
        return "; ".join(parts)


def _pieces(prompt: Prompt, chunk: int) -> list[tuple[int, int]]:
    """Where the prompt is cut: behind every picture where that is possible, else behind the last one, then by chunks."""
    visual = prompt.visual.tolist()
    ends = [i + 1 for i in range(len(visual)) if visual[i] and (i + 1 == len(visual) or not visual[i + 1])]
    whole = any(name not in _SPLITTABLE for name in prompt.inputs)
    pictures = prompt.inputs.get("pixel_values")
    if whole or pictures is None or len(pictures) != len(ends):
        ends = ends[-1:]
    cuts, at = [], 0
    for end in ends:
        first = next(i for i in range(at, end) if visual[i]) if len(ends) > 1 else end
        cuts += [(i, min(i + chunk, first)) for i in range(at, first, chunk)] if len(ends) > 1 else []
        cuts.append((first, end) if len(ends) > 1 else (at, end))
        at = end
    return cuts + [(i, min(i + chunk, len(visual))) for i in range(at, len(visual), chunk)]


def _logits(model: Any, prompt: Prompt, cache: Any, chunk: int) -> Tensor:
    """float32 [S, V] of a prompt fed in pieces; only what predicts an asked token is kept, the rest is zero."""
    device = place_of(model)
    inputs = {n: t.to(device) for n, t in prompt.inputs.items()}
    ids = inputs["input_ids"]
    cuts = _pieces(prompt, chunk)
    shown = 0
    several = sum(bool(prompt.visual[a:b].any()) for a, b in cuts) > 1
    out: list[Tensor] = []
    for a, b in cuts:
        given: dict[str, Any] = {"input_ids": ids[:, a:b]}
        if prompt.visual[a:b].any():
            for name, t in inputs.items():
                if name == "pixel_values" and several:
                    given[name] = t[shown : shown + 1]
                elif name in ("mm_token_type_ids", "token_type_ids"):
                    given[name] = t[:, a:b]
                elif name not in ("input_ids", "attention_mask"):
                    given[name] = t
            shown += 1
        found = model(**given, **given_cache(model, cache), use_cache=True).logits[0].float()
        out.append(found)
    return torch.cat(out)


def remember(model: Any, prompts: Sequence[Prompt], chunk: int = 16) -> list[Tensor]:
    """Log-probabilities [asked, V] of the 16-bit model, for the KL of several rows."""
    with torch.no_grad():
        return [_asked(p, _logits(model, p, dynamic_cache(model, 1, len(p.asked)), chunk))[0] for p in prompts]


def _asked(prompt: Prompt, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [asked, V] and the asked tokens."""
    asked = prompt.asked.clone()
    asked[0] = False
    at = asked.nonzero()[:, 0]
    if not len(at):
        raise EvaluationError("a prompt asks for no token; give it a text behind its picture, or an answer")
    targets = prompt.inputs["input_ids"][0, at]
    return torch.log_softmax(logits[at.to(logits.device) - 1], -1).cpu(), targets


def evaluate_pictures(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    chunk: int = 16,
    cache_factory: CacheFactory | None = None,
    reference: Sequence[Tensor] | None = None,
    model_name: str = "",
    method: str = "",
    data: str = "",
    progress: Progress | None = None,
) -> PictureResult:
    """Run every prompt through `model` and its cache; reference: what `remember` gave for the same prompts."""
    if not prompts:
        raise EvaluationError("there is no prompt with a picture to evaluate on")
    begun = time.perf_counter()
    factory = cache_factory or (packed_cache if is_rewritten(model) else dynamic_cache)
    nll = kl = agree = 0.0
    right = answers = asked_tokens = 0
    bits: list[float] = []
    parts: list[tuple[float, float, int, int]] = []
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            cache = factory(model, 1, len(prompt.asked))
            log_q, targets = _asked(prompt, _logits(model, prompt, cache, chunk))
            if not torch.isfinite(log_q).all():
                raise EvaluationError(f"the model gives logits that are not finite for prompt {i}; try --dtype float32")
            nll -= float(log_q.gather(-1, targets[:, None]).sum())
            good = log_q.argmax(-1) == targets
            first = [j for j in range(1, len(prompt.asked)) if prompt.asked[j] and not prompt.asked[j - 1]]
            owner = torch.tensor([sum(f <= j for f in first) - 1 for j in range(1, len(prompt.asked)) if prompt.asked[j]])
            for piece in range(len(first)):
                right += bool(good[owner == piece].all())
            answers += len(first)
            asked_tokens += len(targets)
            if reference is not None:
                log_p = reference[i]
                kl += float((log_p.exp() * (log_p - log_q)).sum())
                agree += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            if isinstance(cache, KVSinkCache):
                bits.append(float(cache.bits_per_element()))
                parts.append(bits_by_modality(cache, prompt.visual))
            else:
                bits.append(16.0)
            if progress is not None:
                progress(i + 1, len(prompts))
    visual = sum(int(p.visual.sum()) for p in prompts)
    total = sum(len(p.visual) for p in prompts)
    return PictureResult(
        model=model_name or type(model).__name__,
        method=method or (method_name(model) if is_rewritten(model) else STOCK),
        data=data or "pictures",
        prompts=len(prompts),
        visual_tokens=visual,
        text_tokens=total - visual,
        asked_tokens=asked_tokens,
        right=right,
        answers=answers,
        perplexity=math.exp(nll / asked_tokens),
        bits_per_element=sum(bits) / len(bits),
        visual_bits=sum(p[0] * p[2] for p in parts) / visual if parts else None,
        text_bits=sum(p[1] * p[3] for p in parts) / (total - visual) if parts else None,
        kl=None if reference is None else max(0.0, kl / asked_tokens),
        top1=None if reference is None else agree / asked_tokens,
        chunk=chunk,
        versions=versions(),
        seconds=time.perf_counter() - begun,
    )


def bits_by_modality(cache: KVSinkCache, visual: Tensor) -> tuple[float, float, int, int]:
    """Bits per element of visual and of text rows of a cache with one row per layer, and how many of each there are."""
    n = len(visual)
    totals = torch.zeros(n)
    layers = cache.packed_layers()
    for layer in layers:
        width = layer.num_heads * (layer.head_dim + layer.value_dim)
        slots = layer.k_codes.shape[2]
        stored = [
            layer.k_codes,
            layer.v_codes,
            layer.k_scale,
            layer.v_scale,
            layer.k_norm,
            layer.k_sparse,
            layer.k_sparse_at,
            layer.v_sparse,
            layer.v_sparse_at,
        ]
        each = 8.0 * sum(t.numel() * t.element_size() for t in stored) / slots / layer.batch_size / width
        kept = torch.zeros(n, dtype=torch.bool)
        for held in (layer.exact_slot[0], layer.recent_slot):
            inside = held[(held >= 0) & (held < n)].long().cpu()
            kept[inside] = True
        totals += each + torch.where(kept, 16.0, 0.0)
    totals /= max(1, len(layers))
    seen = int(visual.sum())
    text = totals[~visual].mean() if seen < n else totals.new_zeros(())
    return float(totals[visual].mean()) if seen else 0.0, float(text), seen, n - seen


def attention_shares(model: nn.Module, prompts: Sequence[Prompt]) -> list[dict[str, float]]:
    """Of every layer: the shares of attention that the first row, other text and visual rows receive, over all prompts."""
    names = anatomy(model).attentions
    device = place_of(model)
    masses: dict[int, Tensor] = {}

    def see(layer: int) -> See:
        def look(q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None, scale: float) -> None:
            valid = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
            first = torch.zeros((), dtype=torch.int64, device=q.device)
            masses[layer] = observe(q, k, v, out, mask, first, valid, scale, "mass")[0].cpu()

        return look

    sums = [dict.fromkeys(("first", "text", "visual"), 0.0) for _ in names]
    for prompt in prompts:
        with torch.no_grad(), watching(model, names, see):
            model(**{n: t.to(device) for n, t in prompt.inputs.items()}, use_cache=False)
        visual, first = prompt.visual, torch.zeros_like(prompt.visual)
        first[0] = True
        for layer, total in enumerate(sums):
            mass = masses[layer] / masses[layer].sum()
            total["first"] += float(mass[first].sum()) / len(prompts)
            total["visual"] += float(mass[visual & ~first].sum()) / len(prompts)
            total["text"] += float(mass[~visual & ~first].sum()) / len(prompts)
    return sums
