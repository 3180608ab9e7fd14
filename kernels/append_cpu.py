"""New rows into the packed cache on the CPU, coded in C: what `append_ref` does in a hundred small operators.

Formula    codes and scales as `quantize` and `vector_encode` define them: the same quotients, thresholds, rounding and float64
           sums; distances to code vectors are float32 sums in another order, so that of two equally near ones either may win
Source     ours
Shapes     as `kvsink::append_`
Raises     nothing: `serves` says whether it does a codec
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor

from .c_library import EXACT, c_library
from .levels import even_levels, even_thresholds, lloyd_max, thresholds
from .quantize import segments

__all__ = ["by_definition", "select_one", "serves", "store_rows"]

_KIND = {"lloyd": 0, "lloyd-even": 0, "uniform": 1, "uniform-int": 2, "gauss": 3, "vector": 4}
_pointer, _int = ctypes.c_void_p, ctypes.c_int64


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
        *((n, _pointer) for n in ("x", "codes", "scale")),
    )


class _Append(ctypes.Structure):
    _fields_ = (*((n, _int) for n in ("batch", "heads", "rows", "slot")), ("sides", _Side * 2))


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
    return c_library("append_cpu", EXACT, sizes, "coding new rows on the CPU runs in PyTorch, several times slower")


def serves(c: Any) -> bool:
    """Whether both sides of a codec are coded row by row by a quantizer that the C file knows, and it is asked to."""
    return not _defined and _knows(c)


@cache
def _knows(c: Any) -> bool:
    if c.tiles:
        return False
    for side in (c.key, c.value):
        if not side.packed or side.kind not in _KIND or side.by_token_block or side.outliers:
            return False
        if side.kind == "vector" and side.couple > 64:
            return False
        if side.kind in ("uniform", "uniform-int", "gauss") and (side.group_size % 8 or len(set(side.widths)) != 1):
            return False
    return _library() is not None


@cache
def _tables(kind: str, widths: tuple[int, ...]) -> tuple[int, Any, Any, Any, list[Tensor]]:
    """Runs of equal width with the levels and thresholds of each; the list keeps them alive."""
    runs = segments(widths)
    numbers = (_int * (4 * len(runs)))(*[n for run in runs for n in run])
    even = kind == "lloyd-even"
    levels = [(even_levels if even else lloyd_max)(width).contiguous() for *_, width in runs]
    edges = [(even_thresholds if even else thresholds)(width).contiguous() for *_, width in runs]
    pointers = [(_pointer * len(runs))(*[t.data_ptr() for t in held]) for held in (levels, edges)]
    return len(runs), numbers, pointers[0], pointers[1], [*levels, *edges]


def _side(s: Any, x: Tensor, codes: Tensor, scale: Tensor, sigma: Tensor | None, book: Tensor | None) -> _Side:
    dim = x.shape[-1]
    runs, run, levels, edges, _ = _tables(s.kind, tuple(s.widths))
    grouped = s.kind in ("uniform", "uniform-int", "gauss")
    groups = dim // s.group_size if grouped else 1
    vectors: tuple[int, int, int, int | None] = (0, 0, 0, None)
    if book is not None:
        vectors = (s.couple, s.code_bits, book.stride(0) * (book.shape[0] > 1), book.data_ptr())
    return _Side(
        dim, codes.shape[-1], groups, dim // groups, scale.shape[-1], codes.stride(0), codes.stride(1), scale.stride(0),
        scale.stride(1), _KIND[s.kind], int(s.gain), runs, ctypes.addressof(run), ctypes.addressof(levels),
        ctypes.addressof(edges), None if sigma is None else sigma.data_ptr(), *vectors, s.clip, x.data_ptr(), codes.data_ptr(),
        scale.data_ptr(),
    )  # fmt: skip


def store_rows(c: Any, x_k: Tensor, x_v: Tensor, first: int, st: Mapping[str, Tensor], p: Mapping[str, Tensor]) -> None:
    """Code transformed rows float32 [B, H, S, D] and write them to slots first … first + S - 1 of a state by name."""
    library = _library()
    assert library is not None
    x_k, x_v = x_k.contiguous(), x_v.contiguous()
    sides = (
        _side(side, x, st[f"{n}_codes"], st[f"{n}_scale"], p.get(f"{n}_sigma"), p.get(f"{n}_book"))
        for n, side, x in (("k", c.key, x_k), ("v", c.value, x_v))
    )
    b, h, s, _ = x_k.shape
    library.kvsink_append(ctypes.byref(_Append(b, h, s, first, (_Side * 2)(*sides))))


def select_one(
    c: Any, k: Tensor, v: Tensor, candidates: Sequence[Tensor], st: Mapping[str, Tensor], first: int
) -> None:
    """`merge_exact` for one new row per sequence, in place: k, v [B, H, 1, D] in the dtype of the exact store."""
    library = _library()
    assert library is not None
    held = st["exact_k"], st["exact_v"]
    rows = [new.to(old.dtype) for new, old in zip((k, v), held, strict=True)]
    rows = [r if r.stride(-1) == 1 else r.contiguous() for r in rows]
    scores = [x.float().contiguous() for x in candidates[0 : 2 * len(c.segments) : 2]]
    size = [r.element_size() for r in rows]
    two, pointers = _int * 2, _pointer * 2
    library.kvsink_select(
        ctypes.byref(
            _Select(
                k.shape[0], k.shape[1], c.exact_rows, len(c.segments), first,
                ctypes.addressof(capacity := (_int * len(c.segments))(*c.segments)),
                ctypes.addressof(count := (_int * len(scores))(*[x.shape[1] for x in scores])),
                ctypes.addressof(score := (_pointer * len(scores))(*[x.data_ptr() for x in scores])),
                st["exact_slot"].data_ptr(), st["exact_score"].data_ptr(),
                pointers(*[x.data_ptr() for x in held]), pointers(*[r.data_ptr() for r in rows]),
                two(*[r.shape[-1] * n for r, n in zip(rows, size, strict=True)]),
                two(*[r.stride(0) * n for r, n in zip(rows, size, strict=True)]),
                two(*[r.stride(1) * n for r, n in zip(rows, size, strict=True)]),
            )
        )
    )  # fmt: skip
    del capacity, count, score
