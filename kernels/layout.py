"""Codes stored in the order in which a GPU's matrix unit reads them, inside tiles of 128 slots; scales stay in order.

Formula    a run is 8 neighbouring channels; the code of run r of width w_r sits in bin b_r of 16 bits at bit o_r: of the runs left,
           the first ones that fill a bin as far as any do
           unit (x, b) of a slot, 16 bit: channel 8 r + x of the runs in bin b; of a last bin with 8 bits at most, the low byte
           inside a tile the units of 16 slots stand as the A operand of mma.m16n8k16, see `byte_index`
           codes of a trellis: of every unit one bin, or two of 256 channels, holds the lowest bits of 16 runs in their order; the
           next bits stand in the same order in as many bins behind (64 channels: in the upper half of that bin; 80 and 96: those
           of the first 8 runs in a byte behind, of the others 4 bits above the lowest ones); further bits of each run at the
           first free place; behind the units of a tile stand the gains of its slots, a byte each
           keys are told apart by slot, not by position: with j0 = slot - slot mod n and s the row's origin,
           z = T (R_s R_{j0}^-1 k - M[slot mod n]),  k^ = R_{j0} R_s^-1 (T^-1 z^ + M[slot mod n])     (block keys; `post`
           keys leave the rotation off and subtract R_{j0} R_s^-1 M instead)
Source     ours; the fragment order is that of the PTX manual, section on mma.m16n8k16
Differs    the origin is slot minus position of a row's first token, so regular rows are coded as without tiles; for other
           positions the mean fits worse, never wrongly
Shapes     codes uint8 [B, H, L, 16 · bins, 8 less with a half bin, 1 more with a gain], L a multiple of 128; origin_cos,
           origin_sin float32 [B, R]
Exact      yes: `unpermute(permute(x)) = x`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .lasting import kept
from .levels import EVEN_STEP
from .packing import pack_bits, unpack_bits
from .quantize import segments
from .rope import rope, unrope
from .stages import back_table
from .trellis import walk_unit

__all__ = [
    "TILE_SLOTS",
    "Fields",
    "TileTables",
    "fetch",
    "key_rows",
    "make_fields",
    "restore_keys",
    "store",
    "tile_bytes",
    "transform_keys",
]

TILE_SLOTS, BLOCK = 128, 64
Params = Mapping[str, Tensor]


class Piece(NamedTuple):
    """Bits of the codes of a run of 8 channels: those from `first` on, at bit `offset` of a bin."""

    run: int
    first: int
    width: int
    bin: int
    offset: int


@dataclass(frozen=True)
class Fields:
    """Where the codes of a slot sit inside 16-bit bins; half: the last bin has 8 bits at most, and two slots share its words."""

    pieces: tuple[Piece, ...]
    bins: int
    half: bool


@cache
def make_fields(widths: tuple[int, ...], kind: str) -> Fields:
    """The bins of a kind's codes."""
    pieces = _walk_pieces(widths) if kind == "trellis" else _even_pieces(widths)
    count = max(p.bin for p in pieces) + 1
    return Fields(pieces, count, max(p.offset + p.width for p in pieces if p.bin == count - 1) <= 8)


def _even_pieces(widths: tuple[int, ...]) -> tuple[Piece, ...]:
    """Whole codes, bin after bin."""
    left, pieces, b = list(range(len(widths))), list[Piece](), 0
    while left:
        sums = [{0}]  # what runs from one on can fill, from the last one back
        for r in reversed(left):
            sums.append(sums[-1] | {n + widths[r] for n in sums[-1] if n + widths[r] <= 16})
        sums.reverse()
        room = most = max(sums[0])
        for r, behind in zip(list(left), sums[1:], strict=True):
            if room - widths[r] in behind:
                pieces.append(Piece(r, 0, widths[r], b, most - room))
                room -= widths[r]
                left.remove(r)
        b += 1
    return tuple(sorted(pieces))


