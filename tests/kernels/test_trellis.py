"""Trellis codes: the reader is the formula of the file bit by bit, the writer finds the best walk there is, gains and rows of any
size come back."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvsink.kernels import trellis
from kvsink.kernels.levels import distortion as lloyd_max_distortion
from kvsink.kernels.trellis import (
    DISTORTION,
    gain_bytes,
    gain_of,
    odd_polynomial,
    trellis_decode,
    trellis_encode,
    trellis_levels,
    walk_unit,
)

UPPER = {1: (0.3, 1.2), 2: (0.16875, 0.54, 1.08, 1.89)}
CUBIC = {3: (0.1674, 0.002607), 4: (0.0840, 0.0003961), 5: (0.0430, 5.63e-5), 6: (0.0220, 7.99e-6)}
EVERY = (1, 2, 3, 4, 5, 6)


def level(width: int, index: int) -> float:
    j = index - (2 ** (width + 1) - 1) / 2
    if width in UPPER:
        return math.copysign(UPPER[width][int(abs(j))], j)
    a, c = CUBIC[width]
    return a * j + c * j**3


def read_circle(codes: list[int], widths: list[int]) -> list[float]:
    """One circle, code by code."""
    out = []
    for t, (code, width) in enumerate(zip(codes, widths, strict=True)):
        u = [codes[(t - k) % len(codes)] & 1 for k in range(3)]
        u[2] = u[2] if len(codes) > 2 else 0
        out.append(level(width, 4 * (code >> 1) + 2 * (u[0] ^ u[2]) + u[1]))
    return out


def bits_of(row: list[int], widths: list[int]) -> tuple[list[int], int]:
    """The codes of a stored row, one after another from its lowest bit on, and the byte behind them."""
    word, codes = int.from_bytes(bytes(row[:-1]), "little"), []
    for width in widths:
        for _ in range(8):
            codes.append(word & (2**width - 1))
            word >>= width
    return codes, row[-1]


def gain(byte: int) -> float:
    return math.nan if byte == 255 else 0.0 if byte == 0 else 2.0 ** (byte // 16 - 9) * (1 + byte % 16 / 16)


def read_row(row: list[int], sigma: list[float], widths: list[int]) -> list[float]:
    codes, byte = bits_of(row, widths)
    circles = [read_circle(codes[i::8], widths) for i in range(8)]
    return [gain(byte) * sigma[c] * circles[c % 8][c // 8] for c in range(8 * len(widths))]


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("widths", [(1,), (2, 2), (4, 3, 1), (4, 4, 3, 2, 2, 1, 1, 1), (3,) * 9, (6, 5, 4), (5,), (6, 5)])
def test_stored_rows_read_as_the_formula_says(widths: tuple[int, ...]) -> None:
    d = 8 * len(widths)
    sigma = gauss(2, d, seed=1).exp()
    codes = torch.randint(0, 256, (3, 2, 5, sum(widths) + 1), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    codes[..., -1].clamp_(0, 254)
    got = trellis_decode(codes, sigma, widths)
    for at in product(range(3), range(2), range(5)):
        wanted = torch.tensor(read_row(codes[at].tolist(), sigma[at[1]].tolist(), list(widths)), dtype=torch.float64)
        assert (got[at] - wanted).abs().max() <= 2.0**-22 * wanted.abs().max()


@pytest.mark.parametrize("widths", [(1, 1), (2, 2), (1, 2), (1, 1, 1), (2, 2, 2), (3, 1, 2), (5, 4), (6,)])
def test_no_walk_is_nearer_than_the_one_written(widths: tuple[int, ...]) -> None:
    """For the gain that was stored or not: every word of every circle is tried."""
    x, sigma = gauss(1, 1, 6, 8 * len(widths), seed=3), gauss(1, 8 * len(widths), seed=4).exp()
    x = x * sigma
    words = [read_circle(list(w), list(widths)) for w in product(*(range(2**w) for w in widths))]
    words = torch.tensor(words, dtype=torch.float64)
    y = (x / sigma)[0, 0]
    for g in (0.7, 1.0):
        codes = trellis._search(y / g, (sigma / sigma.amax()).square().expand_as(y), widths)
        for row, line in enumerate(codes.tolist()):
            for i in range(8):
                s = sigma[0, i::8].double()
                every = (s * (x[0, 0, row, i::8].double() / s / g - words)).square().sum(-1)
                mine = torch.tensor(read_circle(line[i::8], list(widths)), dtype=torch.float64)
                assert (s * (x[0, 0, row, i::8].double() / s / g - mine)).square().sum() <= every.min() * (1 + 1e-5)


# dB of free levels of least error on a unit Gaussian without a gain, in circles of 8 and of 16 steps and in long walks
KNOWN = {1: (4.56, 4.95, 5.02), 2: (10.18, 10.49, 10.55), 3: (15.82, 16.13, 16.19), 4: (21.12, 21.54, 21.64)}
COST = {1: 0.0, 2: 0.03, 3: 0.13, 4: 0.0}  # what levels of few digits and the cubic may cost; at 4 bits it is better than those


def read_plainly(codes: Tensor, width: int) -> Tensor:
    """Levels float64 of codes [N, D] of one width, by the formula."""
    walk = codes.unflatten(-1, (-1, 8)).int()
    u = [(walk & 1).roll(k, 1) for k in range(3)]
    every = torch.tensor([level(width, i) for i in range(2 ** (width + 1))], dtype=torch.float64)
    return every[4 * (walk >> 1) + 2 * (u[0] ^ u[2]) + u[1]].flatten(1)


@pytest.mark.parametrize("width", KNOWN)
def test_distortion_on_a_gaussian(width: int) -> None:
    for steps, known in zip((8, 16, 128), KNOWN[width], strict=True):
        x = gauss(60_000 // steps, 8 * steps, seed=width).double()
        codes = trellis._search(x, torch.ones_like(x), (width,) * steps)
        got = -10 * math.log10(float((read_plainly(codes, width) - x).square().mean()))
        assert known - COST[width] - 0.05 <= got <= min(known + 0.3, 6.02 * width), (width, steps, got)


@pytest.mark.parametrize("width", [5, 6])
def test_wide_runs_are_between_free_levels_of_single_channels_and_what_can_be(width: int) -> None:
    """Lloyd-Max levels lose 4.35 dB to what can be at all, 1.53 dB of them by the shape of cells: the code gives most of those."""
    x = gauss(4_000, 128, seed=width).double()
    codes = trellis._search(x, torch.ones_like(x), (width,) * 16)
    got = -10 * math.log10(float((read_plainly(codes, width) - x).square().mean()))
    assert -10 * math.log10(lloyd_max_distortion(width)) + 1.0 <= got <= 6.02 * width


@pytest.mark.parametrize("width", EVERY)
def test_water_filling_knows_the_distortion(width: int) -> None:
    x = gauss(1, 1, 5000, 128, seed=width)
    back = trellis_decode(trellis_encode(x, torch.ones(1, 128), (width,) * 16), torch.ones(1, 128), (width,) * 16)
    error = float((back - x).double().square().mean() / x.double().square().mean())
    assert abs(10 * math.log10(error / DISTORTION[width])) <= 0.05


# -- gains and whole rows --------------------------------------------------------------------------------------------------


def test_a_gain_is_the_upper_half_of_a_float16() -> None:
    byte = torch.arange(255, dtype=torch.uint8)
    g = gain_of(byte)
    assert g.tolist() == [gain(b) for b in range(255)] and torch.isnan(gain_of(torch.tensor([255], dtype=torch.uint8)))
    half = ((byte[1:].to(torch.int32) << 6) + 0x1800).to(torch.int16).view(torch.float16)
    assert torch.equal(half.float(), g[1:])
    assert torch.equal(gain_bytes(g), byte)


@given(st.floats(0, 2.0**90, width=32))
@settings(max_examples=300, deadline=None)
def test_the_nearest_gain_is_stored(g: float) -> None:
    byte = int(gain_bytes(torch.tensor([g])))
    off = [abs(gain(b) - g) for b in range(255)]
    assert off[byte] == min(off)
    if off.count(min(off)) > 1:  # half way: to even
        assert byte % 2 == 0


WIDTHS = st.lists(st.sampled_from((1, 2, 3, 4, 5, 6)), min_size=1, max_size=6)


@given(widths=WIDTHS, octaves=st.integers(-6, 4), seed=st.integers(0, 2**20))
@settings(max_examples=40, deadline=None)
def test_rows_of_any_size_come_back(widths: list[int], octaves: int, seed: int) -> None:
    """Octaves of size are octaves of gain alone; sigma's unit does not matter; what is read is nearer than nothing is."""
    d = 8 * len(widths)
    sigma = gauss(2, d, seed=seed).exp()
    x = gauss(1, 2, 3, d, seed=seed + 1) * sigma[:, None]
    codes = trellis_encode(x, sigma, widths)
    assert codes.shape == (1, 2, 3, sum(widths) + 1) and codes.dtype == torch.uint8
    scaled = trellis_encode(x * 2.0**octaves, sigma, widths)
    assert torch.equal(scaled[..., :-1], codes[..., :-1])
    assert torch.equal(scaled[..., -1].int(), codes[..., -1].int() + 16 * octaves)
    assert torch.equal(trellis_encode(x * 2.0**40, sigma * 2.0**40, widths), codes)
    back = trellis_decode(codes, sigma, widths)
    assert ((back - x).square().sum(-1) < x.square().sum(-1)).all()


