"""New rows into the packed cache on the CPU, coded in C: what `append_ref` does in a hundred small operators.

Formula    codes and scales as `quantize` and `vector_encode` define them: the same quotients, thresholds, rounding and float64
           sums; distances to code vectors are float32 sums in another order, so that of two equally near ones either may win
           one new row per sequence is also brought into the basis of its codec here: the same roundings as `transform_keys`
           and `transform_values`, but for x U, whose sums are taken in float64
Source     ours
Shapes     as `kvsink::append_`
Declines   `declines` says in words what it does not code
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..append import append_plain, keep_exact, keep_recent
from ..backends import Call, Device, LayerFormat, Shape
from ..hadamard import hadamard_core
from ..levels import even_levels, even_thresholds, lloyd_max, thresholds
from ..quantize import SIGMA_KINDS, segments
from ..stages import rope_rows
from ..trellis import subsets
from .c_library import EXACT, FLOAT_TYPES, Plan, c_library

__all__ = ["append", "append_one", "by_definition", "declines", "select_one", "store_rows"]

_KIND = {"lloyd": 0, "lloyd-even": 0, "uniform": 1, "uniform-int": 2, "gauss": 3, "vector": 4, "trellis": 5}
_pointer, _int = ctypes.c_void_p, ctypes.c_int64


_COUPLED = 64  # channels
_defined: list[None] = []  # one entry for every `by_definition` that is open


@contextmanager
def by_definition() -> Iterator[None]:
    """Within it rows are coded by the operators of the definition, for who watches or replaces them."""
    _defined.append(None)
    try:
        yield
    finally:
        _defined.pop()


class _Side(ctypes.Structure):
    _fields_ = (
        *((n, _int) for n in ("dim", "row_bytes", "groups", "group_size", "scales", "stride_b", "stride_h")),
        *((n, _int) for n in ("scale_b", "scale_h", "kind", "gain", "runs")),
        *((n, _pointer) for n in ("run", "levels", "thresholds", "sigma")),
        *((n, _int) for n in ("couple", "code_bits", "book_h")),
        ("book", _pointer),
        ("clip", ctypes.c_double),
        *((n, _pointer) for n in ("x", "codes", "scale", "row")),
        *((n, _int) for n in ("type", "row_b", "row_h", "rope", "order")),
        *((n, _pointer) for n in ("mean", "middle", "basis", "offset_cos", "offset_sin")),
        ("block", _int),
    )


class _Append(ctypes.Structure):
    _fields_ = (
        *((n, _int) for n in ("batch", "heads", "rows", "slot")),
        ("sides", _Side * 2),
        ("position", _pointer),
        ("position_b", _int),
        *((n, _pointer) for n in ("cos", "sin")),
        *((n, _int) for n in ("angle_type", "angle_b", "rotary")),
        ("positions", _pointer),
        ("positions_b", _int),
    )


class _Select(ctypes.Structure):
    _fields_ = (
        *((n, _int) for n in ("batch", "heads", "places", "segments", "first")),
        *((n, _pointer) for n in ("capacity", "scores", "candidate", "slot", "score")),
        ("store", _pointer * 2),
        ("fresh", _pointer * 2),
        *((n, _int * 2) for n in ("bytes", "fresh_b", "fresh_h")),
    )


def _library() -> ctypes.CDLL | None:
    sizes = (("kvsink_append_bytes", ctypes.sizeof(_Append)), ("kvsink_select_bytes", ctypes.sizeof(_Select)))
    return c_library("append", EXACT, sizes, "coding new rows on the CPU runs in PyTorch, several times slower")


def declines(f: LayerFormat, s: Shape, d: Device) -> str:
    """What keeps new rows from being coded in C, in words; empty when both sides are coded row by row by a known quantizer."""
    if d.type != "cpu":
        return f"the device is {d.type}"
    if s.dtype == torch.float64:
        return f"{s.dtype} is not float32 or narrower"
    if f.order == "mma":
        return "codes in the order of a GPU kernel"
    for side in (f.key, f.value):
        if side.kind not in _KIND:
            return f"rows of kind {side.kind}"
        if side.by_token_block:
            return "ranges along tokens"
        if side.outliers:
            return "sparse outliers"
        if side.kind == "vector" and side.couple > _COUPLED:
            return f"{side.couple} coupled channels"
        if side.kind in ("uniform", "uniform-int", "gauss") and (side.group_size % 8 or len(set(side.widths)) != 1):
            return f"groups of {side.group_size} channels"
    return "no C compiler" if d.place is not None and _library() is None else ""


@cache
def _tables(kind: str, widths: tuple[int, ...]) -> tuple[int, Any, Any, Any, list[Tensor]]:
    """Runs of equal width with the levels and thresholds of each, where the kind has any; the list keeps them alive."""
    runs = segments(widths)
    numbers = (_int * (4 * len(runs)))(*[n for run in runs for n in run])
    levels: list[Tensor] = []
    edges: list[Tensor] = []
    if kind == "trellis":
        levels, edges = map(list, zip(*(subsets(width, "cpu") for *_, width in runs), strict=True))
    elif kind in SIGMA_KINDS or kind == "gauss":
        even = kind == "lloyd-even"
        levels = [(even_levels if even else lloyd_max)(width).contiguous() for *_, width in runs]
        edges = [(even_thresholds if even else thresholds)(width).contiguous() for *_, width in runs]
    pointers = [(_pointer * len(runs))(*[t.data_ptr() for t in held]) for held in (levels, edges)]
    return len(runs), numbers, pointers[0], pointers[1], [*levels, *edges]


def _side(s: Any, dim: int, codes: Tensor, scale: Tensor, sigma: Tensor | None, book: Tensor | None) -> _Side:
    runs, run, levels, edges, _ = _tables(s.kind, tuple(s.widths))
    grouped = s.kind in ("uniform", "uniform-int", "gauss")
    groups = dim // s.group_size if grouped else 1
    vectors: tuple[int, int, int, int | None] = (0, 0, 0, None)
    if book is not None:
        vectors = (s.couple, s.code_bits, book.stride(0) * (book.shape[0] > 1), book.data_ptr())
    return _Side(
        dim,
        codes.shape[-1],
        groups,
        dim // groups,
        scale.shape[-1],
        codes.stride(0),
        codes.stride(1),
        scale.stride(0),
        scale.stride(1),
        _KIND[s.kind],
        int(s.gain),
        runs,
        ctypes.addressof(run),
        ctypes.addressof(levels),
        ctypes.addressof(edges),
        None if sigma is None else sigma.data_ptr(),
        *vectors,
        s.clip,
        None,
        codes.data_ptr(),
        scale.data_ptr(),
    )


def store_rows(c: Any, x_k: Tensor, x_v: Tensor, first: int, st: Mapping[str, Tensor], p: Mapping[str, Tensor]) -> None:
    """Code transformed rows float32 [B, H, S, D] and write them to slots first … first + S - 1 of a state by name."""
    library = _library()
    assert library is not None
    x_k, x_v = x_k.contiguous(), x_v.contiguous()
    sides = (_Side * 2)()
    for i, (n, side, x) in enumerate((("k", c.key, x_k), ("v", c.value, x_v))):
        sides[i] = _side(side, x.shape[-1], st[f"{n}_codes"], st[f"{n}_scale"], p.get(f"{n}_sigma"), p.get(f"{n}_book"))
        sides[i].x = x.data_ptr()
    b, h, s, _ = x_k.shape
    library.kvsink_append(ctypes.byref(_Append(b, h, s, first, sides)))


def select_one(c: Any, k: Tensor, v: Tensor, candidates: Sequence[Tensor], st: Mapping[str, Tensor], first: int) -> None:
    """`merge_exact` for one new row per sequence, in place: k, v [B, H, 1, D] in the dtype of the exact store."""
    library = _library()
    assert library is not None
    select = _selection(c, st)
    kept = _offer(select, c, k, v, candidates, st, first)
    library.kvsink_select(ctypes.byref(select))
    del kept


def _selection(c: Any, st: Mapping[str, Tensor]) -> _Select:
    """What stays the same from row to row."""
    held, segments = (st["exact_k"], st["exact_v"]), len(c.segments)
    select = _Select(held[0].shape[0], held[0].shape[1], c.exact_rows, segments)
    select.keep = (_int * segments)(*c.segments), (_int * segments)(), (_pointer * segments)()
    select.capacity, select.scores, select.candidate = map(ctypes.addressof, select.keep)
    select.slot, select.score = st["exact_slot"].data_ptr(), st["exact_score"].data_ptr()
    for i, t in enumerate(held):
        select.store[i], select.bytes[i] = t.data_ptr(), t.shape[-1] * t.element_size()
    return select


def _offer(
    select: _Select, c: Any, k: Tensor, v: Tensor, candidates: Sequence[Tensor], st: Mapping[str, Tensor], first: int
) -> list[Tensor]:
    """Put the new row into a selection; the list keeps what it points to alive."""
    select.first = first
    kept = [x.float().contiguous() for x in candidates[0 : 2 * len(c.segments) : 2]]
    for i, x in enumerate(kept):
        select.keep[1][i], select.keep[2][i] = x.shape[1], x.data_ptr()
    for i, (new, name) in enumerate(((k, "exact_k"), (v, "exact_v"))):
        row = new.to(st[name].dtype)
        row = row if row.stride(-1) == 1 else row.contiguous()
        size = row.element_size()
        select.fresh[i], select.fresh_b[i], select.fresh_h[i] = row.data_ptr(), row.stride(0) * size, row.stride(1) * size
        kept.append(row)
    return kept


class _AppendPlan(Plan):
    """What new rows of one state have in common."""

    def __init__(self, c: Any, state: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        super().__init__(c, state, params)
        st, p = c.named(state), c.tables(params)
        self.exact = {n: st[n] for n in ("exact_k", "exact_v")}
        positions = st["positions"]
        self.call = call = _Append(*st["k_codes"].shape[:2], 1)
        call.positions, call.positions_b = positions.data_ptr(), positions.stride(0)
        self.sides = call.sides[0], call.sides[1]
        for side, s, n in zip(self.sides, (c.key, c.value), "kv", strict=True):
            dim = self.exact[f"exact_{n}"].shape[-1]
            made = _side(s, dim, st[f"{n}_codes"], st[f"{n}_scale"], p.get(f"{n}_sigma"), p.get(f"{n}_book"))
            ctypes.pointer(side)[0] = made
            if s.transform == "klt":
                side.basis = self.pointer(p[f"{n}_basis"])
            elif s.transform == "hadamard" and not s.folded:
                side.order = s.order
            if s.center:
                side.mean = self.pointer(p[f"{n}_mean"])
        key, s = self.sides[0], c.key
        if s.domain == "block":
            key.rope = 1
            if s.block > 1:
                key.block = s.block
                key.offset_cos, key.offset_sin = self.pointer(p["offset_cos"]), self.pointer(p["offset_sin"])
        elif s.center:
            key.rope = 2
        if s.transform == "klt":
            key.middle = self.pointer(p["k_mean2"])
        self.select = _selection(c, st) if c.exact_rows else _Select()


@cache
def _brings(f: LayerFormat) -> bool:
    """Whether the C file does all that one new row needs: it knows the stages as well as the quantizers."""
    return not f.anchored and all(
        not (s.reorder or s.exponent) and (s.transform != "hadamard" or s.folded or _plain(s)) for s in (f.key, f.value)
    )


def _plain(s: Any) -> bool:
    return s.heads_per_group == 1 and hadamard_core(s.order) == 1


def append_one(call: Call, first: int) -> bool:
    """All of `append_` but the ring for one new row per sequence, k after RoPE, at slot `first`; whether it was done."""
    k, v, positions, cos, sin, candidates, state, params = call.coding()
    c = call.codec
    if not _brings(c.format):
        return False
    library = _library()
    assert library is not None
    plan = _AppendPlan.of(c, state, params)
    a, positions = plan.call, positions.to(torch.int64)
    angles = [t if t.dtype in FLOAT_TYPES and t.stride(-1) == 1 else t.float().contiguous() for t in (cos, sin)]
    a.slot, a.position, a.position_b = first, positions.data_ptr(), positions.stride(0) * (positions.shape[0] > 1)
    a.cos, a.sin, a.angle_type = angles[0].data_ptr(), angles[1].data_ptr(), FLOAT_TYPES[angles[0].dtype]
    a.rotary, a.angle_b = angles[0].shape[-1], angles[0].stride(0) * (angles[0].shape[0] > 1)
    rows = [t if t.stride(-1) == 1 else t.contiguous() for t in (k, v)]
    for side, t in zip(plan.sides, rows, strict=True):
        side.row, side.type, side.row_b, side.row_h = t.data_ptr(), FLOAT_TYPES[t.dtype], t.stride(0), t.stride(1)
    kept = _offer(plan.select, c, rows[0], rows[1], candidates, plan.exact, first) if c.exact_rows else None
    library.kvsink_append_one(ctypes.byref(a), ctypes.byref(plan.select))
    del kept
    return True


def append(call: Call) -> None:
    """`kvsink::append_`, where `declines` is silent; rows that do not fit are for the definition to say."""
    k, v, positions, cos, sin, candidates, _, _ = call.coding()
    c, s, first = call.codec, k.shape[2], int(call.state.length)
    if _defined or first + s > call.state.positions.shape[1]:
        append_plain(call)
        return
    full_k = k if call.roped else rope_rows(k, cos, sin)
    if s > 1 or not call.roped or not append_one(call, first):
        st, p = call.st, call.p
        st["positions"][:, first : first + s] = positions
        if s == 1 and c.exact_rows and c.anchors is None:
            select_one(c, full_k, v, candidates, st, first)
        else:
            keep_exact(c, st, full_k, v, candidates)
        store_rows(c, c.transform_keys(k, cos, sin, positions, p, call.roped), c.transform_values(v, p), first, st, p)
    if c.ring:
        keep_recent(c, call.st, torch.arange(first, first + s), full_k, v)
