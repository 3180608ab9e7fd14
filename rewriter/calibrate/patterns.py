"""Which layers of a vision-language model look at text and which at a few pivots: measured on prompts with images.

Formula    a_j = attention that key j receives, per head and query that can see it;  m_j = the same, summed over queries
           r = mean of a over text without the first five tokens / mean of a over visual tokens
           c = share of m that the 15 largest positions hold
           text-salient ("tsa") when r > r0 and c < c0, else pivot-salient ("psa")
Source     AKVQ-VL, arXiv 2501.15021: two patterns, told apart by the share of text; the rule with r and c is ours
Shapes     prompts: keyword arguments of the model's forward, with input_ids [B, S]
Exact      sums in float32, averaged over prompts and batch rows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvsink.kernels import observe
from kvsink.model.anatomy import anatomy
from kvsink.model.observed import See, watching
from kvsink.model.offload import place_of
from kvsink.model.rows import visual_rows

__all__ = ["PATTERNS", "attention_patterns", "classify"]

PATTERNS = ("tsa", "psa")
_SINKS, _TOP = 5, 15


def classify(found: tuple[float, float], ratio: float, share: float) -> str:
    """The pattern of a layer from its (r, c) and the thresholds r0, c0."""
    return "tsa" if found[0] > ratio and found[1] < share else "psa"


def attention_patterns(
    model: nn.Module, prompts: Sequence[Mapping[str, Any]], tokens: tuple[int, ...]
) -> list[tuple[float, float]] | None:
    """(r, c) of every layer over the prompts that show visual `tokens`; None when none does."""
    names = anatomy(model).attentions
    device = place_of(model)
    masses: dict[int, Tensor] = {}
    valid = torch.ones(1, 1, dtype=torch.bool)

    def see(layer: int) -> See:
        def look(q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None, scale: float) -> None:
            first = torch.zeros((), dtype=torch.int64, device=q.device)
            masses[layer] = observe(q, k, v, out, mask, first, valid, scale, "mass") / q.shape[1]

        return look

    sums = [[0.0, 0.0] for _ in names]
    rows = 0
    for prompt in prompts:
        inputs = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in prompt.items()}
        visual = visual_rows(inputs["input_ids"], tokens)
        given = inputs.get("attention_mask")
        valid = given.bool() if isinstance(given, Tensor) and given.dim() == 2 else torch.ones_like(visual)
        with torch.no_grad(), watching(model, names, see):
            model(**inputs, use_cache=False)
        queries = valid.flip(1).cumsum(1).flip(1).clamp_min(1)  # that can see a key
        for b in range(len(visual)):
            shown = visual[b] & valid[b]
            text = valid[b] & ~visual[b] & (valid[b].cumsum(0) > _SINKS)
            if not shown.any() or not text.any():
                continue
            rows += 1
            for layer, total in enumerate(sums):
                mass = masses[layer][b]
                mean = mass / queries[b]
                total[0] += float(mean[text].mean() / mean[shown].mean().clamp_min(1e-30))
                total[1] += float(mass.topk(min(_TOP, len(mass))).values.sum() / mass.sum())
    return [(r / rows, c / rows) for r, c in sums] if rows else None
