"""Non-uniform codes: ranges per channel or token, nearest code point, saturation, one scale for all heads of a token."""

from __future__ import annotations

import pytest
import torch

from kvsink.kernels.nuq import nuq_decode_static, nuq_decode_token, nuq_encode_static, nuq_encode_token, span

LEVELS = torch.tensor([-0.9, -0.2, 0.1, 0.7])


def test_span() -> None:
    x = torch.arange(-3.0, 8.0)[None].repeat(2, 1)
    middle, half = span(x, 0.0)
    assert middle.tolist() == [2.0, 2.0] and half.tolist() == [5.0, 5.0]
    x[0, 4], x[1, 5] = 1000.0, -500.0  # one outlier of eleven: a share of 2/11 leaves one on either side
    middle, half = span(x, 2 / 11)
    assert half.max() <= 5.0 and middle.abs().max() <= 3.0
    assert span(torch.full((1, 5), 3.0), 0.0)[1].tolist() == [1.0]  # a constant vector has range 1


def test_keys_take_the_nearest_point_of_their_channel() -> None:
    g = torch.Generator().manual_seed(0)
    x, o, r = torch.randn(2, 3, 7, 16, generator=g), torch.randn(3, 16, generator=g), torch.rand(3, 16, generator=g) + 0.5
    codes, scale = nuq_encode_static(x, o, r, LEVELS)
    assert codes.shape == (2, 3, 7, 4) and scale.shape == (2, 1, 7, 0)
    points = LEVELS[:, None, None, None, None] * r[:, None] + o[:, None]  # [4, 1, 3, 1, 16]
    clamped = torch.minimum(torch.maximum(x, (o - r)[:, None]), (o + r)[:, None])
    wanted = (points - clamped).abs().amin(0)
    assert ((nuq_decode_static(codes, o, r, LEVELS) - clamped).abs() - wanted).abs().max() < 1e-6


def test_values_share_a_scale_over_heads() -> None:
    x = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(1))
    codes, scale = nuq_encode_token(x, LEVELS, 0.0)
    assert codes.shape == (2, 3, 7, 4) and scale.shape == (2, 1, 7, 2) and scale.dtype == torch.float16
    flat = x.transpose(1, 2).flatten(2)
    assert (scale[:, 0, :, 0].float() - (flat.amax(-1) - flat.amin(-1)) / 2).abs().max() <= 2.0**-9
    back = nuq_decode_token(codes, scale, LEVELS)
    half, middle = (t.float()[:, :, :, None] for t in scale.unbind(-1))
    points = LEVELS[:, None, None, None, None] * half + middle
    wanted = (points - x).abs().amin(0)
    assert ((back - x).abs() - wanted).abs().max() < 1e-3 * float(half.max())


@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_outliers_do_not_set_the_range(outliers: float) -> None:
    x = torch.randn(1, 2, 5, 32, generator=torch.Generator().manual_seed(2))
    x[:, 0, :, 3] = 100.0
    _, scale = nuq_encode_token(x, LEVELS, outliers)
    assert (scale[..., 0] > 40).all() if not outliers else (scale[..., 0] < 4).all()


def test_constant_tokens_come_back() -> None:
    x = torch.full((1, 2, 3, 8), 2.5)
    codes, scale = nuq_encode_token(x, torch.tensor([-1.0, 0.0]), 0.0)
    assert torch.equal(nuq_decode_token(codes, scale, torch.tensor([-1.0, 0.0])), x)
