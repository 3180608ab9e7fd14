"""From statistics to codecs: bits are spent where they save most, bases diagonalise, tables have the codec's names."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvsink
from kvsink.calibrate.calibration import calibrate
from kvsink.calibrate.design import design_key, design_value, key_blocks, needs_calibration, water_fill
from kvsink.calibrate.queries import QueryStats
from kvsink.calibrate.record import Calibration
from kvsink.calibrate.statistics import KeyStats, SampleNeed, ValueStats
from kvsink.codecs import Codec, SideSpec, group_size_for, hadamard_order
from kvsink.errors import CalibrationError, UnsupportedError
from kvsink.kernels.hadamard import hadamard_ref
from kvsink.kernels.levels import distortion
from kvsink.model.runtime import Runtime
from kvsink.model.tables import LayerPlan
from tests.models import HEAD_DIM, KV_HEADS, LAYERS, build, tokens

METHODS = sorted(kvsink.methods())


@pytest.fixture(scope="module")
def record() -> Calibration:
    need = dict.fromkeys(range(LAYERS), SampleNeed(fisher=True, error=True))
    return calibrate(build("llama"), tokens(8, 64, seed=1), [()] * LAYERS, {0: (64, 1), 1: (64, 1, 0)}, samples=need)


def angles(block: int) -> Any:
    runtime = Runtime(build("llama"), (LayerPlan(None),) * LAYERS, {}, (), "test")
    return runtime.offset_angles(0, block, torch.device("cpu"))


def falling(seed: int, runs: int, heads: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(heads, 8 * runs, generator=g, dtype=torch.float64)).exp().sort(-1, descending=True).values


# -- bits --------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(bits=st.floats(0.125, 8), runs=st.integers(1, 16), seed=st.integers(0, 2**31))
def test_the_budget_is_spent_exactly(bits: float, runs: int, seed: int) -> None:
    widths = water_fill(falling(seed, runs), bits)
    assert len(widths) == runs and sum(widths) == round(bits * runs)
    assert list(widths) == sorted(widths, reverse=True)
    low = 0 if bits < 1.5 else max(1, int(bits) - 1)
    assert low <= widths[-1] and widths[0] <= min(8, int(bits) + 2)


@settings(max_examples=40, deadline=None)
@given(bits=st.floats(1, 4), runs=st.integers(1, 16), seed=st.integers(0, 2**31))
def test_a_trellis_has_one_to_six_bits_wherever_its_variance_lies(bits: float, runs: int, seed: int) -> None:
    variance = falling(seed, runs)
    widths = water_fill(variance, bits, kind="trellis")
    assert sum(widths) == round(bits * runs) and max(1, int(bits) - 1) <= min(widths) and max(widths) <= min(6, int(bits) + 2)
    assert water_fill(variance.flip(-1), bits, kind="trellis") == widths[::-1] or len(set(widths)) == 1


@pytest.mark.parametrize("bits", [1.0, 2.0, 2.25, 3.5])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_widths_do_better(bits: float, seed: int) -> None:
    variance, runs = falling(seed, 4), 4
    mass = variance.mean(0).unflatten(0, (-1, 8)).sum(-1).tolist()

    def error(widths: tuple[int, ...]) -> float:
        return sum(m * distortion(w) for m, w in zip(mass, widths, strict=True))

    found = water_fill(variance, bits)
    allowed = range(0 if bits < 1.5 else max(1, int(bits) - 1), int(bits) + 3)
    best = min(error(w) for w in product(allowed, repeat=runs) if sum(w) == round(bits * runs))
    assert error(found) <= best * (1 + 1e-12)


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "dim", "size"), [(128, 64, 64), (128, 80, 80), (32, 80, 20), (128, 192, 96), (1, 7, 1)])
def test_groups_divide_the_head(wanted: int, dim: int, size: int) -> None:
    assert group_size_for(wanted, dim) == size


@pytest.mark.parametrize(("dim", "order"), [(64, 64), (80, 80), (96, 96), (112, 16), (72, 24), (120, 40), (16, 16), (8, 8)])
def test_the_largest_hadamard_order(dim: int, order: int) -> None:
    assert hadamard_order(dim) == order


def test_heads_without_a_hadamard_order_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="divides 7 channels; use a method without"):
        hadamard_order(7)


@pytest.mark.parametrize(
    ("heads", "dim", "grouped", "order"),
    [(8, 64, 4, 256), (6, 64, 3, 192), (6, 80, 1, 80), (7, 64, 1, 64), (2, 16, 2, 32), (4, 112, 1, 16)],
)
def test_grouped_heads_need_an_order_for_all_of_them(heads: int, dim: int, grouped: int, order: int) -> None:
    spec = kvsink.get_method("rotatekv").side("key", 4).resolved(heads, dim)
    assert (spec.heads_per_group, spec.order) == (grouped, order)
    assert spec.widths == (4,) * (dim // 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"domain": "pre"}, "domain 'pre' is not one of post, block"),
        ({"transform": "dct"}, "transform 'dct' is not one of none, hadamard, klt"),
        ({"kind": "nf4"}, "quantizer 'nf4' is not one of none"),
        ({"kind": "none", "bits": 4.0}, "bits=4 without a quantizer"),
        ({"bits": 9.0}, "bits=9 is impossible"),
        ({"bits": 0.0}, "bits=0 is impossible"),
        ({"block": 0}, "block=0 is not positive"),
        ({"widths": (2, 3)}, "mixed widths need the lloyd quantizer"),
        ({"transform": "klt", "domain": "block"}, "klt keys are centred"),
        ({"clip": 0.0}, "clip=0.0 is outside"),
        ({"kind": "trellis", "bits": 5.0}, "a trellis has 1 to 4 bits a channel, in runs of 1 to 6, not bits=5 and widths"),
        ({"kind": "trellis", "bits": 0.75}, "a trellis has 1 to 4 bits a channel, in runs of 1 to 6, not bits=0.75"),
        ({"kind": "trellis", "widths": (2, 0)}, r"not bits=2 and widths \[0, 2\]"),
        ({"kind": "trellis", "gain": True}, "a trellis has its gain in the last byte of its codes"),
        ({"kind": "trellis", "metric": "queries"}, "metric 'queries' is not one of none, attention"),
        ({"kind": "trellis", "metric": "attention"}, "a metric needs transform='klt', whose basis it changes"),
        ({"kind": "lloyd", "unbiased": True}, "unbiased levels need kind='trellis'"),
    ],
)
def test_impossible_declarations(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        replace(SideSpec(bits=2, kind="uniform"), **changes)


@pytest.mark.parametrize("method", METHODS)
def test_codecs_survive_their_text(method: str) -> None:
    m = kvsink.get_method(method)
    codec = Codec(m.side("key", 2).resolved(8, 64), m.side("value", 4).resolved(8, 64), (5, 1), 16, True)
    assert Codec.parse(codec.text()) == codec and Codec.parse(codec.text()).text() == codec.text()
    for broken in ("{", "[]", '{"key": {}}', codec.text().replace('"bits"', '"bitz"')):
        with pytest.raises(kvsink.KvsinkError):
            Codec.parse(broken)


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_tables_are_those_the_codec_names(record: Calibration, method: str) -> None:
    m = kvsink.get_method(method)
    bits = 2 if m.key.kind.startswith("vector") else 3
    key = design_key(m.side("key", bits), 1, KV_HEADS, HEAD_DIM, record, angles)
    value = design_value(m.side("value", bits), 1, KV_HEADS, HEAD_DIM, record)
    wanted = set(Codec(key.spec, value.spec).param_names()) - {"start_cos", "start_sin"}
    assert set(key.tables) | set(value.tables) == wanted
    assert all(torch.isfinite(t).all() for d in (key, value) for t in d.tables.values() if t.is_floating_point())
    gain = key.spec.kind == "trellis"  # a byte of a row's codes
    assert 8 * (Codec(key.spec, value.spec).row_bytes(key.spec, HEAD_DIM) - gain) == bits * HEAD_DIM


def test_the_basis_diagonalises_the_covariance(record: Calibration) -> None:
    spec = kvsink.get_method("klt:best").side("key", 2)
    design = design_key(spec, 1, KV_HEADS, HEAD_DIM, record, angles)
    basis, (_, covariance) = design.tables["k_basis"].double(), record.keys[1, 64].centred(*angles(64))
    turned = basis.mT @ covariance @ basis
    diagonal = torch.diagonal(turned, dim1=-2, dim2=-1)
    largest = float(diagonal.max())
    assert (basis.mT @ basis - torch.eye(HEAD_DIM)).abs().max() <= 1e-6
    assert (turned - torch.diag_embed(diagonal)).abs().max() <= 1e-6 * largest
    assert (diagonal.diff(dim=-1) <= 1e-6 * largest).all()
    assert (design.tables["k_sigma"] ** 2 - diagonal).abs().max() <= 1e-5 * largest


def test_the_permutation_sorts_the_rotated_mean(record: Calibration) -> None:
    spec = kvsink.get_method("rotatekv").side("key", 2)
    design = design_key(spec, 1, KV_HEADS, HEAD_DIM, record, angles)
    order, back = design.tables["k_perm"], design.tables["k_unperm"]
    assert torch.equal(order[back], torch.arange(KV_HEADS * HEAD_DIM))
    from kvsink.kernels.hadamard import hadamard_ref

    turned = hadamard_ref(record.keys[1, 1].mean().flatten(), design.spec.order)
    assert (turned[order].diff() >= 0).all()


def test_what_needs_calibration() -> None:
    needs = {n: tuple(needs_calibration(m.side(w, 2)) for w in ("key", "value")) for n, m in kvsink.methods().items()}
    assert {n: needs[n] for n in ("rtn", "rotatekv", "klt", "centred")} == {
        "rtn": (False, False),
        "rotatekv": (True, False),
        "klt": (True, True),
        "centred": (True, True),
    }
    assert key_blocks(SideSpec()) == () and not needs_calibration(SideSpec())


def test_missing_statistics_are_named(record: Calibration) -> None:
    klt = kvsink.get_method("klt")
    with pytest.raises(CalibrationError, match="layer 5 has no key statistics in this record; calibrate with this method"):
        design_key(klt.side("key", 2), 5, KV_HEADS, HEAD_DIM, record, angles)
    with pytest.raises(CalibrationError, match="layer 5 has no value statistics"):
        design_value(klt.side("value", 2), 5, KV_HEADS, HEAD_DIM, record)
    with pytest.raises(CalibrationError, match="layer 0 has no key statistics"):  # of keys after RoPE
        design_key(replace(klt.side("key", 2), domain="post"), 0, KV_HEADS, HEAD_DIM, record, angles)


@pytest.mark.parametrize("kind", ["lloyd", "trellis"])
@pytest.mark.parametrize("side", ["key", "value"])
def test_deviations_are_those_behind_the_rotation(side: str, kind: str) -> None:
    """Rows of two very unequal channels have equal ones behind a Hadamard: sigma is measured there, as the quantizer sees it."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(2, KV_HEADS, 500, HEAD_DIM, generator=g) * torch.linspace(0, 4, HEAD_DIM).exp() + 3.0
    spec, keep = SideSpec(bits=2, center=True, transform="hadamard", kind=kind), torch.ones(2, 500, dtype=torch.bool)
    record = Calibration((), {}, {}, torch.zeros(1), 1000)
    if side == "value":
        record.values[0] = ValueStats.empty(KV_HEADS, HEAD_DIM)
        record.values[0].add(rows, keep)
        design = design_value(spec, 0, KV_HEADS, HEAD_DIM, record)
    else:
        still = torch.ones(64, 0), torch.zeros(64, 0)  # a model without RoPE
        record.keys[0, 64] = KeyStats.empty(64, KV_HEADS, HEAD_DIM)
        record.keys[0, 64].add(rows, torch.arange(500).expand(2, -1), keep, *still)
        design = design_key(spec, 0, KV_HEADS, HEAD_DIM, record, lambda block: still)
    x = hadamard_ref(rows - rows.mean((0, 2), keepdim=True), HEAD_DIM)
    wanted = x.square().mean((0, 2)).sqrt()
    assert (design.tables[f"{side[0]}_sigma"] / wanted - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("method", ["klt:best", "klt"])
def test_rows_outside_the_span_of_the_calibration_rows_are_coded_as_well(method: str) -> None:
    """Calibrated on rows of 12 dimensions of 16; new ones have a thousandth of their size in the others. Their gain must not come
    from there."""
    g, still = torch.Generator().manual_seed(1), (torch.ones(64, 0), torch.zeros(64, 0))
    spread = torch.linspace(2, 0, HEAD_DIM).exp() * (torch.arange(HEAD_DIM) < 12)
    rows = torch.randn(2, KV_HEADS, 1000, HEAD_DIM, generator=g) * spread
    record = Calibration((), {(0, 64): KeyStats.empty(64, KV_HEADS, HEAD_DIM)}, {}, torch.zeros(1), 2000)
    record.keys[0, 64].add(rows, torch.arange(1000).expand(2, -1), torch.ones(2, 1000, dtype=torch.bool), *still)
    record.queries[0] = QueryStats.empty(KV_HEADS, HEAD_DIM)
    record.queries[0].add(torch.randn(2, 2 * KV_HEADS, 1000, HEAD_DIM, generator=g), torch.ones(2, 2 * KV_HEADS, 1000))
    design = design_key(kvsink.get_method(method).side("key", 3), 0, KV_HEADS, HEAD_DIM, record, lambda block: still)
    codec = Codec(design.spec, SideSpec())
    off = []
    for beside in (0.0, 2e-3):
        x = rows[:, :, :200] + beside * torch.randn(2, KV_HEADS, 200, HEAD_DIM, generator=g)
        x = (x - design.tables["k_mean"][:, None] - design.tables["k_mean2"][:, None]) @ design.tables["k_basis"]
        back = codec.dequantize("k", *codec.quantize("k", x, design.tables), design.tables)
        off.append(float((back - x).square().sum() / x.square().sum()))
    assert off[1] <= 1.1 * off[0]


def test_values_have_no_metric() -> None:
    value = SideSpec(bits=2, kind="trellis", transform="klt", center=True, metric="attention")
    with pytest.raises(UnsupportedError, match="metric='attention' is for keys only"):
        Codec(SideSpec(), value)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_levels_without_bias_do_not_shrink_what_is_summed(bits: int) -> None:
    """Of Gaussian rows in walks of 16 steps: all of a row comes back along itself; levels of least error give back 1 - D of it."""
    g, keep = torch.Generator().manual_seed(0), torch.ones(1, 4000, dtype=torch.bool)
    rows = torch.randn(1, KV_HEADS, 4000, 128, generator=g)
    record = Calibration((), {}, {}, torch.zeros(1), 4000)
    record.values[0] = ValueStats.empty(KV_HEADS, 128)
    record.values[0].add(rows, keep)
    along = {}
    for unbiased in (False, True):
        design = design_value(SideSpec(bits=bits, kind="trellis", unbiased=unbiased), 0, KV_HEADS, 128, record)
        codec = Codec(SideSpec(), design.spec)
        back = codec.decode_values(*codec.encode_values(rows, design.tables), design.tables)
        along[unbiased] = float((back * rows).sum() / rows.square().sum())
    assert abs(along[True] - 1) <= 0.02 and abs(along[False] - 1) >= 2 * abs(along[True] - 1)
    assert along[False] < 1