def _walk_pieces(widths: tuple[int, ...]) -> tuple[Piece, ...]:
    """Lowest bits and those above them in the order of the runs, the rest by first fit."""
    runs = len(widths)

    def above(r: int) -> tuple[int, int]:  # those of 9 to 12 runs fill a byte, and the rest stand behind the lowest bits
        if runs <= 8:
            return 0, 8 + r
        if runs <= 12:
            return (1, r) if r < 8 else (0, 4 + r)
        return -(-runs // 16) + r // 16, r % 16

    low = [Piece(r, 0, 1, r // 16, r % 16) for r in range(runs)]
    low += [Piece(r, 1, 1, *above(r)) for r in range(runs) if widths[r] > 1]
    free = [0xFFFF] * (4 * runs)
    for p in low:
        free[p.bin] &= ~(1 << p.offset)
    rest = []
    for r, w in enumerate(widths):
        if (n := w - 2) > 0:
            places = ((b, o) for b in range(len(free)) for o in range(17 - n) if free[b] >> o & (2**n - 1) == 2**n - 1)
            b, o = next(places)
            free[b] &= ~((2**n - 1) << o)
            rest.append(Piece(r, 2, n, b, o))
    return (*low, *rest)


@cache
def even_positions(widths: tuple[int, ...]) -> tuple[int, ...]:
    """The bit at which a kernel reads the equally spaced codes of each run. It reads them in place as 16-bit floats, which are
    linear up to 2047: bits of a bin from 11 on are moved down."""
    fields, cut, out = make_fields(widths, "lloyd-even"), dict[int, int](), []
    for p in fields.pieces:
        if p.offset + p.width > 11:
            cut.setdefault(p.bin, p.offset)
        out.append(p.offset - cut.get(p.bin, 0))
    return tuple(out)


def tile_bytes(widths: Sequence[int], kind: str) -> int:
    """Bytes of one slot."""
    f = make_fields(tuple(widths), kind)
    return 16 * f.bins - 8 * f.half + (kind == "trellis")


# -- words of a slot ----------------------------------------------------------------------------------------------------


def _codes(natural: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Packed bytes [..., sum(widths)] → codes uint8 [..., runs, 8]."""
    parts = [unpack_bits(natural[..., byte : byte + (b - a) * w // 8], w, b - a) for a, b, byte, w in segments(widths)]
    codes = torch.cat(parts, dim=-1)
    return codes.reshape(*codes.shape[:-1], len(widths), 8)


def _natural(codes: Tensor, widths: tuple[int, ...]) -> Tensor:
    flat = codes.flatten(-2)
    return torch.cat([pack_bits(flat[..., a:b].contiguous(), w) for a, b, _, w in segments(widths)], dim=-1)


def slot_units(natural: Tensor, widths: tuple[int, ...], kind: str) -> Tensor:
    """Packed bytes [..., sum(widths)] → int16 [..., 8, bins]: unit (x, b) holds the bits of channel x of the runs in bin b."""
    f, codes = make_fields(widths, kind), _codes(natural, widths).to(torch.int32)  # [..., run, x]
    units = torch.zeros((*codes.shape[:-2], 8, f.bins), dtype=torch.int32, device=codes.device)
    for p in f.pieces:
        units[..., p.bin] |= (codes[..., p.run, :] >> p.first & ((1 << p.width) - 1)) << p.offset
    return torch.where(units >= 1 << 15, units - (1 << 16), units).to(torch.int16)


def slot_bytes(units: Tensor, widths: tuple[int, ...], kind: str) -> Tensor:
    """The inverse of `slot_units`."""
    codes = torch.zeros((*units.shape[:-2], len(widths), 8), dtype=torch.uint8, device=units.device)
    for p in make_fields(widths, kind).pieces:
        codes[..., p.run, :] |= ((units[..., p.bin] >> p.offset & ((1 << p.width) - 1)) << p.first).to(torch.uint8)
    return _natural(codes, widths)


# -- places of units ------------------------------------------------------------------------------------------------------


def _place(slot: int, word: int, lane: int, words: int) -> int:
    """Byte of a lane's 32-bit word: 16 slots make a sub-tile; an even one stands beside that of 64 slots later."""
    sub, wide = slot % 64 // 16 * 2 + slot // 64, 4 if words % 4 == 0 else 2 if words % 2 == 0 else 1  # words loaded at a time
    return sub * 128 * words + word // wide * 128 * wide + lane * 4 * wide + word % wide * 4


def byte_index(side: str, bins: int, half: bool) -> list[list[int]]:
    """Slot → places of the bytes of its units (x, b), in their order; a half bin has the low ones alone.

    Keys: slots 2 g and 2 g + 1 are rows g and g + 8 of the fragment, channels 2 t and 2 t + 1 the halves of a word. Values: channel
    g is row g, slots 4 t + 2 h + j the half h of word j. Half bins of two slots share a word.
    """
    full, words, rows = bins - half, 2 * bins - half, []
    for slot in range(TILE_SLOTS):
        r, places = slot % 16, []
        for x in range(8):
            lane, low = (r // 2 * 4 + x // 2, x % 2) if side == "k" else (x * 4 + r // 4, r // 2 % 2)
            for b in range(full):
                at = _place(slot, r % 2 * full + b, lane, words) + 2 * low
                places += [at, at + 1]
            if half:
                places.append(_place(slot, 2 * full, lane, words) + 2 * low + r % 2)
        rows.append(places)
    return rows


@kept
def _index(side: str, bins: int, half: bool, gain: bool, device: str) -> Tensor:
    """int64 [128, bytes of a slot]; the gain is its last one."""
    rows = byte_index(side, bins, half)
    if gain:
        rows = [[*places, TILE_SLOTS * len(places) + slot] for slot, places in enumerate(rows)]
    return torch.tensor(rows, device=device)


def _held_bytes(units: Tensor, f: Fields) -> Tensor:
    """Units as bytes [..., bytes of a slot], in the order of `byte_index`."""
    both = units.contiguous().view(torch.uint8)
    both = both.reshape(*both.shape[:-1], f.bins, 2)
    return both.flatten(-3) if not f.half else both.flatten(-2)[..., : 2 * f.bins - 1].flatten(-2)


def store(codes: Tensor, natural: Tensor, slots: Tensor, widths: tuple[int, ...], side: str, kind: str) -> None:
    """Write packed rows [B, H, S, sum(widths)], of a trellis with the gain behind, to their slots int64 [S] of codes uint8
    [B, H, L, bytes], in place."""
    f, walk = make_fields(widths, kind), kind == "trellis"
    rows = _held_bytes(slot_units(natural[..., : sum(widths)], widths, kind), f)
    rows = torch.cat([rows, natural[..., -1:]], -1) if walk else rows
    index = _index(side, f.bins, f.half, walk, str(codes.device))
    at = slots[:, None] // TILE_SLOTS * (TILE_SLOTS * rows.shape[-1]) + index[slots % TILE_SLOTS]
    codes.flatten(2).index_copy_(2, at.flatten(), rows.flatten(2))


def fetch(codes: Tensor, widths: tuple[int, ...], side: str, kind: str, start: int = 0, count: int | None = None) -> Tensor:
    """Packed rows, as `store` takes them, of `count` slots from `start` on (all: None)."""
    count = codes.shape[2] - start if count is None else count
    first, last, f, walk = start // TILE_SLOTS, -(-(start + count) // TILE_SLOTS), make_fields(widths, kind), kind == "trellis"
    tiles = codes[:, :, first * TILE_SLOTS : last * TILE_SLOTS].contiguous().flatten(2).unflatten(2, (last - first, -1))
    index = _index(side, f.bins, f.half, walk, str(codes.device))
    rows = tiles[..., index.flatten()].unflatten(-1, index.shape).flatten(2, 3)
    rows = rows[:, :, start - first * TILE_SLOTS : start - first * TILE_SLOTS + count]
    rows, gains = rows.split((rows.shape[-1] - walk, int(walk)), dim=-1)
    units = F.pad(rows.unflatten(-1, (8, -1)), (0, int(f.half))).contiguous().view(torch.int16)
    natural = slot_bytes(units, widths, kind)
    return torch.cat([natural, gains], -1) if walk else natural


# -- keys by slot -----------------------------------------------------------------------------------------------------------


def _rotated(x: Tensor, slots: Tensor, p: Params, back: bool) -> Tensor:
    """R_{j0} R_s^-1 x, or its inverse when `back`; x [B or 1, H, S, D], slots [S]."""
    start = p["start_cos"][slots // BLOCK], p["start_sin"][slots // BLOCK]
    cos, sin = p["origin_cos"][:, None, None], p["origin_sin"][:, None, None]
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
            return (_rotated(x, slots, p, back=True) - table) @ p["k_basis"].to(x.dtype)
        x = x - _rotated(table.to(x.dtype), slots, p, back=False)
    return hadamard(x) if s.transform == "hadamard" else x


def restore_keys(x: Tensor, slots: Tensor, s: Any, p: Params, hadamard: Any) -> Tensor:
    """The stages of `transform_keys` taken back; keys after RoPE."""
    if s.domain == "block":
        back = back_table(p, "k", "basis").mT.to(x.dtype)
        return _rotated(x @ back + p["k_table"][:, slots % BLOCK][None], slots, p, back=False)
    x = hadamard(x) if s.transform == "hadamard" else x
    return x + _rotated(p["k_table"][:, slots % BLOCK][None].to(x.dtype), slots, p, back=False) if s.center else x


# -- tables of the kernel ---------------------------------------------------------------------------------------------------


def key_rows(basis: Tensor, sigma: Tensor, widths: tuple[int, ...], kind: str) -> Tensor:
    """diag(sigma · unit) U^T, [H, 128 components, 128 channels]: the query in units of codes. unit: 2^8 times what is read as 1,
    which is step · 2^-pos of equally spaced codes, 0 of those of 0 bits, and `walk_unit` of a trellis."""
    if kind == "trellis":
        units = [walk_unit(w) * 2.0**8 for w in widths]
    else:
        units = [EVEN_STEP[w] * 2.0 ** (8 - q) if w else 0.0 for w, q in zip(widths, even_positions(widths), strict=True)]
    return (sigma * torch.tensor(units, device=basis.device).repeat_interleave(8)).unsqueeze(-1) * basis.mT


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
    def rotation(cos: Tensor, sin: Tensor) -> Tensor:
        """Angles of block starts [P, R] → int32 [P, 2, 4, R / 16]: cosines then sines of the first half, B operand order."""
        half = cos.shape[-1] // 2
        both = torch.stack([cos[:, :half], sin[:, :half]], 1).view(-1, 2, half // 8, 4, 2)  # cos|sin, run, t, hi
        return _pairs(both.transpose(2, 3))
