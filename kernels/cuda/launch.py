"""The GPU side of `append_` and `attend` for codecs in tiles: arguments of the CUDA kernels.

Formula    see `kvsink.kernels.append`, `kvsink.kernels.attend`
Source     ours
Shapes     as the ops'
Exact      codes equal the definition's up to ties that the order of sums decides; output: relative error of a 16-bit result
Declines   a mask that is not bool [B or 1, 1, 1, >= L] for one new row: the definition runs then, and says so once
Cost       one launch for `append_`, one for `attend` of one new row, two with block KLT in more than 128 channels, between which
           the turned queries of all blocks stand in memory; no copy from the host, no synchronisation
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import layout
from ..append import keep_exact
from ..attend import attend_plain
from ..backends import Call, LayerFormat
from ..prefill import attend_chunk
from ..read import put_rows
from ..stages import back_table, rope_rows
from ..triton import append as triton_append
from . import module, variants

__all__ = [
    "REPEATS", "AttendArguments", "RowArguments", "append", "append_rows", "attend", "attend_one", "decode_rows", "library",
    "step", "step_one", "variant_of",
]  # fmt: skip

_pointer, _int, _long, _float = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_float
_SEGMENTS = 4
REPEATS = 32  # query heads that share a key-value head
_READ = ("k_codes", "k_scale", "v_codes", "v_scale", "exact_k", "exact_v", "exact_slot", "recent_k", "recent_v")

State = Mapping[str, Tensor]
Params = Mapping[str, Tensor]


class AttendArguments(ctypes.Structure):
    """`Params` of attend.cuh."""

    _fields_ = [
        *((n, _pointer) for n in (
            "q", "k_codes", "k_scale", "v_codes", "v_scale", "mean", "rotation", "basis", "origin_cos", "origin_sin", "length",
            "pages", "exact_at", "mask", "exact_k", "exact_v", "exact_slot", "recent_k", "recent_v", "new_k", "new_v",
            "value_mean", "value_sigma", "out", "partial", "turned",
        )),
        *((n, _long) for n in ("mask_row", "length_row", "page_row", "page_bytes", "unit_bytes")),
        *((n, _int) for n in (
            "B", "Hkv", "share", "tiles", "E", "N", "extra", "window", "q_bf16", "key_hadamard", "value_hadamard",
        )),
        ("scale", _float),
    ]  # fmt: skip


class RowArguments(ctypes.Structure):
    """`RowParams` of rows.cuh."""

    _fields_ = [
        ("k", _pointer), ("v", _pointer), ("k_stride", _long * 3), ("v_stride", _long * 3),
        *((n, _pointer) for n in (
            "table", "start_cos", "start_sin", "origin_cos", "origin_sin", "basis", "sigma", "v_mean", "v_sigma", "length",
            "positions", "slots", "asks", "named",
        )),
        *((n, _long) for n in ("position_row", "length_row", "page_bytes", "unit_bytes")),
        *((n, _pointer) for n in (
            "stored_positions", "k_codes", "v_codes", "k_scale", "v_scale", "exact_k", "exact_v", "exact_slot", "exact_score",
        )),
        ("score", _pointer * _SEGMENTS),
        *((n, _pointer) for n in ("recent_k", "recent_v", "recent_slot", "arrived", "group_arrived")),
        ("capacity", _int * _SEGMENTS),
        *((n, _int) for n in (
            "segments", "E", "window", "B", "Hkv", "S", "L", "bf16", "key_hadamard", "value_hadamard", "per", "first", "places",
        )),
        ("key_clip", _float), ("value_clip", _float),
    ]  # fmt: skip


class Library(Protocol):
    """Who runs the kernels: `module.Cubin`, or an emulation."""

    groups: int  # rows of the grid that share a key-value head
    turned: int  # bytes of 128 slots' queries in the basis, for each of them; 0 where attention turns them

    @property
    def partial(self) -> Tensor: ...
    @property
    def arrived(self) -> Tensor: ...
    def share(self, heads: int) -> int: ...
    def attend(self, argument: Any, fresh: Any, heads: int) -> None: ...
    def append(self, argument: Any) -> None: ...
    def step(self, argument: Any, fresh: Any, rows: Any, heads: int) -> None: ...
    def decode(self, argument: Any, rows: int, heads: int) -> None: ...
    def list_exact(self, argument: Any, sequences: int) -> None: ...


def variant_of(codec: Any, repeats: int, rotary: int | None = None) -> variants.Variant:
    """What the kernels must be compiled for, by a codec or a format; rotary: channels that carry RoPE, None for all of a head."""
    return _variant(codec if isinstance(codec, LayerFormat) else codec.format, repeats, rotary)


@cache
def _variant(f: LayerFormat, repeats: int, rotary: int | None) -> variants.Variant:
    mode = 2 if f.key.transform == "klt" else 1 if f.key.center else 0
    rotated = 8 * len(f.key.widths) if rotary is None or not mode else rotary
    many = f.window > 0 or f.exact > variants.FEW
    walks = (side.kind == "trellis" for side in (f.key, f.value))
    return variants.Variant(mode, f.key.widths, f.value.widths, repeats, rotated, many, *walks)


def _rotates(side: Any) -> int:
    return int(side.transform == "hadamard" and not side.folded)


# -- rows in and out ----------------------------------------------------------------------------------------------------


def _row_arguments(codec: Any, k: Tensor, v: Tensor, st: State, p: Params, back: bool = False) -> RowArguments:
    """The arguments of rows to be coded, or `back` for rows to be read."""
    at = module.pointer
    basis = p.get("tile_rows" if back else "k_basis")
    sigma, value_sigma = (back_table(p, n, "sigma") if back else p.get(f"{n}_sigma") for n in "kv")
    return RowArguments(
        k=at(k), v=at(v), k_stride=(_long * 3)(*k.stride()[:3]), v_stride=(_long * 3)(*v.stride()[:3]),
        table=at(p.get("k_table")), start_cos=at(p.get("start_cos")), start_sin=at(p.get("start_sin")),
        origin_cos=at(p.get("origin_cos")), origin_sin=at(p.get("origin_sin")), basis=at(basis), sigma=at(sigma),
        v_mean=at(p.get("v_mean")), v_sigma=at(value_sigma), k_codes=at(st["k_codes"]), v_codes=at(st["v_codes"]),
        k_scale=at(st["k_scale"]), v_scale=at(st["v_scale"]),
        recent_k=at(st["recent_k"]), recent_v=at(st["recent_v"]), recent_slot=at(st["recent_slot"]), window=codec.ring,
        B=k.shape[0], Hkv=k.shape[1], S=k.shape[2], L=st["k_codes"].shape[2],
        bf16=int(k.dtype == torch.bfloat16), key_hadamard=_rotates(codec.key), value_hadamard=_rotates(codec.value),
        key_clip=codec.key.clip, value_clip=codec.value.clip,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """A tensor whose rows lie together and 16-byte aligned."""
    aligned = x.stride(-1) == 1 and all(n % 8 == 0 for n in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _fresh_rows(
    lib: Library, codec: Any, k: Tensor, v: Tensor, positions: Tensor, candidates: Sequence[Tensor], st: State, p: Params
) -> tuple[RowArguments, bool, list[Tensor]]:
    """Arguments for new rows, whether the kernel sees to the exact rows too, and what must live until the launch."""
    k, v = _rows(k), _rows(v)
    positions = positions if positions.dtype == torch.int64 and positions.stride(-1) == 1 else positions.long().contiguous()
    a = _row_arguments(codec, k, v, st, p)
    at = module.pointer
    a.length, a.positions, a.stored_positions = at(st["length"]), at(positions), at(st["positions"])
    a.length_row = int(st["length"].dim() > 0)
    a.per = min(8, k.shape[0] * k.shape[2])  # a block's rows are of one head, or nearly all blocks' are
    a.position_row = positions.stride(0) if positions.shape[0] > 1 else 0
    # One new row has one candidate per segment: the kernel enters it itself.
    whole = k.shape[2] == 1 and len(codec.segments) <= _SEGMENTS and all(s.shape[1] == 1 for s in candidates[::2])
    whole = whole and k.shape[0] * (k.shape[1] + 1) <= lib.arrived.numel()
    scores = [s.float().expand(k.shape[0], 1).contiguous() for s in candidates[::2]] if whole else []
    if whole:
        counts = lib.arrived
        a.segments, a.E, a.arrived, a.group_arrived = len(codec.segments), codec.exact_rows, at(counts), at(counts[k.shape[0] :])
        a.exact_k, a.exact_v = at(st["exact_k"]), at(st["exact_v"])
        a.exact_slot, a.exact_score = at(st["exact_slot"]), at(st["exact_score"])
        for i, (score, capacity) in enumerate(zip(scores, codec.segments, strict=True)):
            a.score[i], a.capacity[i] = score.data_ptr(), capacity
    return a, whole, [k, v, positions, *scores]


def append_rows(
    lib: Library, codec: Any, k: Tensor, v: Tensor, positions: Tensor, candidates: Sequence[Tensor], st: State, p: Params
) -> bool:
    """Code and store new rows [B, H, S, D], keys after RoPE. True when the exact rows have been seen to as well."""
    a, whole, _held = _fresh_rows(lib, codec, k, v, positions, candidates, st, p)
    lib.append(a)
    return whole


def decode_rows(
    lib: Library, codec: Any, st: State, p: Params, start: int, end: int, dtype: torch.dtype, total: int
) -> tuple[Tensor, Tensor]:
    """Slots start … end - 1 of `total` as keys after RoPE and values [B, H, end - start, D], recent and exact rows over them."""
    b, h = st["k_codes"].shape[:2]
    k, v = (torch.empty(b, h, end - start, 8 * len(codec.key.widths), dtype=dtype, device=st["k_codes"].device) for _ in range(2))
    a = _row_arguments(codec, k, v, st, p, back=True)
    a.first = start
    lib.decode(a, b * (end - start), h)
    for full, side, prefix in ((k, codec.key, "k"), (v, codec.value, "v")):
        places = [(f"exact_{prefix}", st["exact_slot"])]
        if codec.ring:
            places.insert(0, (f"recent_{prefix}", codec.exact_recent(side, st["recent_slot"], total)[None].expand(b, -1)))
        for name, slot in places:
            inside = (slot >= start) & (slot < end)
            put_rows(full, st[name], torch.where(inside, slot - start, -1))
    return k, v


# -- one new row ----------------------------------------------------------------------------------------------------------


def _mask_rows(mask: Tensor, slots: int) -> Tensor | None:
    """A mask as bytes [B or 1, slots] with aligned rows, or None when it is of another kind."""
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != 1:
        return None
    rows = mask[:, 0, 0, :slots]
    if rows.shape[1] < slots:
        return F.pad(rows, (0, slots - rows.shape[1]))
    aligned = rows.stride(1) == 1 and rows.data_ptr() % 16 == 0 and (rows.shape[0] == 1 or rows.stride(0) % 16 == 0)
    return rows if aligned else rows.clone(memory_format=torch.contiguous_format)


def step_one(
    lib: Library, codec: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, candidates: Sequence[Tensor], st: State,
    p: Params, mask: Tensor | None, scale: float,
) -> Tensor | None:  # fmt: skip
    """`append_` and `attend` of one new row per sequence, side by side; None when one must wait for the other.

    The new row enters the exact rows after attention has read them, so the row it drives out is exact for one step longer.
    """
    if codec.strict:
        return None
    fresh, whole, _held = _fresh_rows(lib, codec, k, v, positions, candidates, st, p)
    return attend_one(lib, codec, q, k, v, st, p, mask, scale, fresh) if whole else None


def attend_one(
    lib: Library, codec: Any, q: Tensor, k: Tensor, v: Tensor, st: State, p: Params, mask: Tensor | None, scale: float,
    fresh: RowArguments | None = None,
) -> Tensor | None:  # fmt: skip
    """`attend` of one new row per sequence, which `fresh` stores too; None when the mask is not one of visible slots."""
    slots = st["k_codes"].shape[2]
    visible = None if mask is None else _mask_rows(mask, slots)
    if mask is not None and visible is None:
        return None
    q, k, v = (_rows(x).contiguous() for x in (q, k, v))
    out = torch.empty_like(q)
    at = module.pointer
    module.contiguous([st[n] for n in _READ])
    groups = lib.groups
    new = 0 if codec.strict else 1
    # No more blocks than tiles: one without work would fetch its tables all the same.
    share = min(lib.share(k.shape[1] * groups), q.shape[0] * (slots // layout.TILE_SLOTS))
    a = AttendArguments(
        q=at(q), mean=at(p.get("tile_mean")), rotation=at(p.get("tile_turn")), basis=at(p.get("tile_basis")),
        origin_cos=at(p.get("origin_cos")), origin_sin=at(p.get("origin_sin")), length=at(st["length"]), mask=at(visible),
        **{n: at(st[n]) for n in _READ},
        new_k=at(k), new_v=at(v), window=codec.ring, value_mean=at(p.get("v_mean")), value_sigma=at(back_table(p, "v", "sigma")),
        out=at(out), partial=at(lib.partial),
        length_row=int(st["length"].dim() > 0),
        mask_row=visible.stride(0) if visible is not None and visible.shape[0] > 1 else 0,
        B=q.shape[0], Hkv=k.shape[1], share=share, tiles=slots // layout.TILE_SLOTS, E=codec.exact_rows,
        N=new, extra=1 - new, q_bf16=int(q.dtype == torch.bfloat16), key_hadamard=_rotates(codec.key),
        value_hadamard=_rotates(codec.value), scale=scale * math.log2(math.e),
    )  # fmt: skip
    if fresh is None:
        lib.attend(a, RowArguments(), k.shape[1] * groups)
    else:  # attention sees to the exact rows, the coding does not
        coded = RowArguments.from_buffer_copy(fresh)
        coded.segments = 0
        lib.step(a, fresh, coded, k.shape[1] * groups)
    return out


# -- what a call asks -----------------------------------------------------------------------------------------------------


def library(f: Any, repeats: int, rotary: int, place: torch.device) -> Library:
    """The kernels for a format or codec. repeats: query heads per key-value head, or 0 where any will do: coding rows does not
    depend on them. Raises NativeError."""
    if not repeats:
        return _any_library(f if isinstance(f, LayerFormat) else f.format, rotary, place)
    return module.library(variant_of(f, repeats, rotary), place)


@cache
def _any_library(f: LayerFormat, rotary: int, place: torch.device) -> Library:
    """Kernels that are loaded already where there are some, else those for one query head."""
    held = (module.loaded(_variant(f, n, rotary), place) for n in range(REPEATS, 0, -1))
    return next((lib for lib in held if lib is not None), None) or module.library(_variant(f, 1, rotary), place)


def _library(call: Call) -> Library:
    return library(call.codec, call.shape.repeats, call.shape.rotary, call.k.device)


def append(call: Call, lib: Library | None = None) -> None:
    """`append_`: one launch for one new row; the exact rows of more are chosen by plain operators. lib: kernels, if others."""
    k, v, positions, cos, sin, candidates, _, _ = call.coding()
    k = k if call.roped else rope_rows(k, cos, sin)
    if not append_rows(lib or _library(call), call.codec, k, v, positions, candidates, call.st, call.p):
        keep = triton_append.keep_exact if triton_append.keeps(call.codec, candidates, k.device) else keep_exact
        keep(call.codec, call.st, k, v, candidates)


def attend(call: Call, lib: Library | None = None) -> Tensor:
    """`attend`: the kernels for one new row, pieces of the decoded past for more."""
    q, k, v, _, _, mask, scale = call.asking()
    lib, c, st, p = lib or _library(call), call.codec, call.st, call.p
    if q.shape[2] == 1:
        out = attend_one(lib, c, q, k, v, st, p, mask, scale)
        assert out is not None  # masks of another kind are declined
        return out
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return attend_plain(call)  # the length decides what runs, and a graph under capture cannot read it
    first, slots = int(call.state.length), st["k_codes"].shape[2]
    if first + q.shape[2] > slots:
        raise IndexError(f"{q.shape[2]} rows do not fit behind {first} of {slots} slots; make the cache longer")

    def past(start: int, end: int) -> tuple[Tensor, Tensor]:
        return decode_rows(lib, c, st, p, start, end, k.dtype, first + q.shape[2])

    return attend_chunk(past, q, k, v, first, mask, scale, call.causal, c.strict)


def step(call: Call) -> Tensor:
    """Both, of one new row per sequence: in one launch, or side by side in a CUDA graph."""
    q, k, v, _, _, mask, scale = call.asking()
    assert call.positions is not None
    rest = call.positions, call.candidates, call.st, call.p, mask, scale
    out = step_one(_library(call), call.codec, q, k, v, *rest)
    if out is None:  # more sequences than the kernels see to
        append(call)
        return attend(call)
    return out
