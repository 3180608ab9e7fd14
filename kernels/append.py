"""New rows enter the cache of one layer: coded, packed and stored in place, with the best rows kept exact beside them.

Formula    slots = length .. length + S - 1
           codes[slots], scale[slots] = encode(k), encode(v);  recent[slot mod W] = last W rows, unchanged
           per protection segment: the best `capacity` of (stored rows ∪ candidates) by score stay exact, as
           `kvsink.kernels.selection` says
           a side that is coded by blocks of R tokens: every block the new rows touch is coded anew from the recent rows
           and the new ones; ranges leave out padding (slots that the caller has marked as not `real`) and rows now kept exact
           a side with outliers: the new entries compete for the records of their blocks, see `kvsink.kernels.sparse`
           the length is the caller's to advance, after the new rows have been attended to
Source     KVSink, arXiv 2508.04257 section 4 (side store of sinks); the running selection over chunks is ours
Differs    every row is coded, protected rows too: a row that loses its place in the side store is then simply read
           from its codes (clamped to the ranges of its group where those left it out); so are rows of an unfinished
           block, whose codes nothing reads until it is full
Shapes     k, v [B, H, S, D]; positions int [B or 1, S]; cos, sin [B or 1, S, R]; candidates: pairs of score float32
           [B, n] and index int64 [B, n] into the chunk, one pair per segment, then bool [B, S] of visual rows where the
           codec asks for it; state: see kvsink.codecs.STATE_NAMES. Places of anchors behind the segments are left alone
Exact      the side store and the recent window, yes; codes, see the codec
Raises     IndexError when the slots do not fit (the cache checks first and says so in the user's words)
Cost       reads S rows, writes their codes; the transform is 2·S·H·D² flops (klt) or S·H·D·log2 D (Hadamard)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends import Call, LayerState
from .base import resolve_codec
from .selection import merge_exact
from .sparse import merge_sparse
from .stages import rope_rows
from .tokens import touched, window_rows

__all__ = ["append", "append_", "append_plain", "append_ref", "keep_exact", "keep_recent"]

EXACT = (("exact_slot", 1), ("exact_score", 1), ("exact_k", 2), ("exact_v", 2))  # the side store, and where its places run


def append_ref(
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    candidates: Sequence[Tensor],
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    codec: str,
    roped: bool,
) -> None:
    """The definition, for any device."""
    c = resolve_codec(codec)
    p, st = c.tables(params), c.named(state)
    if c.modal:
        p["visual"] = candidates[-1]
    b, _, s, _ = k.shape
    slots = st["length"] + torch.arange(s, device=k.device)
    st["positions"].index_copy_(1, slots, positions.expand(b, s).to(st["positions"].dtype))
    full_k = k if roped else rope_rows(k, cos, sin)
    keep_exact(c, st, full_k, v, candidates)
    if c.tiles:
        c.store_tiles(full_k, v, slots, st, p)
        keep_recent(c, st, slots, full_k, v)
        return
    if c.key.by_token_block:
        _store_blocks(c, c.key, "k", full_k, st, lambda rows: c.transform_keys(rows, cos, sin, positions, p, True))
    elif st["k_sparse"].shape[2]:
        x = c.transform_keys(k, cos, sin, positions, p, roped)
        _store_rows("k", st, slots, *c.quantize("k", x, p))
        _store_outliers(c, "k", x, st, p)
    else:
        _store_rows("k", st, slots, *c.encode_keys(k, cos, sin, positions, p, roped))
    if c.value.by_token_block:
        _store_blocks(c, c.value, "v", v, st, lambda rows: c.transform_values(rows, p))
    elif st["v_sparse"].shape[2]:
        x = c.transform_values(v, p)
        _store_rows("v", st, slots, *c.quantize("v", x, p))
        _store_outliers(c, "v", x, st, p)
    else:
        _store_rows("v", st, slots, *c.encode_values(v, p))
    keep_recent(c, st, slots, full_k, v)


def keep_exact(c: Any, st: dict[str, Tensor], full_k: Tensor, v: Tensor, candidates: Sequence[Tensor]) -> None:
    """The running selection, in place."""
    if not c.exact_rows:
        return
    held = [st[name].narrow(dim, 0, c.exact_rows) for name, dim in EXACT]  # anchors stand behind
    merged = merge_exact(held[0], held[1], (held[2], held[3]), (full_k, v), candidates, c.segments, st["length"])
    for old, new in zip(held, merged, strict=True):
        old.copy_(new)


def keep_recent(c: Any, st: dict[str, Tensor], slots: Tensor, full_k: Tensor, v: Tensor) -> None:
    if not c.ring:
        return
    s = full_k.shape[2]
    last = min(s, c.ring)
    ring = slots[-last:] % c.ring
    st["recent_k"].index_copy_(2, ring, full_k[:, :, s - last :].to(st["recent_k"].dtype))
    st["recent_v"].index_copy_(2, ring, v[:, :, s - last :].to(st["recent_v"].dtype))
    st["recent_slot"].index_copy_(0, ring, slots[-last:].to(st["recent_slot"].dtype))


def _store_rows(prefix: str, st: dict[str, Tensor], slots: Tensor, codes: Tensor, scale: Tensor) -> None:
    st[f"{prefix}_codes"].index_copy_(2, slots, codes.to(st[f"{prefix}_codes"].dtype))
    st[f"{prefix}_scale"].index_copy_(2, slots, scale)


def _store_blocks(
    c: Any, side: Any, prefix: str, new: Tensor, st: dict[str, Tensor], transform: Callable[[Tensor], Tensor]
) -> None:
    """Code every block of tokens that the new rows touch."""
    length, s = st["length"], new.shape[2]
    total = length + s
    slots, rows = window_rows(st[f"recent_{prefix}"], new, length, side.flush)
    valid = _tokens_to_code(st, slots, total)
    codes, scale, norm = c.encode_block(transform(rows), side, valid)
    # Slots that are not reached yet may lie behind the end of the cache: the first slot is written again instead.
    held = torch.where(slots < total, torch.arange(slots.numel(), device=slots.device), 0)
    groups = torch.where(slots[:: side.group_tokens] < total, held[:: side.group_tokens] // side.group_tokens, 0)
    first = slots[:1] // side.group_tokens
    st[f"{prefix}_codes"].index_copy_(2, slots[:1] + held, codes.index_select(2, held))
    st[f"{prefix}_scale"].index_copy_(2, first + groups, scale.index_select(2, groups))
    if norm is not None:
        st[f"{prefix}_norm"].index_copy_(2, slots[:1] + held, norm.index_select(2, held))


def _tokens_to_code(st: dict[str, Tensor], slots: Tensor, total: Tensor) -> Tensor:
    """bool [B, N]: slots that hold tokens which are read from codes: no padding, nothing now kept exact."""
    real = st["real"]
    valid = (slots < total) & real.index_select(1, slots.clamp_max(real.shape[1] - 1))
    return valid & ~(slots[None, :, None] == st["exact_slot"][:, None, :]).any(-1)


def _store_outliers(c: Any, prefix: str, x: Tensor, st: dict[str, Tensor], p: dict[str, Tensor]) -> None:
    """The entries of transformed new rows [B, H, S, D] that leave the dense range, into the records of their blocks."""
    length, s, n = st["length"], x.shape[2], (c.key if prefix == "k" else c.value).outlier_tokens
    first, block = touched(length, s, n)
    slots = first * n + torch.arange(block.numel() * n, device=x.device)
    scale = st[f"{prefix}_scale"]
    if scale.shape[3]:
        scale = scale.index_select(2, slots.clamp_max(scale.shape[2] - 1))
    valid = _tokens_to_code(st, slots, length + s)
    rows = x.transpose(1, 2).flatten(2)
    value, index = st[f"{prefix}_sparse"], st[f"{prefix}_sparse_at"]
    offset, extent = c.dense_range(prefix, scale, p)
    merge_sparse(value, index, rows, length, valid, offset, extent, n)


def append_plain(call: Call) -> None:
    """`append_` by its definition."""
    append_ref(*call.coding(), call.text, call.roped)


def append(
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    candidates: Sequence[Tensor],
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    codec: str,
    roped: bool,
) -> None:
    """The op outside graphs, without what a dispatcher costs for every tensor of the state."""
    call = Call(
        resolve_codec(codec),
        codec,
        k,
        v,
        LayerState(*state),
        params,
        positions=positions,
        candidates=candidates,
        turn=(cos, sin),
        roped=roped,
    )
    backends.choose("append", *call.facts).run(call)


append_ = torch.library.custom_op("kvsink::append_", append, mutates_args=("state",))
append_.register_fake(lambda *_: None)
