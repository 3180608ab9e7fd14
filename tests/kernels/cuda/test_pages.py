"""Pages on a GPU, emulated: rows written, attended to and read back, against a cache of each sequence alone by the definition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsink.codecs import STATE_NAMES
from kvsink.kernels.append import append_ref
from kvsink.kernels.backends import Shape
from kvsink.kernels.cuda import launch, pages
from kvsink.kernels.pages import PAGE, PageFormat
from tests.paged import exact_rows, slots_of
from tests.states import GPU

from .emulated import Emulated
from .test_tile_shapes import KINDS, KV_HEADS, NAMES, layer_of, rows

REACH = 512
NONE = torch.empty(0)
QUICK = (0, 9, 32)
EVERY = [
    pytest.param(i, id=NAMES[i], marks=() if i in QUICK else pytest.mark.slow)
    for i in (0, 6, 9, 11, 20, 27, 32, 33, 37, 44, 48, 51)
]


@dataclass
class Held:
    """A layer's pages, full of what others have left there."""

    index: int
    places: int = 3
    exact: int = 8
    count: int = 9

    def __post_init__(self) -> None:
        kind, layer = KINDS[self.index], layer_of(self.index, 1)
        self.codec = pages.in_pages(layer.codec, self.exact)
        self.params = layer.shared.runtime.params(
            1, self.codec, REACH, torch.device("cpu"), {"origin_cos": NONE, "origin_sin": NONE}
        )
        self.p = self.codec.tables(self.params)
        self.form = PageFormat.of(self.codec, (kind.dim, kind.dim), self.places, torch.float16)
        g = torch.Generator().manual_seed(3)
        cache = torch.randint(0, 256, (self.count, KV_HEADS, PAGE, self.form.slot_bytes), dtype=torch.uint8, generator=g)
        self.pages = self.form.views(cache)
        self.pages.named.copy_(self.pages.named[:, :1] % (PAGE + 1))
        for part in (self.pages.exact_k, self.pages.exact_v):
            part.nan_to_num_(0, 0, 0)
        self.lib = Emulated(launch.variant_of(self.codec, kind.repeats, self.codec.rotary(self.params)), 3, card=kind.card)

    def write(self, k: Tensor, v: Tensor, slots: Tensor, at: Tensor, asks: Tensor) -> None:
        k, v = (x.transpose(0, 1) for x in (k, v))
        pages.write(self.lib, self.codec, self.p, self.pages, slots, at, k, v, asks)

    def alone(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What a cache that one sequence [H, n, D] was fed to holds in its codes, by the definition."""
        codec, n, dim = replace(self.codec, segments=()), k.shape[1], k.shape[2]
        layout = codec.layout(1, KV_HEADS, dim, dim, REACH, torch.float32)
        st = {name: torch.full(shape, fill, dtype=dtype) for name, (shape, dtype, fill) in layout.items()}
        st["positions"], st["real"] = torch.zeros(1, REACH, dtype=torch.int32), torch.ones(1, REACH, dtype=torch.bool)
        turned = self.codec.rotary(self.params)
        origin = {"origin_cos": torch.ones(1, turned), "origin_sin": torch.zeros(1, turned)}
        params = layer_of(self.index, 1).shared.runtime.params(1, codec, REACH, torch.device("cpu"), origin)
        none, state = torch.empty(1, n, 0), [st[name] for name in STATE_NAMES]
        append_ref(k[None].float(), v[None].float(), torch.arange(n)[None], none, none, [], state, params, codec.text(), True)
        p = codec.tables(params)
        return codec.read_keys(st, p, 0, n)[0], codec.read_values(st, p, 0, n)[0]


def fed(held: Held, lengths: list[int], chunks: list[int], share: float = 0.03) -> tuple[Tensor, list[Any]]:
    """Sequences in shuffled pages, the last rows of each (`chunks`) written together, those before alone."""
    kind, g = KINDS[held.index], torch.Generator().manual_seed(7)
    order, made, tables = torch.randperm(held.count, generator=g).int(), [], []
    for i, n in enumerate(lengths):
        k, v = (rows(1, n, 10 * i + s, KV_HEADS, kind.dim)[0] for s in (1, 2))
        made.append((k, v, torch.rand(n, generator=g) < share))
        used = -(-n // PAGE)
        tables.append(torch.nn.functional.pad(order[:used], (0, REACH // PAGE - used), value=int(order[0])))
        order = order[used:]
    parts = []
    for (k, v, asks), n, new, table in zip(made, lengths, chunks, tables, strict=True):
        before, now = torch.arange(n - new), torch.arange(n - new, n)
        if n > new:
            held.write(k[:, before], v[:, before], slots_of(table, before), before, asks[before])
        parts.append((k[:, now], v[:, now], slots_of(table, now), now, asks[now]))
    held.write(*(torch.cat([p[i] for p in parts], 1 if i < 2 else 0) for i in range(5)))
    return torch.stack(tables), made


@pytest.mark.parametrize("index", EVERY)
def test_rows_are_read_back_as_a_cache_of_their_sequence_alone_holds_them(index: int) -> None:
    """Codes by the definition, and of every page the first rows that asked, as they came; some chunks begin inside pages."""
    held = Held(index)
    tables, made = fed(held, [200, 5, 383], [130, 5, 1])
    for table, (k, v, asks) in zip(tables, made, strict=True):
        n, exact = k.shape[1], exact_rows(asks, held.places)
        at = torch.arange(n)
        dims = (k.shape[2], k.shape[2])
        got = pages.decode(held.lib, held.codec, held.p, held.pages, slots_of(table, at), at, dims, torch.float16)
        for back, row, wanted in zip((x.transpose(0, 1) for x in got), (k, v), held.alone(k, v), strict=True):
            assert torch.equal(back[:, exact], row[:, exact])
            off = (back.float() - wanted)[:, ~exact]
            assert off.norm() <= 2e-3 * wanted.norm()  # float16, and ties
        named = held.pages.named[table[: -(-n // PAGE)].long()]
        slots = [[1 + int(i) % PAGE for i in exact.nonzero()[:, 0] if i // PAGE == page] for page in range(named.shape[0])]
        assert named.tolist() == [[s + [0] * (held.places - len(s))] * KV_HEADS for s in slots]


@pytest.mark.parametrize("index", EVERY)
@pytest.mark.parametrize(("exact", "share"), [(8, 0.01), (64, 0.03)])
def test_attention_over_pages_is_softmax_over_what_is_held(index: int, exact: int, share: float) -> None:
    """Sequences of their own lengths; one that sees nothing, as padding of a CUDA graph is, gives zeros."""
    held, lengths = Held(index, exact=exact), [200, 5, 383]
    tables, made = fed(held, lengths, [1, 1, 1], share)
    kind, last = KINDS[index], torch.tensor([199, 4, 382, -1])
    tables = torch.cat([tables, tables[:1]])
    q = (rows(4, 1, 5, KV_HEADS * kind.repeats, kind.dim) * 0.5)[:, :, 0]
    out, places = torch.full_like(q, float("nan")), pages.list_exact(held.lib, held.codec, held.pages, tables, last)
    pages.attend(held.lib, held.codec, held.p, held.pages, q, tables, last, places, 0.09, out)
    assert (held.lib.partial == -1).all() and not out[3].any()
    for i, (k, v, asks) in enumerate(made):
        as_it_came = exact_rows(asks, held.places)
        as_it_came &= as_it_came.cumsum(0) <= exact
        assert places.slot[i][places.slot[i] >= 0].tolist() == as_it_came.nonzero()[:, 0].tolist()
        full = [x.double() for x in held.alone(k, v)]
        for rows_, came in zip(full, (k, v), strict=True):
            rows_[:, as_it_came] = came[:, as_it_came].double()
        query = q[i].double().unflatten(0, (KV_HEADS, -1))
        wanted = ((0.09 * query @ full[0].mT).softmax(-1) @ full[1]).flatten(0, 1)
        assert (out[i].double() - wanted).norm() <= 3e-3 * wanted.norm()


def test_sequences_are_attended_to_a_few_at_a_time_where_turned_queries_would_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(48)
    tables, _ = fed(held, [200, 5, 383], [1, 1, 1])
    kind, last = KINDS[48], torch.tensor([199, 4, 382])
    q = (rows(3, 1, 5, KV_HEADS * kind.repeats, kind.dim) * 0.5)[:, :, 0]
    places = pages.list_exact(held.lib, held.codec, held.pages, tables, last)
    outs, launches = [], []
    monkeypatch.setattr(held.lib, "attend", lambda a, *rest: (launches.append(a.B), Emulated.attend(held.lib, a, *rest)))
    for most in (3, 2):
        monkeypatch.setattr(pages, "TURNED", most * KV_HEADS * tables.shape[1] * held.lib.turned)
        outs.append(torch.full_like(q, float("nan")))
        pages.attend(held.lib, held.codec, held.p, held.pages, q, tables, last, places, 0.09, outs[-1])
    assert launches == [3, 2, 1]
    assert (outs[0].float() - outs[1].float()).norm() <= 2e-3 * outs[0].float().norm()  # in another order of parts


def test_a_page_used_again_and_a_slot_written_again_keep_no_place() -> None:
    held, table = Held(9), torch.tensor([4, 2, 0, 0], dtype=torch.int32)
    k, v = (rows(1, 12, s, KV_HEADS, 64)[0] for s in (1, 2))

    def write(first: int, asks: list[int]) -> list[int]:
        at = torch.arange(first, first + len(asks))
        held.write(k[:, at], v[:, at], slots_of(table, at), at, torch.tensor(asks, dtype=torch.bool))
        return held.pages.named[4, 1].tolist()

    assert held.pages.named[4].any()
    assert write(0, [0, 1, 0, 1, 0, 1]) == [2, 4, 6]
    assert write(3, [0, 1]) == [2, 5, 0]
    assert torch.equal(held.pages.exact_k[4, :, 1], k[:, 4]) and torch.equal(held.pages.exact_v[4, :, 0], v[:, 1])
    assert write(5, [0]) == [2, 5, 0] and write(6, [1, 1]) == [2, 5, 7]
    assert write(0, [0]) == [0, 0, 0]


def test_padding_writes_nothing() -> None:
    held = Held(9)
    before = [part.clone() for part in held.pages]
    k, v = (rows(1, 3, s, KV_HEADS, 64)[0] for s in (1, 2))
    held.write(k, v, torch.tensor([-1, 130, -1]), torch.tensor([700, 2, -1]), torch.ones(3, dtype=torch.bool))
    for was, part in zip(before, held.pages, strict=True):
        assert torch.equal(was[[0, *range(2, 9)]].nan_to_num(7), part[[0, *range(2, 9)]].nan_to_num(7))
    assert held.pages.named[1, 0].tolist() == [3, 0, 0]


def test_more_places_than_a_warp_has_lanes_are_declined() -> None:
    held = Held(9)
    shape = Shape(KV_HEADS, KV_HEADS, 64, 64, 64, torch.float16)
    assert pages.declines(held.codec, shape, GPU, 33) == "33 exact rows of a page, more than 32"
    assert not pages.declines(held.codec, shape, GPU, 32)
    assert "codes in rows of bytes" in pages.declines(replace(held.codec, tiles=False), shape, GPU, 2)
