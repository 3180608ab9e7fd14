"""Pages: their layout, rows written and read against a codec that is fed alone, places, pages that are used again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvsink.codecs import Codec, SideSpec
from kvsink.kernels.pages import PAGE, Batch, PageFormat, attend_pages, attend_pages_ref, read_pages
from tests.close import FUSED_FLOAT32
from tests.paged import PAGED, Served, alone, exact_rows, fed, served, slots_of
from tests.states import HEAD_DIM, KV_HEADS, rows

IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options)}" for name, options in PAGED]
NEVER = torch.zeros(0, dtype=torch.bool)


@pytest.mark.parametrize("places", [0, 1, 3])
def test_parts_of_a_page_stand_one_behind_the_other(places: int) -> None:
    form = PageFormat((33, 40), (0, 1), (16, 24), places, torch.bfloat16)
    cache = torch.zeros(3, 2, PAGE, form.slot_bytes, dtype=torch.uint8)
    wanted = PAGE * (33 + 40 + 2) + places * (2 * (16 + 24) + 1)
    assert form.slot_bytes == -(-wanted // PAGE)
    views = form.views(cache)
    for i, part in enumerate(views):
        part.fill_(i + 1)
    if not places:
        assert views.named.shape == (3, 2, 0)
    seen = [i for i, part in enumerate(views) if part.numel() and not bool((part == i + 1).all())]
    assert seen == [] and int((cache != 0).sum()) <= cache.numel()
    assert sum(p.numel() * p.element_size() for p in views) == 6 * wanted


@pytest.mark.parametrize(("bits", "least"), [((2, 2), 6.3), ((2, 4), 4.4), ((4, 4), 3.4)])
def test_a_page_holds_several_times_the_tokens_of_sixteen_bits(bits: tuple[int, int], least: float) -> None:
    """Heads of 128 channels, with a gain a row and two exact rows: 512 bytes a token in bfloat16."""
    key, value = (SideSpec(bits=n, kind="lloyd", gain=True, widths=(n,) * 16) for n in bits)
    form = PageFormat.of(Codec(key, value), (128, 128), 2, torch.bfloat16)
    assert form.slot_bytes == -(-(128 * (16 * sum(bits) + 4) + 2 * 512 + 2) // 128) and 512 / form.slot_bytes >= least


def test_a_page_that_is_no_run_of_bytes_is_refused() -> None:
    form = PageFormat((8, 8), (0, 0), (16, 16), 1, torch.float32)
    with pytest.raises(ValueError, match="are not runs of 128 x"):
        form.views(torch.zeros(2, PAGE, 2, form.slot_bytes, dtype=torch.uint8).transpose(1, 2))


@pytest.mark.parametrize(("method", "options"), PAGED, ids=IDS)
def test_codes_are_those_of_a_codec_fed_alone(method: str, options: tuple) -> None:
    """Bit by bit, whatever rows come together, in pages of others."""
    s = served(method, options)
    batch, made = fed(s, [150, 70], [40, 1])
    for i, (k, v, wanted) in enumerate(made):
        n, st = k.shape[1], alone(s, k, v)
        slots = slots_of(batch.tables[i], torch.arange(n))
        for name in ("k_codes", "v_codes", "k_scale", "v_scale"):
            held = getattr(s.pages, name)[slots // PAGE, :, slots % PAGE].transpose(0, 1)
            assert torch.equal(held, st[name][0].expand_as(held)), name
        p = s.codec.tables(s.params)
        got_k, got_v = read_pages(s.codec, p, s.pages, batch.tables[i], n)
        exact = exact_rows(wanted, 2)
        for got, codes, rows_ in ((got_k, s.codec.read_keys(st, p, 0, n)[0], k), (got_v, s.codec.read_values(st, p, 0, n)[0], v)):
            assert torch.equal(got[:, exact], rows_[:, exact])
            assert torch.equal(got[:, ~exact], codes[:, ~exact])
        assert int(exact.sum()) < int(wanted.sum()) or i  # of the first sequence a page overflows


def attended(s: Served, batch: Batch, made: list[Any], q: torch.Tensor, places: int) -> torch.Tensor:
    """Softmax in float64 over what a codec fed alone reads, rows that stay exact laid over it."""
    out, p = [], s.codec.tables(s.params)
    for i, (k, v, wanted) in enumerate(made):
        n, st, exact = k.shape[1], alone(s, k, v), exact_rows(wanted, places)
        full_k, full_v = s.codec.read_keys(st, p, 0, n)[0].double(), s.codec.read_values(st, p, 0, n)[0].double()
        full_k[:, exact], full_v[:, exact] = k[:, exact].double(), v[:, exact].double()
        for t in range(batch.starts[i], batch.starts[i + 1]):
            seen = n - (batch.starts[i + 1] - t) + 1
            query = q[t].double().unflatten(0, (KV_HEADS, -1))
            weight = (0.25 * query @ full_k[:, :seen].mT).softmax(-1)
            out.append((weight @ full_v[:, :seen]).flatten(0, 1))
    return torch.stack(out)


@pytest.mark.parametrize(("method", "options", "places"), [(*p, 2 * (i != 1)) for i, p in enumerate(PAGED)], ids=IDS)
def test_attention_over_pages_is_softmax_over_what_was_stored(method: str, options: tuple, places: int) -> None:
    s = served(method, options, places)
    lengths, chunks = [140, 5, 131], [21, 5, 1]
    batch, made = fed(s, lengths, chunks, seed=1)
    q = torch.randn(sum(chunks), 2 * KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    wanted = attended(s, batch, made, q, places)
    for attend in (attend_pages_ref, attend_pages):
        got = attend(s.codec, s.params, s.pages, q, batch, 0.25)
        assert (got - wanted).abs().max() <= FUSED_FLOAT32 * max(float(v.abs().max()) for _, v, _ in made)


def test_places_are_claimed_in_slot_order_over_chunks() -> None:
    s, (k, v) = served("rtn", places=2), (t[0] for t in rows(1, 6))
    table = torch.tensor([5], dtype=torch.int32)
    for chunk, wanted in (([0, 1], [0, 1]), ([2, 3, 4], [1, 0, 1]), ([5], [1])):
        at = torch.tensor(chunk)
        s.write(k[:, at], v[:, at], slots_of(table, at), at, torch.tensor(wanted, dtype=torch.bool))
    assert s.pages.named[5].tolist() == [[2, 3]] * KV_HEADS  # slots 1 and 2: those of 4 and 5 came too late
    assert torch.equal(s.pages.exact_k[5, :, 1], k[:, 2]) and torch.equal(s.pages.exact_v[5, :, 0], v[:, 1])


def test_a_slot_that_is_written_again_gives_its_place_back() -> None:
    s, (k, v) = served("rtn", places=3), (t[0] for t in rows(1, 6))
    table, at, yes = torch.tensor([2], dtype=torch.int32), torch.arange(6), torch.ones(6, dtype=torch.bool)
    s.write(k, v, slots_of(table, at), at, yes & (at % 2 == 1))
    assert s.pages.named[2, 0].tolist() == [2, 4, 6]
    s.write(k[:, 3:5], v[:, 3:5], slots_of(table, at[3:5]), at[3:5], torch.tensor([False, True]))
    assert s.pages.named[2, 0].tolist() == [2, 5, 0]  # slot 3 no longer asks, slot 4 does, slot 5 is not written yet


def test_a_page_used_again_holds_nothing_of_its_past() -> None:
    """Two sequences of other lengths through the same page, against the second in a page that was never used."""
    outs = []
    for past in (True, False):
        s, table = served("klt", places=2, count=1), torch.tensor([[0]], dtype=torch.int32)
        for seed, n in ((1, 128), (2, 9))[not past :]:
            k, v = (t[0] for t in rows(1, n, seed=seed))
            at = torch.arange(n)
            s.write(k, v, slots_of(table[0], at), at, torch.zeros(n, dtype=torch.bool) if seed == 2 else at < 2)
        q = torch.randn(1, 2 * KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(4))
        outs.append(attend_pages(s.codec, s.params, s.pages, q, Batch([0, 1], [9], table), 0.25))
        assert s.pages.named.tolist() == [[[0, 0]] * KV_HEADS]
    assert torch.equal(*outs)


def test_padding_writes_nothing() -> None:
    s, (k, v) = served("rtn", places=1), (t[0] for t in rows(1, 3))
    before = [t.contiguous().view(torch.uint8).clone() for t in s.pages]
    s.write(k, v, torch.tensor([-1, 130, -1]), torch.tensor([0, 2, 0]), torch.ones(3, dtype=torch.bool))
    after = [t.contiguous().view(torch.uint8) for t in s.pages]
    assert all(torch.equal(a[[0, *range(2, 8)]], b[[0, *range(2, 8)]]) for a, b in zip(before, after, strict=True))
    assert s.pages.named[1, 0].tolist() == [3] and not torch.equal(before[0][1, :, 2], after[0][1, :, 2])
    assert torch.equal(before[0][1, :, 3:], after[0][1, :, 3:])
