"""Decode attention over packed rows on the CPU: one new query row per sequence, in C, without unpacking the cache.

Formula    logit_t = a_t (w_m . level_t) + b_t sum(w_m) + mean_t with w_m the query turned back to the start of block m and
           into the basis of the key codec, and mean_t the share of the calibrated mean; out = restore(sum p_t (a_t level_t + b_t))
           exact rows take part as they are; both parts share one softmax
Source     FlashAttention, arXiv 2205.14135 (online softmax); the query carries the transform: ours (`klt`), RotateKV's idea of
           a rotated query, arXiv 2501.16383
Shapes     as `kvsink::attend` with S = 1
Exact      equals the definition up to float32 rounding and an exponential of relative error 3e-7
Raises     nothing: `why_not` says in words what it does not serve, and the caller takes another path
Cost       reads the codes once; 2·Hq·L·D flops for the keys and as many for the values

The C file beside this one is built at first use, see `c_library`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .c_library import LOOSE, c_library
from .levels import even_levels, lloyd_max
from .quantize import SIGMA_KINDS, segments

__all__ = ["attend_one", "why_not"]

_KIND = {"lloyd": 0, "lloyd-even": 0, "vector": 0, "gauss": 2, "uniform": 2, "uniform-int": 3}
_SMALLEST_BLOCK = 16  # below it a query per block costs more than decoding

_pointer, _int = ctypes.c_void_p, ctypes.c_int64


class _Side(ctypes.Structure):
    _fields_ = (
        *((n, _int) for n in ("dim", "row_bytes", "groups", "group_size", "scales")),
        *((n, _int) for n in ("stride_b", "stride_h", "scale_b", "scale_h", "kind", "runs")),
        *((n, _pointer) for n in ("run", "tables", "levels", "codes", "scale")),
        *((n, _int) for n in ("couple", "code_bits", "book_h")),
        ("book", _pointer),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((n, _int) for n in ("batch", "heads", "repeats", "slots", "pieces")),
        ("key", _Side),
        ("value", _Side),
        *((n, _int) for n in ("blocks", "block", "mean_span")),
        *((n, _pointer) for n in ("w", "mean", "positions")),
        ("position_stride", _int),
        ("mask", _pointer),
        *((n, _int) for n in ("mask_b", "mask_h")),
        ("q", _pointer),
        ("exact", _int),
        *((n, _pointer) for n in ("exact_k", "exact_v", "exact_slot", "out", "mass", "work")),
    )


def _library() -> ctypes.CDLL | None:
    sizes = (("kvsink_attend_call_bytes", ctypes.sizeof(_Call)),)
    return c_library("attend_cpu", LOOSE, sizes, "packed attention on the CPU runs in PyTorch, several times slower")


def why_not(codec: Any, q: Tensor, k: Tensor) -> str:
    """What keeps a call from the C kernel, in words; empty when it serves it."""
    s = codec.key
    if q.device.type != "cpu" or q.dtype == torch.float64:
        return "not float32 or narrower on the CPU"
    if q.shape[2] != 1:
        return "more than one new row"
    for side in (codec.key, codec.value):
        if not side.packed or side.kind not in _KIND:
            return f"rows of kind {side.kind}"
        if side.by_token_block:
            return "ranges along tokens"
        if side.outliers:
            return "sparse outliers"
    if codec.ring > codec.window:
        return "rows that stay exact on one side alone"
    if codec.tiles:
        return "codes in the order of a GPU kernel"
    if s.reorder or s.heads_per_group > 1 or (codec.value.heads_per_group > 1 and not codec.value.folded):
        return "a rotation across heads"
    if s.domain == "block" and s.block < _SMALLEST_BLOCK:
        return f"blocks of {s.block} tokens"
    return "" if _library() is not None else "no C compiler"


@cache
def _tables(kind: str, widths: tuple[int, ...]) -> tuple[int, Any, Any, Any, list[Tensor]]:
    """Runs of equal width and, for each, the levels of every byte (widths that divide 8) or of every code, and of every code
    in at least sixteen numbers; the list keeps them alive."""
    runs = segments(widths)
    numbers = (_int * (4 * len(runs)))(*[n for run in runs for n in run])
    held, plain = [], []
    for *_, width in runs:
        levels = _levels(kind, width)
        plain.append(torch.nn.functional.pad(levels.float(), (0, max(0, 16 - len(levels)))))
        if 8 % width == 0:
            byte = torch.arange(256)
            levels = levels[torch.stack([(byte >> (i * width)) & (2**width - 1) for i in range(8 // width)], dim=-1)]
        held.append(levels.float().contiguous())
    pointers = [(_pointer * len(runs))(*[t.data_ptr() for t in tables]) for tables in (held, plain)]
    return len(runs), numbers, pointers[0], pointers[1], [*held, *plain]


def _levels(kind: str, width: int) -> Tensor:
    if kind.startswith("uniform"):
        return torch.arange(2.0**width)
    return even_levels(width) if kind == "lloyd-even" else lloyd_max(width)


def _side(spec: Any, codes: Tensor, scale: Tensor, dim: int, book: Tensor | None) -> _Side:
    runs, run, tables, levels, _ = _tables(spec.kind, tuple(spec.widths))
    vectors: tuple[int, int, int, int | None] = (0, 0, 0, None)
    if book is not None:
        vectors = (spec.couple, spec.code_bits, book.stride(0) * (book.shape[0] > 1), book.data_ptr())
    groups = dim // spec.group_size if _KIND[spec.kind] else 1
    return _Side(
        dim, codes.shape[-1], groups, dim // groups, scale.shape[-1], codes.stride(0), codes.stride(1), scale.stride(0),
        scale.stride(1), _KIND[spec.kind] or int(spec.gain), runs, ctypes.addressof(run), ctypes.addressof(tables),
        ctypes.addressof(levels), codes.data_ptr(), scale.data_ptr(), *vectors,
    )  # fmt: skip


def _query(codec: Any, q: Tensor, p: Mapping[str, Tensor], reach: int) -> tuple[Tensor, int, Tensor | None]:
    """q [B, H, R, D] in the basis of the key codec → w [B, H, R, M, D], tokens of a block, logits of the mean by position."""
    from .hadamard import hadamard_ref

    s, n = codec.key, codec.table_tokens
    starts = turned = None
    if s.domain == "block" or s.center:
        blocks = min(-(-reach // n), p["start_cos"].shape[0])
        cos, sin = p["start_cos"][:blocks], p["start_sin"][:blocks]
        starts = _turn_back(q, cos, sin)  # [B, H, R, M, D]
    mean = None
    if s.center:
        assert starts is not None
        mean = (starts @ p["k_table"][None, :, None].mT).flatten(-2)  # [B, H, R, M·n]
    if s.domain == "block":
        turned, block = starts, n
    else:
        turned, block = q[..., None, :].clone(), max(reach, 1)
    assert turned is not None
    del starts
    if s.transform == "klt":
        turned = turned @ p["k_basis"][None, :, None]
    elif s.transform == "hadamard" and not s.folded:
        turned = hadamard_ref(turned, s.order)
    if s.kind in SIGMA_KINDS:
        turned.mul_(p["k_sigma"][None, :, None, None])
    return turned.contiguous(), block, mean.contiguous() if mean is not None else None


def _turn_back(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R^-1 q for every row of angles [M, R] → [B, H, R, M, D]: `rope` with -sin, into one tensor. The query of all blocks is the
    largest scratch of a step; the halves that `rope` puts together would double it."""
    half, r = cos.shape[-1] // 2, cos.shape[-1]
    out = q[..., None, :].repeat(*(1,) * (q.dim() - 1), len(cos), 1)
    for at, other, sign in ((slice(0, half), slice(half, r), 1.0), (slice(half, r), slice(0, half), -1.0)):
        out[..., at].mul_(cos[:, at]).addcmul_(q[..., None, other], sin[:, at], value=sign)
    return out


