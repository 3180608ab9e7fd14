"""The C code that stores new rows on the CPU gives the codes, scales and exact rows of the definition, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsink.codecs import Codec, SideSpec
from kvsink.codecs.quantizers import QUANTIZERS
from kvsink.kernels import append_
from kvsink.kernels.cpu import append
from kvsink.kernels.cpu.append import by_definition, declines, select_one, store_rows
from kvsink.kernels.cpu.c_library import c_library
from kvsink.kernels.selection import merge_exact
from tests.states import CPU, append_arguments, layer_of, rows, shape_of

SLOTS, FIRST = 12, 3
SIDES = (
    *(SideSpec(bits=b, kind="lloyd", gain=gain, widths=(b, b)) for b in range(1, 9) for gain in (False, True)),
    SideSpec(bits=2, kind="lloyd", gain=True, widths=(4, 3, 2, 1, 1, 0, 2, 5)),
    SideSpec(bits=2, kind="lloyd-even", gain=True, widths=(4, 3, 2, 0)),
    *(
        SideSpec(bits=b, kind=kind, group_size=16, clip=clip, widths=(b,) * 4)
        for b in (1, 2, 3, 4, 6, 8)
        for kind, clip in (("uniform", 1.0), ("uniform-int", 0.8), ("gauss", 1.0))
    ),
    *(
        SideSpec(bits=b / c, kind="vector", couple=c, code_bits=b, gain=gain, widths=())
        for c, b in ((4, 8), (8, 8), (8, 10), (4, 9), (16, 12))
        for gain in (False, True)
    ),
    *(
        SideSpec(bits=2, kind="trellis", widths=w)
        for w in ((1,), (2, 2), (4, 3, 1), (2,) * 8, (4, 4, 3, 3, 2, 2, 1, 1, 1, 1), (2,) * 16, (3,) * 64)
    ),
)


def _case(side: SideSpec, shape: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    g, (b, h, s) = torch.Generator().manual_seed(seed), shape
    dim = 8 * len(side.widths) or 32
    x = torch.randn(b, s, h, dim, generator=g).transpose(1, 2) * 3.0 + 0.5
    tables = {"sigma": torch.rand(h, dim, generator=g) + 0.1}
    if side.kind == "vector":
        tables["book"] = torch.randn(h, dim // side.couple, 2**side.code_bits, side.couple, generator=g)
    return x, {f"{p}_{n}": t for p in "kv" for n, t in tables.items()}


def _state(side: SideSpec, shape: tuple[int, int, int], dim: int) -> dict[str, torch.Tensor]:
    (b, h, _), q = shape, QUANTIZERS[side.kind]
    codes = torch.full((b, h, SLOTS, q.row_bytes(side, dim)), 255, dtype=torch.uint8)
    scale = torch.full((b, h, SLOTS, q.row_scales(side, dim)), float("nan"), dtype=torch.float16)
    return {f"{p}_{n}": t.clone() for p in "kv" for n, t in (("codes", codes), ("scale", scale))}


@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 3, 7)])
@pytest.mark.parametrize("side", SIDES, ids=lambda s: f"{s.kind}-{s.bits:g}-{s.gain}-{len(s.widths)}")
def test_codes_and_scales_are_those_of_the_definition(side: SideSpec, shape: tuple[int, int, int]) -> None:
    x, p = _case(side, shape, seed=int(8 * side.bits))
    held = _state(side, shape, x.shape[-1])
    codec: Any = SimpleNamespace(key=side, value=side)
    store_rows(codec, x, -x, FIRST, held, p)
    end = FIRST + shape[2]
    for prefix, given_rows in (("k", x), ("v", -x)):
        codes, scale = QUANTIZERS[side.kind].encode(given_rows, side, p, prefix)
        assert torch.equal(held[f"{prefix}_codes"][:, :, FIRST:end], codes)
        assert torch.equal(held[f"{prefix}_scale"][:, :, FIRST:end], scale)
        for name in ("codes", "scale"):  # nothing else was touched
            fresh = _state(side, shape, x.shape[-1])[f"{prefix}_{name}"]
            for rest in (slice(0, FIRST), slice(end, SLOTS)):
                one, two = held[f"{prefix}_{name}"][:, :, rest], fresh[:, :, rest]
                assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e6, 3e38])
@pytest.mark.parametrize("side", SIDES[14:20:3] + SIDES[20:28:4] + SIDES[-4:-2], ids=lambda s: f"{s.kind}-{s.bits:g}")
def test_constant_and_extreme_rows(side: SideSpec, value: float) -> None:
    x, p = _case(side, (1, 2, 2), seed=0)
    x = torch.full_like(x, value)
    held = _state(side, (1, 2, 2), x.shape[-1])
    store_rows(SimpleNamespace(key=side, value=side), x, x, FIRST, held, p)
    codes, scale = QUANTIZERS[side.kind].encode(x, side, p, "k")
    assert torch.equal(held["k_scale"][:, :, FIRST : FIRST + 2], scale)
    assert torch.equal(held["k_codes"][:, :, FIRST : FIRST + 2], codes)


@pytest.mark.parametrize("widths", [(2, 2, 2), (4, 3, 1, 1), (6, 5, 4, 3)])
def test_walks_of_every_gain_and_of_no_number(widths: tuple[int, ...]) -> None:
    """Rows from far below the least gain to far above the largest, of zeros and with entries that are not finite."""
    side = SideSpec(bits=2, kind="trellis", widths=widths)
    x, p = _case(side, (1, 2, 600), seed=1)
    x = (x - 0.5) / 3 * p["k_sigma"][:, None] * torch.linspace(-12, 9, 600).exp2()[:, None]
    x[:, :, ::50], x[:, 0, 1::50, 3], x[:, 1, 2::50, 7] = 0.0, float("nan"), -float("inf")
    q = QUANTIZERS["trellis"]
    held = {f"{n}_codes": torch.zeros(1, 2, 600, q.row_bytes(side, x.shape[-1]), dtype=torch.uint8) for n in "kv"}
    held |= {f"{n}_scale": torch.zeros(1, 2, 600, 0, dtype=torch.float16) for n in "kv"}
    store_rows(SimpleNamespace(key=side, value=side), x, x, 0, held, p)
    codes, _ = q.encode(x, side, p, "k")
    assert torch.equal(held["k_codes"], codes) and torch.equal(held["v_codes"], codes)
    assert {0, 1, 2, 128, 253, 254, 255} <= set(codes[..., -1].flatten().tolist())


@given(
    scores=st.lists(st.sampled_from([-float("inf"), -1.0, 0.0, 0.5, 1.0, 2.5, 4.0]), min_size=6, max_size=14),
    capacities=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    times=st.integers(1, 4),
    wide=st.booleans(),
    cropped=st.sets(st.integers(0, 12), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_the_running_selection_is_that_of_the_definition(
    scores: list[float], capacities: list[int], times: int, wide: bool, cropped: set[int]
) -> None:
    """Rows come one by one; every segment has the same scores, so that rows are chosen twice and marked as repeats. Now
    and then the newest row is taken back."""
    places, dtype = sum(capacities), torch.float32 if wide else torch.bfloat16
    codec: Any = SimpleNamespace(segments=tuple(capacities), exact_rows=places)
    shapes = {"exact_k": (2, 2, places, 8), "exact_v": (2, 2, places, 4)}
    one = {n: torch.zeros(s, dtype=dtype) for n, s in shapes.items()}
    one["exact_slot"] = torch.full((2, places), -1, dtype=torch.int32)
    one["exact_score"] = torch.full((2, places), -float("inf"))
    two = {n: t.clone() for n, t in one.items()}
    g = torch.Generator().manual_seed(len(scores))
    for first, score in enumerate(scores):
        k, v = torch.randn(2, 1, 2, 8, generator=g).transpose(1, 2), torch.randn(2, 2, 1, 4, generator=g)
        # A row may stand several times among the candidates, as one with several large channels does.
        new = torch.tensor([[score], [-score if score != -float("inf") else 3.0]]) - 0.5 * torch.arange(times)
        candidates = [t for _ in capacities for t in (new, torch.zeros(2, times, dtype=torch.int64))]
        select_one(codec, k, v, candidates, one, first)
        names = ("exact_slot", "exact_score", "exact_k", "exact_v")
        merged = merge_exact(
            two["exact_slot"],
            two["exact_score"],
            (two["exact_k"], two["exact_v"]),
            (k, v),
            candidates,
            capacities,
            torch.tensor(first),
        )
        two = dict(zip(names, merged, strict=True))
        assert torch.equal(one["exact_slot"], two["exact_slot"]) and torch.equal(one["exact_score"], two["exact_score"])
        used = two["exact_slot"] != -1
        for name in ("exact_k", "exact_v"):
            assert torch.equal(one[name].transpose(1, 2)[used], two[name].transpose(1, 2)[used])
        if first in cropped:  # as a crop does: rows behind it are gone, their places stay empty where they are
            for held in (one, two):
                gone = torch.where(held["exact_slot"] < -1, -held["exact_slot"] - 2, held["exact_slot"]) >= first
                held["exact_slot"].masked_fill_(gone, -1)
                held["exact_score"].masked_fill_(gone, -float("inf"))


def test_what_it_does_not_serve_takes_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of("klt:best")
    codec, (k, v) = Codec.parse(layer.codec_text), rows(1, 2)
    shape = shape_of(k)
    assert declines(codec.format, shape, CPU) == ""
    for method, reason in (("kivi", "ranges along tokens"), ("kvquant", "rows of kind nuq"), ("oscar", "ranges along tokens")):
        assert declines(Codec.parse(layer_of(method).codec_text).format, shape, CPU) == reason
    assert declines(codec.format, shape._replace(dtype=torch.float64), CPU) == "torch.float64 is not float32 or narrower"
    coded: list[int] = []
    monkeypatch.setattr(append, "store_rows", lambda *_: coded.append(1))
    with by_definition():
        append_(**append_arguments(layer, k, v))
    assert not coded and layer.k_codes[:, :, :2].any()
    append_(**append_arguments(layer, k, v))
    assert coded
    monkeypatch.setenv("KVSINK_CPU_KERNEL", "0")
    c_library.cache_clear()
    try:
        assert declines(codec.format, shape, CPU) == "no C compiler"
    finally:
        c_library.cache_clear()
