"""New rows into a packed cache on any GPU that Triton serves: three launches, no synchronisation.

Formula    as `kvsink.kernels.append`
Source     ours
Shapes     as `kvsink::append_`
Exact      codes equal the definition's up to ties that the order of float32 sums in the transform decides (a search through a
           trellis is the definition's, bit for bit, of the row that it is given: a tie may change a few codes of one circle);
           exact rows are the same rows, in places of their own order. Rows behind the last slot are left out, for the cache to say
Declines   `declines` says in words what it does not serve, and the plain operators run
Cost       three launches: the codes of keys, those of values, and exact rows with positions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import OFFERED, Call, Device, LayerFormat, Shape, device_of
from ..lasting import kept
from ..levels import even_levels, even_thresholds, lloyd_max, thresholds
from ..quantize import segments
from ..trellis import subsets
from . import attend
from .attend import power, transform

__all__ = ["append", "declines", "keep_exact", "keeps", "launches"]

_KIND = {"lloyd": 0, "lloyd-even": 0, "vector": 1, "gauss": 2, "uniform": 3, "uniform-int": 4, "static": 5, "trellis": 6}
_SEGMENTS = 4
_FAR = 1 << 20  # a bit that no row has
_WARPS = 4  # more of them wait for each other: 8 take 1.3 to 1.6 times as long, 16 up to 3 times
_TILE = 128 * 256  # numbers of a basis or of codebooks in registers at a time; a half or a quarter takes up to twice as long
_ROWS = 2048  # numbers of the rows that four warps code, of several new ones: 4096 take all registers there are
_DEPTH = 32  # rows of a basis that such a program multiplies by at a time


def declines(f: LayerFormat, s: Shape, d: Device) -> str:
    """What keeps new rows from the Triton kernels, in words; empty when they serve them."""
    if reason := attend.declines(f, s._replace(mask="", exact=f.exact, rows=1), d):
        return reason
    if not s.offered:
        return "several new candidates for one exact row" if s.rows == 1 else "more candidates for exact rows than they compare"
    if f.modal or f.anchored:
        return "rows by modality, or anchors"
    if len(f.segments) > _SEGMENTS:
        return f"{len(f.segments)} protection segments"
    for side in (f.key, f.value):
        if side.kind == "vector" and (side.couple & (side.couple - 1) or s.dim % side.couple):
            return f"{side.couple} coupled channels"
        if side.kind in ("gauss", "uniform", "uniform-int") and side.group_size != s.dim and power(s.dim) != s.dim:
            return f"groups of {side.group_size} of {s.dim} channels"
    return ""


@kept
def _tables(kind: str, widths: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """meta int32 [4, DP] (width, first threshold, first bit, first level of a channel), levels and thresholds; of
    a trellis by subset."""
    dim = 8 * len(widths)
    meta = torch.zeros(4, power(dim), dtype=torch.int32)
    meta[2] = _FAR
    levels, edges = [torch.zeros(1)], [torch.zeros(1)]
    first: dict[int, tuple[int, int]] = {}
    even = kind == "lloyd-even"
    for a, b, byte, w in segments(widths):
        if w not in first:
            first[w] = sum(len(e) for e in edges), sum(len(x) for x in levels)
            if kind == "trellis":
                level, edge = (x.flatten() for x in subsets(w, "cpu"))
            else:
                level = (even_levels if even else lloyd_max)(w).float()
                edge = (even_thresholds if even else thresholds)(w).float()
            levels.append(level)
            edges.append(edge)
        meta[0, a:b], meta[1, a:b], meta[3, a:b] = w, first[w][0], first[w][1]
        meta[2, a:b] = 8 * byte + torch.arange(b - a) * w
    return meta.to(device), torch.cat(levels).to(device), torch.cat(edges).to(device)


def append(call: Call) -> None:
    """`kvsink::append_` for S = 1 where `declines` is silent."""
    for launch in launches(call):
        launch()


def launches(call: Call) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
    """The same in three parts, which may run at the same time: codes of keys, codes of values, exact rows and positions."""
    from . import append_kernels as kernels

    k, v, positions, cos, sin, candidates, _, _ = call.coding()
    codec, st, p, roped = call.codec, call.st, call.p, call.roped
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (cos, sin))
    angles = cos, sin, cos.stride(0) if cos.shape[0] > 1 else 0
    step = positions.stride(0) if positions.shape[0] > 1 else 0
    sides = ("k", codec.key, k), ("v", codec.value, v)
    code = [partial(_code, kernels, codec, *side, positions, step, angles, st, p, roped) for side in sides]
    if k.shape[2] > 1:
        return code[0], code[1], partial(_enter_rows, codec, k, v, positions, step, angles, candidates, st, roped, True)
    return code[0], code[1], partial(_enter, kernels, codec, k, v, positions, step, angles, candidates, st, roped)


def keeps(codec: Any, candidates: Sequence[Tensor], place: torch.device) -> bool:
    """Whether `keep_exact` serves a codec's exact rows."""
    d, few = device_of(place), max((x.shape[1] for x in candidates[: 2 * len(codec.segments) : 2]), default=0) <= OFFERED
    return d.gpu and d.triton and few and codec.anchors is None and len(codec.segments) <= _SEGMENTS


