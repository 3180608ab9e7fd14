"""Ranges along tokens: the op equals a slow loop over blocks, whatever the chunks; padding and exact rows are left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvsink.codecs import Codec, SideSpec
from kvsink.errors import UnsupportedError
from kvsink.kernels import append_
from kvsink.kernels.packing import unpack_bits
from kvsink.kernels.tokens import open_blocks, quantize_tokens, token_norm, touched
from tests.states import append_arguments, layer_of, rows

FLUSH, GROUP = 8, 4


def by_hand(x: Tensor, valid: list[bool], bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes [T, D] and x^ [T, D] of one head, one channel and one group at a time."""
    t, d = x.shape
    codes, back = torch.zeros(t, d, dtype=torch.int32), torch.zeros(t, d)
    for start in range(0, t, group):
        span = range(start, min(start + group, t))
        for channel in range(d):
            seen = [float(x[i, channel]) for i in span if valid[i]] or [0.0]
            lo = torch.tensor(min(seen)).half().float()
            step = ((torch.tensor(max(seen)) - torch.tensor(min(seen))) / (2**bits - 1)).half().float()
            for i in span:
                level = ((x[i, channel] - lo) / step).round().clamp(0, 2**bits - 1) if step else torch.zeros(())
                codes[i, channel], back[i, channel] = int(level), lo + step * level
    return codes, back


def fed(method: str, k: Tensor, v: Tensor, chunks: list[int], options: tuple = (), **override: Any) -> Any:
    """A layer that has seen the rows in these chunks."""
    layer, at = layer_of(method, options, k.shape[0]), 0
    for i, n in enumerate(chunks):
        given = append_arguments(layer, k[:, :, at : at + n], v[:, :, at : at + n], seed=i)
        given |= {name: make(at, n) for name, make in override.items() if name != "real"}
        if "real" in override:
            layer.shared.real[:, at : at + n] = override["real"](at, n)
        append_(**given)
        layer.length.add_(n)
        at += n
    return layer


def codes_of(layer: Any, prefix: str = "k") -> Tensor:
    side = layer.codec.key if prefix == "k" else layer.codec.value
    return unpack_bits(getattr(layer, f"{prefix}_codes"), side.widths[0], 8 * len(side.widths)).int()


def read_back(layer: Any, total: int) -> tuple[Tensor, Tensor]:
    c, p = layer.codec, dict(zip(layer.codec.param_names(), layer.params, strict=True))
    state = c.named(layer.state())
    return c.read_keys(state, p, 0, total), c.read_values(state, p, 0, total)


chunkings = st.lists(st.integers(1, 19), min_size=1, max_size=6).filter(lambda c: sum(c) <= 60)


@settings(max_examples=40, deadline=None)
@given(chunks=chunkings, seed=st.integers(0, 2**31), bits=st.integers(1, 8))
def test_chunks_of_any_size_equal_the_slow_loop(chunks: list[int], seed: int, bits: int) -> None:
    total = sum(chunks)
    k, v = rows(2, total, seed)
    layer = fed("kivi/8", k, v, chunks, (("key_bits", bits),))
    codes, (back, _) = codes_of(layer), read_back(layer, total)
    for b in range(2):
        for h in range(2):
            wanted, x = by_hand(k[b, h], [True] * total, bits, GROUP)
            assert (codes[b, h, :total] != wanted).float().mean() <= 0.002  # a division may round the other way
            assert (back[b, h] - x).abs().max() <= 1.001 * float(layer.k_scale[..., :16].float().max())
            assert ((back[b, h] - x).abs() > 1e-6).float().mean() <= 0.002


@settings(max_examples=25, deadline=None)
@given(chunks=chunkings, seed=st.integers(0, 2**31))
@pytest.mark.parametrize("method", ["kivi/8", "oscar/8", "kvarn/8"])
def test_one_prefill_equals_steps(method: str, chunks: list[int], seed: int) -> None:
    total = sum(chunks)
    k, v = rows(1, total, seed)
    layers = [fed(method, k, v, split) for split in ([total], chunks, [1] * total)]
    for other in layers[1:]:
        for name in ("k_codes", "k_scale", "v_codes", "v_scale", "k_norm", "recent_k", "recent_v", "recent_slot"):
            assert torch.equal(getattr(layers[0], name), getattr(other, name)), name


