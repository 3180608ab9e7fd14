"""Anchors come and go: rows that leave the recent window compete with the anchors held, by the attention they received.

Formula    budget m = rows, or ceil(share · t) at t tokens;  anchors = the m best of (anchors held ∪ rows that leave) by score,
           or by score / (t - slot), the mean over the queries that could see the row
           before a chunk is stored    `release_`: the rows it pushes out of the window compete with the scores they have
           after its attention         `settle_`: every held score grows by what the chunk gave, the new rows of the window
                                       begin with theirs, and new rows that do not fit the window compete at once
Source     AnTKV, arXiv 2506.19505 (budget and window); the schedule over chunks is ours
Differs    scores of anchors go on growing while they are held; a row that a protection segment holds is not taken twice
Shapes     k, v [B, H, S, D] the new rows, k after RoPE; scores float32 [B, L] from `kvsink::observe`; valid bool [B, S] or
           None; total int64 [], t with the chunk counted in; state: exact_k, exact_v, exact_slot, exact_score, recent_k,
           recent_v, recent_slot, recent_score
           the window is the ring of recent rows, which codecs that work on blocks of tokens make longer
Exact      yes: the rows kept are the rows
Cost       reads the places of the anchors and min(S, W) rows of the window
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import resolve_codec
from .selection import merge_exact, top_rows

__all__ = ["release_", "release_ref", "settle_", "settle_ref"]

_NEVER = float("-inf")


def _compete(k: Tensor, v: Tensor, score: Tensor, start: Tensor, total: Tensor, state: Sequence[Tensor], c: Any) -> None:
    """Rows k, v [B, H, n, D] of the slots start … start + n - 1 with score [B, n], -inf where a row may not be taken."""
    exact_k, exact_v, exact_slot, exact_score = state[:4]
    fixed, places = c.exact_rows, exact_slot.shape[1] - c.exact_rows
    slots = start + torch.arange(k.shape[2], device=k.device)
    held = exact_slot[:, :fixed].to(torch.int64)
    held = torch.where(held < -1, -held - 2, held)
    score = score.masked_fill((held[:, :, None] == slots).any(1), _NEVER)
    old_slot, old_score = exact_slot[:, fixed:], exact_score[:, fixed:]
    if c.anchors.normalize:
        score, old_score = score / (total - slots), old_score / (total - old_slot)
    best, index = top_rows(score, places)
    slot, rank, new_k, new_v = merge_exact(
        old_slot, old_score, (exact_k[:, :, fixed:], exact_v[:, :, fixed:]), (k, v), (best, index), (places,), start
    )
    budget = c.anchors.rows or (total * c.anchors.ppm + 999_999) // 1_000_000
    kept = (torch.arange(places, device=k.device) < budget) & (rank > _NEVER)
    score = rank * (total - slot) if c.anchors.normalize else rank
    exact_slot[:, fixed:] = torch.where(kept, slot, -1)
    exact_score[:, fixed:] = torch.where(kept, score, _NEVER).to(exact_score.dtype)
    exact_k[:, :, fixed:] = new_k
    exact_v[:, :, fixed:] = new_v


def release_ref(new: int, total: Tensor, state: Sequence[Tensor], codec: str) -> None:
    """The definition: `new` rows are about to be stored as slots total - new … total - 1."""
    c = resolve_codec(codec)
    recent_k, recent_v, recent_slot, recent_score = state[4:]
    leave = min(new, c.ring)
    if leave == 0:
        return
    slots = total - new - c.ring + torch.arange(leave, device=total.device)
    place = slots % c.ring
    gone = (slots < 0) | (recent_slot[place] != slots)
    score = recent_score[:, place].masked_fill(gone, _NEVER)
    _compete(recent_k.index_select(2, place), recent_v.index_select(2, place), score, slots[0], total, state, c)


def settle_ref(
    k: Tensor, v: Tensor, scores: Tensor, valid: Tensor | None, total: Tensor, state: Sequence[Tensor], codec: str
) -> None:
    """The definition: the chunk k, v is stored and has been attended to."""
    c = resolve_codec(codec)
    exact_slot, exact_score, recent_score = state[2], state[3], state[7]
    s, fixed, window = k.shape[2], c.exact_rows, c.ring
    first = total - s
    slot = exact_slot[:, fixed:].to(torch.int64)
    exact_score[:, fixed:] += torch.where(slot >= 0, scores.gather(1, slot.clamp_min(0)), 0.0)
    own = scores.index_select(1, first + torch.arange(s, device=k.device))
    own = own if valid is None else own.masked_fill(~valid, _NEVER)
    if window:
        slots = total - window + torch.arange(window, device=k.device)
        place = slots % window
        grown = recent_score[:, place] + scores.index_select(1, slots.clamp_min(0))
        begun = own.index_select(1, (slots - first).clamp_min(0))
        grown = torch.where(slots >= first, begun, grown)
        recent_score[:, place] = torch.where(slots >= 0, grown, _NEVER)
    if s > window:
        n = s - window
        _compete(k[:, :, :n], v[:, :, :n], own[:, :n], first, total, state, c)


@torch.library.custom_op("kvsink::release_", mutates_args=("state",))
def release_(new: int, total: Tensor, state: Sequence[Tensor], codec: str) -> None:
    release_ref(new, total, state, codec)


@release_.register_fake
def _release_outputs(new: int, total: Tensor, state: Sequence[Tensor], codec: str) -> None:
    return None


@torch.library.custom_op("kvsink::settle_", mutates_args=("state",))
def settle_(k: Tensor, v: Tensor, scores: Tensor, valid: Tensor | None, total: Tensor, state: Sequence[Tensor], codec: str) -> None:
    settle_ref(k, v, scores, valid, total, state, codec)


@settle_.register_fake
def _settle_outputs(
    k: Tensor, v: Tensor, scores: Tensor, valid: Tensor | None, total: Tensor, state: Sequence[Tensor], codec: str
) -> None:
    return None
