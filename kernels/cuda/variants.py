"""What the CUDA kernels are compiled for: a kind of layer, a card, and how a block works on it.

Formula    shared memory as attend.cuh lays it out; of the ways a block can work the first that fits the card is taken
Source     ours
Raises     NativeError where none fits
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..layout import even_positions, make_fields, tile_bytes
from ..levels import EVEN_STEP
from ..trellis import CUBIC, LEVELS
from .driver import NativeError

__all__ = ["FEW", "SHARED_LIMIT", "Card", "Shape", "Variant", "by_warp", "card_named", "card_of", "single", "too_old", "unit"]

FEW = 8  # exact rows that a warp of each query head sees to
SHARED_LIMIT = 232448  # bytes of shared memory that one block of an sm_90 GPU can have
_FOLDER = Path(__file__).parent
ROW_COST = 16  # superblocks of 128 tokens in whose time a divided row is prepared, merged and written
FILES = (
    "arch.cuh",
    "channels.cuh",
    "fields.cuh",
    "trellis.cuh",
    "read.cuh",
    "attend.cuh",
    "query.cuh",
    "softmax.cuh",
    "exact.cuh",
    "merge.cuh",
    "rounding.cuh",
    "search.cuh",
    "rows.cuh",
    "schedule.cuh",
    "turn.cuh",
    "pages.cuh",
)


def unit(defines: Mapping[str, str], names: Sequence[str]) -> str:
    """One translation unit without includes: macros, then files of `kernels/cuda`."""
    head = "".join(f"#define {name} {text}\n" for name, text in defines.items())
    return head + "".join((_FOLDER / name).read_text() for name in names)


@dataclass(frozen=True)
class Card:
    """What code is made for: compute capability times ten, the bytes of shared memory that one block can have, whether the
    driver's own compiler finishes it, as the code of another card must be, and how a block works, if not as is best."""

    target: int = 90
    shared: int = SHARED_LIMIT
    portable: bool = False
    shape: Shape | None = None

    @property
    def arch(self) -> str:
        """The compiler's name of the target; with the features of one generation where the kernels use them."""
        return f"compute_{self.target}" if self.portable else f"sm_{self.target}{'a' if self.target in (90, 100) else ''}"


SMALL = 101376  # bytes of shared memory that a block of most cards can have
SHARED = {80: 166912, 87: 166912, 90: SHARED_LIMIT, 100: SHARED_LIMIT}
"""Bytes of shared memory that a block can have, by compute capability times ten; of others `SMALL`."""


def card_named(capability: str) -> Card:
    """The card of a compute capability such as "8.9". Raises NativeError for what is none."""
    major, _, minor = capability.partition(".")
    if not major.isdecimal() or len(minor) != 1 or not minor.isdecimal():
        raise NativeError(f"{capability!r} is not a compute capability; write for example 9.0")
    if reason := too_old((int(major), int(minor)), "a card"):
        raise NativeError(reason)
    target = 10 * int(major) + int(minor)
    return Card(target, SHARED.get(target, SMALL))


@cache
def card_of(device: torch.device) -> Card:
    """The card at hand. $KVSINK_CUDA_TARGET (compute_80, ...) and $KVSINK_CUDA_SHARED (bytes) name a smaller one, whose code it
    then runs; $KVSINK_CUDA_SHAPE (warps,stages,items,steps of `Shape`) says how a block works, to measure one against another."""
    major, minor = torch.cuda.get_device_capability(device)
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SHARED_LIMIT)
    found = 10 * major + minor
    target = _asked_target(found)
    return Card(target, _asked_shared(shared), target != found, _asked_shape())


def _asked_target(found: int) -> int:
    """What $KVSINK_CUDA_TARGET says, or the target of the card. Raises NativeError for what does not run on it."""
    asked = os.environ.get("KVSINK_CUDA_TARGET", "")
    named = re.fullmatch(r"(?:(?:compute|sm)_)?([1-9][0-9]+)[af]?", asked)
    if asked and not named:
        raise NativeError(f"KVSINK_CUDA_TARGET={asked}: write a target of a CUDA compiler, as compute_80")
    target = int(named[1]) if named else found
    if target != found and not 80 <= target < 90:
        raise NativeError(f"KVSINK_CUDA_TARGET={asked}: of other cards, the code of 8.0 to 8.9 alone runs here; write compute_80")
    return target


def _asked_shared(most: int) -> int:
    """What $KVSINK_CUDA_SHARED says, or the bytes that the card has. Raises NativeError for what it has not."""
    asked = os.environ.get("KVSINK_CUDA_SHARED", "")
    if not asked:
        return most
    if not re.fullmatch("[1-9][0-9]*", asked) or int(asked) > most:
        raise NativeError(f"KVSINK_CUDA_SHARED={asked}: write bytes of shared memory from 1 to {most}, as 101376")
    return int(asked)