@pytest.mark.parametrize("chunks", [[30], [9, 1, 1, 13, 6], [1] * 30])
@pytest.mark.parametrize("method", ["kivi/8", "oscar/8", "kvarn/8"])
def test_padding_leaves_no_trace(method: str, chunks: list[int]) -> None:
    """Rows 0 to 10 of the second sequence are padding: what stands there changes no code of its tokens."""
    pad = torch.tensor([[0], [11]])

    def positions(at: int, n: int) -> Tensor:
        return (torch.arange(at, at + n) - pad).clamp_min(0)

    k, v = rows(2, 30)
    k[1, :, :11] *= 1000.0
    other = k.clone()
    other[1, :, :11] = 0.25
    real = {"real": lambda at, n: torch.arange(at, at + n) >= pad}
    one, two = (fed(method, x, v, chunks, positions=positions, **real) for x in (k, other))
    first = 11 // GROUP  # the groups before hold padding alone, and nothing reads them
    assert torch.equal(one.k_codes[0], two.k_codes[0]) and torch.equal(one.k_scale[0], two.k_scale[0])
    assert torch.equal(one.k_codes[1, :, 11:], two.k_codes[1, :, 11:])
    assert torch.equal(one.k_scale[1, :, first:], two.k_scale[1, :, first:])
    assert float(one.k_scale[1, :, first:].float().abs().max()) < 20  # the padding is 1000 times as large