def keep_exact(codec: Any, st: dict[str, Tensor], k: Tensor, v: Tensor, candidates: Sequence[Tensor]) -> None:
    """The running selection over new rows, keys after RoPE, in one launch."""
    if not codec.exact_rows:
        return
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    _enter_rows(codec, k, v, st["positions"], 0, (k, k, 0), candidates, st, True, False)


def _enter_rows(
    codec: Any, k: Tensor, v: Tensor, positions: Tensor, step: int, angles: tuple[Tensor, Tensor, int],
    candidates: Sequence[Tensor], st: dict[str, Tensor], roped: bool, whole: bool,
) -> None:  # fmt: skip
    """Several new rows into the exact rows and, where they are to be entered as a whole, the window and the positions."""
    from . import rows_kernels as kernels

    b, h, s, d = k.shape
    cos, sin, cos_b = angles
    n = len(codec.segments)
    pairs = list(zip(candidates[: 2 * n : 2], candidates[1 : 2 * n : 2], strict=True))
    score = [x.float().expand(b, -1).contiguous() for x, _ in pairs] + [k] * (_SEGMENTS - n)  # pointers that are not followed
    index = [x.expand(b, -1).contiguous() for _, x in pairs] + [k] * (_SEGMENTS - n)
    count = [x.shape[1] for x, _ in pairs] + [0] * (_SEGMENTS - n)
    ends = [sum(codec.segments[: i + 1]) for i in range(_SEGMENTS)]
    exact, recent, ring = st["exact_k"], st["recent_k"], codec.ring if whole else 0
    kernels.enter_rows_kernel[(b, 1 + (h if ring else 0))](
        k, v, positions, st["length"], cos, sin, *score, *index, st["positions"], exact, st["exact_v"], st["exact_slot"],
        st["exact_score"], recent, st["recent_v"], st["recent_slot"],
        *k.stride()[:3], *v.stride()[:3], step, positions.stride(1), cos_b, cos.stride(1), *count,
        st["positions"].stride(0), exact.shape[2], *exact.stride()[:2],
        *recent.stride()[:2], s, st["positions"].shape[1], H=h, D=d, DP=power(d), EP=power(codec.exact_rows or 1),
        NP=power(max(count)), W=ring, N=n, A=ends[0], B=ends[1], C=ends[2], E=codec.exact_rows,
        ROTARY=0 if roped else cos.shape[-1], PLACES=whole,
    )  # fmt: skip


def _enter(
    kernels: Any, codec: Any, k: Tensor, v: Tensor, positions: Tensor, step: int, angles: tuple[Tensor, Tensor, int],
    candidates: Sequence[Tensor], st: dict[str, Tensor], roped: bool,
) -> None:  # fmt: skip
    """The new rows into the exact rows, the window and the positions."""
    b, h, _, d = k.shape
    cos, sin, cos_b = angles
    n = len(codec.segments)
    scores = [x if x.dtype == torch.float32 else x.float() for x in candidates[: 2 * n : 2]]
    scores += [k] * (_SEGMENTS - n)  # pointers that are not followed
    strides = [x.stride(0) if x.dim() == 2 and x.shape[0] > 1 else 0 for x in scores]
    ends = [sum(codec.segments[: i + 1]) for i in range(_SEGMENTS)]
    exact, recent = st["exact_k"], st["recent_k"]
    kernels.enter_kernel[(b,)](
        k, v, positions, st["length"], cos, sin, *scores, st["positions"], exact, st["exact_v"], st["exact_slot"],
        st["exact_score"], recent, st["recent_v"], st["recent_slot"],
        *k.stride()[:2], *v.stride()[:2], step, cos_b, *strides, st["positions"].stride(0), *exact.stride()[:2],
        *recent.stride()[:2], H=h, HP=1 << (h - 1).bit_length(), D=d, DP=power(d), E=exact.shape[2],
        EP=power(exact.shape[2] or 1), W=codec.ring, N=n, A=ends[0], B=ends[1], C=ends[2], ROTARY=0 if roped else cos.shape[-1],
    )  # fmt: skip


