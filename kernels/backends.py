"""One table of what runs where: who codes new rows, who attends, who does both in one step, and why nobody faster does.

Formula    the first backend of the table whose `declines` is silent serves a layer; the others say their reason in words
Source     ours
Differs    a layer's codes stand in one of two orders, "row" (bytes of a row, channel after channel) or "mma" (tiles that a GPU's
           matrix unit reads, see `kvsink.kernels.layout`): a cache takes the second where `plan` finds that the tile kernels serve
Exact      every backend equals the definition, `append_ref` and `attend_ref`, within the bound that its file states
Raises     nothing: the last backend of every column is the definition in plain operators, which serves all
Cost       a choice is made once per format, shape and device; later ones are a look-up of about a microsecond
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .quantize import SIGMA_KINDS

__all__ = [
    "GROWS",
    "KNOWN_STAGES",
    "TABLES_BACK",
    "Backend",
    "Call",
    "Choice",
    "Device",
    "LayerFormat",
    "LayerState",
    "Part",
    "Shape",
    "SideFormat",
    "choose",
    "device_of",
    "layer_format",
    "plan",
    "table",
    "tell_once",
    "unread",
]

GROWS = -1  # exact rows whose number grows with the slots
OFFERED = 128  # candidates of one segment among several new rows that kernels compare
KNOWN_STAGES = (
    "add",
    "center",
    "center_roped",
    "hadamard_heads",
    "negated",
    "project",
    "reorder_heads",
    "rope_offset",
    "rope_rows",
    "rope_start",
    "row_of",
    "table_rows",
    "unproject",
    "unrope_rows",
)
"""Functions of `kvsink.kernels.stages` that every backend carries out or declines by a word of the format."""

TABLES_BACK = ("metric", "unbiased")
"""Fields that only the tables tell of, see `kvsink.kernels.stages.back_table`: kernels that ask it serve them."""

_STEP = {"gauss": 2, "uniform": 2, "uniform-int": 3}


@dataclass(frozen=True)
class SideFormat:
    """How keys or values are stored, as kernels see it; the words are those of `kvsink.codecs.SideSpec`. beyond: names of what
    the declaration has beside them, fields, settings and stages: no backend serves a name that its `Part` does not list."""

    kind: str
    widths: tuple[int, ...]
    couple: int
    code_bits: int
    group_size: int
    gain: bool
    domain: str
    block: int
    center: bool
    transform: str
    order: int
    folded: bool
    heads_per_group: int
    reorder: bool
    by_token_block: bool
    norm: bool
    flush: int
    newest: int
    outliers: float
    exponent: int
    visual_bits: int
    beyond: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        """False where rows stay in 16 bit."""
        return self.kind != "none"

    @property
    def numbers(self) -> int:
        """What stands beside a row: 0 nothing, 1 a gain, 2 step and lowest, 3 step and zero."""
        return _STEP.get(self.kind, int(self.gain and self.kind in (*SIGMA_KINDS, "vector")))


@dataclass(frozen=True, eq=False)
class LayerFormat:
    """How one layer is stored; made by `layer_format`, so that equal ones are one object.

    segments: exact rows of each protection segment; ring: recent rows held, of which `window` are read as they came on both sides;
    tokens: of a block of keys; anchored: exact rows beside the segments; strict: new rows are read back from their codes; uneven:
    positions do not all run as far ahead of their slots.
    """

    key: SideFormat
    value: SideFormat
    segments: tuple[int, ...] = ()
    window: int = 0
    ring: int = 0
    tokens: int = 64
    strict: bool = False
    anchored: bool = False
    uneven: bool = False
    order: str = "row"

    @property
    def exact(self) -> int:
        """Exact rows of the segments."""
        return sum(self.segments)

    @property
    def modal(self) -> bool:
        """Whether visual rows are coded otherwise than text."""
        return bool(self.key.visual_bits or self.value.visual_bits)

    def in_tiles(self) -> LayerFormat:
        """The same in the order of the tile kernels."""
        return layer_format(*(getattr(self, f.name) for f in fields(self)[:-1]), "mma")


layer_format = cache(LayerFormat)
"""The one object of equal formats: choices are found again by it, without a look into it."""


class LayerState(NamedTuple):
    """The tensors of a layer, in the order in which ops receive them; shapes as `kvsink.codecs.Codec.layout` says."""

    k_codes: Tensor
    k_scale: Tensor
    v_codes: Tensor
    v_scale: Tensor
    exact_k: Tensor
    exact_v: Tensor
    exact_slot: Tensor
    exact_score: Tensor
    recent_k: Tensor
    recent_v: Tensor
    recent_slot: Tensor
    length: Tensor
    positions: Tensor
    k_norm: Tensor
    k_sparse: Tensor
    k_sparse_at: Tensor
    v_sparse: Tensor
    v_sparse_at: Tensor
    real: Tensor


class Shape(NamedTuple):
    """What a call works on. heads: query heads, 0 where only rows are coded; rotary: channels that RoPE turns; rows: new ones per
    sequence, 2 for any more; mask: "" for none, "slots" for bool [B or 1, 1, 1, L], else "other"; exact: places of exact rows, or
    GROWS; offered: whether every segment is offered one row of one new one, or at most `OFFERED` of several."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    rotary: int
    dtype: torch.dtype
    exact: int = 0
    rows: int = 1
    mask: str = ""
    offered: bool = True

    @property
    def repeats(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, eq=False)
