"""Candidates for the exact side store: the highest-scoring rows of a chunk of hidden states.

Formula    by "channel": score_t = max over the given channels c of |H[t, c]| · weight_c, top `count` tokens
           by "entries": the `count` largest entries of |H| over all tokens and channels, each mapped to its token; a
           token may then appear more than once
Source     "channel": KVSink, arXiv 2508.04257 section 4; "entries": RotateKV, arXiv 2501.16383 (attention-sink-aware)
Differs    runs over chunks: a cache keeps the best of all chunks seen; invalid (padding) rows score -inf
Shapes     hidden [B, S, E], valid bool [B, S], channels int64 [C], weights float32 [C] →
           score float32 [B, n], index int64 [B, n] with n = min(count, S) or min(count, S·E); index counts inside the chunk
Exact      yes
Cost       reads C channels (or all E) of every row once
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Cost, OpSpec, nbytes, register_op

__all__ = ["select_sinks", "select_sinks_ref"]


def select_sinks_ref(
    hidden: Tensor, valid: Tensor, channels: Tensor, weights: Tensor, count: int, entries: bool
) -> tuple[Tensor, Tensor]:
    """The definition. `entries` ranks single entries over all channels, else rows by their marked channels."""
    if entries:
        score = hidden.float().abs().masked_fill(~valid[..., None], float("-inf")).flatten(1)  # [B, S·E]
        best, flat = score.topk(min(count, score.shape[1]), dim=1)
        return best, flat // hidden.shape[-1]
    score = (hidden[..., channels].float().abs() * weights).amax(-1).masked_fill(~valid, float("-inf"))  # [B, S]
    if score.shape[1] == 1:
        return score, torch.zeros_like(score, dtype=torch.int64)  # one new row: nothing to choose from
    best, index = score.topk(min(count, score.shape[1]), dim=1)
    return best, index


@torch.library.custom_op("kvsink::select_sinks", mutates_args=())
def select_sinks(
    hidden: Tensor, valid: Tensor, channels: Tensor, weights: Tensor, count: int, entries: bool
) -> tuple[Tensor, Tensor]:
    return select_sinks_ref(hidden, valid, channels, weights, count, entries)


@select_sinks.register_fake
def _outputs(
    hidden: Tensor, valid: Tensor, channels: Tensor, weights: Tensor, count: int, entries: bool
) -> tuple[Tensor, Tensor]:
    rows = hidden.shape[1] * (hidden.shape[2] if entries else 1)
    n = torch.sym_min(count, rows)
    return hidden.new_empty((hidden.shape[0], n), dtype=torch.float32), hidden.new_empty(
        (hidden.shape[0], n), dtype=torch.int64
    )


def _cost(**a: Any) -> Cost:
    hidden, tokens = a["hidden"], a["valid"].numel()
    scored = tokens * (hidden.shape[2] if a["entries"] else a["channels"].numel())
    kept = hidden.shape[0] * min(a["count"], hidden.shape[1] * (hidden.shape[2] if a["entries"] else 1))
    return Cost(flops=2 * scored, read=nbytes(a["valid"]) + scored * hidden.element_size(), written=12 * kept)


def _example(entries: bool, count: int):
    def make(g: torch.Generator) -> dict[str, object]:
        valid = torch.ones(2, 9, dtype=torch.bool)
        valid[1, :3] = False
        return dict(
            hidden=torch.randn(2, 9, 16, generator=g), valid=valid, channels=torch.tensor([3, 7]),
            weights=torch.tensor([1.0, 0.5]), count=count, entries=entries,
        )  # fmt: skip

    return make


SPEC = register_op(
    OpSpec(
        name="select_sinks",
        op=select_sinks,
        ref=select_sinks_ref,
        cost=_cost,
        examples=(_example(False, 5), _example(True, 20), _example(False, 50)),
    )
)