def test_the_gain_is_the_least_squares_one() -> None:
    widths, sigma = (3, 2, 2, 1), gauss(2, 32, seed=8).exp()
    x = gauss(2, 2, 5, 32, seed=9) * sigma[:, None] * 1.7
    codes = trellis_encode(x, sigma, widths)
    unit = trellis_decode(torch.cat([codes[..., :-1], torch.full_like(codes[..., :1], 144)], -1), sigma, widths)
    best = (x.double() * unit).sum(-1) / unit.double().square().sum(-1)
    assert torch.equal(gain_bytes(best), codes[..., -1])


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    widths, sigma = (2, 2), torch.ones(1, 16)
    x = gauss(1, 1, 6, 16, seed=10)
    good = trellis_encode(x, sigma, widths)
    x[0, 0, 0], x[0, 0, 1, 3], x[0, 0, 2, 15], x[0, 0, 3], x[0, 0, 4] = 0.0, math.nan, -math.inf, 1e-30, 3e38
    codes = trellis_encode(x, sigma, widths)
    assert codes[0, 0, :, -1].tolist()[:5] == [0, 255, 255, 0, 254]
    assert torch.equal(codes[0, 0, 5], good[0, 0, 5])  # rows do not touch each other
    back = trellis_decode(codes, sigma, widths)[0, 0]
    assert (back[0] == 0).all() and back[1:3].isnan().all() and (back[3] == 0).all() and back[4].isfinite().all()