def _pieces(batch: int, heads: int, slots: int) -> int:
    wanted = -(-4 * torch.get_num_threads() // (batch * heads))
    return max(1, min(wanted, slots // 128))


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None, scale: float,
    codec: Any,
) -> Tensor:  # fmt: skip
    """`kvsink::attend` for S = 1 where `why_not` is empty."""
    library, c = _library(), codec
    assert library is not None
    p = dict(zip(c.param_names(), params, strict=True))
    (k_codes, k_scale, v_codes, v_scale, exact_k, exact_v, exact_slot, _,
     recent_k, recent_v, recent_slot, length, positions) = state[:13]  # fmt: skip
    b, h, _, d = k.shape
    dv, r, first = v.shape[3], q.shape[1] // k.shape[1], int(length)
    slots = first + 1
    query = (q.float() * scale).reshape(b, h, r, d)
    w, block, mean = _query(c, query, p, int(positions[:, :slots].max()) + 1)
    held_k, held_v, held = _held(c, k, v, (exact_k, exact_v, exact_slot), (recent_k, recent_v, recent_slot), first)
    extra = None
    if mask is not None:
        extra = mask[..., 0, :slots]
        extra = torch.where(extra, 0.0, -1e30) if extra.dtype == torch.bool else extra.float()
        extra = extra.contiguous()
    pieces = _pieces(b, h, slots)
    out, mass = torch.empty(2, b, h, r, dv), torch.empty(2, b, h, r)
    work = torch.empty(b * h * pieces * r * (2 + dv))
    call = _Call(
        b, h, r, slots, pieces, _side(c.key, k_codes, k_scale, d, p.get("k_book")),
        _side(c.value, v_codes, v_scale, dv, p.get("v_book")), w.shape[3], block,
        0 if mean is None else mean.shape[-1], w.data_ptr(), None if mean is None else mean.data_ptr(), positions.data_ptr(),
        positions.stride(0), None if extra is None else extra.data_ptr(), *_strides(extra), query.data_ptr(),
        held.shape[1], held_k.data_ptr(), held_v.data_ptr(), held.data_ptr(), out.data_ptr(), mass.data_ptr(),
        work.data_ptr(),
    )  # fmt: skip
    library.kvsink_attend(ctypes.byref(call))
    decoded = out[0] / mass[0, ..., None].clamp_min(1e-30)
    if c.value.kind in SIGMA_KINDS:
        decoded = decoded * p["v_sigma"][:, None, :]
    decoded = c.restore_values(decoded, p) * mass[0, ..., None] + out[1]
    return (decoded / mass.sum(0)[..., None].clamp_min(1e-30)).reshape(b, h * r, 1, dv).to(q.dtype)


def _strides(mask: Tensor | None) -> tuple[int, int]:
    """Numbers from one sequence and from one head of a mask [B or 1, 1 or Hq, L] to the next."""
    if mask is None:
        return 0, 0
    return mask.stride(0) * (mask.shape[0] > 1), mask.stride(1) * (mask.shape[1] > 1)


def _held(
    c: Any, k: Tensor, v: Tensor, exact: tuple[Tensor, ...], recent: tuple[Tensor, ...], first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that are read as they are, each once: keys [B, H, E, D], values and slots int32 [B, E]."""
    b = k.shape[0]
    keys, values, slot = [exact[0]], [exact[1]], exact[2]
    if c.window:
        live = torch.where(recent[2] <= first, recent[2], -1).expand(b, -1)
        keys.append(recent[0])
        values.append(recent[1])
        slot = torch.cat([slot, _once(live, slot)], dim=1)
    if not c.strict:
        new = torch.full((b, 1), first, dtype=torch.int32)
        keys.append(k.to(exact[0].dtype))
        values.append(v.to(exact[1].dtype))
        slot = torch.cat([slot, _once(new, slot)], dim=1)
    return torch.cat(keys, dim=2).float().contiguous(), torch.cat(values, dim=2).float().contiguous(), slot.contiguous()


def _once(slot: Tensor, held: Tensor) -> Tensor:
    """Slots [B, n] with -1 where `held` [B, E] names them already."""
    return torch.where((slot[:, :, None] == held[:, None, :]).any(-1), -1, slot).to(torch.int32)
