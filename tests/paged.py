"""Sequences of random rows in shuffled pages, and the same rows in a cache of their own, side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvsink.codecs import STATE_NAMES
from kvsink.kernels import append_
from kvsink.kernels.pages import PAGE, Batch, PageFormat, Pages, RowCoder, write_pages
from tests.states import HEAD_DIM, KV_HEADS, layer_of, rows

__all__ = ["PAGED", "Served", "alone", "exact_rows", "fed", "served", "slots_of"]

PAGED: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
    ("klt", ()),
    ("klt:best", (("key_bits", 3), ("value_bits", 4))),
    ("klt:codebooks", (("key_bits", 1.25), ("value_bits", 1), ("windows", 18))),
    ("klt:even", (("value_bits", 2),)),
    ("centred", ()),
    ("rtn", ()),
    ("static", ()),
    ("kvquant", ()),
)
"""Codecs that code rows one by one."""

REACH = 1024  # tokens that the tables of angles reach


@dataclass
class Served:
    """A layer of pages, and what its rows are coded with."""

    codec: Any
    params: list[Tensor]
    runtime: Any
    pages: Pages
    coder: RowCoder

    def write(self, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor, exact: Tensor) -> None:
        """Rows [H, n, D] to their slots."""
        k, v, turn = k.transpose(0, 1), v.transpose(0, 1), self.angles(positions)
        write_pages(self.pages, slots, self.coder(k, v, positions, turn), k, v, exact)

    def angles(self, positions: Tensor) -> list[Tensor]:
        return [t[0] for t in self.runtime.angles(1, positions[None])]


@cache
def _layer(method: str, options: tuple[tuple[str, Any], ...]) -> Any:
    return layer_of(method, options)


def served(method: str, options: tuple = (), places: int = 2, count: int = 8, dtype: torch.dtype = torch.float32) -> Served:
    """`count` pages full of what others have left there."""
    layer = _layer(method, options)
    codec = replace(layer.codec, segments=(), window=0, strict=True, anchors=None)
    params = layer.shared.runtime.params(1, codec, REACH, torch.device("cpu"))
    form = PageFormat.of(codec, (HEAD_DIM, HEAD_DIM), places, dtype)
    left = torch.randint(
        0, 256, (count, KV_HEADS, PAGE, form.slot_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    pages = form.views(left)
    pages.named.copy_(pages.named % (PAGE + 1))
    return Served(codec, params, layer.shared.runtime, pages, RowCoder(codec, params))


def slots_of(table: Tensor, positions: Tensor) -> Tensor:
    """Where the tokens of a sequence lie."""
    return table[positions // PAGE].long() * PAGE + positions % PAGE


def alone(s: Served, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """The state of a cache that one sequence [H, n, D] was fed to, row by row."""
    n = k.shape[1]
    layout = s.codec.layout(1, KV_HEADS, HEAD_DIM, HEAD_DIM, n, k.dtype)
    st = {name: torch.full(shape, fill, dtype=dtype) for name, (shape, dtype, fill) in layout.items()}
    st["positions"], st["real"] = torch.zeros(1, n, dtype=torch.int32), torch.ones(1, n, dtype=torch.bool)
    for i in range(n):
        at = torch.tensor([i])
        cos, sin = s.runtime.angles(1, at[None])
        append_(
            k[None, :, i : i + 1],
            v[None, :, i : i + 1],
            at[None],
            cos,
            sin,
            [],
            [st[x] for x in STATE_NAMES],
            s.params,
            s.codec.text(),
            True,
        )
        st["length"].add_(1)
    return st


def exact_rows(wanted: Tensor, places: int) -> Tensor:
    """The rows of one sequence that stay exact: of every page the first `places` that ask for it."""
    chunks = [w & (w.cumsum(0) <= places) for w in wanted.split(PAGE)]
    return torch.cat(chunks)


def fed(
    s: Served, lengths: list[int], chunks: list[int], seed: int = 0, share: float = 0.03
) -> tuple[Batch, list[tuple[Tensor, Tensor, Tensor]]]:
    """Sequences of these lengths in shuffled pages, the last rows of each (`chunks`) written in one batch, those before alone.

    Returns that batch, and keys, values and which rows ask for a place of every sequence.
    """
    g = torch.Generator().manual_seed(seed)
    order, made, tables = torch.randperm(s.pages.named.shape[0], generator=g).int(), [], []
    for i, n in enumerate(lengths):
        k, v = (t[0] for t in rows(1, n, seed=10 * seed + i))
        made.append((k, v, torch.rand(n, generator=g) < share))
        used = -(-n // PAGE)
        tables.append(order[:used])
        order = order[used:]
    table = torch.stack([torch.nn.functional.pad(t, (0, 8 - len(t))) for t in tables])
    parts = []
    for (k, v, wanted), n, new, t in zip(made, lengths, chunks, tables, strict=True):
        before, now = torch.arange(n - new), torch.arange(n - new, n)
        if n > new:
            s.write(k[:, before], v[:, before], slots_of(t, before), before, wanted[before])
        parts.append((k[:, now], v[:, now], slots_of(t, now), now, wanted[now]))
    s.write(*(torch.cat([p[i] for p in parts], 1 if i < 2 else 0) for i in range(5)))
    starts = [0, *torch.tensor(chunks).cumsum(0).tolist()]
    return Batch(starts, lengths, table), made
