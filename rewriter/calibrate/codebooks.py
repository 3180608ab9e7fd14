"""Tables that are learnt from samples: codebooks of vectors, and code points with their ranges.

Formula    vector   C = weighted k-means of the runs of c transformed channels, one codebook per head and run (one for all heads
                    when `shared`), of x / rms(x) with a gain
           nuq      Q = weighted one-dimensional k-means of y = (x - o) / r over all entries inside the range, by 4096 bins of
                    equal width, the best of 16 starts; at 2 bits and below Q' = Q·s + t is read, so that what is read has
                    the mean and deviation of y
           static   per channel, the step of least squared error among 48 fractions of its range; rows after RoPE are taken at
                    positions drawn over the whole context, the first 16 at their own. Every text has one row at position 0, most of
                    the attention goes there, and a mean leaves it far outside: among centred values these rows count twice as
                    much as all others together, among keys a quarter as much
           weights  fisher: the sum of the squared gradients of a run (after a rotation: the mean over the head); of nuq, times
                    r^2 unless "fisher-raw".  error: f of the row, mean 1 per window, at most its 99.9 % quantile
Source     CQ, arXiv 2405.03917; AnTKV, arXiv 2506.19505; KVQuant, arXiv 2401.18079 with appendix E
Differs    see the methods
Shapes     x [H, N, D] after the stages before the quantizer; k_book, v_book [H or 1, D/c, 2^b, c]; levels, read [2^b]
Raises     CalibrationError when the record lacks rows or weights
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvsink.calibrate.kmeans import assign, weighted_kmeans
from kvsink.calibrate.record import Calibration
from kvsink.calibrate.statistics import Samples
from kvsink.codecs import Codec, SideSpec
from kvsink.codecs.quantizers import QUANTIZERS, VECTOR_KINDS
from kvsink.errors import CalibrationError, UnsupportedError
from kvsink.kernels.nuq import span
from kvsink.kernels.static import best_steps

__all__ = ["learn", "learn_book", "learn_levels", "learn_steps", "row_weights"]

Turn = Callable[[Tensor, bool], tuple[Tensor, tuple[Tensor, Tensor]]]  # positions [N], spread → positions [N], cos, sin [1, N, R]

_BINS, _STARTS = 4096, 16
_FIRST = {"k": 0.25, "v": 2.0}  # weight of the rows at position 0 against all others, for fixed steps
_EFFORT = {"cpu": (8192, 8), "cuda": (1 << 30, 100)}  # rows at most (never below 4 per centroid) and steps of k-means


def learn(
    side: str,
    spec: SideSpec,
    layer: int,
    record: Calibration,
    tables: dict[str, Tensor],
    device: torch.device,
    turn: Turn | None = None,
) -> dict[str, Tensor]:
    """The learnt tables of one side. tables: those of the stages before the quantizer. turn: keys that are coded after RoPE ask
    it where their rows may stand, and for the angles there."""
    rows = record.samples.get(layer)
    name = "keys" if side == "k" else "values"
    if rows is None:
        raise CalibrationError(f"layer {layer} has no samples in this record; calibrate with this method again")
    need = QUANTIZERS[spec.kind].learns(spec)
    if len(rows) < need:
        raise CalibrationError(
            f"layer {layer}: {len(rows)} sampled rows are fewer than {need} centroids; calibrate on at least {need} tokens "
            "that are not kept exact"
        )
    where = {n: t.to(device) for n, t in tables.items()}
    x = getattr(rows, name).to(device).transpose(0, 1)[None]  # [1, H, N, D]
    if side == "k":
        cos = sin = x.new_empty(1, len(rows), 0)
        positions = rows.positions
        if spec.domain == "post" and turn is not None:
            positions, (cos, sin) = turn(positions, spec.transform != "klt")  # a basis after RoPE is of rows where they stood
        codec = Codec(spec, SideSpec())
        x = codec.transform_keys(x, cos.to(device), sin.to(device), positions.to(device)[None], where, roped=False)[0]
    else:
        x = Codec(SideSpec(), spec).transform_values(x, where)[0]
    weights = row_weights(side, spec, layer, rows)
    weights = None if weights is None else weights.to(device)
    if spec.transform == "grouped" and weights is not None and spec.weights.startswith("fisher"):
        weights = weights @ where[f"{side}_unbasis" if spec.own_inverse else f"{side}_basis"].square()  # by the chain rule
    if spec.kind == "static":
        if weights is None and spec.center:
            weights = _first_rows(side, rows.positions).to(device)
        return {f"{side}_step": learn_steps(x, weights, spec).cpu()}
    if spec.kind in VECTOR_KINDS:
        return {f"{side}_book": learn_book(x, weights, spec).cpu()}
    if spec.kind == "nuq":
        return {n: t.cpu() for n, t in learn_levels(side, x, weights, spec).items()}
    raise UnsupportedError(f"nothing here learns the tables of quantizer {spec.kind!r}; add it to kvsink.calibrate.codebooks.learn")


def row_weights(side: str, spec: SideSpec, layer: int, rows: Samples) -> Tensor | None:
    """Weights [H, N, D] of the entries, or [H, N, 1] where a row has one; None when all count the same."""
    if spec.weights == "none":
        return None
    kind = spec.weights.partition("-")[0]
    found = getattr(rows, f"{'key' if side == 'k' else 'value'}_{kind}")
    if found is None:
        raise CalibrationError(f"layer {layer} has no {kind} weights in this record's samples; calibrate with this method again")
    if kind == "fisher":
        w = found.transpose(0, 1)
        return w.mean(-1, keepdim=True) if spec.transform not in ("none", "grouped") or (side == "k" and spec.block > 1) else w
    return _per_window(found, rows.windows).T[..., None]


def _first_rows(side: str, positions: Tensor) -> Tensor:
    """Weights [1, N, 1] that give the rows at position 0 their share of the whole; all ones where there are none."""
    first = positions == 0
    count = int(first.sum())
    weight = _FIRST[side] * (len(first) - count) / count if count else 1.0
    return torch.where(first, max(weight, 1.0), 1.0)[None, :, None]


def _per_window(f: Tensor, windows: Tensor | None) -> Tensor:
    """Factors [N, H] with mean 1 in each window, clipped at their 99.9 % quantile."""
    out = f.clone()
    windows = torch.zeros(len(f), dtype=torch.int64) if windows is None else windows
    for window in windows.unique():
        inside = windows == window
        part = f[inside] / f[inside].mean(0).clamp_min(1e-30)
        ordered = part.sort(dim=0).values
        out[inside] = torch.minimum(part, ordered[min(len(part) - 1, int(0.999 * len(part)))])
    return out


def learn_book(x: Tensor, w: Tensor | None, spec: SideSpec) -> Tensor:
    """Codebooks [H or 1, D/c, 2^b, c] of rows [H, N, D]; numbers that float16 holds."""
    d = x.shape[-1]
    c, k = spec.couple, 2**spec.code_bits
    x = x.float()
    if spec.gain or spec.kind == "vector-normed":
        size = x.square().mean(-1 if spec.gain else (0, 2), keepdim=True).sqrt().clamp_min(1e-12).expand(len(x), -1, -1)
        x, w = x / size, size.square() if w is None else w * size.square()
    most, steps = _EFFORT["cuda" if x.is_cuda else "cpu"]
    groups = x.unflatten(-1, (-1, c)).transpose(1, 2)  # [H, D/c, N, c]
    weights = None
    if w is not None:
        w = w.expand(-1, -1, d) if w.shape[-1] == 1 else w
        weights = w.unflatten(-1, (-1, c)).sum(-1).transpose(1, 2)  # [H, D/c, N]
    if spec.shared:
        groups = groups.transpose(0, 1).flatten(1, 2)[None]
        weights = None if weights is None else weights.transpose(0, 1).flatten(1, 2)[None]
    most = max(most, 4 * k)
    if (held := groups.shape[2]) > most:
        drawn = torch.randperm(held, generator=torch.Generator().manual_seed(0))[:most].sort().values.to(x.device)
        groups = groups[:, :, drawn]
        weights = None if weights is None else weights[:, :, drawn]
    found = weighted_kmeans(groups.flatten(0, 1), None if weights is None else weights.flatten(0, 1), k, steps)
    book = found.centroids.unflatten(0, groups.shape[:2])
    return book.clamp(-65504.0, 65504.0).half().float()


def learn_steps(x: Tensor, w: Tensor | None, spec: SideSpec) -> Tensor:
    """Steps [H, D] of rows [H, N, D]."""
    most = _EFFORT["cuda" if x.is_cuda else "cpu"][0] // 2
    if (held := x.shape[1]) > most:
        drawn = torch.randperm(held, generator=torch.Generator().manual_seed(0))[:most].sort().values.to(x.device)
        x, w = x[:, drawn], None if w is None else w[:, drawn]
    return best_steps(x, w, spec.widths[0])


def learn_levels(side: str, x: Tensor, w: Tensor | None, spec: SideSpec) -> dict[str, Tensor]:
    """Code points of rows [H, N, D], with the range of every channel for keys."""
    x = x.float()
    if side == "k":
        offset, extent = (t.half().float() for t in span(x.transpose(1, 2), spec.outliers))  # [H, D]
        extent = torch.where(extent > 0, extent, torch.ones_like(extent))
        tables, o, r = {"k_offset": offset, "k_range": extent}, offset[:, None], extent[:, None]
    else:
        middle, half = span(x.transpose(0, 1).flatten(1), spec.outliers)  # [N]
        tables, o, r = {}, middle[None, :, None], half[None, :, None]
    y = ((x - o) / r).flatten()
    w = torch.ones_like(x) if w is None else w.expand_as(x)
    w = (w if spec.weights == "fisher-raw" else w * r.square()).flatten().double()
    inside = y.abs() <= 1.0 + 1e-3
    y, w = y[inside].double().clamp(-1.0, 1.0), w[inside]
    place = ((y + 1.0) * (_BINS / 2)).long().clamp(0, _BINS - 1)
    mass = y.new_zeros(_BINS).index_add_(0, place, w)
    count = torch.bincount(place, minlength=_BINS).double()
    centre = y.new_zeros(_BINS).index_add_(0, place, y) / count.clamp_min(1.0)
    used = count > 0
    k = 2 ** int(spec.bits)
    points, weights = centre[used].float(), mass[used].float()
    if len(points) < k:  # fewer different numbers than code points
        points = torch.cat([points, torch.linspace(-1.0, 1.0, k, device=x.device)])
        weights = torch.cat([weights, torch.zeros(k, device=x.device)])
    starts = (points[None, :, None].expand(_STARTS, -1, -1), weights[None].expand(_STARTS, -1))
    found = weighted_kmeans(*starts, k, steps=300, tolerance=1e-6).centroids  # [starts, 2^b, 1]
    best = (starts[1] * assign(starts[0], found)[1]).sum(-1).argmin()
    levels = found[best].flatten().sort().values.half().float()
    read = levels.clone()
    if spec.bits <= 2:  # rounding shrinks the deviation: give it back
        between = (levels[1:] + levels[:-1]) / 2
        back = levels[torch.bucketize(points, between)].double()
        share = count[used] / count.sum() if len(points) == int(used.sum()) else None
        if share is not None:
            mu1, mu2 = (share * points).sum(), (share * back).sum()
            s1, s2 = ((share * (t - m).square()).sum().sqrt() for t, m in ((points, mu1), (back, mu2)))
            ratio = s1 / s2.clamp_min(1e-12)
            read = (levels * ratio + (mu1 - mu2 * ratio)).half().float()
    return {**tables, f"{side}_levels": levels, f"{side}_read": read.float()}
