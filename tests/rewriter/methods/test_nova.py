"""NOVA-KV: the transform is the whitening of its formula, groups span the spectrum, keys come back with the mean after RoPE."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvsink
from kvsink.calibrate.calibration import calibrate
from kvsink.calibrate.design import sample_need
from kvsink.codecs import Codec
from kvsink.codecs.protect import parse_policies
from kvsink.kernels.vector import vector_decode, vector_encode
from kvsink.model.runtime import runtime_of
from kvsink.report import counted_bits
from tests.graphs import rewritten
from tests.models import HEAD_DIM, build, tokens
from tests.states import read_codes, rows


def test_keys_are_whitened_by_queries_and_centred_after_rope() -> None:
    """F^T S F is diagonal and F^-1 M F^-T the identity, M damped; S the covariance of keys as attention sees them."""
    model = build("llama")
    need = sample_need(kvsink.get_method("nova").side("key", 2).resolved(2, HEAD_DIM))
    assert need is not None
    given = [parse_policies("first:1")] * 2, dict.fromkeys(range(2), (0,))
    record = calibrate(model, tokens(10, 64), *given, samples=dict.fromkeys(range(2), need))
    kvsink.rewrite(model, "nova", calibration=record, protect="first:1")
    tables, stats, moment = runtime_of(model).tables, record.keys[1, 0], record.queries[1].roped
    assert moment is not None
    mean = stats.mean()
    covariance = stats.second / stats.count.sum() - mean[:, :, None] * mean[:, None]
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    asked = moment / size + 0.01 * torch.eye(HEAD_DIM)
    forth, back = (tables[f"layers.1.k_{n}"].double() for n in ("basis", "unbasis"))
    turned = forth.mT @ covariance @ forth
    spectrum = turned.diagonal(dim1=-2, dim2=-1)
    assert (turned - torch.diag_embed(spectrum)).abs().max() <= 1e-4 * spectrum.max()
    assert (back.mT @ asked @ back - torch.eye(HEAD_DIM)).abs().max() <= 1e-4
    assert (tables["layers.1.k_mean2"].double() - mean).abs().max() <= 1e-5
    for head in spectrum:  # no group of four has all of the strongest components
        order = head.argsort(descending=True)
        assert {int(i) // 4 for i in order[:4]} == set(range(HEAD_DIM // 4))


def test_keys_are_those_of_the_formula() -> None:
    """Centred after RoPE, into the basis, the codes of the quantizer fed alone, and back by the inverse found anew."""
    model = rewritten("llama", "sdpa", "nova", protect="first:1", window=0)
    runtime = runtime_of(model)
    codec = replace(runtime.plans[1].codec, segments=())
    p = dict(zip(codec.param_names(), runtime.params(1, codec, 64, torch.device("cpu")), strict=True))
    k, v = rows(1, 40, heads=2)
    positions = torch.arange(40)[None]
    found = read_codes(codec, p, k, v, positions, *runtime.angles(1, positions))[0]
    mean, basis = p["k_mean2"].double(), p["k_basis"].double()
    z = (k.double() - mean[:, None]) @ basis
    coded = vector_decode(*vector_encode(z.float(), p["k_book"], 8, True), p["k_book"], 8).double()
    wanted = coded @ torch.linalg.inv(basis) + mean[:, None]
    apart = (found.double() - wanted).abs().amax(-1) / wanted.abs().max()
    assert apart.median() <= 1e-4 and (apart > 1e-2).double().mean() <= 0.05  # a code where two centroids are as near


@pytest.mark.parametrize(("dim", "key", "value"), [(128, 2.125, 2.25), (64, 2.25, 2.5)])
def test_counted_bits_are_the_formula(dim: int, key: float, value: float) -> None:
    m, n = kvsink.get_method("nova"), 131072
    sides = [m.side(which, 2).resolved(8, dim) for which in ("key", "value")]
    found = counted_bits(Codec(*sides), 8, dim, n)
    beside = (64 + 40 * n) / (2 * 8 * dim * n)  # the length, positions and real slots
    assert found == pytest.approx([key + beside, value + beside], abs=1e-9)
