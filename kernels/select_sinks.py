"""Candidates for the exact side store: the highest-scoring rows of a chunk of hidden states.

Formula    by "channel": score_t = max over the given channels c of |H[t, c]| · weight_c, top `count` tokens
           by "entries": the `count` largest entries of |H| over all tokens and channels, each mapped to its token; a
           token may then appear more than once; of equal scores the earlier row (kernels/selection.py)
Source     "channel": KVSink, arXiv 2508.04257 section 4; "entries": RotateKV, arXiv 2501.16383 (attention-sink-aware)
Differs    runs over chunks: a cache keeps the best of all chunks seen; invalid (padding) rows score -inf
Shapes     hidden [B, S, E], valid bool [B, S], channels int64 [C], weights float32 [C] →
           score float32 [B, n], index int64 [B, n] with n = min(count, S) or min(count, S·E); index counts inside the chunk
Exact      yes
Cost       reads C channels (or all E) of every row once; one launch on a GPU for one new row by channel
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .base import Cost, OpSpec, nbytes, register_op
from .selection import top_rows

__all__ = ["select_sinks", "select_sinks_ref"]


def select_sinks_ref(
    hidden: Tensor, valid: Tensor, channels: Tensor, weights: Tensor, count: int, entries: bool
) -> tuple[Tensor, Tensor]:
    """The definition. `entries` ranks single entries over all channels, else rows by their marked channels."""
    if entries:
        score = hidden.float().abs().masked_fill(~valid[..., None], float("-inf"))
        each = score.topk(min(count, score.shape[2]), dim=2).values  # [B, S, n]: no more of one token can be chosen
        best, flat = top_rows(each.flatten(1), count)
        return best, flat // each.shape[2]
    score = (hidden[..., channels].float().abs() * weights).amax(-1).masked_fill(~valid, float("-inf"))  # [B, S]
    if score.shape[1] == 1:
        return score, torch.zeros_like(score, dtype=torch.int64)  # one new row: nothing to choose from
    return top_rows(score, count)


@torch.library.custom_op("kvsink::select_sinks", mutates_args=())
def select_sinks(
    hidden: Tensor, valid: Tensor, channels: Tensor, weights: Tensor, count: int, entries: bool
) -> tuple[Tensor, Tensor]:
    return select_sinks_ref(hidden, valid, channels, weights, count, entries)


@cache
def _row_kernel() -> Any:
    """The Triton kernel for one new row per sequence: its score and a zero, one program per sequence."""
    import triton
    import triton.language as tl

    @triton.jit
    def _select_sinks_kernel(
        hidden_ptr, valid_ptr, channels_ptr, weights_ptr, score_ptr, index_ptr, row, valid_row, C, BLOCK: tl.constexpr
    ):
        b = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, BLOCK)
        inside = c < C
        channel = tl.load(channels_ptr + c, mask=inside, other=0)
        weight = tl.load(weights_ptr + c, mask=inside, other=0.0)
        h = tl.abs(tl.load(hidden_ptr + b * row + channel, mask=inside, other=0.0).to(tl.float32)) * weight  # [BLOCK]
        score = tl.max(tl.where(inside, h, float("-inf")), 0)
        score = tl.where(tl.sum((h != h).to(tl.int32), 0) > 0, float("nan"), score)
        score = tl.where(tl.load(valid_ptr + b * valid_row) != 0, score, float("-inf"))
        tl.store(score_ptr + b, score)
        tl.store(index_ptr + b, 0)

    return _select_sinks_kernel


def launch_row(hidden: Tensor, valid: Tensor, channels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`select_sinks` of one new row per sequence by marked channels, in one launch."""
    b = hidden.shape[0]
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    score = torch.empty(b, 1, dtype=torch.float32, device=hidden.device)
    index = torch.empty(b, 1, dtype=torch.int64, device=hidden.device)
    count = channels.numel()
    block = 1 << max(0, count - 1).bit_length()
    _row_kernel()[(b,)](
        hidden, valid.view(torch.uint8), channels, weights, score, index, hidden.stride(0), valid.stride(0), count, BLOCK=block
    )
    return score, index


@select_sinks.register_kernel("cuda")
def _on_gpu(hidden: Tensor, valid: Tensor, channels: Tensor, weights: Tensor, count: int, entries: bool) -> tuple[Tensor, Tensor]:
    one_row = hidden.shape[1] == 1 and not entries and hidden.dtype != torch.float64
    if one_row and importlib.util.find_spec("triton") is not None:
        return launch_row(hidden, valid, channels, weights)
    return select_sinks_ref(hidden, valid, channels, weights, count, entries)


@select_sinks.register_fake
def _outputs(hidden: Tensor, valid: Tensor, channels: Tensor, weights: Tensor, count: int, entries: bool) -> tuple[Tensor, Tensor]:
    rows = hidden.shape[1] * (hidden.shape[2] if entries else 1)
    n = torch.sym_min(count, rows)
    return hidden.new_empty((hidden.shape[0], n), dtype=torch.float32), hidden.new_empty((hidden.shape[0], n), dtype=torch.int64)


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
            hidden=torch.randn(2, 9, 16, generator=g),
            valid=valid,
            channels=torch.tensor([3, 7]),
            weights=torch.tensor([1.0, 0.5]),
            count=count,
            entries=entries,
        )

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
