"""Codes stored in the order in which a GPU's matrix unit reads them, inside tiles of 128 slots; scales stay in order.

Formula    a run is 8 neighbouring channels; the code of run r of width w_r sits in bin b_r at bit o_r (first fit into 16-bit bins)
           keys    word (t, b) of a slot, 32 bit: channels 8 r + 2 t (low half) and 8 r + 2 t + 1 (high half) of the runs in bin b
           values  half word (g, b) of a slot, 16 bit: channel 8 r + g of the runs in bin b
           inside a tile the words of 16 slots stand as the A operand of mma.m16n8k16: lane 4 g + t, see `key_index`
           keys are told apart by slot, not by position: with j0 = slot - slot mod n and s the row's anchor,
           z = T (R_s R_{j0}^-1 k - M[slot mod n]),  k^ = R_{j0} R_s^-1 (T^-1 z^ + M[slot mod n])     (block keys; `post`
           keys leave the rotation off and subtract R_{j0} R_s^-1 M instead)
Source     ours; the fragment order is that of the PTX manual, section on mma.m16n8k16
Differs    the anchor is slot minus position of a row's first token, so regular rows are coded as without tiles; for other
           positions the mean fits worse, never wrongly
Shapes     codes uint8 [B, H, L, 16 · bins], L a multiple of 128; anchor_cos, anchor_sin float32 [B, 128]
Exact      yes: `unpermute(permute(x)) = x`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .levels import EVEN_STEP
from .packing import pack_bits, unpack_bits
from .quantize import segments
from .rope import rope, unrope

__all__ = [
    "DIMS", "TILE_SLOTS", "Fields", "TileTables", "fetch", "key_rows", "make_fields", "restore_keys", "store",
    "tile_bytes", "transform_keys",
]  # fmt: skip

DIMS, TILE_SLOTS, BLOCK = (64, 128, 256), 128, 64
Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Fields:
    """Where the code of each run of 8 channels sits inside 16-bit bins. pos: its bit after a bin's second half moved down."""

    width: tuple[int, ...]
    bin: tuple[int, ...]
    offset: tuple[int, ...]
    pos: tuple[int, ...]
    bins: int


@cache
def make_fields(widths: tuple[int, ...]) -> Fields:
    """First fit. A code is read in place as a 16-bit float, which is linear up to 2047: bits from 11 on are moved down."""
    fill, cut = [0] * len(widths), [-1] * len(widths)
    bins, offset, pos = [], [], []
    for w in widths:
        b = next(i for i in range(len(widths)) if fill[i] + w <= 16)
        if fill[b] + w > 11 and cut[b] < 0:
            cut[b] = fill[b]
        bins.append(b)
        offset.append(fill[b])
        pos.append(fill[b] - max(cut[b], 0))
        fill[b] += w
    return Fields(tuple(widths), tuple(bins), tuple(offset), tuple(pos), max(bins) + 1)


def tile_bytes(widths: Sequence[int]) -> int:
    """Bytes of one slot."""
    return 16 * make_fields(tuple(widths)).bins


# -- words of a slot ----------------------------------------------------------------------------------------------------


def _codes(natural: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Packed bytes [..., sum(widths)] → codes uint8 [..., runs, 8]."""
    parts = [unpack_bits(natural[..., byte : byte + (b - a) * w // 8], w, b - a) for a, b, byte, w in segments(widths)]
    return torch.cat(parts, dim=-1).unflatten(-1, (len(widths), 8))


def _natural(codes: Tensor, widths: tuple[int, ...]) -> Tensor:
    flat = codes.flatten(-2)
    return torch.cat([pack_bits(flat[..., a:b].contiguous(), w) for a, b, _, w in segments(widths)], dim=-1)


def key_words(natural: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Packed bytes [..., sum(widths)] → int32 [..., 4 · bins], word (t, b)."""
    f, codes = make_fields(widths), _codes(natural, widths).to(torch.int64).unflatten(-1, (4, 2))  # [..., run, t, hi]
    words = torch.zeros((*codes.shape[:-3], 4, f.bins), dtype=torch.int64, device=codes.device)
    for r in range(len(widths)):
        for hi in range(2):
            words[..., f.bin[r]] |= codes[..., r, :, hi] << (16 * hi + f.offset[r])
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).flatten(-2)


