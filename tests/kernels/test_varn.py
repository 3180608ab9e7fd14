"""Variance normalisation: scales and rows against the algorithm in float64 numpy, one line at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvsink.codecs import Codec, SideSpec
from kvsink.errors import UnsupportedError
from kvsink.kernels.dequantize import dequantize_ref
from kvsink.kernels.quantize import quantize_ref
from kvsink.kernels.tokens import dequantize_tokens, quantize_tokens
from kvsink.kernels.varn import varn_decode, varn_encode, varn_numbers, varn_scales

GROUP, DIM = 8, 16
AXES = ("channel", "token")


def by_hand(x: Any, steps: int) -> tuple[Any, Any]:
    """Scales of columns and rows of one tile [R, C]."""
    rows, columns = x.shape
    a, c = np.zeros(rows), np.zeros(columns)

    def imbalance() -> float:
        y = x / np.exp(c)[None] / np.exp(a)[:, None]
        stds = y.std(0, ddof=1), y.std(1, ddof=1)
        return sum(s.max() / max(s.min(), 1e-8) for s in stds)

    best, kept = imbalance(), (np.exp(c), np.exp(a))
    for _ in range(steps):
        for j in range(columns):
            s = (x[:, j] / np.exp(c[j]) / np.exp(a)).std(ddof=1)
            c[j] = np.clip(c[j] + np.log(np.clip(s, 1e-3, 1e3)), -0.3, 10)
        for i in range(rows):
            s = (x[i] / np.exp(c) / np.exp(a[i])).std(ddof=1)
            a[i] = np.clip(a[i] + np.log(np.clip(s, 1e-3, 1e3)), -0.3, 10)
        if (found := imbalance()) <= best:
            best, kept = found, (np.exp(c), np.exp(a))
    return kept


def tile(seed: int, *shape: int) -> Tensor:
    """Rows whose tokens and channels differ in size."""
    g = torch.Generator().manual_seed(seed)
    size = (1.5 * torch.randn(*shape[:-1], 1, generator=g)).exp() * (1.5 * torch.randn(shape[-1], generator=g)).exp()
    return size * torch.randn(*shape, generator=g)


def everything(x: Tensor) -> Tensor:
    return torch.ones(x.shape[0], x.shape[2], dtype=torch.bool)


def coded(x: Tensor, axis: str, bits: int = 4, steps: int = 8, valid: Tensor | None = None, size: int = DIM) -> Tensor:
    """Rows as their codes say."""
    found = varn_encode(x, everything(x) if valid is None else valid, axis, bits, GROUP, size, steps)
    assert found[1].shape[2:] == (x.shape[2] // GROUP, varn_numbers(axis, DIM, GROUP, size))
    return varn_decode(*found, axis, bits, GROUP, size)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), steps=st.integers(0, 9))
def test_scales_are_those_of_the_algorithm(seed: int, steps: int) -> None:
    x = tile(seed, 2, 3, GROUP, DIM)
    column, row = varn_scales(x, torch.ones_like(x, dtype=torch.bool), steps)
    for i in range(2):
        for j in range(3):
            wanted = by_hand(x[i, j].double().numpy(), steps)
            assert np.allclose(column[i, j, 0], wanted[0], rtol=1e-9) and np.allclose(row[i, j, :, 0], wanted[1], rtol=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("axis", AXES)
def test_rows_are_those_of_the_normalised_tile(axis: str, bits: int) -> None:
    """Both scales taken off, ranges of what is left, both put back, in float64: a step apart at most, where two codes meet."""
    x = tile(5, 1, 2, 2 * GROUP, DIM)
    back = coded(x, axis, bits)
    for head in range(2):
        for at in (0, GROUP):
            rows = x[0, head, at : at + GROUP].double().numpy()
            if axis == "channel":
                token, channel = by_hand(rows.T, 8)
            else:
                channel, token = by_hand(rows, 8)
            y = rows / token[:, None] / channel[None]
            along = 0 if axis == "channel" else 1
            low, high = y.min(along, keepdims=True), y.max(along, keepdims=True)
            step = (high - low) / (2**bits - 1)
            wanted = (np.round((y - low) / step) * step + low) * token[:, None] * channel[None]
            error = np.abs(back[0, head, at : at + GROUP].double().numpy() - wanted)
            unit = step * token[:, None] * channel[None]
            half = 2e-3 * np.abs(wanted)  # scales of float16
            assert (error <= 1.01 * unit + half).all() and (error > 0.02 * unit + half).mean() < 0.01
            assert (np.abs(back[0, head, at : at + GROUP].double().numpy() - rows) <= 0.52 * unit + 2e-3 * np.abs(rows)).all()


@pytest.mark.parametrize("axis", AXES)
def test_without_steps_it_is_plain_ranges(axis: str) -> None:
    x = tile(1, 2, 3, 2 * GROUP, DIM)
    if axis == "channel":
        wanted = dequantize_tokens(*quantize_tokens(x, everything(x), 2, GROUP), 2, GROUP)
    else:
        widths = (2,) * (DIM // 8)
        wanted = dequantize_ref(*quantize_ref(x, None, "uniform", widths, 8, 1.0, False), None, "uniform", widths, 8, False)
    assert torch.equal(coded(x, axis, 2, 0, size=8), wanted)


@pytest.mark.parametrize("axis", AXES)
def test_quiet_tokens_and_loud_channels_cost_less_than_without(axis: str) -> None:
    x = torch.randn(1, 2, 4 * GROUP, DIM, generator=torch.Generator().manual_seed(2))
    x[:, :, 3::GROUP] *= 30.0
    x[..., 5] *= 30.0
    errors = [(coded(x, axis, 2, steps) - x).square() for steps in (0, 8)]
    rest = [e[:, :, [t for t in range(4 * GROUP) if t % GROUP != 3]][..., [c for c in range(DIM) if c != 5]].mean() for e in errors]
    assert rest[1] < 0.5 * rest[0]


@pytest.mark.parametrize("junk", [0.0, 1e6, float("inf"), float("nan")])
@pytest.mark.parametrize("axis", AXES)
def test_rows_that_do_not_count_leave_no_trace(axis: str, junk: float) -> None:
    x = tile(3, 1, 2, GROUP, DIM)
    valid = everything(x)
    valid[:, 5:] = False
    other = x.clone()
    other[:, :, 5:] = junk
    one, two = (coded(rows, axis, valid=valid)[:, :, :5] for rows in (x, other))
    assert torch.equal(one, two)
    if axis == "token":  # a row is its own range: the scales of a shorter tile are the same
        short = varn_scales(x[:, :, :5], torch.ones(1, 2, 5, 1, dtype=torch.bool), 8)[0]
        assert torch.allclose(varn_scales(x, valid[:, None, :, None], 8)[0], short, rtol=1e-12)


@pytest.mark.parametrize("axis", AXES)
def test_flat_tiles_come_back_as_they_are(axis: str) -> None:
    for x in (torch.zeros(1, 1, GROUP, DIM), torch.full((1, 1, GROUP, DIM), 0.75)):
        assert (coded(x, axis) - x).abs().max() <= 2.0**-10 * 0.75
    equal = tile(4, 1, 1, 1, DIM).expand(-1, -1, GROUP, -1)  # tokens that are alike get one scale
    scale = varn_scales(equal.mT, torch.ones_like(equal.mT, dtype=torch.bool), 8)[0]
    assert torch.allclose(scale, scale[..., :1].expand_as(scale))


@pytest.mark.parametrize("axis", AXES)
def test_a_read_may_begin_inside_a_tile(axis: str) -> None:
    x = tile(6, 1, 2, 2 * GROUP, DIM)
    codes, scale = varn_encode(x, everything(x), axis, 3, GROUP, DIM, 4)
    whole = varn_decode(codes, scale, axis, 3, GROUP, DIM)
    assert torch.equal(varn_decode(codes[:, :, 3:12], scale, axis, 3, GROUP, DIM, 3), whole[:, :, 3:12])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(flush=12), "a block of 12 tokens is not a multiple of its groups of 8; use flush=16"),
        (dict(kind="gauss"), "kind='uniform'"),
        (dict(clip=0.9), "without clipping"),
        (dict(domain="block", block=1), "after RoPE"),
        (dict(axis="channel", norm=True), "no scales of varn"),
        (dict(varn=-1), "cannot be negative"),
    ],
)
def test_declines(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        SideSpec(**{"bits": 2, "kind": "uniform", "group_tokens": 8, "flush": 8, "varn": 8, **fields})


def test_no_kernel_takes_it_for_ranges_alone() -> None:
    side = SideSpec(bits=2, kind="uniform", group_tokens=8, flush=8, varn=8).resolved(2, 64)
    assert Codec(side, side).format.key.beyond == Codec(side, side).format.value.beyond == ("varn",)
