"""How well the predictor finds what attention calls sinks, and what is special about their keys and values.

Formula    truth: the 5 tokens of a window with the most attention, summed over heads, queries and the stage's layers
           recall = |predicted K and truth| / 5;  precision = |predicted K and truth| / K
           crest of X = max |X| / rms(X)
Source     KVSink, arXiv 2508.04257 section 4 (predictor and Preserve-First-N)
Shapes     mass [N, L, Hq, T]; keys, values [H, T, D] of one layer and window
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvsink.kernels import hadamard
from kvsink.kernels.hadamard import hadamard_core
from kvsink.kernels.rope import unrope
from kvsink.profiling.hidden import Hidden, StageLife

__all__ = ["KVRanges", "predictor_rows", "truth"]

TRUE = 5


def truth(mass: Tensor, layers: range, count: int = TRUE) -> Tensor:
    """Positions [N, count] that received the most attention in `layers`, best first."""
    return mass[:, layers.start : layers.stop].sum((1, 2)).topk(min(count, mass.shape[-1]), dim=-1).indices


def predictor_rows(life: StageLife, hidden: Hidden, mass: Tensor, layers: range) -> list[dict[str, Any]]:
    """Recall and precision of the predictor and of the first N tokens for K = 1, 5, 20, over all windows."""
    score = hidden.of_channel(life.stage.channels[0])[life.stage.block].abs()  # [N, T]
    wanted = truth(mass, layers)
    rows = []
    for k in (1, 5, 20):
        k = min(k, score.shape[1])
        first = torch.arange(k).expand(len(score), k)
        row: dict[str, Any] = {"k": k}
        for name, chosen in (("kvsink", score.topk(k, dim=-1).indices), ("first", first)):
            hits = (chosen[:, :, None] == wanted[:, None]).any(-1).sum(-1).double()
            row[name] = {"recall": float((hits / wanted.shape[1]).mean()), "precision": float((hits / k).mean())}
        rows.append(row)
    return rows


class KVRanges:
    """Ranges of one layer's keys and values before and after each rotation, and norms of sinks against the rest."""

    def __init__(self) -> None:
        self.peak: dict[str, float] = {}
        self.squares: dict[str, float] = {}
        self.count: dict[str, int] = {}
        self.norms: dict[str, list[float]] = {}

    def add(self, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, sinks: Tensor) -> None:
        """One window: keys after RoPE and values [H, T, D]; positions of the sinks."""
        k, v = k.float(), v.float()
        forms = {"key": k, "value": v}
        if cos is not None and sin is not None and cos.shape[-1]:
            forms["key before RoPE"] = unrope(k[None], cos[:, None], sin[:, None])[0]
        for name, x in list(forms.items()):
            try:
                hadamard_core(x.shape[-1])
            except ValueError:
                continue
            forms[f"{name}, Hadamard"] = hadamard(x.contiguous(), x.shape[-1], False)
        for name, x in forms.items():
            self.peak[name] = max(self.peak.get(name, 0.0), float(x.abs().max()))
            self.squares[name] = self.squares.get(name, 0.0) + float(x.square().sum())
            self.count[name] = self.count.get(name, 0) + x.numel()
        rest = torch.ones(k.shape[1], dtype=torch.bool)
        rest[sinks] = False
        for name, x in (("key", k), ("value", v)):
            norm = x.norm(dim=-1).cpu()  # [H, T]
            self.norms.setdefault(f"{name} sinks", []).append(float(norm[:, ~rest].mean()))
            self.norms.setdefault(f"{name} rest", []).append(float(norm[:, rest].mean()))

    def rows(self) -> dict[str, dict[str, float]]:
        """Largest magnitude, rms and crest by form."""
        out = {}
        for name, peak in self.peak.items():
            rms = (self.squares[name] / self.count[name]) ** 0.5
            out[name] = {"largest": peak, "rms": rms, "crest": peak / rms if rms else 0.0}
        return out

    def mean_norms(self) -> dict[str, float]:
        return {name: sum(x) / len(x) for name, x in self.norms.items()}