def test_neither_chunks_nor_strides_nor_float64_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    widths, sigma = (3, 2, 1), gauss(2, 24, seed=11).exp()
    x = gauss(2, 7, 2, 24, seed=12).transpose(1, 2)
    codes = trellis_encode(x, sigma, widths)
    assert torch.equal(codes, trellis_encode(x.contiguous().double(), sigma, widths))
    monkeypatch.setattr(trellis, "_ROWS", 3)
    assert torch.equal(codes, trellis_encode(x.contiguous(), sigma, widths))
    assert trellis_encode(x[:, :, :0], sigma, widths).shape == (2, 2, 0, 7)


@pytest.mark.parametrize(("widths", "words"), [((2, 0), "not 0, 2"), ((7, 2), "not 2, 7"), ((2,), "1 widths of 8 channels")])
def test_widths_that_a_walk_cannot_hold(widths: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trellis_encode(torch.zeros(1, 1, 1, 16), torch.ones(1, 16), widths)


def test_levels_are_symmetric_and_ascend() -> None:
    for width in EVERY:
        levels = trellis_levels(width, "cpu")
        assert levels.shape == (2 ** (width + 1),) and torch.equal(levels, -levels.flip(0)) and (levels.diff() > 0).all()
        assert (levels.double() - torch.tensor([level(width, i) for i in range(len(levels))])).abs().max() < 2e-6


@pytest.mark.parametrize("width", EVERY)
def test_an_odd_polynomial_is_every_level(width: int) -> None:
    j = torch.arange(2 ** (width + 1), dtype=torch.float64) - (2 ** (width + 1) - 1) / 2
    got = sum(f * j ** (2 * i + 1) for i, f in enumerate(odd_polynomial(width)))
    assert (got - torch.tensor([level(width, i) for i in range(len(j))], dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("width", [1, 2])
def test_levels_of_few_bits_have_three_digits(width: int) -> None:
    """What the CUDA kernels and products of whole numbers rely on."""
    in_units = trellis_levels(width, "cpu").double() / walk_unit(width)
    assert (in_units.half().view(torch.int16) & 255 == 0).all() and (in_units.half() - in_units).abs().max() < 1e-6
    assert ((4 * in_units).round() - 4 * in_units).abs().max() < 1e-5 and (4 * in_units).abs().max() < 128
