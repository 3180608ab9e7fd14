"""The ops of an exported graph that no kernel file has: pure functions of tensors, each of which becomes one ONNX node.

The others (hadamard, quantize, dequantize, encode, decode, select_sinks) are those of `kvsink.kernels`. A codec runs its stages
through `Steps`, so that rotations and reorderings are nodes and not a dozen reshapes.

Shapes     k, v [B, H, S, D] new rows, from slot `first` int64 [B] on; C slots of a cache; exact rows [B, H, E, D] at slot int32
           [B, E] with score float32 [B, E]
Exact      yes, all of them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvsink.kernels import hadamard, stages
from kvsink.kernels.base import resolve_codec
from kvsink.kernels.selection import merge_exact, top_rows

__all__ = [
    "Steps",
    "attend",
    "attend_packed",
    "center_roped",
    "channel_reorder",
    "first_rows",
    "lay_rows",
    "mean_rows",
    "preserve_sinks",
    "rotate_block",
    "undo_rope",
    "write_rows",
]

FIRST_SCORE = 1e30  # above any activation, as in `kvsink.model.candidates`


@torch.library.custom_op("kvsink_export::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q k^T + mask) v, query heads of a group side by side: q [B, Hq, S, D], k, v [B, H, C, D].

    Rows of k and v behind the last column of the mask are room that nothing reads.
    """
    groups, length = q.shape[1] // k.shape[1], k.shape[2] if mask is None else mask.shape[-1]
    k, v = (x[:, :, :length].repeat_interleave(groups, dim=1) for x in (k, v))
    causal = mask is None and q.shape[2] > 1
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, is_causal=causal)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


@torch.library.custom_op("kvsink_export::attend_packed", mutates_args=())
def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    codes: Sequence[Tensor],
    exact: Sequence[Tensor],
    params: Sequence[Tensor],
    scale: float,
    codec: str,
) -> Tensor:
    """`attend` over what a packed cache stands for, with the exact rows and the new ones in their places.

    mask [B, 1, S, total]: the new rows are its last ones. positions [B, C] and codes (of keys, their scale, of values, their
    scale) of C slots; exact: keys, values and slots of the rows kept exact, or nothing; params in the order of the codec's names.
    """
    assert mask is not None
    c = resolve_codec(codec)
    p = c.tables(params)
    keys = c.decode_keys(codes[0], codes[1], positions, p).to(k.dtype)
    values = c.decode_values(codes[2], codes[3], p).to(v.dtype)
    first = torch.full((q.shape[0],), mask.shape[-1] - k.shape[2])
    at = list(exact[2:])
    keys, values = lay_rows(keys, k, first, [*exact[:1], *at]), lay_rows(values, v, first, [*exact[1:2], *at])
    return attend(q, keys, values, mask, scale)


@attend_packed.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    codes: Sequence[Tensor],
    exact: Sequence[Tensor],
    params: Sequence[Tensor],
    scale: float,
    codec: str,
) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


@torch.library.custom_op("kvsink_export::channel_reorder", mutates_args=())
def channel_reorder(x: Tensor, permutation: Tensor) -> Tensor:
    """The H·D channels of all heads together: y[..., i] = x[..., permutation[i]]."""
    return stages.reorder_heads(x, permutation).contiguous()


