"""Rows of many sequences in pages of 128 slots, as serving engines hand them out: layout, new rows, attention.

Formula    a page of one head: | key codes | value codes | key numbers | value numbers | exact keys | exact values | named |
           named[i] = 1 + the slot of the page whose row stands in place i as it came; 0: the place is empty
           new rows: each is coded alone, as `kvsink::append_` does; of those that ask for it the first `places` of a page in slot
           order stay exact. A slot that is written again loses its place first, as do those behind it
           out = softmax(scale · q k^T) v^ over the slots up to the query's own, k^ and v^ from codes, exact rows laid over them
Source     ours; pages and block tables are those of PagedAttention, arXiv 2309.06180
Differs    a page depends on the rows before its end alone: no later row changes what stands in it, so sequences can share it
Shapes     cache uint8 [pages, H, 128, C]; slots int64 [n], page · 128 + slot of the page, -1 for a row of padding; k, v [n, H, D],
           keys after RoPE; q [n, Hq, D]; tables int32 [sequences, pages]. A token's slot in its sequence is its position
Exact      rows in their places; codes equal those of a cache that holds one sequence, bit by bit
Cost       the reference decodes a sequence once for all its new rows; `kvsink.kernels.cpu.pages` reads codes as they lie
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends import Call, LayerState, Shape, device_of
from .layout import TILE_SLOTS

__all__ = ["PAGE", "Batch", "PageFormat", "Pages", "RowCoder", "attend_pages", "attend_pages_ref", "read_pages", "write_pages"]

PAGE = TILE_SLOTS
ROWS = 16  # query rows of one sequence that share what is decoded


class Pages(NamedTuple):
    """The parts of all pages: codes uint8 and numbers float16 [pages, H, 128, n], exact rows [pages, H, places, D], named uint8
    [pages, H, places]."""

    k_codes: Tensor
    v_codes: Tensor
    k_scale: Tensor
    v_scale: Tensor
    exact_k: Tensor
    exact_v: Tensor
    named: Tensor


@dataclass(frozen=True)
class PageFormat:
    """What one page of one head holds. codes, numbers: bytes and float16 numbers of a row; dims: its channels; of keys and values.
    dtype: of exact rows."""

    codes: tuple[int, int]
    numbers: tuple[int, int]
    dims: tuple[int, int]
    places: int
    dtype: torch.dtype

    @classmethod
    def of(cls, codec: Any, dims: tuple[int, int], places: int, dtype: torch.dtype) -> PageFormat:
        """The page of a codec whose rows are coded one by one."""
        sides = tuple(zip((codec.key, codec.value), dims, strict=True))
        codes, numbers = ([f(side, dim) for side, dim in sides] for f in (codec.row_bytes, codec.row_scales))
        return cls((codes[0], codes[1]), (numbers[0], numbers[1]), dims, places, dtype)

    @property
    def parts(self) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
        """Dtype and shape of every part, in their order."""
        e = self.places
        return (
            *((torch.uint8, (PAGE, n)) for n in self.codes),
            *((torch.float16, (PAGE, n)) for n in self.numbers),
            *((self.dtype, (e, d)) for d in self.dims),
            (torch.uint8, (e,)),
        )

    @property
    def slot_bytes(self) -> int:
        """C: bytes of a page by its slots, rounded up."""
        return -(-sum(_nbytes(*part) for part in self.parts) // PAGE)

    def views(self, cache: Tensor) -> Pages:
        """The parts of a cache uint8 [pages, H, 128, C], whose page of one head is one run of bytes."""
        if cache.shape[2:] != (PAGE, self.slot_bytes) or cache.stride()[2:] != (self.slot_bytes, 1):
            raise ValueError(
                f"pages of {tuple(cache.shape)}, strides {cache.stride()}, are not runs of {PAGE} x {self.slot_bytes} bytes"
            )
        flat, at, out = cache.flatten(2), 0, []
        for dtype, shape in self.parts:
            size = _nbytes(dtype, shape)
            out.append(
                flat[..., at : at + size].view(dtype).unflatten(2, shape) if size else flat.new_empty((*flat.shape[:2], *shape))
            )
            at += size
        return Pages(*(t if t.dtype == dtype else t.to(dtype) for t, (dtype, _) in zip(out, self.parts, strict=True)))


def _nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()


@dataclass(eq=False)
class Batch:
    """The sequences of one step. starts: where the new rows of each begin, and their end; lengths: rows of each, new ones included;
    tables: its pages."""

    starts: Sequence[int]
    lengths: Sequence[int]
    tables: Tensor

    @cached_property
    def positions(self) -> Tensor:
        """int64 [n] of the new rows."""
        spans = zip(self.starts, self.starts[1:], self.lengths, strict=False)
        return torch.cat([torch.arange(length - (b - a), length) for a, b, length in spans])

    @cached_property
    def jobs(self) -> Tensor:
        """int64 [jobs, 4], neighbouring new rows of a sequence: the first, how many, the slots that one sees, the sequence."""
        spans = enumerate(zip(self.starts, self.starts[1:], self.lengths, strict=False))
        return torch.tensor(
            [(at, min(ROWS, b - at), length - (b - at) + 1, i) for i, (a, b, length) in spans for at in range(a, b, ROWS)],
            dtype=torch.int64,
        ).reshape(-1, 4)


class RowCoder:
    """Codes rows one by one: each is a sequence of its own to `append_`, so that its codes do not depend on those it comes with.

    codec: one without exact rows or a window; params: its tables.
    """

    def __init__(self, codec: Any, params: Sequence[Tensor]) -> None:
        self.codec, self.text, self.params = codec, codec.text(), params
        self._state: LayerState | None = None  # of so many rows; its codes are read before it is used again

    def __call__(self, k: Tensor, v: Tensor, positions: Tensor, turn: Sequence[Tensor]) -> list[Tensor]:
        """Rows [n, H, D] at positions [n], turned by angles [n, R] → codes and numbers [n, H, bytes], in the order of `Pages`."""
        n, h, dim = k.shape
        if self._state is None or self._state.positions.shape[0] != n:
            layout = self.codec.layout(n, h, dim, v.shape[2], 1, k.dtype)
            st = {name: torch.full(shape, fill, dtype=dtype, device=k.device) for name, (shape, dtype, fill) in layout.items()}
            st["positions"] = torch.zeros(n, 1, dtype=torch.int32, device=k.device)
            st["real"] = torch.ones(n, 1, dtype=torch.bool, device=k.device)
            self._state = LayerState(**{name: st[name] for name in LayerState._fields})
        state, rows, angles = self._state, (k[:, :, None], v[:, :, None]), [t[:, None] for t in turn]
        call = Call(self.codec, self.text, *rows, state, self.params, positions=positions[:, None], turn=angles)
        backends.choose("append", *call.facts).run(call)
        return [t[:, :, 0].expand(-1, h, -1) for t in (state.k_codes, state.v_codes, state.k_scale, state.v_scale)]


def write_pages(pages: Pages, slots: Tensor, coded: Sequence[Tensor], k: Tensor, v: Tensor, exact: Tensor) -> None:
    """Rows, coded by `RowCoder`, to their slots, in the order of each sequence. exact: bool [n], those that ask for a place."""
    if int(slots.min()) < 0:
        real = slots >= 0
        slots, coded, k, v, exact = slots[real], [t[real] for t in coded], k[real], v[real], exact[real]
    page, at = slots // PAGE, slots % PAGE
    for to, rows in zip(pages[:4], coded, strict=True):
        to[page, :, at] = rows
    if not pages.named.shape[2]:
        return
    begins = torch.ones_like(slots, dtype=torch.bool)
    begins[1:] = slots[1:] != slots[:-1] + 1
    begins |= at == 0
    held = pages.named[page[begins]]
    stale = held > at[begins, None, None]
    if stale.any():
        pages.named[page[begins]] = held.masked_fill(stale, 0)
    for i in exact.nonzero()[:, 0].tolist():
        where = int(page[i])
        free = (pages.named[where, 0] == 0).nonzero()
        if len(free):
            place = int(free[0])
            pages.exact_k[where, :, place], pages.exact_v[where, :, place] = (
                k[i].to(pages.exact_k.dtype),
                v[i].to(pages.exact_v.dtype),
            )
            pages.named[where, :, place] = int(at[i]) + 1


def read_pages(codec: Any, p: Mapping[str, Tensor], pages: Pages, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys after RoPE and values float32 [H, length, D] of one sequence."""
    used = table[: -(-length // PAGE)].to(torch.int64)

    def rows(part: Tensor) -> Tensor:
        return part[used].transpose(0, 1).flatten(1, 2)[None]  # [1, H, slots, n]

    positions = torch.arange(len(used) * PAGE, device=table.device)[None]
    k = codec.decode_keys(rows(pages.k_codes), rows(pages.k_scale), positions, p)[0]
    v = codec.decode_values(rows(pages.v_codes), rows(pages.v_scale), p)[0]
    for page, place in pages.named[used, 0].nonzero().tolist():
        slot = page * PAGE + int(pages.named[used[page], 0, place]) - 1
        k[:, slot], v[:, slot] = pages.exact_k[used[page], :, place].float(), pages.exact_v[used[page], :, place].float()
    return k[:, :length], v[:, :length]


def attend_pages_ref(
    codec: Any, params: Sequence[Tensor], pages: Pages, q: Tensor, batch: Batch, scale: float, out: Tensor | None = None
) -> Tensor:
    """The definition, for any device: each sequence is read whole."""
    out, p = torch.empty_like(q[..., : pages.exact_v.shape[3]]) if out is None else out, codec.tables(params)
    for i, (a, b, length) in enumerate(zip(batch.starts, batch.starts[1:], batch.lengths, strict=False)):
        k, v = read_pages(codec, p, pages, batch.tables[i], length)
        seen = torch.arange(length, device=q.device) < torch.arange(length - (b - a) + 1, length + 1, device=q.device)[:, None]
        query = q[a:b].float().transpose(0, 1).unflatten(0, (k.shape[0], -1))  # [H, repeats, rows, D]
        logits = (query @ k[:, None].mT * scale).masked_fill(~seen, float("-inf"))
        out[a:b] = (logits.softmax(-1) @ v[:, None]).flatten(0, 1).transpose(0, 1).to(out.dtype)
    return out


def attend_pages(
    codec: Any, params: Sequence[Tensor], pages: Pages, q: Tensor, batch: Batch, scale: float, out: Tensor | None = None
) -> Tensor:
    """`attend_pages_ref` by the kernels of the device, where they serve the codec. out: where the result goes, [n, Hq, D]."""
    from .cpu import pages as cpu

    (_, heads, _, dim), places = pages.exact_k.shape, pages.named.shape[2]
    shape = Shape(q.shape[1], heads, dim, pages.exact_v.shape[3], codec.rotary(params), q.dtype, places)
    run = attend_pages_ref if cpu.declines(codec.format, shape, device_of(q.device)) else cpu.attend
    return run(codec, params, pages, q, batch, scale, out)
