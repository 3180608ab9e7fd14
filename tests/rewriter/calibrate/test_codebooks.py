"""Learnt tables: planted codebooks are found, weights reach k-means, code points fit, what is missing is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kvsink
from kvsink.calibrate import codebooks
from kvsink.calibrate.codebooks import learn, learn_book, learn_levels, row_weights
from kvsink.calibrate.design import balanced, design_value
from kvsink.calibrate.record import Calibration
from kvsink.calibrate.statistics import Samples, ValueStats
from kvsink.codecs import Codec, SideSpec
from kvsink.errors import CalibrationError, UnsupportedError
from kvsink.kernels.levels import distortion
from kvsink.kernels.static import best_steps, static_decode, static_encode
from kvsink.kernels.vector import vector_decode, vector_encode
from kvsink.model.runtime import runtime_of
from kvsink.report import counted_bits
from tests.models import build, tokens

CPU = torch.device("cpu")
TWO = SideSpec(bits=2, kind="vector", couple=4, code_bits=8)


def rows_of(heads: int, n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(heads, n, dim, generator=torch.Generator().manual_seed(seed))


def error(x: Tensor, book: Tensor, spec: SideSpec, w: Tensor | None = None) -> float:
    back = vector_decode(*vector_encode(x[None], book, spec.code_bits, spec.gain), book, spec.code_bits)[0]
    square = (back - x).square()
    return float((square if w is None else square * w).mean())


def record_of(**fields: Any) -> Calibration:
    n = 512
    samples = Samples(torch.randn(n, 2, 16), torch.randn(n, 2, 16), torch.arange(n), windows=torch.arange(n) // 128, **fields)
    return Calibration((), {}, {}, torch.zeros(0), n, samples={0: samples})


# -- vector ------------------------------------------------------------------------------------------------------------


def test_a_planted_book_is_found() -> None:
    g = torch.Generator().manual_seed(0)
    spec = SideSpec(bits=0.75, kind="vector", couple=4, code_bits=3)
    centres = 4 * torch.randn(2, 2, 8, 4, generator=g)
    pick = torch.randint(0, 8, (2, 2, 600), generator=g)
    x = torch.stack([torch.cat([centres[h, i, pick[h, i]] for i in range(2)], dim=-1) for h in range(2)])
    book = learn_book(x, None, spec)
    assert book.shape == (2, 2, 8, 4) and torch.equal(book, book.half().float())
    assert error(x, book, spec) <= 1e-5 * float(x.square().mean())


def test_books_hold_for_rows_they_have_not_seen() -> None:
    """Four Gaussian channels in 8 bits: below the scalar quantizer of 2 bits, seen or not."""
    x, fresh = rows_of(1, 8192, 8), rows_of(1, 2048, 8, seed=1)
    book = learn_book(x, None, TWO)
    assert error(x, book, TWO) < distortion(2) and error(fresh, book, TWO) < distortion(2)


def test_weights_buy_weighted_error() -> None:
    x, fresh = rows_of(1, 4096, 8), rows_of(1, 2048, 8, seed=1)

    def heavy(rows: Tensor) -> Tensor:
        return torch.where(rows[..., :1] > 0.5, 50.0, 1.0)

    plain, weighted = learn_book(x, None, TWO), learn_book(x, heavy(x), TWO)
    one = slice(0, 4)  # the group whose channels say what is heavy
    parts = [replace_book(b, one) for b in (plain, weighted)]
    errors = [error(fresh[..., one], b, TWO, heavy(fresh)) for b in parts]
    assert errors[1] < 0.9 * errors[0]
    assert error(fresh[..., one], parts[1], TWO) > error(fresh[..., one], parts[0], TWO)


def replace_book(book: Tensor, channels: slice) -> Tensor:
    return book[:, channels.start // 4 : channels.stop // 4]


def test_one_book_for_all_heads() -> None:
    spec = replace(TWO, shared=True)
    x = rows_of(1, 1024, 8).expand(3, -1, -1)
    book = learn_book(x, None, spec)
    assert book.shape == (1, 2, 256, 4) and error(x, book, spec) < 2 * distortion(2)


def test_a_gain_serves_rows_of_any_size() -> None:
    spec = replace(TWO, gain=True)
    x = rows_of(1, 4096, 16) * torch.logspace(-2, 2, 4096)[None, :, None]
    plain, gained = learn_book(x, None, TWO), learn_book(x, None, spec)
    small = x[:, :1000]
    assert error(small, gained, spec) < 0.1 * error(small, plain, TWO)


# -- weights -----------------------------------------------------------------------------------------------------------


def test_weights_of_rows() -> None:
    fisher, factor = torch.rand(512, 2, 16), torch.rand(512, 2)
    factor[5] = 1e6
    rows = record_of(key_fisher=fisher, value_error=factor).samples[0]
    block = SideSpec(bits=2, kind="vector", domain="block", block=1, weights="fisher")
    assert row_weights("k", replace(block, weights="none"), 0, rows) is None
    assert torch.equal(row_weights("k", block, 0, rows), fisher.transpose(0, 1))  # type: ignore[arg-type]
    turned = row_weights("k", replace(block, transform="hadamard"), 0, rows)
    assert turned is not None and torch.allclose(turned[..., 0], fisher.mean(-1).T)
    error_ = row_weights("v", SideSpec(bits=2, kind="vector", weights="error"), 0, rows)
    assert error_ is not None and error_.shape == (2, 512, 1)
    later = error_[:, 128:256, 0]
    assert torch.allclose(later.mean(-1), torch.ones(2), atol=1e-2)  # each window counts the same, whatever another holds
    with pytest.raises(CalibrationError, match="layer 0 has no fisher weights in this record's samples; calibrate with"):
        row_weights("v", SideSpec(bits=2, kind="vector", weights="fisher"), 0, rows)


# -- code points -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_code_points_beat_equal_steps(side: str, bits: int) -> None:
    x = rows_of(2, 2000, 16).pow(3)  # a peak with heavy tails
    spec = SideSpec(bits=bits, kind="nuq", domain="block" if side == "k" else "post", block=1 if side == "k" else 64)
    spec = spec.resolved(2, 16)
    tables = learn_levels(side, x, None, spec)
    levels = tables[f"{side}_levels"]
    assert levels.shape == (2**bits,) and (levels.diff() >= 0).all() and levels.abs().max() <= 1
    even = torch.linspace(-1, 1, 2**bits)
    codec = Codec(spec, SideSpec()) if side == "k" else Codec(SideSpec(), spec)

    def loss(points: Tensor) -> float:
        held = {**tables, f"{side}_levels": points, f"{side}_read": points}
        return float((codec.dequantize(side, *codec.quantize(side, x[None], held), held)[0] - x).square().mean())

    # A token's 32 entries spread over its range: equal steps are nearly right for it.
    assert loss(levels) < (0.7 if side == "k" else 0.97) * loss(even)


def test_reading_restores_mean_and_deviation() -> None:
    x = rows_of(2, 4000, 16)
    spec = SideSpec(bits=2, kind="nuq", domain="block", block=1).resolved(2, 16)
    tables = learn_levels("k", x, None, spec)
    codec = Codec(spec, SideSpec())
    y = codec.dequantize("k", *codec.quantize("k", x[None], tables), tables)[0] - tables["k_offset"][:, None]
    y = y / tables["k_range"][:, None]
    wanted = (x - tables["k_offset"][:, None]) / tables["k_range"][:, None]
    assert abs(float(y.std() / wanted.std()) - 1) < 0.01 and abs(float(y.mean() - wanted.mean())) < 0.01
    four = learn_levels("k", x, None, replace(spec, bits=4, widths=(4, 4)))
    assert torch.equal(four["k_levels"], four["k_read"]) and not torch.equal(tables["k_levels"], tables["k_read"])


def test_ranges_are_those_of_the_channels() -> None:
    x = rows_of(2, 1000, 16) * torch.arange(1, 17)
    tables = learn_levels("k", x, None, SideSpec(bits=2, kind="nuq", domain="block", block=1).resolved(2, 16))
    half = (x.amax(1) - x.amin(1)) / 2
    assert (tables["k_range"] - half).abs().max() <= 2.0**-10 * half.max()
    narrow = learn_levels("k", x, None, SideSpec(bits=2, kind="nuq", domain="block", block=1, outliers=0.1).resolved(2, 16))
    assert (narrow["k_range"] < 0.8 * tables["k_range"]).all()


def test_scaled_and_raw_weights_differ_where_ranges_do() -> None:
    """A wide channel with entries at its ends and a narrow one at its middle: scaled weights care for the wide one."""
    x = torch.cat([100 * torch.sign(rows_of(1, 1000, 8)), 0.01 * rows_of(1, 1000, 8, seed=1)], dim=-1)
    spec = SideSpec(bits=1, kind="nuq", domain="block", block=1, weights="fisher").resolved(1, 16)
    scaled, raw = (learn_levels("k", x, torch.ones_like(x), replace(spec, weights=w)) for w in ("fisher", "fisher-raw"))
    assert scaled["k_levels"].abs().min() > 0.99 > raw["k_levels"].abs().min()


# -- refusals and the whole --------------------------------------------------------------------------------------------


def test_missing_samples_are_named() -> None:
    with pytest.raises(CalibrationError, match="layer 3 has no samples in this record; calibrate with this method again"):
        learn("v", TWO, 3, record_of(), {}, CPU)
    record = record_of()
    record.samples[0] = record.samples[0].take(torch.arange(200))
    with pytest.raises(CalibrationError, match="layer 0: 200 sampled rows are fewer than 256 centroids; calibrate on at least"):
        learn("v", TWO, 0, record, {}, CPU)
    with pytest.raises(CalibrationError, match="512 calibration tokens are too few for codebooks of 1024 centroids"):
        kvsink.rewrite(build("llama"), "cq", key_bits=1.25, value_bits=1.25, calibration=tokens(8, 64))


@pytest.mark.parametrize(
    ("bits", "dim", "words"),
    [
        (3, 64, r"bits=3 has no codebook setting; use 2.25 \(known: 4 = 2c8b"),
        (0.375, 80, "head_dim=80 does not split into runs of 32 channels; use bits=0.75"),
        (8, 64, "bits=8 has no codebook setting; use 4"),
    ],
)
def test_bits_without_a_setting(bits: float, dim: int, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        kvsink.get_method("cq").side("key", bits).resolved(2, dim)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"couple": 4}, "couple=4 and code_bits=0 are given together"),
        ({"couple": 4, "code_bits": 9}, "9 bits for 4 channels are not 2 bits each"),
        ({"bits": 6.5, "couple": 2, "code_bits": 13}, "of codes of 1 to 12 bits"),
        ({"outliers": 1.0}, "outliers=1.0 is outside"),
        ({"weights": "mass"}, "weights 'mass' is not one of none, fisher"),
    ],
)
def test_impossible_declarations(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        replace(SideSpec(bits=2, kind="vector"), **changes)


def test_keys_are_coded_in_the_block_domain() -> None:
    cq = kvsink.get_method("cq")
    with pytest.raises(UnsupportedError, match="vector keys are in the block domain"):
        kvsink.rewrite(build("llama"), replace(cq, key=replace(cq.key, domain="post")), calibration=tokens(8, 64))


def test_counted_bits_at_two() -> None:
    """Keys and values of 64 channels at 2 bits: a gain of 8 bits each in a trellis, of 16 with Lloyd-Max levels, none in codebooks;
    exact rows and positions on top."""
    for name, numbers in (("klt", (8, 8)), ("klt:codebooks", (16, 0))):
        method = kvsink.get_method(name)
        key, value = (method.side(side, 2).resolved(3, 64) for side in ("key", "value"))
        key, value = (replace(side, widths=() if side.kind == "vector" else (2,) * 8) for side in (key, value))
        for bits, number in zip(counted_bits(Codec(key, value, (5, 1)), 3, 64, layers=30), numbers, strict=True):
            assert 2 + number / 64 < bits < 2.04 + number / 64
    kinds = [kvsink.get_method("klt").side("value", bits).kind for bits in (1.25, 1.5, 4, 5)]
    assert kinds == ["vector", "trellis", "trellis", "gauss"]


def test_one_record_serves_every_method() -> None:
    from kvsink.calibrate.calibration import calibrate
    from kvsink.calibrate.design import gather_needs

    chosen = [("klt", 2, 2), ("cq", 2, 2), ("antkv", 1, 1), ("kvquant", 2, 2), ("rotatekv", 2, 2)]
    pairs = [(m.side("key", k), m.side("value", v)) for name, k, v in chosen for m in (kvsink.get_method(name),)]
    blocks, need = gather_needs(pairs, 2, 16)
    assert blocks == (1, 64) and need is not None and (need.rows, need.fisher, need.error) == (256, True, True)
    record = calibrate(build("llama"), tokens(8, 64, seed=1), [()] * 2, {0: blocks, 1: blocks}, samples={0: need, 1: need})
    for name, k, v in chosen:
        model = build("llama")
        kvsink.rewrite(model, name, key_bits=k, value_bits=v, calibration=record, protect="none")
        assert runtime_of(model).method == name


# -- eigenbasis under codebooks ----------------------------------------------------------------------------------------


def test_variances_are_dealt_out_evenly() -> None:
    """32 variances that halve each time, in runs of 4: each run gets one of the first 8, and products nearly agree."""
    values = 0.5 ** torch.arange(32.0)
    order = balanced(values, 4)
    assert sorted(order.tolist()) == list(range(32))
    logs = values.log2()[order].unflatten(0, (8, 4)).sum(-1)
    assert float(logs.max() - logs.min()) <= 8 < float(values.log2().unflatten(0, (8, 4)).sum(-1).diff().abs().sum())
    assert sorted(order.unflatten(0, (8, 4)).amin(-1).tolist()) == list(range(8))


def test_an_eigenbasis_serves_codebooks_of_correlated_channels() -> None:
    """Values that are one number repeated in channels of different runs: the basis finds it, runs of channels cannot."""
    g = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(16, 16, generator=g)).Q * (2.0 ** -torch.arange(16.0))
    rows = torch.randn(2048, 1, 16, generator=g) @ mix.mT
    samples = Samples(rows, rows, torch.arange(2048))
    record = Calibration((), {}, {0: ValueStats.empty(1, 16)}, torch.zeros(0), 2048, samples={0: samples})
    record.values[0].add(rows.transpose(0, 1)[None], torch.ones(1, 2048, dtype=torch.bool))
    errors = []
    for transform in ("none", "klt"):
        design = design_value(replace(SideSpec(bits=2, kind="vector"), transform=transform), 0, 1, 16, record)
        codec, x = Codec(SideSpec(), design.spec), rows.transpose(0, 1)[None]
        back = codec.restore_values(codec.dequantize("v", *codec.encode_values(x, design.tables), design.tables), design.tables)
        errors.append(float((back - x).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_rows_at_position_0_have_their_share_of_the_weight() -> None:
    positions = torch.tensor([0, 5, 9, 0, 7, 3, 2, 8, 6, 4])
    for side, share in (("k", 0.25), ("v", 2.0)):
        weight = codebooks._first_rows(side, positions)
        first = weight[0, positions == 0, 0]
        assert weight.shape == (1, 10, 1) and bool((weight[0, positions > 0] == 1).all())
        assert float(first.sum()) == max(2.0, share * 8)  # never less than a row has without
    assert bool((codebooks._first_rows("v", positions + 1) == 1).all())


def test_a_fixed_step_serves_a_first_row_that_the_mean_leaves_outside() -> None:
    """A row far outside saturates when all rows count the same, and is met when it has its share."""
    x = torch.randn(1, 400, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 9.0
    positions = torch.arange(400)

    def error(weights: torch.Tensor | None) -> float:
        step = best_steps(x, weights, 4)
        return float((static_decode(static_encode(x[:, None, :1], step, 4)[0], step, 4) - 9.0).abs().max())

    assert error(None) > 3 and error(codebooks._first_rows("v", positions)) < 1