def _asked_shape() -> Shape | None:
    """What $KVSINK_CUDA_SHAPE says. Raises NativeError for what no kernel is written for."""
    asked = os.environ.get("KVSINK_CUDA_SHAPE", "")
    if not asked:
        return None
    found = [int(n) for n in asked.split(",") if n.isdecimal()]
    if len(found) == 4 and asked == ",".join(map(str, found)):
        shape = Shape(*found)
        if (
            shape.warps in (4, 8, 12, 16)
            and shape.stages > 0
            and shape.items in (1, 2, 4)
            and 0 < shape.steps <= min(2, shape.items)
        ):
            return shape
    raise NativeError(
        f"KVSINK_CUDA_SHAPE={asked}: write warps,stages,items,steps, as 12,1,4,2: 4, 8, 12 or 16 warps, steps of 1 or 2 in items"
    )


@dataclass(frozen=True)
class Shape:
    """How a block works: warps that compute, stages of each, tile pairs of a stage, units of one softmax step, most query heads."""

    warps: int
    stages: int
    items: int
    steps: int
    heads: int = 8

    def groups(self, repeats: int) -> int:
        """Rows of the grid that share a key-value head of `repeats` query heads."""
        return 1 if repeats <= 4 else -(-repeats // self.heads)

    def columns(self, repeats: int) -> int:
        """Query heads of a product."""
        return 4 if -(-repeats // self.groups(repeats)) <= 4 else 8


_SHAPES = (
    Shape(12, 1, 2, 2),
    Shape(8, 2, 4, 2),
    Shape(8, 1, 4, 2),
    Shape(8, 2, 2, 2),
    Shape(8, 2, 1, 1),
    Shape(8, 1, 2, 2),
    Shape(4, 2, 4, 2),
    Shape(4, 1, 4, 2),
    Shape(4, 1, 2, 2),
    Shape(4, 2, 2, 2),
    Shape(4, 2, 1, 1),
    Shape(4, 1, 1, 1),
    Shape(4, 2, 1, 1, heads=4),
    Shape(4, 1, 1, 1, heads=4),
)


@dataclass(frozen=True)
class Variant:
    """What is compiled in: mode (0 plain, 1 with the mean's logit, 2 block KLT), widths of runs of 8 channels, query heads per
    key-value head, channels that carry RoPE, whether rows read as they came are many: a window, or more than `FEW` exact ones; and
    which sides have codes of a trellis."""

    mode: int
    key_widths: tuple[int, ...]
    value_widths: tuple[int, ...]
    repeats: int
    rotary: int = 128
    many: bool = False
    key_trellis: bool = False
    value_trellis: bool = False

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return 8 * len(self.key_widths)

    @property
    def single_row(self) -> bool:
        """Whether `append_row` codes a new row by a block of its own."""
        return self.mode != 2 or self.dim <= 128 or self.rotary == self.dim or self.rotary <= 128

    @property
    def ahead(self) -> bool:
        """Whether a launch ahead of attention takes the query to the basis of the codes."""
        return self.mode == 2 and self.dim > 128

    @property
    def _tile_bytes(self) -> tuple[int, int]:
        """Bytes of one slot's codes, without the gain of a trellis."""
        sides = (self.key_widths, self.key_trellis), (self.value_widths, self.value_trellis)
        keys, values = (tile_bytes(w, "trellis") - 1 if walk else tile_bytes(w, "lloyd-even") for w, walk in sides)
        return keys, values

    def shared_bytes(self, shape: Shape) -> int:
        """SMEM_BYTES of attend.cuh for this variant."""
        d, columns, runs = self.dim, shape.columns(self.repeats), self.dim // 8
        klt, codes = self.mode == 2, 128 * sum(self._tile_bytes)
        scales = (128 if self.key_trellis else 256 if klt else 512) + (128 if self.value_trellis else 512)
        heads = -(-self.repeats // shape.groups(self.repeats))
        held, blocks = 8 if columns == 8 else 4 if heads > 2 else 2, 1 if columns == 8 and shape.items < 4 else 2
        turn = blocks * held * (2 * d + 256) if self.ahead else 4 * self.rotary if self.mode else 0
        stage = codes * shape.items // 4 + scales + turn + 128
        tables = 0 if self.ahead else (128 * d if self.mode else 0) + (2 * d * d if klt else 0)
        parts = shape.warps * heads * (d + 4) * 4
        raw = columns * 4 * (-(-runs // 4) * 4 + 4) * 4 if self.mode and not self.ahead else 0
        query = 2 * raw + 2 * (0 if klt else columns * d * 2) + 64
        return shape.warps * shape.stages * stage + tables + parts + query + 8 * (shape.warps * shape.stages + 8)

    def shape(self, card: Card) -> Shape:
        """How a block works on a card. Raises NativeError when no way fits its shared memory."""
        known = _SHAPES if card.shape is None else (card.shape,)
        fits = [s for s in known if (card.shape or self._suits(s, card)) and self.shared_bytes(s) <= card.shared]
        if not fits:
            least = min(self.shared_bytes(s) for s in known)
            raise NativeError(f"{least} bytes of shared memory, more than the {card.shared} that a block can have")
        return fits[0]

    def _suits(self, shape: Shape, card: Card) -> bool:
        """Whether registers suffice: those of eight warps that compute are few where they cannot be taken from others. Twelve take
        less time where one reads both sides of a trellis for more than four query heads of 128 channels, and more elsewhere; one
        stage of a whole superblock does in place of two of half of it with equally spaced keys in a basis and 3 bits or more, and
        in 99 KB with any keys in a basis. There eight with one small stage do where 2 bits have no basis."""
        even = self.dim == 128 and not (self.key_trellis or self.value_trellis)
        klt = self.mode == 2 and self.dim == 128
        small = card.shared <= SMALL and card.target not in (90, 100)
        if (shape.warps, shape.stages) == (4, 1) and shape.items > 1:
            return small and klt
        if small and (shape.warps, shape.stages, shape.items) == (8, 1, 2):
            return even and not klt and set(self.key_widths + self.value_widths) == {2}
        eight = card.target in (90, 100) and (self.dim <= 128 or self.repeats <= 4 or self.ahead)
        if (shape.warps, shape.stages, shape.items) == (8, 1, 4):
            many = sum(self.key_widths) + sum(self.value_widths) >= 6 * len(self.key_widths)
            return eight and klt and even and many
        twelve = eight and self.dim == 128 and shape.columns(self.repeats) == 8 and self.key_trellis and self.value_trellis
        return (shape.warps == 4 or (twelve if shape.warps == 12 else eight)) and (self.dim <= 128 or shape.steps == 1)

    def defines(self, card: Card) -> dict[str, str]:
        """Macros of the source."""
        shape = self.shape(card)
        return {
            "MODE": str(self.mode),
            **_places("KEY", self.key_widths, self.key_trellis),
            **_places("VALUE", self.value_widths, self.value_trellis),
            "KEY_TRELLIS": str(int(self.key_trellis)),
            "VALUE_TRELLIS": str(int(self.value_trellis)),
            "WALK_LEVELS": ", ".join(f"{x}" for unit, numbers in LEVELS.values() for x in (unit, *numbers)),
            "CUBIC": ", ".join(f"{x}" for factors in CUBIC.values() for x in factors),
            "HEADS_PER_KV": str(self.repeats),
            "HEAD_DIM": str(self.dim),
            "ROTARY": str(self.rotary),
            "MANY": str(int(self.many)),
            "WARPS": str(shape.warps),
            "STAGES": str(shape.stages),
            "ITEM_PAIRS": str(shape.items),
            "STEP_PAIRS": str(shape.steps),
            "MOST_HEADS": str(shape.heads),
            "TARGET": str(card.target),
            "SHARED_MOST": str(card.shared),
            "KSTEP": ", ".join(f"{EVEN_STEP[w]}f" for w in range(1, 7)),
        }

    def source(self, card: Card) -> str:
        """One translation unit without includes."""
        return unit(self.defines(card), FILES)


def _places(side: str, widths: tuple[int, ...], walks: bool) -> dict[str, str]:
    """Macros of fields.cuh: where the codes of each run stand."""
    fields = make_fields(widths, "trellis" if walks else "lloyd-even")
    bins, places = [0] * len(widths), [0] * len(widths)
    for piece in fields.pieces:
        if not walks or piece.first == 2:
            bins[piece.run], places[piece.run] = piece.bin, piece.offset
    read = places if walks else even_positions(widths)
    lists = {"WIDTHS": widths, "BINS": bins, "SHIFTS": [a - b for a, b in zip(places, read, strict=True)], "PLACES": read}
    units = {"UNITS": (fields.bins, int(fields.half))}
    return {f"{side}_{name}": ", ".join(map(str, numbers)) for name, numbers in (lists | units).items()}


def by_warp(batch: int, share: int, tiles: int, warps: int) -> bool:
    """Whether rows of `tiles` superblocks take less time whole, one warp each, than divided among `share` blocks of `warps`."""
    warps *= share
    return -(-batch // warps) * warps * tiles <= batch * max(ROW_COST, 1.1 * tiles)


def single(argument: Any) -> bool:
    """Whether there is one sequence, and a block of each head for every superblock that it can hold: `attend_single`."""
    return bool(argument.B == 1 and argument.share == argument.tiles and not argument.window and argument.E <= FEW)


def too_old(capability: tuple[int, int], name: str) -> str:
    """Why a GPU cannot run the kernels; empty when it can."""
    major, minor = capability
    return f"{name} has compute capability {major}.{minor}; the kernels need 8.0" if major < 8 else ""
