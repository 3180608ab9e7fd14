"""Which rows stay exact: one rule for every place that chooses rows by score.

Formula    per protection segment the best `capacity` of (rows that are exact ∪ candidates) stay, in this order: the higher score
           first; among equal scores the row of the earlier slot; empty places (slot -1, score -inf) last. So a new row enters
           only if its score is strictly above one that is held, and of the rows held with the lowest score the one of the
           latest slot leaves. Where a row stands among the places decides nothing. -inf and what is no number never enter
           a row named by several candidates is held once (the other places are marked as -(slot + 2))
Source     KVSink, arXiv 2508.04257 section 4 (side store of sinks); the running selection over chunks and the rule are ours
Differs    the C, Triton and CUDA forms and the ONNX nodes keep the same rows, each in places of its own order
Shapes     score float32 [B, N], slot int64 [B, N]; rows [B, H, E, D], chunk [B, H, S, D]
Exact      yes
Cost       one top-k of 64-bit numbers per segment; copies the rows of E places
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["merge_exact", "precedence", "top_rows"]

NEVER = float("-inf")


def _numbers(score: Tensor) -> Tensor:
    """Scores as float32, -inf for what is no number."""
    score = score.float()
    return score.masked_fill(~(score > NEVER), NEVER)


def precedence(score: Tensor, slot: Tensor) -> Tensor:
    """The rule as one int64 per row: larger goes before smaller. Equal only for one row at one score.

    score float32 without NaN, slot below 2**31, of shapes that broadcast. The bits of a float32, turned round where it is
    negative, order as the number does; they stand above the slot.
    """
    bits = (score + 0.0).view(torch.int32)  # -0.0 and 0.0 are one score
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.to(torch.int64) * (1 << 32) - slot


def top_rows(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Candidates of a chunk: the best min(count, S) of its rows by score [B, S], best first → score float32, index int64."""
    score = _numbers(score)
    place = torch.arange(score.shape[1], device=score.device)
    order = precedence(score, place).topk(min(count, score.shape[1]), dim=1).indices
    return score.gather(1, order), order


def merge_exact(
    slot: Tensor,
    score: Tensor,
    rows: tuple[Tensor, Tensor],
    chunk: tuple[Tensor, Tensor],
    candidates: Sequence[Tensor],
    segments: Sequence[int],
    first: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The running selection: stored rows [B, E] against the candidates of a chunk that begins at slot `first`.

    rows are the stored exact keys and values [B, H, E, D], chunk the new ones [B, H, S, D]; candidates are pairs of score
    [B, n] and index into the chunk, one pair per segment. Returns the new slot [B, E], score [B, E], exact keys and values,
    the rows of every segment in the order of the rule.
    """
    out_slot: list[Tensor] = []
    out_score: list[Tensor] = []
    out_k: list[Tensor] = []
    out_v: list[Tensor] = []
    at = 0
    for i, capacity in enumerate(segments):
        part = slice(at, at + capacity)
        at += capacity
        new_score, new_index = candidates[2 * i], candidates[2 * i + 1]
        held = slot[:, part].to(torch.int64)
        held = torch.where(held < -1, -held - 2, held)  # a place marked as a repeat still names its row
        every_score = _numbers(torch.cat([score[:, part], new_score], dim=1))
        every_slot = torch.cat([held, new_index + first], dim=1)
        order = precedence(every_score, every_slot).topk(capacity, dim=1).indices
        best = every_score.gather(1, order)
        chosen = every_slot.gather(1, order).masked_fill(best == NEVER, -1)
        for stored, new, out in ((rows[0], chunk[0], out_k), (rows[1], chunk[1], out_v)):
            wide = new_index[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
            pool = torch.cat([stored[:, :, part], new.gather(2, wide).to(stored.dtype)], dim=2)
            out.append(pool.gather(2, order[:, None, :, None].expand(-1, pool.shape[1], -1, pool.shape[3])))
        out_slot.append(chosen)
        out_score.append(best)
    merged = torch.cat(out_slot, dim=1)
    place = torch.arange(merged.shape[1], device=merged.device)
    earlier = place[:, None] > place
    repeat = ((merged[:, :, None] == merged[:, None, :]) & earlier).any(-1) & (merged >= 0)
    merged = torch.where(repeat, -merged - 2, merged)
    return merged.to(slot.dtype), torch.cat(out_score, dim=1), torch.cat(out_k, dim=2), torch.cat(out_v, dim=2)
