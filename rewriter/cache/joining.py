"""Sequences that join a running batch: two packed caches become one, whose rows end together.

Formula    slot s of the shorter cache becomes slot s + pad, pad = longer length - shorter length; what is before it is padding,
           for the attention mask to hide as it hides left padding. Positions of rows stay what they were
Source     ours
Differs    from paging (vLLM, arXiv 2309.06180): rows are moved once, so that every kernel goes on with one length per batch
Shapes     as in kvsink.cache.storage, with the batch rows of the second cache behind those of the first
Cost       one copy of both caches
Exact      codes, scales and exact rows move as bytes
Declines   pads that would cut what a codec codes together (`pad_unit`), anchors of caches of different lengths, layers that are
           left alone or slide
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvsink.codecs import ANCHOR_NAMES, SHARED_NAMES, STATE_NAMES, Codec
from kvsink.errors import KvsinkError, UnsupportedError
from kvsink.kernels.layout import TILE_SLOTS

__all__ = ["joined_shared", "joined_state", "pad_unit", "pads_of"]


def pad_unit(codec: Codec) -> int:
    """Slots by a multiple of which rows of a codec can be moved: those that are coded, or stored, together."""
    unit = TILE_SLOTS if codec.tiles else 1
    for side in (codec.key, codec.value):
        if side.packed:
            unit = math.lcm(unit, max(1, side.flush), max(1, side.group_tokens) if side.by_token_block else 1)
            unit = math.lcm(unit, side.outlier_tokens if side.outliers else 1)
    return unit


def pads_of(a: Any, b: Any) -> tuple[int, int]:
    """Slots of padding that the rows of two caches get. Raises KvsinkError when they cannot become one."""
    for cache in (a, b):
        if cache.sliding is not None or len(cache.packed_layers()) != len(cache.layers):
            raise UnsupportedError(
                "a cache with sliding-window layers, or layers that kvsink leaves alone, cannot be joined; prefill rows together"
            )
        if not all(layer.is_initialized and int(layer.length) for layer in cache.packed_layers()):
            raise KvsinkError("an empty cache cannot be joined; prefill a prompt first")
    for i, (one, two) in enumerate(zip(a.layers, b.layers, strict=True)):
        first, second = ((layer.stored_text(), layer.max_length, layer.dtype, layer.device) for layer in (one, two))
        if first != second:
            raise KvsinkError(
                f"layer {i}: the caches differ in codec, max_length, dtype or device; make both with "
                "kvsink.KVSinkCache.for_model and the same arguments"
            )
        for layer in (one, two):
            layer.check_asked()
            if layer._unseen is not None:
                raise KvsinkError(f"layer {i} waits for its attention to be observed; join caches between two forward passes")
    lengths = [[int(layer.length) for layer in cache.layers] for cache in (a, b)]
    if any(len(set(held)) > 1 for held in lengths):
        raise KvsinkError("a forward pass over one of the caches stopped half-way; crop or reset it first")
    longest = max(lengths[0][0], lengths[1][0])
    pads = longest - lengths[0][0], longest - lengths[1][0]
    for i, layer in enumerate(a.layers):
        if max(pads) and layer.codec.anchors is not None:
            raise UnsupportedError(
                f"layer {i}: its anchors are a share of the length, which differs ({lengths[0][0]} and {lengths[1][0]} tokens); "
                "left-pad the shorter prompt to the length of the longer"
            )
        if max(pads) % (unit := pad_unit(layer.codec)):
            raise UnsupportedError(
                f"layer {i}: lengths {lengths[0][0]} and {lengths[1][0]} differ by {max(pads)}, and {unit} tokens are coded or "
                f"stored together; left-pad the shorter prompt until the difference is a multiple of {unit}"
            )
    return pads


def joined_state(a: Any, b: Any, pads: tuple[int, int], slots: int) -> dict[str, Tensor]:
    """The state of two layers as that of one with `slots` slots; nothing of either is written."""
    names = [n for n in (*STATE_NAMES, *ANCHOR_NAMES) if n not in SHARED_NAMES]
    moved = [_moved(layer, pad, slots, names) for layer, pad in zip((a, b), pads, strict=True)]
    longer, shorter = (moved[0], moved[1]) if pads[0] == 0 else (moved[1], moved[0])
    here, there = longer["recent_slot"], shorter["recent_slot"]
    if bool(((here != there) & ((here >= max(pads)) | (there >= 0))).any()):
        raise UnsupportedError(
            f"layer {a.layer}: a crop has left one cache fewer recent rows as they came than the other; go on with either for "
            f"{a.codec.ring} tokens, or prefill again"
        )
    out = {n: torch.cat([m[n] for m in moved]) for n in names if n not in ("recent_slot", "length")}
    return {**out, "recent_slot": here, "length": longer["length"]}


def joined_shared(a: Any, b: Any, pads: tuple[int, int], slots: int, layer: Any) -> dict[str, Tensor]:
    """What the layers of two caches share, as of one: SHARED_NAMES [B, slots], and the origins of codes in tiles."""
    out = {}
    for name in SHARED_NAMES:
        held = []
        for old, pad in zip((getattr(a, name), getattr(b, name)), pads, strict=True):
            count = min(slots - pad, old.shape[1])
            new = old.new_zeros((old.shape[0], slots))  # slots before are padding
            new[:, pad : pad + count] = old[:, :count]
            new[:, pad + count :] = name == "real"
            held.append(new)
        out[name] = torch.cat(held)
    if a.origin_cos is None:
        return out
    turned = []
    for shared, pad in zip((a, b), pads, strict=True):  # the first token of a row now stands `pad` slots later
        cos, sin = a.runtime.angles(layer.layer, torch.tensor([[pad]], device=layer.device))
        norm = (cos * cos + sin * sin).sqrt().clamp_min(1e-12)
        cos, sin, c, s = (cos / norm)[0], (sin / norm)[0], shared.origin_cos, shared.origin_sin
        turned.append((c * cos - s * sin, s * cos + c * sin))
    return {**out, "origin_cos": torch.cat([c for c, _ in turned]), "origin_sin": torch.cat([s for _, s in turned])}


def _moved(layer: Any, pad: int, slots: int, names: list[str]) -> dict[str, Tensor]:
    """The tensors of one layer with its rows at slots pad … of `slots`."""
    held, c = int(layer.length), layer.codec
    then = c.layout(layer.batch_size, layer.num_heads, layer.head_dim, layer.value_dim, slots, layer.dtype)
    out: dict[str, Tensor] = {}
    for name in names:
        old, (shape, dtype, fill) = getattr(layer, name), then[name]
        if name in ("recent_slot", "recent_k", "recent_v", "recent_score", "length"):
            out[name] = old.clone()
            continue
        new = torch.full(shape, fill, dtype=dtype, device=old.device)
        along = 1 if name.endswith(("_sparse", "_sparse_at", "_slot", "_score")) else 2
        per = _slots_of_one(c, name)
        start, count = (pad // per, -(-held // per)) if per else (0, old.shape[along])
        if c.tiles and name in ("k_codes", "v_codes"):
            count = -(-held // TILE_SLOTS) * TILE_SLOTS
        count = min(count, old.shape[along])  # nothing, where a codec has no such tensor
        new.narrow(along, start if count else 0, count).copy_(old.narrow(along, 0, count))
        out[name] = new
    slot = out["exact_slot"]
    out["exact_slot"] = torch.where(slot < -1, slot - pad, torch.where(slot >= 0, slot + pad, slot))  # a repeat s is -s - 2
    out["length"] += pad
    recent = out["recent_slot"]
    recent = torch.where((recent >= 0) & (recent < held), recent + pad, -1)  # those of a cropped tail are gone
    turn = pad % c.ring if c.ring else 0  # a row stands at its slot modulo the ring
    out["recent_slot"] = recent.roll(turn)
    for name in ("recent_k", "recent_v"):
        out[name] = out[name].roll(turn, 2)
    return out


def _slots_of_one(codec: Codec, name: str) -> int:
    """Slots that one entry of a tensor stands for; 0 where it does not go by slots."""
    side = codec.key if name.startswith("k_") else codec.value
    if name in ("k_sparse", "k_sparse_at", "v_sparse", "v_sparse_at"):
        return side.outlier_tokens
    if name in ("k_scale", "v_scale") and side.by_token_block:
        return side.group_tokens
    return 1 if name.startswith(("k_", "v_")) else 0
