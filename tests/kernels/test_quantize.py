"""The quantizers hold their error bounds, round ties to even, and keep constant groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsink.kernels.dequantize import dequantize_ref
from kvsink.kernels.levels import even_levels, lloyd_max, thresholds
from kvsink.kernels.packing import unpack_bits
from kvsink.kernels.quantize import KINDS, quantize_ref, scales_per_row, segments

ROUNDING = 2.0**-20  # float32 arithmetic of one row, relative to its largest number


def rows(seed: int, *shape: int, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["uniform", "uniform-int"]),
    width=st.integers(1, 8),
    groups=st.sampled_from([8, 16, 32]),
    clip=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 2**31),
    power=st.integers(-6, 6),
)
def test_uniform_errors_stay_within_half_a_step(kind: str, width: int, groups: int, clip: float, seed: int, power: int) -> None:
    x = rows(seed, 1, 2, 5, 32, spread=2.0**power)
    codes, scale = quantize_ref(x, None, kind, (width,) * 4, groups, clip, False)
    back = dequantize_ref(codes, scale, None, kind, (width,) * 4, groups, False)
    step, base = scale.float().unflatten(-1, (-1, 2)).split(1, dim=-1)  # [..., groups, 1]
    low = -base * step if kind == "uniform-int" else base
    low, high, step = (t.expand(*t.shape[:-1], groups).flatten(-2) for t in (low, low + (2**width - 1) * step, step))
    inside = torch.minimum(torch.maximum(x, low), high)  # what lies outside the clipped range lands on its end
    assert ((back - inside).abs() <= step / 2 + ROUNDING * x.abs().max()).all()
    assert (high - low <= clip * (x.amax() - x.amin()) * 1.01).all()  # the step is no wider than the range needs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", range(1, 9))
def test_codes_are_in_range_and_the_error_falls(kind: str, width: int) -> None:
    x, sigma = rows(width, 2, 3, 50, 32), torch.rand(3, 32) + 0.5
    x = x * sigma[:, None]

    def coded(bits: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        codes, scale = quantize_ref(x, sigma, kind, (bits,) * 4, 32, 1.0, True)
        back = dequantize_ref(codes, scale, sigma, kind, (bits,) * 4, 32, True)
        return codes, scale, float((back - x).square().mean())

    codes, scale, error = coded(width)
    assert codes.dtype == torch.uint8 and codes.shape == (2, 3, 50, 4 * width)
    assert scale.dtype == torch.float16 and scale.shape == (2, 3, 50, scales_per_row(kind, 32, 32, True))
    assert int(unpack_bits(codes, width, 32).max()) <= 2**width - 1
    if width > 1:
        assert error < 0.6 * coded(width - 1)[2]


def test_ties_round_to_even() -> None:
    """Range 0 … 3 at 2 bits: the step is 1 and 0.5, 1.5, 2.5 lie halfway."""
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.0, 1.0, 2.0, 0.25])[None, None, None]
    for kind in ("uniform", "uniform-int"):
        codes, _ = quantize_ref(x, None, kind, (2,), 8, 1.0, False)
        assert unpack_bits(codes, 2, 8).flatten().tolist() == [0, 0, 2, 2, 3, 1, 2, 0]


def test_the_integer_zero_point_rounds_to_even_too() -> None:
    x = torch.tensor([-0.5, 2.5, 0.5, 1.5, 0.0, 1.0, 2.0, -0.25])[None, None, None]  # -lo / s = 0.5, so z = 0
    codes, scale = quantize_ref(x, None, "uniform-int", (2,), 8, 1.0, False)
    assert scale.flatten().tolist() == [1.0, 0.0]
    assert unpack_bits(codes, 2, 8).flatten().tolist() == [0, 2, 0, 2, 0, 1, 2, 0]


def test_a_row_on_a_threshold_takes_the_lower_level() -> None:
    edges = thresholds(2)
    x = torch.cat([edges, edges, edges[:2]])[None, None, None]
    codes, _ = quantize_ref(x, torch.ones(1, 8), "lloyd", (2,), 8, 1.0, False)
    assert unpack_bits(codes, 2, 8).flatten().tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("kind", ["uniform", "gauss"])
@pytest.mark.parametrize("number", [0.0, 5.0, -0.375])
def test_constant_groups_come_back_exactly(kind: str, number: float) -> None:
    x = torch.full((1, 1, 3, 16), number)
    codes, scale = quantize_ref(x, None, kind, (2, 2), 16, 1.0, False)
    assert torch.equal(dequantize_ref(codes, scale, None, kind, (2, 2), 16, False), x)


@pytest.mark.parametrize("number", [0.0, 5.0, -0.375])
def test_constant_groups_get_step_one_with_an_integer_zero(number: float) -> None:
    x = torch.full((1, 1, 3, 16), number)
    codes, scale = quantize_ref(x, None, "uniform-int", (2, 2), 16, 1.0, False)
    assert (scale[..., 0] == 1).all()
    assert (dequantize_ref(codes, scale, None, "uniform-int", (2, 2), 16, False) - x).abs().max() <= 0.5


def test_a_row_of_zeros_under_lloyd_is_finite() -> None:
    codes, scale = quantize_ref(torch.zeros(1, 2, 3, 16), torch.ones(2, 16), "lloyd", (2, 2), 16, 1.0, True)
    assert torch.equal(dequantize_ref(codes, scale, torch.ones(2, 16), "lloyd", (2, 2), 16, True), torch.zeros(1, 2, 3, 16))


@pytest.mark.parametrize(("kind", "table"), [("lloyd", lloyd_max), ("lloyd-even", even_levels)])
def test_lloyd_takes_the_nearest_level_of_each_channel(kind: str, table: Callable[[int], torch.Tensor]) -> None:
    widths, sigma, x = (4, 2, 1, 0), torch.rand(2, 32) + 0.5, rows(0, 1, 2, 40, 32)
    codes, scale = quantize_ref(x, sigma, kind, widths, 32, 1.0, False)
    assert scale.shape[-1] == 0
    back = dequantize_ref(codes, scale, sigma, kind, widths, 32, False)
    unit = x / sigma[:, None]
    for run, width in enumerate(widths):
        part = slice(8 * run, 8 * run + 8)
        got = (back / sigma[:, None])[..., part]
        levels = table(width) if width else torch.zeros(1)
        best = (unit[..., part, None] - levels).abs().amin(-1)
        assert ((unit[..., part] - got).abs() <= best + ROUNDING).all()


@pytest.mark.parametrize("kind", ["lloyd", "lloyd-even"])
def test_the_gain_of_a_row_is_the_least_squares_one(kind: str) -> None:
    widths, sigma = (4, 2, 1, 0), torch.rand(2, 32) + 0.5
    x = rows(0, 1, 2, 40, 32) * torch.logspace(-2, 2, 40)[:, None]  # rows of very different size
    codes, scale = quantize_ref(x, sigma, kind, widths, 32, 1.0, True)
    back = dequantize_ref(codes, scale, sigma, kind, widths, 32, True)

    def error(factor: float) -> torch.Tensor:
        return (x - factor * back).square().sum(-1)

    slack = 1e-4 * x.square().sum(-1)  # the gain is rounded to float16
    assert (error(1.0) <= error(0.98) + slack).all() and (error(1.0) <= error(1.02) + slack).all()
    assert (error(1.0) < error(0.8)).all() and (error(1.0) < error(1.2)).all()
    plain_codes, none = quantize_ref(x, sigma, kind, widths, 32, 1.0, False)
    plain = dequantize_ref(plain_codes, none, sigma, kind, widths, 32, False)
    assert error(1.0).mean() < (x - plain).square().sum(-1).mean()


def test_runs_of_equal_width_are_one_segment() -> None:
    assert segments((4, 4, 2, 0, 1)) == [(0, 16, 0, 4), (16, 24, 8, 2), (32, 40, 10, 1)]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="unknown quantizer 'unifrom'"):
        quantize_ref(torch.zeros(1, 8), None, "unifrom", (2,), 8, 1.0, False)
    with pytest.raises(ValueError, match="do not cover 16"):
        quantize_ref(torch.zeros(1, 16), None, "uniform", (2,), 16, 1.0, False)
