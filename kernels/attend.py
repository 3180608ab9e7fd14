"""Attention of new queries over the packed cache of one layer, without a 16-bit copy of it.

Formula    out = softmax(scale · q k^T + mask) v^ with k^, v^ as `kvsink::read` defines them
           computed over tiles of slots with a running maximum and sum (online softmax), decoding one tile at a time
Source     FlashAttention, arXiv 2205.14135 (online softmax); KIVI, arXiv 2402.02750 (attention over packed tiles)
Shapes     q [B, Hq, S, D] after RoPE; k, v [B, H, S, D] the rows just appended, k after RoPE, at slots length …
           length + S - 1; mask bool or additive
           [B or 1, 1 or Hq, S, >= L] or None → [B, Hq, S, D] in the dtype of q
Units      scale multiplies logits
Exact      equals `read` + softmax attention up to float32 rounding: |difference| <= 1e-5 of the largest |v|
Cost       4·B·Hq·S·L·D flops beside decoding L rows once; holds one tile of decoded rows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends import Call, LayerState, tell_once
from .base import resolve_codec
from .prefill import attend_chunk
from .read import TILE, put_rows, read_ref

__all__ = ["TILE", "attend", "attend_plain", "attend_ref", "attention"]


def _additive(mask: Tensor | None, is_causal: bool, first: Tensor, s: int, slots: Tensor) -> Tensor:
    """Additive float32 mask [.., S, n] for the given slots; always hides slots a query may not see yet."""
    query = first + torch.arange(s, device=slots.device)
    visible = slots[None, :] <= query[:, None]  # [S, n]
    zero = torch.zeros((), device=slots.device)
    hidden = torch.where(visible, zero, float("-inf"))
    if mask is None:
        return hidden
    part = mask[..., slots]
    extra = torch.where(part, zero, float("-inf")) if part.dtype == torch.bool else part.float()
    return torch.minimum(extra, hidden) if is_causal else extra + torch.where(slots < first + s, zero, float("-inf"))


def attend_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    codec: str,
) -> Tensor:
    """The definition: read everything, then attend in float32."""
    full_k, full_v = read_ref(k, v, state, params, codec)
    if mask is not None:  # a growing cache has more slots than rows; its mask ends with the rows
        full_k, full_v = full_k[:, :, : mask.shape[-1]], full_v[:, :, : mask.shape[-1]]
    b, h, slots, d = full_k.shape
    s, r = q.shape[2], q.shape[1] // h
    bias = _additive(mask, is_causal, LayerState(*state).length, s, torch.arange(slots, device=q.device))
    wide = _wide(q)
    logits = q.to(wide).reshape(b, h, r * s, d) @ full_k.to(wide).mT * scale  # [B, H, R·S, L]
    logits = (logits.reshape(b, h, r, s, slots) + _grouped(bias, h, r)).reshape(b, h, r * s, slots)
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    p = (logits - top).exp()
    out = (p @ full_v.to(wide)) / p.sum(-1, keepdim=True).clamp_min(1e-30)
    return out.reshape(b, h * r, s, d).to(q.dtype)


def _wide(q: Tensor) -> torch.dtype:
    """What sums are taken in: float32, or float64 where the model is."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _grouped(bias: Tensor, heads: int, repeats: int) -> Tensor:
    """A mask [.., S, n] with or without query heads, shaped to add to [B, H, R, S, n]."""
    if bias.dim() == 4:
        return bias.reshape(bias.shape[0], heads, repeats, *bias.shape[2:]) if bias.shape[1] > 1 else bias[:, :, None]
    return bias


