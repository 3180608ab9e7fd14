"""Every tolerance of the tests, by name and with its reason; none depends on the machine."""

from __future__ import annotations

from typing import Any

import torch

EXACT_FLOAT64 = 1e-12
"""Exact rewrites of float64 models: a few hundred roundings of 1.1e-16 on numbers of order one."""

SOFTMAX_IN_FLOAT32 = 2e-6
"""Same sums, another order, in float32: two layers of at most 64 terms, 2**-24 each, on logits of order one. Eager
models take their softmax in float32 even when the rest is float64, so this is their bound in float64 too."""

FUSED_FLOAT32 = 1e-5
"""Fused attention against its parts: softmax and sums in float32 in another order, relative to the largest value."""

HALF_SCALE = 2.0**-11
"""One float16 scale that rounds the other way after float32 sums in another order, relative to the largest value."""


def largest_difference(left: Any, right: Any) -> float:
    """max |left - right| over all tensors of two equal structures; infinite when their shapes differ."""
    worst = 0.0
    a, b = (torch.utils._pytree.tree_leaves(side) for side in (left, right))
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor):
            if x.shape != y.shape:
                return float("inf")
            if x.numel():
                both = x.double() - y.double()
                worst = max(worst, float(both.masked_fill(x == y, 0.0).abs().max()))  # equal infinities differ by nothing
    return worst
