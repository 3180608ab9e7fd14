"""Weighted k-means over many groups at once: the codebooks of vector quantizers, and levels where a vector has one entry.

Formula    min_C sum_j w_j min_k ||x_j - C_k||^2 for each group: assignment by plain distance, C_k the weighted mean of its rows
           seeding: rows are drawn with probability w_j · (squared distance to the nearest seed so far); up to k / 64 of them
           between two updates of that distance; a cluster without weight moves to the row with the largest w_j·distance
Source     Lloyd 1957; k-means++ seeding, Arthur and Vassilvitskii 2007; weights as in CQ (arXiv 2405.03917) and AnTKV
           (arXiv 2506.19505)
Differs    several seeds between two updates; seeding looks at 8·k rows at most
Shapes     x [G, N, c], w [G, N] or None → C [G, k, c], float32
Exact      deterministic on one device for one seed; the objective never rises from one step to the next
Cost       2·G·N·k·c flops per step, in chunks of `_CHUNK` distances
Raises     ValueError for fewer rows than clusters
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["KMeans", "assign", "weighted_kmeans"]

_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 28}  # distances held at once


@dataclass
class KMeans:
    """Centroids [G, k, c] and the objective, weighted mean squared distance over all groups, before each step and at the end."""

    centroids: Tensor
    objective: list[float] = field(default_factory=list)


def assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every row: index int64 [G, N] and squared distance [G, N]."""
    g, n, _ = x.shape
    k = centroids.shape[1]
    half = -0.5 * centroids.square().sum(-1)  # [G, k]: x·C - |C|^2 / 2 is largest where the distance is smallest
    index = torch.empty(g, n, dtype=torch.int64, device=x.device)
    near = torch.empty(g, n, dtype=x.dtype, device=x.device)
    rows = max(1, _CHUNK[x.device.type if x.device.type in _CHUNK else "cpu"] // (g * k))
    for at in range(0, n, rows):
        part = torch.baddbmm(half[:, None], x[:, at : at + rows], centroids.mT)
        near[:, at : at + rows], index[:, at : at + rows] = part.max(-1)
    return index, (x.square().sum(-1) - 2 * near).clamp_min_(0.0)


def _seed(x: Tensor, w: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k rows of every group, drawn by weight and distance."""
    g, n, c = x.shape
    most = 8 * k
    if n > most:
        drawn = torch.randperm(n, generator=generator, device=x.device)[:most]
        x, w, n = x[:, drawn], w[:, drawn], most
    seeds = x.new_empty(g, k, c)
    far = torch.ones_like(w)
    at = 0
    while at < k:
        take = 1 if at == 0 else min(max(1, k // 64), k - at)
        chance = (w * far).double()
        chance = chance + 1e-12 * chance.amax(-1, keepdim=True) + 1e-30  # rows without weight only when nothing else is left
        key = -torch.rand(g, n, generator=generator, dtype=torch.float64, device=x.device).clamp_min(1e-300).log() / chance
        picked = key.topk(take, dim=-1, largest=False).indices  # the first of n exponential clocks: a draw without repeats
        new = x.gather(1, picked[..., None].expand(-1, -1, c))
        seeds[:, at : at + take] = new
        near = assign(x, new)[1]
        far = near if at == 0 else torch.minimum(far, near)
        at += take
    return seeds


def weighted_kmeans(x: Tensor, w: Tensor | None, k: int, steps: int = 100, tolerance: float = 1e-4, seed: int = 0) -> KMeans:
    """Cluster every group of x [G, N, c] into k; stops when the objective falls by less than `tolerance` of itself."""
    g, n, c = x.shape
    if n < k:
        raise ValueError(f"{n} rows are fewer than {k} clusters; give at least {k}")
    x = x.float()
    w = torch.ones(g, n, device=x.device) if w is None else w.float()
    w = w / w.mean(-1, keepdim=True).clamp_min(1e-30)
    centroids = _seed(x, w, k, torch.Generator(x.device).manual_seed(seed))
    out = KMeans(centroids)
    weighted = w[..., None] * x
    for step in range(steps + 1):
        index, distance = assign(x, centroids)
        error = w * distance
        out.objective.append(float(error.mean()))
        held = out.objective
        if step == steps or (step and held[-2] - held[-1] <= tolerance * held[-2]):
            break
        mass = x.new_zeros(g, k).scatter_add_(1, index, w)
        total = x.new_zeros(g, k, c).scatter_add_(1, index[..., None].expand(-1, -1, c), weighted)
        empty = mass <= 0
        centroids = torch.where(empty[..., None], centroids, total / mass.clamp_min(1e-30)[..., None])
        if (lost := int(empty.sum(-1).max())) > 0:
            worst = error.topk(min(lost, n), dim=-1).indices  # [G, lost]
            rank = (empty.long().cumsum(-1) - 1).clamp(0, worst.shape[1] - 1)
            new = x.gather(1, worst.gather(1, rank)[..., None].expand(-1, -1, c))
            centroids = torch.where(empty[..., None], new, centroids)
    out.centroids = centroids
    return out