@pytest.mark.parametrize("method", ["kivi/8", "oscar/8", "kvarn/8"])
def test_a_row_padded_by_whole_blocks_is_the_row_alone(method: str) -> None:
    k, v = rows(2, 37)
    pad = torch.tensor([[0], [FLUSH]])
    layer = fed(method, k, v, [20, 1, 16], positions=lambda at, n: (torch.arange(at, at + n) - pad).clamp_min(0))
    alone = fed(method, k[1:, :, FLUSH:], v[1:, :, FLUSH:], [5, 24])
    assert torch.equal(layer.k_codes[1, :, FLUSH:37], alone.k_codes[0, :, : 37 - FLUSH])
    groups = -(-(37 - FLUSH) // GROUP)
    assert torch.equal(layer.k_scale[1, :, FLUSH // GROUP :][:, :groups], alone.k_scale[0, :, :groups])
    wanted, got = read_back(alone, 37 - FLUSH)[0], read_back(layer, 37)[0][1:, :, FLUSH:]
    assert torch.equal(wanted, got)


@pytest.mark.parametrize("chunks", [[30], [9, 1, 1, 13, 6], [1] * 30])
def test_a_protected_row_does_not_widen_its_group(chunks: list[int]) -> None:
    k, v = rows(1, 30)
    loud = k.clone()
    loud[:, :, 13] *= 1000.0

    def candidates(at: int, n: int) -> list[Tensor]:
        score = torch.where(torch.arange(at, at + n) == 13, 1.0, float("-inf"))[None]
        best, index = score.topk(1, dim=1)
        return [best, index]

    options = (("protect", "first:1"),)
    one, two = (fed("kivi/8", x, v, chunks, options, candidates=candidates) for x in (k, loud))
    assert two.exact_slot.tolist() == [[13]] and torch.equal(two.exact_k[:, :, 0], loud[:, :, 13])
    assert torch.equal(one.k_scale, two.k_scale)
    rest = [i for i in range(30) if i != 13]
    assert torch.equal(one.k_codes[:, :, rest], two.k_codes[:, :, rest])
    without = fed("kivi/8", loud, v, chunks)
    assert float(without.k_scale[:, :, 3].abs().max()) > 50 * float(two.k_scale[:, :, 3].abs().max())


def test_the_norm_is_one_number_per_token_and_takes_its_size() -> None:
    k, v = rows(2, 24)
    k[:, :, 3] *= 100.0  # without the norm, this row would set the range of its group
    k[:, :, 5] = 0.0
    layer = fed("oscar/8", k, v, [24])
    wanted = k.square().sum((1, 3)).sqrt().half()
    wanted[:, 5] = 1.0
    assert layer.k_norm.shape == (2, 1, 64, 1) and torch.allclose(layer.k_norm[:, 0, :24, 0], wanted, rtol=2e-3)
    loud = (read_back(layer, 24)[0] - k)[:, :, [0, 1, 2, 3]].square().sum((0, 1, 3)) / k[:, :, :4].square().sum((0, 1, 3))
    plain = (read_back(fed("kivi/8", k, v, [24]), 24)[0] - k)[:, :, :4].square().sum((0, 1, 3)) / k[:, :, :4].square().sum(
        (0, 1, 3)
    )
    assert float(loud.max()) < 0.3 < float(plain[:3].min())  # the quiet rows are lost without it
    assert torch.isfinite(read_back(layer, 24)[0]).all()
    assert token_norm(torch.full((1, 2, 1, 8), 1e6)).isfinite().all()


def test_a_constant_group_is_read_as_its_value() -> None:
    x = torch.full((1, 1, 4, 8), 0.75)
    codes, scale = quantize_tokens(x, torch.ones(1, 4, dtype=torch.bool), 2, 4)
    assert (codes == 0).all() and scale[..., :8].eq(0).all() and scale[..., 8:].eq(0.75).all()
    k, v = torch.full((1, 2, 16, 16), 0.75), rows(1, 16)[1]
    assert torch.equal(read_back(fed("kivi/8", k, v, [16]), 16)[0], k)


def test_the_count_of_blocks_depends_on_the_rows_alone() -> None:
    for n in range(1, 30):
        counts = set()
        for length in range(20):
            first, offset = touched(torch.tensor(length), n, FLUSH)
            named = sorted({int(first) + int(o) for o in offset})
            assert named == list(range(length // FLUSH, (length + n - 1) // FLUSH + 1))
            counts.add(offset.numel())
        assert len(counts) == 1 and counts.pop() <= n // FLUSH + 2


def test_which_recent_rows_are_exact() -> None:
    ring = torch.tensor([16, 17, 18, 11, 12, 13, 14, 15])
    assert [s for s in open_blocks(ring, 19, 8, 0).tolist() if s >= 0] == [16, 17, 18]
    assert [s for s in open_blocks(ring, torch.tensor(19), 0, 5).tolist() if s >= 0] == [16, 17, 18, 14, 15]
    assert [s for s in open_blocks(ring, 19, 8, 4).tolist() if s >= 0] == [16, 17, 18, 15]
    assert [s for s in open_blocks(ring, 17, 8, 0).tolist() if s >= 0] == [16]  # rows behind a crop are gone
    assert [s for s in open_blocks(ring, 16, 8, 0).tolist() if s >= 0] == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(flush=12, group_tokens=8), "a block of 12 tokens is not a multiple of its groups of 8; use flush=16"),
        (dict(flush=0, group_tokens=8), "not a multiple of its groups"),
        (dict(flush=8, group_tokens=0), "not a multiple of its groups"),
        (dict(flush=8, group_tokens=8, domain="block", block=1), "after RoPE"),
        (dict(flush=8, group_tokens=8, center=True), "without centring"),
        (dict(flush=8, group_tokens=8, kind="gauss"), "kind='uniform'"),
        (dict(axis="token", group_tokens=8), "axis='channel'"),
        (dict(axis="token", norm=True), "axis='channel'"),
        (dict(axis="diagonal"), "not one of token, channel"),
        (dict(flush=-8, group_tokens=8), "cannot be negative"),
    ],
)
def test_declines(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        SideSpec(**{"bits": 2, "kind": "uniform", "axis": "channel", **fields})


def test_odd_heads_and_fractions_are_declined() -> None:
    key = SideSpec(bits=2, kind="uniform", axis="channel", group_tokens=32, flush=128)
    with pytest.raises(UnsupportedError, match="head_dim=15 is not divisible by 8"):
        key.resolved(2, 15)
    with pytest.raises(UnsupportedError, match=r"bits=2.5 is not whole.* use 2 or 3"):
        SideSpec.from_dict({**key.as_dict(), "bits": 2.5}).resolved(2, 16)
    with pytest.raises(UnsupportedError, match="norm is for keys"):
        Codec(SideSpec(), SideSpec.from_dict({**key.as_dict(), "norm": True}))
