"""Which new rows may stay exact, by what a forward pass shows of them: their number, or the hidden states of a block.

Shapes     hidden [B, S, E], numbers of rows [B or 1, S] → scores float32 [B, n] and their places int64 [B, n] among the new rows
Exact      a score of -inf is no candidate
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvsink.codecs.protect import Segment
from kvsink.kernels import select_sinks
from kvsink.kernels.selection import top_rows
from kvsink.model.frame import Frame

__all__ = ["order_candidates", "passes", "pivot_scores", "position_hash", "rank"]

_FIRST_SCORE = 1e30  # above any activation: rows of `first:N` always win


def pivot_scores(hidden: Tensor, valid: Tensor | None, least: float, ratio: float) -> Tensor:
    """max_c |h_tc| of hidden [B, S, E] where it is above `least` and above `ratio` times the median |h| of its batch row,
    float32 [B, S]; -inf elsewhere and at padding."""
    size = hidden.detach().abs().float()
    counted = size if valid is None else size.masked_fill(~valid[..., None], float("nan"))
    median = counted.flatten(1).nanmedian(dim=1, keepdim=True).values
    score = size.amax(-1)
    passed = (score > least) & (score > ratio * median)
    passed = passed if valid is None else passed & valid
    return score.masked_fill(~passed, float("-inf"))


def passes(written: Tensor, least: float) -> Tensor:
    """Which rows a feed-forward layer wrote more than `least` for, either sign: bool in the shape of `written`."""
    return written.float().abs() > least


def rank(hidden: Tensor, frame: Frame, channels: Tensor, weights: Tensor, count: int, entries: bool) -> tuple[Tensor, Tensor]:
    valid = frame.valid
    if valid is None:
        valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if channels.device != hidden.device:
        channels, weights = channels.to(hidden.device), weights.to(hidden.device)
    return select_sinks(hidden, valid, channels, weights, count, entries)


def order_candidates(frame: Frame, order: Tensor, batch: int, segment: Segment) -> tuple[Tensor, Tensor]:
    """Candidates known by their number among the real rows of their sequence, `order` [B or 1, S]: `first:N` the rows below N,
    `random:N` the N largest hashes. Documents packed in one sequence share its places: those of the first come first."""
    inside = order >= 0
    if segment.source == "first":
        inside = inside & (order < segment.count)
        score = _FIRST_SCORE * (1.0 - order * 1e-6)
    else:
        score = position_hash(order)
    inside = inside.expand(batch, -1)
    if frame.valid is not None:
        inside = inside & frame.valid
    if score.is_cuda and score.shape[1] == 1 and torch.compiler.is_dynamo_compiling():
        # The op's result is one buffer that every layer reads; plain operators would be computed anew for each.
        first = torch.zeros(1, dtype=torch.int64, device=score.device)
        ones = torch.ones(1, device=score.device)
        return select_sinks(score.float().expand(batch, -1)[..., None], inside, first, ones, 1, False)
    score = score.expand(batch, -1).masked_fill(~inside, float("-inf"))
    if score.shape[1] == 1:
        return score.float(), torch.zeros_like(score, dtype=torch.int64)  # nothing to choose from
    return top_rows(score, segment.count)


def position_hash(positions: Tensor) -> Tensor:
    """A fixed pseudo-random number in (0, 1], float32, for every position: the same in every run, layer and batch row."""
    x = (positions.to(torch.int64) + 1) & 0xFFFFFFFF
    for shift, factor in ((16, 0x45D9F3B), (16, 0x45D9F3B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return (((x ^ (x >> 16)) & 0xFFFFFF) + 1).float() / float(1 << 24)
