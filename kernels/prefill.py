"""Attention of several new rows over a packed past: the past is decoded a piece at a time, and attention over pieces merged.

Formula    softmax over [decoded past | new rows], the past a few thousand slots at a time, merged by their log-sum-exp
Source     merging by log-sum-exp as in FlashAttention, arXiv 2205.14135 section 3
Shapes     q [B, Hq, S, D], k and v [B, Hkv, S, D], S > 1 → [B, Hq, S, D]
Exact      relative error of a 16-bit result
Cost       decodes the past once; `_DECODED_BYTES` of it at a time
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import TILE_SLOTS

__all__ = ["attend_chunk", "attend_piece", "pieces"]

_DECODED_BYTES = 128 << 20  # keys and values of a piece of the past, decoded at a time


def pieces() -> str:
    """PyTorch's attention for a whole piece, as $KVSINK_PIECES says: "flash", or "cudnn", which plans every shape anew, but whole
    pieces share one. Raises ValueError for another name."""
    asked = os.environ.get("KVSINK_PIECES") or "flash"
    if asked not in ("flash", "cudnn"):
        raise ValueError(f"KVSINK_PIECES is {asked!r}; set flash or cudnn")
    return asked


def attend_chunk(
    past: Callable[[int, int], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    strict: bool,
) -> Tensor:
    """`attend` of S > 1 new rows behind `first` others; `past` gives slots start … end - 1 as keys and values [B, H, n, D].

    strict: new rows are read back from the past too.
    """
    s = q.shape[2]
    causal = mask is None or is_causal
    if first == 0 and not strict:
        part = None if mask is None else mask[..., :s]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=part, is_causal=mask is None, scale=scale, enable_gqa=True)
    b, h = k.shape[:2]
    r = q.shape[1] // h
    step = max(1024, _DECODED_BYTES // (b * h * (k.shape[3] + v.shape[3]) * k.element_size()) // TILE_SLOTS * TILE_SLOTS)
    out = q.new_zeros((b, h * r, s, q.shape[3]), dtype=torch.float32)
    top = q.new_full((b, h * r, s), float("-inf"), dtype=torch.float32)

    def merge(part: Tensor, mass: Tensor) -> None:
        """Add the attention over some slots, with the logarithm of its sum of weights."""
        nonlocal top
        peak = torch.logaddexp(top, mass)
        out.mul_((top - peak).exp().nan_to_num_(0.0)[..., None]).add_(part * (mass - peak).exp().nan_to_num_(0.0)[..., None])
        top = peak

    if not strict:
        merge(*attend_piece(q, k, v, None if mask is None else mask[..., first : first + s], scale, causal))
    held = first + s if strict else first
    for start in range(0, held, step):
        end = min(start + step, held)
        tile_k, tile_v = past(start, end)
        part = None if mask is None else mask[..., start:end]
        if strict and causal:
            query, slot = torch.arange(s, device=q.device) + first, torch.arange(start, end, device=q.device)
            seen = (slot[None] <= query[:, None])[None, None]
            part = seen if part is None else part & seen if part.dtype == torch.bool else part.masked_fill(~seen, float("-inf"))
        whole = end - start == step
        merge(*attend_piece(q, tile_k, tile_v, part, scale, False, pieces() if whole else "flash"))
    return out.to(q.dtype)


def attend_piece(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, by: str = "flash"
) -> tuple[Tensor, Tensor]:
    """Attention over some keys and the logarithm of its sum of weights [B, Hq, S] float32. by: see `pieces`."""
    b, hq, s, d = q.shape
    h, n = k.shape[1], k.shape[2]
    flash = q.device.type == "cuda" and q.dtype != torch.float32 and d % 8 == 0 and d <= 256
    if flash and mask is None:
        if causal:
            k, v = (x.repeat_interleave(hq // h, 1) if hq != h else x for x in (k, v))
            found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
            return found[0], found[1]
        grouped = q.reshape(b, h, hq // h * s, d)  # heads that share keys are rows of one head
        if by == "cudnn":
            found = torch.ops.aten._scaled_dot_product_cudnn_attention(grouped, k, v, None, True, 0.0, False, False, scale=scale)
        else:
            found = torch.ops.aten._scaled_dot_product_flash_attention(grouped, k, v, 0.0, False, False, scale=scale)
        return found[0].reshape(b, hq, s, d), found[1].reshape(b, hq, s)
    bias = None
    if mask is not None:
        bias = torch.where(mask, 0.0, float("-inf")) if mask.dtype == torch.bool else mask.float()
    if causal:
        seen = torch.ones(s, n, dtype=torch.bool, device=q.device).tril()
        bias = torch.where(seen, 0.0 if bias is None else bias, float("-inf"))
    out, mass = [], []
    count = max(1, (256 << 20) // (4 * b * hq * n))
    k, v = k.float().repeat_interleave(hq // h, 1), v.float().repeat_interleave(hq // h, 1)
    for i in range(0, s, count):  # logits of a bounded number of rows at a time
        logits = q[:, :, i : i + count].float() @ k.mT * scale
        if bias is not None:
            logits = logits + (bias[..., i : i + count, :] if bias.shape[-2] > 1 else bias)
        mass.append(logits.logsumexp(-1))
        out.append((logits - mass[-1][..., None]).exp().nan_to_num_(0.0) @ v)
    return torch.cat(out, dim=2), torch.cat(mass, dim=2)