def value_words(natural: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Packed bytes [..., sum(widths)] → int16 [..., 8 · bins], half word (g, b)."""
    f, codes = make_fields(widths), _codes(natural, widths).to(torch.int32)  # [..., run, g]
    words = torch.zeros((*codes.shape[:-2], 8, f.bins), dtype=torch.int32, device=codes.device)
    for r in range(len(widths)):
        words[..., f.bin[r]] |= codes[..., r, :] << f.offset[r]
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16).flatten(-2)


def key_bytes(words: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The inverse of `key_words`."""
    f, w = make_fields(widths), words.unflatten(-1, (4, -1))
    codes = [
        torch.stack(
            [(w[..., f.bin[r]] >> (16 * hi + f.offset[r])) & ((1 << f.width[r]) - 1) for hi in range(2)], dim=-1
        )
        for r in range(len(widths))
    ]
    return _natural(torch.stack(codes, dim=-3).flatten(-2).to(torch.uint8), widths)


def value_bytes(words: Tensor, widths: tuple[int, ...]) -> Tensor:
    """The inverse of `value_words`."""
    f, w = make_fields(widths), words.unflatten(-1, (8, -1))
    codes = [(w[..., f.bin[r]] >> f.offset[r]) & ((1 << f.width[r]) - 1) for r in range(len(widths))]
    return _natural(torch.stack(codes, dim=-2).to(torch.uint8), widths)


# -- places of words ------------------------------------------------------------------------------------------------------

_INDEX: dict[tuple[str, int, str], Tensor] = {}


def _index(side: str, bins: int, device: torch.device) -> Tensor:
    """int64 [128, words]: where the words of each slot of a tile stand, in words from the tile's begin."""
    key = (side, bins, str(device))
    held = _INDEX.get(key)
    if held is None:
        held = torch.tensor(key_index(bins) if side == "k" else value_index(bins), device=device)
        if type(held) is Tensor:
            _INDEX[key] = held
    return held


def _place(slot: int, word: int, lane: int, bins: int) -> int:
    """Byte of a lane's 32-bit word: 16 slots make a sub-tile; an even one stands beside that of 64 slots later."""
    sub, n = slot % 64 // 16 * 2 + slot // 64, 2 * bins
    wide = 4 if n % 4 == 0 else 2  # words a lane loads at a time
    return sub * 128 * n + word // wide * 128 * wide + lane * 4 * wide + word % wide * 4


def key_index(bins: int) -> list[list[int]]:
    """Slot → places of its 32-bit words (t, b), in 4 bytes: row g or g + 8 of the fragment, slots 2 g and 2 g + 1."""
    rows = []
    for slot in range(TILE_SLOTS):
        r = slot % 16
        rows.append([_place(slot, r % 2 * bins + b, r // 2 * 4 + t, bins) // 4 for t in range(4) for b in range(bins)])
    return rows


def value_index(bins: int) -> list[list[int]]:
    """Slot → places of its 16-bit words (g, b), in 2 bytes; two slots share a 32-bit word."""
    rows = []
    for slot in range(TILE_SLOTS):
        r = slot % 16
        t, hi, half = r // 4, r // 2 % 2, r % 2
        rows.append([_place(slot, half * bins + b, g * 4 + t, bins) // 2 + hi for g in range(8) for b in range(bins)])
    return rows


def store(codes: Tensor, natural: Tensor, slots: Tensor, widths: tuple[int, ...], side: str) -> None:
    """Write packed rows [B, H, S, sum(widths)] to their slots int64 [S] of codes uint8 [B, H, L, bytes], in place."""
    words = key_words(natural, widths) if side == "k" else value_words(natural, widths)
    flat = codes.flatten(2).view(words.dtype)  # [B, H, L · words]
    per_tile = TILE_SLOTS * words.shape[-1]
    at = (
        slots[:, None] // TILE_SLOTS * per_tile
        + _index(side, make_fields(widths).bins, codes.device)[slots % TILE_SLOTS]
    )
    flat.index_copy_(2, at.flatten(), words.flatten(2))


def fetch(codes: Tensor, widths: tuple[int, ...], side: str, start: int = 0, count: int | None = None) -> Tensor:
    """Packed rows [B, H, n, sum(widths)] of `count` slots from `start` on (all: None), in their natural order."""
    count = codes.shape[2] - start if count is None else count
    first, last = start // TILE_SLOTS, -(-(start + count) // TILE_SLOTS)
    dtype = torch.int32 if side == "k" else torch.int16
    tiles = codes[:, :, first * TILE_SLOTS : last * TILE_SLOTS].contiguous().flatten(2).view(dtype)
    tiles = tiles.unflatten(2, (last - first, -1))
    index = _index(side, make_fields(widths).bins, codes.device)
    words = tiles[..., index.flatten()].unflatten(-1, index.shape).flatten(2, 3)
    words = words[:, :, start - first * TILE_SLOTS : start - first * TILE_SLOTS + count]
    return key_bytes(words, widths) if side == "k" else value_bytes(words, widths)


# -- keys by slot -----------------------------------------------------------------------------------------------------------


def _turn(x: Tensor, slots: Tensor, p: Params, back: bool) -> Tensor:
    """R_{j0} R_s^-1 x, or its inverse when `back`; x [B or 1, H, S, D], slots [S]."""
    start = p["start_cos"][slots // BLOCK], p["start_sin"][slots // BLOCK]
    cos, sin = p["anchor_cos"][:, None, None], p["anchor_sin"][:, None, None]
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    start, cos, sin = (start[0].to(wide), start[1].to(wide)), cos.to(wide), sin.to(wide)
    if p["start_cos"].shape[-1] == 0:
        return x
    return rope(unrope(x, *start), cos, sin) if back else rope(unrope(x, cos, sin), *start)


def transform_keys(k: Tensor, slots: Tensor, s: Any, p: Params, hadamard: Any) -> Tensor:
    """Keys after RoPE [B, H, S, D] through every stage before the quantizer."""
    x = k if k.dtype == torch.float64 else k.float()
    if s.center:
        table = p["k_table"][:, slots % BLOCK][None]  # [1, H, S, D]
        if s.domain == "block":
            return (_turn(x, slots, p, back=True) - table) @ p["k_basis"].to(x.dtype)
        x = x - _turn(table.to(x.dtype), slots, p, back=False)
    return hadamard(x) if s.transform == "hadamard" else x


def restore_keys(x: Tensor, slots: Tensor, s: Any, p: Params, hadamard: Any) -> Tensor:
    """The stages of `transform_keys` taken back; keys after RoPE."""
    if s.domain == "block":
        return _turn(x @ p["k_basis"].mT.to(x.dtype) + p["k_table"][:, slots % BLOCK][None], slots, p, back=False)
    x = hadamard(x) if s.transform == "hadamard" else x
    return x + _turn(p["k_table"][:, slots % BLOCK][None].to(x.dtype), slots, p, back=False) if s.center else x


# -- tables of the kernel ---------------------------------------------------------------------------------------------------


def key_rows(basis: Tensor, sigma: Tensor, widths: tuple[int, ...]) -> Tensor:
    """diag(sigma · step · 2^(8 - pos)) U^T, [H, 128 components, 128 channels]: the query in units of codes."""
    f = make_fields(widths)
    unit = torch.tensor(
        [EVEN_STEP[w] * 2.0 ** (8 - q) for w, q in zip(f.width, f.pos, strict=True)], device=basis.device
    )
    return (sigma * unit.repeat_interleave(8)).unsqueeze(-1) * basis.mT


def _pairs(x: Tensor) -> Tensor:
    """[..., 2] → int32 [...] of two float16."""
    return x.to(torch.float16).contiguous().view(torch.int32).squeeze(-1)


class TileTables:
    """Constant tables as A or B operands of mma.m16n8k16, each from the plain table of the codec."""

    @staticmethod
    def mean(table: Tensor) -> Tensor:
        """[H, 64, D] → int32 [H, 4, D / 16, 32, 4]; rows g and g + 8 are slots 2 g and 2 g + 1."""
        steps = table.shape[-1] // 16
        x = table.view(-1, 4, 8, 2, steps, 2, 4, 2).permute(0, 1, 4, 2, 6, 5, 3, 7)  # pair, step, g, t, half, row, hi
        return _pairs(x).reshape(table.shape[0], 4, steps, 32, 4)

    @staticmethod
    def basis(rows: Tensor) -> Tensor:
        """[H, D components, D channels] → int32 [H, D / 16, D / 16, 32, 4]."""
        steps = rows.shape[-1] // 16
        x = rows.reshape(-1, steps, 2, 8, steps, 2, 4, 2).permute(0, 1, 4, 3, 6, 5, 2, 7)  # m, step, g, t, half, row, hi
        return _pairs(x).reshape(rows.shape[0], steps, steps, 32, 4)

    @staticmethod
    def turn(cos: Tensor, sin: Tensor) -> Tensor:
        """Angles of block starts [P, R] → int32 [P, 2, 4, R / 16]: cosines then sines of the first half, B operand order."""
        half = cos.shape[-1] // 2
        both = torch.stack([cos[:, :half], sin[:, :half]], 1).view(-1, 2, half // 8, 4, 2)  # cos|sin, run, t, hi
        return _pairs(both.transpose(2, 3))