@channel_reorder.register_fake
def _(x: Tensor, permutation: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("kvsink_export::first_rows", mutates_args=())
def first_rows(positions: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Candidates of `first:N`: rows of the chunk whose position is below `count`, as score and index [B, min(count, S)]."""
    inside = (positions >= 0) & (positions < count) & valid
    score = torch.where(inside, FIRST_SCORE * (1.0 - positions * 1e-6), float("-inf"))
    return top_rows(score, count)


@first_rows.register_fake
def _(positions: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    shape = valid.shape[0], torch.sym_min(count, valid.shape[1])
    return valid.new_empty(shape, dtype=torch.float32), valid.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("kvsink_export::preserve_sinks", mutates_args=())
def preserve_sinks(
    slot: Tensor,
    score: Tensor,
    exact_k: Tensor,
    exact_v: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    candidates: Sequence[Tensor],
    segments: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kvsink.kernels.selection.merge_exact`; the chunk begins at slot `first`."""
    return merge_exact(slot, score, (exact_k, exact_v), (k, v), candidates, segments, first[:, None])


@preserve_sinks.register_fake
def _(
    slot: Tensor,
    score: Tensor,
    exact_k: Tensor,
    exact_v: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    candidates: Sequence[Tensor],
    segments: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(slot), torch.empty_like(score), torch.empty_like(exact_k), torch.empty_like(exact_v)


@torch.library.custom_op("kvsink_export::write_rows", mutates_args=())
def write_rows(past: Tensor, new: Tensor, first: Tensor) -> Tensor:
    """`past` with new rows from slot `first` on: ONNX's TensorScatter, which writes in place where a runtime lets it.

    past [B, H, C, n] or [B, C], new with S rows in place of C.
    """
    axis = min(2, past.dim() - 1)
    at = first[:, None] + torch.arange(new.shape[axis])
    index = at.view(at.shape[0], *[1] * (axis - 1), at.shape[1], *[1] * (past.dim() - 1 - axis)).expand(new.shape)
    return past.scatter(axis, index, new)


@write_rows.register_fake
def _(past: Tensor, new: Tensor, first: Tensor) -> Tensor:
    return torch.empty_like(past)


@torch.library.custom_op("kvsink_export::lay_rows", mutates_args=())
def lay_rows(rows: Tensor, new: Tensor, first: Tensor, exact: Sequence[Tensor]) -> Tensor:
    """Decoded rows [B, H, C, D] with the new ones as they came in their places, and before them the rows kept exact.

    exact: rows and their slots, or nothing. An empty place rewrites the first new row with itself; exact rows of the new chunk
    are the new rows.
    """
    full = write_rows(rows, new, first)
    if not exact:
        return full
    kept, slot = exact
    old = (slot >= 0) & (slot < first[:, None])
    index = torch.where(old, slot, first[:, None]).long()[:, None, :, None].expand(kept.shape)
    return full.scatter(2, index, torch.where(old[:, None, :, None], kept, new[:, :, :1]))


@lay_rows.register_fake
def _(rows: Tensor, new: Tensor, first: Tensor, exact: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(rows)


@torch.library.custom_op("kvsink_export::rotate_block", mutates_args=())
def rotate_block(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, block: int, start: bool) -> Tensor:
    """`rope_offset` (angles of the offset inside a block) or, with `start`, `rope_start` (angles of the block's first token)."""
    step = stages.rope_start if start else stages.rope_offset
    return step(x, cos, sin, positions.long(), block)


@rotate_block.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, block: int, start: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("kvsink_export::undo_rope", mutates_args=())
def undo_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`unrope_rows`: keys before RoPE, by the angles [B or 1, S, R] of the rows themselves."""
    return stages.unrope_rows(x, cos, sin)


@undo_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("kvsink_export::mean_rows", mutates_args=())
def mean_rows(table: Tensor, positions: Tensor) -> Tensor:
    """`table_rows`: rows of a [H, n, D] table at position mod n → [B, H, S, D]."""
    return stages.table_rows(table, positions.long()).contiguous()


@mean_rows.register_fake
def _(table: Tensor, positions: Tensor) -> Tensor:
    return table.new_empty((positions.shape[0], table.shape[0], positions.shape[1], table.shape[2]))


@torch.library.custom_op("kvsink_export::center_roped", mutates_args=())
def center_roped(x: Tensor, mean: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R_j k - R_j mu for keys that carry RoPE already."""
    return stages.center_roped(x, mean, cos, sin)


@center_roped.register_fake
def _(x: Tensor, mean: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


class Steps:
    """The stages of a codec, by the names of `kvsink.kernels.stages`, as they enter an exported graph."""

    add = staticmethod(stages.add)
    row_of = staticmethod(stages.row_of)
    center = staticmethod(stages.center)
    project = staticmethod(stages.project)
    unproject = staticmethod(stages.unproject)
    table_rows: Any = staticmethod(mean_rows)
    reorder_heads: Any = staticmethod(channel_reorder)

    @staticmethod
    def center_roped(x: Tensor, mean: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return center_roped(x, mean, cos, sin) if cos.shape[-1] else stages.center(x, mean)

    @staticmethod
    def unrope_rows(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return undo_rope(x, cos, sin) if cos.shape[-1] else x

    @staticmethod
    def rope_offset(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, block: int) -> Tensor:
        return rotate_block(x, cos, sin, positions, block, False) if cos.shape[-1] else x

    @staticmethod
    def rope_start(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, block: int) -> Tensor:
        return rotate_block(x, cos, sin, positions, block, True) if cos.shape[-1] else x

    @staticmethod
    def hadamard_heads(x: Tensor, order: int, heads_per_group: int = 1, inverse: bool = False) -> Tensor:
        """`kvsink::hadamard` over one head, or over neighbouring heads laid side by side."""
        if heads_per_group == 1:
            return hadamard(x, order, inverse)
        heads, dim = x.shape[1], x.shape[3]
        flat = hadamard(x.transpose(1, 2).flatten(2), order, inverse)
        return flat.unflatten(2, (heads, dim)).transpose(1, 2)
