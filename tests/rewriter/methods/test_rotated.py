"""Rotated rows in trellis codes: bits by a formula, errors by that of a Gaussian, and nothing of the model in what is stored."""

from __future__ import annotations

import pytest
import torch

import kvsink
from kvsink.calibrate.design import design_key, design_value
from kvsink.calibrate.record import Calibration
from kvsink.codecs import Codec
from kvsink.errors import UnsupportedError
from kvsink.kernels.trellis import DISTORTION
from kvsink.model.runtime import runtime_of
from kvsink.report import counted_bits
from tests.models import build, tokens

EMPTY = Calibration((), {}, {}, torch.zeros(0), 0)


def designs(bits: float, dim: int, size: float = 1.0) -> tuple[Codec, dict[str, torch.Tensor]]:
    m = kvsink.get_method("rotated")
    key = design_key(m.side("key", bits), 0, 2, dim, EMPTY, lambda n: (torch.ones(n, dim), torch.zeros(n, dim)), size=size)
    value = design_value(m.side("value", bits), 0, 2, dim, EMPTY, size=size)
    return Codec(key.spec, value.spec, (4,)), {**key.tables, **value.tables}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [2, 2.5, 3, 4])
def test_counted_bits_are_the_formula(bits: float, dim: int) -> None:
    heads, n = 2, 4096
    codec, _ = designs(bits, dim)
    small = (64 * 4 + 64 + 40 * n) / 2 / (heads * dim * n)  # slots and scores of exact rows, the length, positions and real slots
    for found in counted_bits(codec, heads, dim, n):
        assert found == pytest.approx(bits + 8 / dim + 16 * 4 / n + small, abs=1e-9)


@pytest.mark.parametrize("size", [1e-6, 1.0, 300.0])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_errors_are_those_of_a_gaussian(bits: int, size: float) -> None:
    """Rows with all their size in three channels, which a rotation spreads: the error of a Gaussian row, at any size."""
    dim, generator = 128, torch.Generator().manual_seed(0)
    codec, tables = designs(bits, dim, size)
    x = torch.randn(1, 2, 400, dim, generator=generator) * size / 8
    x[..., :3] *= 8
    one = torch.ones(1, 400, dim)
    codes, scale = codec.encode_keys(x, one, torch.zeros_like(one), torch.arange(400)[None], tables, True)
    back = codec.decode_keys(codes, scale, torch.arange(400)[None], tables)
    error = float((back - x).square().mean() / x.square().mean())
    assert error == pytest.approx(DISTORTION[bits], rel=0.15)


def test_nothing_stored_is_of_the_model() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = build("llama")
        for p in model.parameters():
            p.data.add_(0.01 * torch.randn_like(p))
        kvsink.rewrite(model, "rotated", calibration="none")
        found.append(runtime_of(model).tables)
    assert found[0].keys() == found[1].keys() and all(torch.equal(t, found[1][n]) for n, t in found[0].items())


def test_the_first_rows_stay_exact() -> None:
    plain, model = build("llama"), build("llama")
    report = kvsink.rewrite(model, "rotated", calibration="none")
    assert [s.key for s in runtime_of(model).plans[0].segments] == ["first:4"] and report.protect == "first:4"
    with torch.no_grad():
        wanted = plain(tokens(1, 4, seed=3)).logits
        cache = kvsink.KVSinkCache.for_model(model, 1, max_length=16, strict=True)
        got = model(tokens(1, 4, seed=3), past_key_values=cache).logits
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_flat_side_is_not_calibrated() -> None:
    from dataclasses import replace

    side = kvsink.get_method("rotated").side("key", 3)
    for changes in ({"kind": "uniform"}, {"center": True}):
        with pytest.raises(UnsupportedError, match="flat=True needs a kind of lloyd, lloyd-even, trellis"):
            replace(side, **changes)
