"""Decode attention over packed rows on the CPU: one new query row per sequence, in C, without unpacking the cache.

Formula    logit_t = a_t (w_m . level_t) + b_t sum(w_m) + mean_t with w_m the query rotated back to the start of block m and
           into the basis of the key codec, and mean_t the share of the calibrated mean; out = restore(sum p_t (a_t level_t + b_t))
           exact rows take part as they are; both parts share one softmax
Source     FlashAttention, arXiv 2205.14135 (online softmax); the query carries the transform: ours (`klt`), RotateKV's idea of
           a rotated query, arXiv 2501.16383
Shapes     as `kvsink::attend` with S = 1
Exact      equals the definition up to float32 rounding and an exponential of relative error 3e-7
Declines   `declines` says in words what it does not serve
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

from ..backends import Call, Device, LayerFormat, LayerState, Shape, unread
from ..hadamard import hadamard_matrix
from ..levels import levels_of, levels_of_bytes
from ..quantize import SIGMA_KINDS, segments
from ..stages import back_table
from ..trellis import trellis_levels
from .c_library import FLOAT_TYPES, LOOSE, Plan, c_library

__all__ = ["attend", "declines"]

_KIND = {"lloyd": 0, "lloyd-even": 0, "trellis": 0, "vector": 0, "gauss": 2, "uniform": 2, "uniform-int": 3}
_SMALLEST_BLOCK = 16  # below it a query per block costs more than decoding

_pointer, _int = ctypes.c_void_p, ctypes.c_int64


class _Side(ctypes.Structure):
    _fields_ = (
        *((n, _int) for n in ("dim", "row_bytes", "groups", "group_size", "scales")),
        *((n, _int) for n in ("stride_b", "stride_h", "scale_b", "scale_h", "kind", "runs")),
        *((n, _pointer) for n in ("run", "tables", "levels", "codes", "scale")),
        *((n, _int) for n in ("couple", "code_bits", "book_h")),
        *((n, _pointer) for n in ("book", "sigma", "basis")),
        ("basis_h", _int),
        ("walk", _int),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        *((n, _pointer) for n in ("k", "v", "slot")),
        *((n, _int) for n in ("count", "type", "only", "k_b", "k_h", "k_row", "v_b", "v_h", "v_row", "slot_b")),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *((n, _int) for n in ("batch", "heads", "repeats", "slots", "coded", "pieces", "threads")),
        ("key", _Side),
        ("value", _Side),
        ("q", _pointer),
        *((n, _int) for n in ("q_type", "q_b", "q_h")),
        ("scale", ctypes.c_double),
        *((n, _int) for n in ("by_block", "block", "blocks", "rotary")),
        *((n, _pointer) for n in ("start_cos", "start_sin", "mean", "value_mean", "positions")),
        ("position_stride", _int),
        ("mask", _pointer),
        *((n, _int) for n in ("mask_bool", "mask_b", "mask_h")),
        ("rows", _Rows * 3),
        *((n, _pointer) for n in ("out", "work")),
        ("held", _int),
        ("slot", _pointer),
        *((n, _int) for n in ("share", "limit")),
        ("table", _pointer),
        *((n, _int) for n in ("page", "places")),
    )


def _library() -> ctypes.CDLL | None:
    sizes = (("kvsink_attend_call_bytes", ctypes.sizeof(_Call)),)
    return c_library("attend", LOOSE, sizes, "packed attention on the CPU runs in PyTorch, several times slower")


def declines(f: LayerFormat, s: Shape, d: Device) -> str:
    """What keeps a call from the C kernel, in words; empty when it serves it."""
    if d.type != "cpu":
        return f"the device is {d.type}"
    if s.dtype == torch.float64:
        return f"{s.dtype} is not float32 or narrower"
    if s.rows > 1:
        return "more than one new row"
    if reason := unread(f, tuple(_KIND)):
        return reason
    if f.key.domain == "block" and f.key.block < _SMALLEST_BLOCK:
        return f"blocks of {f.key.block} tokens"
    return "no C compiler" if d.place is not None and _library() is None else ""


@cache
def _tables(kind: str, widths: tuple[int, ...]) -> tuple[int, Any, Any, Any, list[Tensor]]:
    """Runs of equal width and, for each, the levels of every byte (widths that divide 8) or of every code, and of every code
    again and again in at least sixteen numbers; the list keeps them alive."""
    runs = segments(widths)
    numbers = (_int * (4 * len(runs)))(*[n for run in runs for n in run])
    held, plain = [], []
    for *_, width in runs:
        levels = trellis_levels(width, "cpu") if kind == "trellis" else levels_of(kind, width)
        plain.append(levels.repeat(-(-16 // len(levels))))
        held.append(levels if 8 % width or kind == "trellis" else levels_of_bytes(kind, width))
    pointers = [(_pointer * len(runs))(*[t.data_ptr() for t in tables]) for tables in (held, plain)]
    return len(runs), numbers, pointers[0], pointers[1], [*held, *plain]


class _AttendPlan(Plan):
    """What calls over one state have in common."""

    def __init__(self, c: Any, state: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        super().__init__(c, state, params)
        st, p = LayerState(*state), c.tables(params)
        self.length, batch = st.length, st.k_codes.shape[0]
        self.call = call = _Call(batch=batch, heads=st.k_codes.shape[1], blocks=1, block=1 << 30)
        call.key = self._side(c.key, st.k_codes, st.k_scale, st.exact_k.shape[3], "k", p)
        call.value = self._side(c.value, st.v_codes, st.v_scale, st.exact_v.shape[3], "v", p)
        call.by_block = c.key.domain == "block"
        if c.key.domain == "block" or c.key.center:
            cos, sin = p["start_cos"], p["start_sin"]
            call.block, call.blocks, call.rotary = c.table_tokens, cos.shape[0], cos.shape[1]
            call.start_cos, call.start_sin = self.pointer(cos), self.pointer(sin)
        if c.key.center:
            call.mean = self.pointer(p["k_table"].mT)
        if c.value.center:
            call.value_mean = self.pointer(p["v_mean"])
        call.positions, call.position_stride = st.positions.data_ptr(), st.positions.stride(0)
        call.rows[0] = _rows(st.exact_k, st.exact_v, st.exact_slot)
        if c.window:
            call.rows[1] = _rows(st.recent_k, st.recent_v, st.recent_slot)
        self.fresh = call.rows[2]
        call.held = sum(r.count for r in call.rows) + (not c.strict)
        call.slot = self.pointer(torch.empty(batch, call.held, dtype=torch.int32))

    def _side(self, spec: Any, codes: Tensor, scale: Tensor, dim: int, prefix: str, p: Mapping[str, Tensor]) -> _Side:
        runs, run, tables, levels, _ = _tables(spec.kind, tuple(spec.widths))
        groups = dim // spec.group_size if _KIND[spec.kind] else 1
        side = _Side(
            dim,
            codes.shape[-1],
            groups,
            dim // groups,
            scale.shape[-1],
            codes.stride(0),
            codes.stride(1),
            scale.stride(0),
            scale.stride(1),
            _KIND[spec.kind] or int(spec.gain),
            runs,
            ctypes.addressof(run),
            ctypes.addressof(tables),
            ctypes.addressof(levels),
            codes.data_ptr(),
            scale.data_ptr(),
        )
        if (book := p.get(f"{prefix}_book")) is not None:
            side.couple, side.code_bits, side.book = spec.couple, spec.code_bits, self.pointer(book)
            side.book_h = book[0].numel() * (book.shape[0] > 1)
        if spec.kind in SIGMA_KINDS:
            side.sigma = self.pointer(back_table(p, prefix, "sigma"))
        side.walk = spec.kind == "trellis"
        if spec.transform == "klt":
            side.basis, side.basis_h = self.pointer(back_table(p, prefix, "basis")), dim * dim
        elif spec.transform == "hadamard" and not spec.folded:
            side.basis = self.pointer(torch.block_diag(*[hadamard_matrix(spec.order, torch.float32)] * (dim // spec.order)))
        return side


def _rows(k: Tensor, v: Tensor, slot: Tensor | None) -> _Rows:
    """Rows k, v [B, H, n, D] with slots [B, n] or [n]."""
    where = (None, 0) if slot is None else (slot.data_ptr(), slot.stride(0) if slot.dim() == 2 else 0)
    strides = (*k.stride()[:3], *v.stride()[:3])
    return _Rows(k.data_ptr(), v.data_ptr(), where[0], k.shape[2], FLOAT_TYPES[k.dtype], 0, *strides, where[1])


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def attend(call: Call) -> Tensor:
    """`kvsink::attend` for S = 1 where `declines` is silent."""
    q, k, v, state, params, mask, scale = call.asking()
    library = _library()
    assert library is not None
    plan = _AttendPlan.of(call.codec, state, params)
    c, fresh, first = plan.call, plan.fresh, int(plan.length)
    q, k, v = _dense(q), _dense(k), _dense(v)
    b, h, slots, threads = c.batch, c.heads, first + 1, torch.get_num_threads()
    c.repeats, c.slots, c.coded, c.threads, c.scale = q.shape[1] // h, slots, slots, threads, scale
    c.pieces = pieces = max(1, min(-(-8 * threads // (b * h)), slots // 128))
    c.q, c.q_type, c.q_b, c.q_h = q.data_ptr(), FLOAT_TYPES[q.dtype], q.stride(0), q.stride(1)
    c.mask = None
    if mask is not None:
        if mask.shape[-1] < slots:
            raise ValueError(f"a mask {tuple(mask.shape)} does not reach the {slots} slots held")
        mask = _dense(mask if mask.dtype in (torch.bool, torch.float32) else mask.float())
        c.mask, c.mask_bool = mask.data_ptr(), mask.dtype == torch.bool
        c.mask_b, c.mask_h = mask.stride(0) * (mask.shape[0] > 1), mask.stride(1) * (mask.shape[1] > 1)
    if not call.codec.strict:
        fresh.k, fresh.v, fresh.only, fresh.count, fresh.type = k.data_ptr(), v.data_ptr(), first, 1, FLOAT_TYPES[k.dtype]
        fresh.k_b, fresh.k_h, fresh.v_b, fresh.v_h = k.stride(0), k.stride(1), v.stride(0), v.stride(1)
    out = torch.empty(b, q.shape[1], 1, v.shape[3], dtype=q.dtype)
    work = torch.empty(b * pieces * q.shape[1] * (2 + v.shape[3]), dtype=torch.float32)
    c.out, c.work = out.data_ptr(), work.data_ptr()
    library.kvsink_attend(ctypes.byref(c))
    return out
