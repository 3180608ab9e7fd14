"""The whole cache of one layer as keys and values again: decoded rows, with the exact ones laid over them.

Formula    k^ = decode(codes);  k^[recent_slot] = recent rows: those of the window, of the block that is not full yet and
           the newest, as the side says;  k^[exact_slot] = exact rows;  k^[new slots] = k, unless the codec is strict; the
           same for v
Source     KVSink, arXiv 2508.04257 section 4, step 4
Shapes     k, v [B, H, S, D] the rows just appended, at slots length … length + S - 1
           → k^, v^ [B, H, L, D] in the dtype of k and v; slots past the length
           hold finite rest and are for the attention mask to hide
Exact      protected, recent and new rows yes
Cost       decodes L rows of keys and values: this is the uncompiled path, the fused op never materializes them
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import LayerState
from .base import resolve_codec

__all__ = ["TILE", "put_rows", "read", "read_ref"]

TILE = 512  # slots decoded at a time


def put_rows(full: Tensor, rows: Tensor, slot: Tensor) -> Tensor:
    """Lay rows [B, H, E, D] over full [B, H, L, D] at slot int [B, E]; negative slots are left out. Writes in place."""
    if rows.shape[2] == 0:
        return full
    # Empty places are sent to a slot of their own row's choosing: they rewrite what already stands at slot 0.
    index = slot.clamp_min(0).to(torch.int64)[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3])
    used = (slot >= 0)[:, None, :, None]
    current = full.gather(2, index)
    zeroth = (slot == 0).any(1)[:, None, None, None]
    first = torch.where(slot == 0, 1, 0).argmax(1)[:, None, None, None].expand(-1, full.shape[1], 1, full.shape[3])
    rest = torch.where(zeroth, rows.gather(2, first).to(full.dtype), current)
    return full.scatter_(2, index, torch.where(used, rows.to(full.dtype), rest))


def read_ref(k: Tensor, v: Tensor, state: Sequence[Tensor], params: Sequence[Tensor], codec: str) -> tuple[Tensor, Tensor]:
    """The definition, for any device."""
    c = resolve_codec(codec)
    p, st = c.tables(params), c.named(state)
    s, slots = k.shape[2], st["k_codes"].shape[2]
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    full_k, full_v = (x.new_zeros((*x.shape[:2], slots, x.shape[3])) for x in (k, v))
    if k.device.type == "cpu":  # tile by tile up to the length: intermediate values take several times the room of a row
        for start in range(0, end := int(st["length"]) + s, TILE):
            stop = min(start + TILE, end)
            full_k[:, :, start:stop] = c.read_keys(st, p, start, stop, wide)
            full_v[:, :, start:stop] = c.read_values(st, p, start, stop, wide)
    else:
        full_k.copy_(c.read_keys(st, p, 0, slots, wide))
        full_v.copy_(c.read_values(st, p, 0, slots, wide))
    new = st["length"] + torch.arange(s, device=k.device)
    for prefix, side, full, fresh in (("k", c.key, full_k, k), ("v", c.value, full_v, v)):
        if c.ring:
            live = c.exact_recent(side, st["recent_slot"], st["length"] + s)  # rows of a cropped tail are gone
            put_rows(full, st[f"recent_{prefix}"], live[None].expand(full.shape[0], -1))
        put_rows(full, st[f"exact_{prefix}"], st["exact_slot"])
        if not c.strict:
            full.index_copy_(2, new, fresh)
    return full_k, full_v


@torch.library.custom_op("kvsink::read", mutates_args=())
def read(k: Tensor, v: Tensor, state: Sequence[Tensor], params: Sequence[Tensor], codec: str) -> tuple[Tensor, Tensor]:
    return read_ref(k, v, state, params, codec)


@read.register_fake
def _outputs(k: Tensor, v: Tensor, state: Sequence[Tensor], params: Sequence[Tensor], codec: str) -> tuple[Tensor, Tensor]:
    slots = LayerState(*state).k_codes.shape[2]
    return (k.new_empty((k.shape[0], k.shape[1], slots, k.shape[3])), v.new_empty((v.shape[0], v.shape[1], slots, v.shape[3])))
