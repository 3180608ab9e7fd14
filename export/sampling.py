"""The next token of every row from its logits."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["choose"]


def choose(logits: Any, temperature: float, top_k: int, top_p: float, rng: Any) -> Any:
    """One token id per row of logits [B, V]: the likeliest at temperature 0, else drawn from the top_k (0: all) within top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.astype(np.float64) / temperature
    order = np.argsort(-scores, axis=-1)
    ranked = np.take_along_axis(scores, order, axis=-1)
    share = np.exp(ranked - ranked[:, :1])
    share /= share.sum(-1, keepdims=True)
    before = share.cumsum(-1) - share
    share = np.where((before < top_p) & (np.arange(share.shape[1]) < (top_k or share.shape[1])), share, 0.0)
    share /= share.sum(-1, keepdims=True)
    drawn = (share.cumsum(-1) < rng.random((len(share), 1))).sum(-1)
    return np.take_along_axis(order, np.minimum(drawn, share.shape[1] - 1)[:, None], axis=-1)[:, 0]