def _code(
    kernels: Any, codec: Any, name: str, side: Any, rows: Tensor, positions: Tensor, step: int, angles: tuple[Tensor, Tensor, int],
    st: dict[str, Tensor], p: dict[str, Tensor], roped: bool,
) -> None:  # fmt: skip
    """The codes of one side of the new rows."""
    b, h, s, d = rows.shape
    key, wide = name == "k", power(d)
    cos, sin, cos_b = angles
    basis, basis_h = transform(side, d, p.get(f"{name}_basis"), rows.device)
    book, sigma = p.get(f"{name}_book"), p.get(f"{name}_sigma", p.get(f"{name}_step"))
    meta = levels = edges = rows
    if book is None:
        meta, levels, edges = _tables("lloyd" if side.kind == "static" else side.kind, tuple(side.widths), str(rows.device))
    codes, scale = st[f"{name}_codes"], st[f"{name}_scale"]
    blocked, center = key and side.domain == "block", side.center
    offset = blocked and side.block > 1

    def held(x: Tensor | None) -> Tensor:
        return rows if x is None else x  # a pointer that is not followed

    tables = (
        held(p.get(f"{name}_mean") if center else None), held(p.get("offset_cos")), held(p.get("offset_sin")),
        held(p.get("k_mean2")), held(basis), held(sigma), held(book), levels, edges, meta, codes, scale,
    )  # fmt: skip
    apart = *codes.stride()[:2], *scale.stride()[:2], basis_h, 0 if book is None or book.shape[0] == 1 else book.stride(0)
    shape = dict(
        H=h, D=d, DP=wide, KEY=key, ROPED=roped, ROTARY=cos.shape[-1] if key else 0, BLOCKED=blocked, OFFSET=offset,
        BLOCK=side.block if offset else 1, CENTER=center, CENTER2=key and side.transform == "klt", BASIS=basis is not None,
        KIND=_KIND[side.kind], GAIN=side.gain, WIDEST=max(side.widths, default=0), GROUP=side.group_size, COUPLE=side.couple or 1,
        BITS=side.code_bits, BYTES=codes.shape[-1], SCALES=scale.shape[-1],
    )  # fmt: skip
    if side.kind == "trellis":
        shape["enable_fp_fusion"] = False  # so that sums are those of the definition, bit for bit
    given = rows, positions, st["length"], cos, sin, *tables
    if s == 1:
        kernels.code_kernel[(b * h,)](
            *given, *rows.stride()[:2], step, cos_b, *apart, side.clip, CHUNK=min(_TILE // (2 * wide), wide),
            BYTES_P=power(codes.shape[-1]), STEP=min(_TILE // wide, 1 << side.code_bits), num_warps=_WARPS, **shape,
        )  # fmt: skip
        return
    from . import rows_kernels

    many = max(16, _ROWS // wide)
    tiles = -(-s // many)
    few = many * wide <= _ROWS and side.kind != "trellis"  # whose searches four warps have too few registers for
    rows_kernels.code_rows_kernel[(tiles * b * h,)](
        *given, *rows.stride()[:3], step, positions.stride(1), cos_b, cos.stride(1), *apart, s, codes.shape[2], tiles, side.clip,
        R=many, CHUNK=min(_DEPTH, wide), STEP=min(_TILE // (2 * many * wide), 1 << side.code_bits),
        num_warps=_WARPS if few else 2 * _WARPS, num_stages=1, **shape,
    )  # fmt: skip