def _attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    codec: str,
) -> Tensor:
    """The same in tiles of slots up to the length: what runs on the CPU."""
    c = resolve_codec(codec)
    p, st = c.tables(params), c.named(state)
    b, h, s, d = k.shape
    r, length = q.shape[1] // h, st["length"]
    first = int(length)
    total = first + s
    wide = _wide(q)
    query = q.to(wide).reshape(b, h, r * s, d) * scale
    top = query.new_full((b, h, r * s, 1), torch.finfo(torch.float32).min)
    mass, out = torch.zeros_like(top), torch.zeros_like(query)
    for start in range(0, total, TILE):
        end = min(start + TILE, total)
        tile_k, tile_v = _past_rows(c, st, p, total, start, end, wide)
        if not c.strict and end > first:
            lo = max(first, start)
            for full, fresh in ((tile_k, k), (tile_v, v)):
                full[:, :, lo - start : end - start] = fresh[:, :, lo - first : end - first]
        bias = _additive(mask, is_causal, length, s, torch.arange(start, end, device=q.device))
        logits = (query @ tile_k.mT).reshape(b, h, r, s, end - start) + _grouped(bias, h, r)
        logits = logits.reshape(b, h, r * s, end - start)
        peak = torch.maximum(top, logits.amax(-1, keepdim=True))
        fade, weight = (top - peak).exp(), (logits - peak).exp()
        mass = mass * fade + weight.sum(-1, keepdim=True)
        out = out * fade + weight @ tile_v
        top = peak
    return (out / mass.clamp_min(1e-30)).reshape(b, h * r, s, d).to(q.dtype)


def _past_rows(
    c: Any, st: Mapping[str, Tensor], p: Mapping[str, Tensor], total: int, start: int, end: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Slots start … end - 1 of `total` as keys after RoPE and values in `dtype`, recent and exact rows laid over them."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = []
    for prefix, side, rows in (("k", c.key, c.read_keys), ("v", c.value, c.read_values)):
        full = rows(st, p, start, end, wide).to(dtype)
        full = full if side.packed or full.dtype != st[f"{prefix}_codes"].dtype else full.clone()
        places = [(f"exact_{prefix}", st["exact_slot"])]
        if c.ring:
            live = c.exact_recent(side, st["recent_slot"], total)[None].expand(full.shape[0], -1)
            places.insert(0, (f"recent_{prefix}", live))
        for name, slot in places:
            inside = (slot >= start) & (slot < end)
            put_rows(full, st[name], torch.where(inside, slot - start, -1))
        out.append(full)
    return out[0], out[1]


def attend_plain(call: Call) -> Tensor:
    """The same by plain operators: tile by tile on the CPU; several new rows on a GPU over pieces of the decoded past."""
    q, k, v, state, params, mask, scale = call.asking()
    c, device, several = call.codec, q.device.type, q.shape[2] > 1
    if device == "cpu":
        return _attend_tiles(q, k, v, state, params, mask, scale, call.causal, call.text)
    if c.tiles and not several:
        faster = backends.choose("attend", *call.facts).why
        tell_once(f"attention over packed codes runs on the plain operators: {faster[0][1]}")
    if device != "cuda" or not several or q.dtype == torch.float64 or torch.cuda.is_current_stream_capturing():
        return attend_ref(q, k, v, state, params, mask, scale, call.causal, call.text)
    first = int(call.state.length)

    def past(start: int, end: int) -> tuple[Tensor, Tensor]:
        return _past_rows(c, call.st, call.p, first + q.shape[2], start, end, k.dtype)

    return attend_chunk(past, q, k, v, first, mask, scale, call.causal, c.strict)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    codec: str,
) -> Tensor:
    """The op outside graphs; its result may have any strides."""
    call = Call(resolve_codec(codec), codec, k, v, LayerState(*state), params, q, mask=mask, scale=scale, causal=is_causal)
    out: Tensor = backends.choose("attend", *call.facts).run(call)
    return out


@torch.library.custom_op("kvsink::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    codec: str,
) -> Tensor:
    return attention(q, k, v, state, params, mask, scale, is_causal, codec).contiguous()


@attend.register_fake
def _outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    codec: str,
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