class Device:
    """Where a call runs. type: "cpu", "cuda", "hip" for a GPU that PyTorch reaches through ROCm, or another of PyTorch's; shared:
    bytes of shared memory that a block can have; place: the device itself, on which kernels can be compiled, or None for one that
    is only asked about."""

    type: str
    capability: tuple[int, int] = (0, 0)
    name: str = "this GPU"
    triton: bool = False
    place: torch.device | None = None
    shared: int = 232448

    @property
    def gpu(self) -> bool:
        """Whether Triton could know it."""
        return self.type in ("cuda", "hip")


@cache
def device_of(place: torch.device) -> Device:
    """What is known of a device."""
    if place.type != "cuda":
        return Device(place.type, place=place)
    kind = "cuda" if torch.version.hip is None else "hip"
    triton = importlib.util.find_spec("triton") is not None
    facts = torch.cuda.get_device_properties(place)
    shared = getattr(facts, "shared_memory_per_block_optin", Device.shared)
    return Device(kind, (facts.major, facts.minor), facts.name, triton, place, shared)


@dataclass
class Call:
    """The arguments of `append_`, `attend` or both. codec: the one that `text` names; k: new keys after RoPE; coded: those to be
    coded, before RoPE unless `roped`, with the angles of their positions, or () for a codec that takes none."""

    codec: Any
    text: str
    k: Tensor
    v: Tensor
    state: LayerState
    params: Sequence[Tensor]
    q: Tensor | None = None
    positions: Tensor | None = None
    candidates: Sequence[Tensor] = ()
    mask: Tensor | None = None
    scale: float = 1.0
    causal: bool = False
    coded: Tensor | None = None
    turn: Sequence[Tensor] = ()
    roped: bool = True

    @property
    def facts(self) -> tuple[LayerFormat, Shape, Device]:
        """What `choose` goes by: how rows are stored, their sizes, where they are; the rows themselves stay here."""
        return self.codec.format, self.shape, device_of(self.k.device)

    @cached_property
    def st(self) -> dict[str, Tensor]:
        """The state by name."""
        return self.state._asdict()

    @cached_property
    def p(self) -> dict[str, Tensor]:
        """The tables by name."""
        tables: dict[str, Tensor] = self.codec.tables(self.params)
        return tables

    @property
    def angles(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B or 1, S, R] of the new rows, R = 0 where none were given."""
        cos, sin = self.turn or (self.k.new_empty(1, self.k.shape[2], 0),) * 2
        return cos, sin

    def coding(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Sequence[Tensor], LayerState, Sequence[Tensor]]:
        """The arguments of `append_` up to the tables."""
        assert self.positions is not None
        rows = self.k if self.coded is None else self.coded
        return rows, self.v, self.positions, *self.angles, self.candidates, self.state, self.params

    def asking(self) -> tuple[Tensor, Tensor, Tensor, LayerState, Sequence[Tensor], Tensor | None, float]:
        """The arguments of `attend` up to the scale."""
        assert self.q is not None
        return self.q, self.k, self.v, self.state, self.params, self.mask, self.scale

    @cached_property
    def shape(self) -> Shape:
        """Sizes, and what else kernels have to know of the arguments before they see them."""
        k, q, mask, visible = self.k, self.q, self.mask, ""
        if mask is not None:
            plain = mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == 1
            visible = "slots" if plain else "other"
        scores = self.candidates[: 2 * len(self.codec.segments) : 2]
        heads, dtype = (0, k.dtype) if q is None else (q.shape[1], q.dtype)
        _, kv_heads, rows, dim = k.shape
        return Shape(
            heads,
            kv_heads,
            dim,
            self.v.shape[3],
            self.codec.rotary(self.params),
            dtype,
            self.state.exact_k.shape[2],
            min(rows, 2),
            visible,
            all(x.shape[1] <= (1 if rows == 1 else OFFERED) for x in scores),
        )


class Part(NamedTuple):
    """One thing a backend does. declines: "" where it serves, else the reason in words that a user reads; knows: names of
    `SideFormat.beyond` that it carries out all the same, None for all of them: the definition runs the codec itself."""

    declines: Callable[[LayerFormat, Shape, Any], str]
    run: Callable[[Call], Any]
    knows: tuple[str, ...] | None = ()

    def refuses(self, f: LayerFormat, s: Shape, d: Device | None) -> str:
        """The same with what a format has beyond the words of kernels, for which nothing is compiled."""
        for what, side in (("keys", f.key), ("values", f.value)):
            for name in side.beyond if self.knows is not None else ():
                if name not in self.knows:  # type: ignore[operator]
                    uncompiled = d if d is None else replace(d, place=None)
                    return self.declines(f, s, uncompiled) or f"{what} with {name!r}, which these kernels do not know"
        return self.declines(f, s, d)


@dataclass(frozen=True)
class Backend:
    """What one family of kernels does; None where it has none for that."""

    name: str
    append: Part | None = None
    attend: Part | None = None
    step: Part | None = None


class Choice(NamedTuple):
    """Who serves, and the reason of each faster backend."""

    name: str
    run: Callable[[Call], Any]
    why: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return " | ".join((self.name, *(f"{name}: {reason}" for name, reason in self.why)))


@cache
def table() -> tuple[Backend, ...]:
    """All backends, fastest first."""
    from . import append_attend
    from .append import append_plain
    from .attend import attend_plain
    from .cpu import append as cpu_append
    from .cpu import attend as cpu_attend
    from .cuda import backend as tiles
    from .cuda import launch, rows_of_bytes
    from .triton import append as triton_append
    from .triton import attend as triton_attend

    return (
        Backend(
            "cuda (tiles)",
            Part(tiles.declines, launch.append, TABLES_BACK),
            Part(tiles.declines_mask, launch.attend, TABLES_BACK),
            Part(tiles.declines_step, launch.step, TABLES_BACK),
        ),
        Backend(
            "cuda (rows of bytes)",
            None,
            Part(rows_of_bytes.declines, rows_of_bytes.attend, ("metric",)),
            Part(append_attend.declines_beside, append_attend.side_by_side, ("metric",)),
        ),
        Backend(
            "triton",
            Part(triton_append.declines, triton_append.append, TABLES_BACK),
            Part(triton_attend.declines, triton_attend.attend, TABLES_BACK),
        ),
        Backend(
            "cpu (C)",
            Part(cpu_append.declines, cpu_append.append, TABLES_BACK),
            Part(cpu_attend.declines, cpu_attend.attend, TABLES_BACK),
        ),
        Backend("torch", Part(_nobody, append_plain, None), Part(_nobody, attend_plain, None)),
        Backend("append, then attend", step=Part(_nobody, append_attend.in_turn, None)),
    )


def _nobody(f: LayerFormat, s: Shape, d: Device) -> str:
    return ""


_TOLD: set[str] = set()


@cache
def choose(what: str, f: LayerFormat, s: Shape, d: Device) -> Choice:
    """Who does `what`, one of "append", "attend" and "step", for a layer of format `f`, and why nobody faster does."""
    why: list[tuple[str, str]] = []
    for backend in table():
        part: Part | None = getattr(backend, what)
        if part is None:
            continue
        if not (reason := part.refuses(f, s, d)):
            return Choice(backend.name, part.run, tuple(why))
        why.append((backend.name, reason))
    raise AssertionError("the definition serves everything")


def plan(what: str, f: LayerFormat, s: Shape, d: Device) -> Choice:
    """`choose` for a layer that is not stored yet: in tiles where their kernels serve it, else in rows of bytes."""
    tiles = table()[0]
    tiled = f.in_tiles()
    assert tiles.attend is not None
    if reason := tiles.attend.refuses(tiled, s, d):
        found = choose(what, f, s, d)
        return found._replace(why=((tiles.name, reason), *found.why[1:]))
    return choose(what, tiled, s, d)


def unread(f: LayerFormat, kinds: Sequence[str]) -> str:
    """What keeps a format from kernels that look codes up row by row and head by head, in words; empty when nothing does."""
    for side in (f.key, f.value):
        if side.kind not in kinds:
            return f"rows of kind {side.kind}"
        if side.by_token_block:
            return "ranges along tokens"
        if side.outliers:
            return "sparse outliers"
        if side.exponent:
            return "rows beyond the range of float16"
    if f.ring > f.window:
        return "rows that stay exact on one side alone"
    if f.order == "mma":
        return "codes in the order of a GPU kernel"
    k, v = f.key, f.value
    if k.reorder or k.heads_per_group > 1 or (v.heads_per_group > 1 and not v.folded):
        return "a rotation across heads"
    return ""


def tell_once(text: str) -> None:
    """Warn once per process."""
    if text not in _TOLD:
        _TOLD.add(text)
        warnings.warn(f"kvsink: {text}", stacklevel=3)
