"""Attention over packed rows in pages on the CPU, in C: decode steps and chunks of prompts alike, of many sequences in one call.

Formula    as `kvsink.kernels.pages`; neighbouring new rows of a sequence share what is decoded for them, and each sees the slots up
           to its own. Parts of a long sequence share one softmax by their running maxima and sums (online softmax)
Source     ours; the C file is that of `kvsink.kernels.cpu.attend`, which says how codes are read
Shapes     as `kvsink.kernels.pages`
Exact      equals the definition up to float32 rounding and an exponential of relative error 3e-7
Declines   what `kvsink.kernels.cpu.attend` declines
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends import TABLES_BACK, Device, LayerFormat, LayerState, Part, Shape
from . import attend as single
from .c_library import FLOAT_TYPES

if TYPE_CHECKING:
    from ..pages import Batch, Pages

__all__ = ["attend", "declines"]

_pointer, _int = ctypes.c_void_p, ctypes.c_int64


class _Pages(ctypes.Structure):
    _fields_ = (
        *((n, _int) for n in ("jobs", "rows", "tables_b")),
        *((n, _pointer) for n in ("job", "tables", "named")),
        ("named_b", _int),
    )


def _library() -> ctypes.CDLL | None:
    library = single._library()
    if library is not None:
        library.kvsink_attend_pages_bytes.restype = _int
        assert library.kvsink_attend_pages_bytes() == ctypes.sizeof(_Pages)
    return library


@cache
def declines(f: LayerFormat, s: Shape, d: Device) -> str:
    """What keeps a codec's pages from the C kernel, in words; any number of new rows is served."""
    return Part(single.declines, single.attend, TABLES_BACK).refuses(f, s._replace(rows=1), d)


class _PagedPlan(single._AttendPlan):
    """What calls over one cache of pages have in common; it takes pages for sequences."""

    def __init__(self, c: Any, pages: Pages, params: Sequence[Tensor]) -> None:
        none = torch.empty(0)
        state = LayerState(*[none] * len(LayerState._fields))._replace(
            **{n: getattr(pages, n) for n in ("k_codes", "k_scale", "v_codes", "v_scale", "exact_k", "exact_v")},
            exact_slot=torch.empty(0, dtype=torch.int32),
            positions=torch.empty(1, 0, dtype=torch.int32),
        )
        super().__init__(c, state, params)
        self.others = (*pages[1:], *params)
        call, heads = self.call, pages.named.shape[1]
        call.page, call.places, call.position_stride = pages.k_codes.shape[2], pages.named.shape[2], 0
        self.pages = _Pages(named=pages.named.data_ptr(), named_b=pages.named.stride(0))
        self.heads, self.positions = heads, torch.empty(0, dtype=torch.int32)

    def reach(self, slots: int) -> None:
        """Positions of so many slots, which are their numbers."""
        if len(self.positions) < slots:
            self.positions = torch.arange(slots, dtype=torch.int32)
            self.call.positions = self.positions.data_ptr()


def attend(
    codec: Any, params: Sequence[Tensor], pages: Pages, q: Tensor, batch: Batch, scale: float, out: Tensor | None = None
) -> Tensor:
    """`attend_pages` where `declines` is silent."""
    library = _library()
    assert library is not None
    plan = _PagedPlan.of(codec, pages, params)
    c, p, jobs, threads = plan.call, plan.pages, batch.jobs, torch.get_num_threads()
    count, most = len(jobs), max(batch.lengths)
    used = -(-most // c.page)
    plan.reach(used * c.page)
    q = q if q.stride(-1) == 1 else q.contiguous()
    made = torch.empty(q.shape[0], q.shape[1], pages.exact_v.shape[3], dtype=q.dtype)
    tables = (
        batch.tables
        if batch.tables.stride(1) == 1 and batch.tables.dtype == torch.int32
        else batch.tables.to(torch.int32).contiguous()
    )
    c.repeats, c.threads, c.scale = q.shape[1] // plan.heads, threads, scale
    c.pieces = pieces = max(1, min(-(-8 * threads // (count * plan.heads)), used))
    c.q, c.q_type, c.q_b, c.q_h = q.data_ptr(), FLOAT_TYPES[q.dtype], q.stride(0), q.stride(1)
    c.held = used * c.places
    p.jobs, p.rows, p.job = count, int(jobs[:, 1].max()), jobs.data_ptr()
    p.tables, p.tables_b = tables.data_ptr(), tables.stride(0)
    slot = torch.empty(count, max(1, c.held), dtype=torch.int32)
    work = torch.empty(count * pieces * q.shape[1] * p.rows * (2 + made.shape[2]), dtype=torch.float32)
    c.slot, c.out, c.work = slot.data_ptr(), made.data_ptr(), work.data_ptr()
    library.kvsink_attend_pages(ctypes.byref(c), ctypes.byref(p))
    return made if out is None else out.copy_(made)
