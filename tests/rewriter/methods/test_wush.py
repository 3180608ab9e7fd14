"""WUSH-KV: codes and rows by its formulas in float64, exact rows as declared, and less loss than a rotation under its measure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import kvsink
from kvsink.codecs import Codec
from kvsink.errors import CalibrationError
from kvsink.model.runtime import runtime_of
from kvsink.report import counted_bits
from tests.graphs import rewritten
from tests.models import HEAD_DIM, build, tokens
from tests.states import read_codes, rows


def layer(method: Any = "wush", **options: Any) -> tuple[Codec, dict[str, torch.Tensor], Any]:
    """Codec and tables of layer 1 of a tiny Llama."""
    model = rewritten("llama", "sdpa", method, **options)
    runtime = runtime_of(model)
    codec = replace(runtime.plans[1].codec, segments=(), window=0)
    return codec, dict(zip(codec.param_names(), runtime.params(1, codec, 64, torch.device("cpu")), strict=True)), runtime


def by_hand(x: Any, forth: Any, kappa: float, bits: int = 2) -> Any:
    """x^ of rows [N, D]: into the basis, clipped at the quantile, coded, and back."""
    z = x @ forth
    t = np.sort(np.abs(z), -1)[:, int(kappa * z.shape[-1]), None]
    lo, hi = np.maximum(z.min(-1, keepdims=True), -t), np.minimum(z.max(-1, keepdims=True), t)
    step = (hi - lo) / (2**bits - 1)
    return (np.clip(np.rint((z - lo) / step), 0, 2**bits - 1) * step + lo) @ np.linalg.inv(forth)


@pytest.mark.parametrize("method", ["wush", "oscar-int2"])
def test_too_few_queries_are_refused_with_a_number_that_works(method: str) -> None:
    """Every eighth query of 64 tokens, by two query heads a key-value head, are 16; a moment of 16 dimensions asks for 32."""
    ids, options = tokens(4, 64, seed=1), {"key_bits": 2, "value_bits": 16, "protect": "none"}
    words = (
        r"layer 0: 16 queries are too few for their second moment of 16 dimensions \(condition number \de\+\d+\); .*at least 128 "
    )
    with pytest.raises(CalibrationError, match=words):
        kvsink.rewrite(build("llama"), method, calibration=ids[:1], **options)
    kvsink.rewrite(build("llama"), method, calibration=ids[:2], **options)


@pytest.mark.parametrize("side", ["k", "v"])
def test_rows_are_those_of_the_formula(side: str) -> None:
    """The way back is the inverse of the way in, found anew; a code may fall the other way where scales are float16."""
    codec, p, runtime = layer()
    k, v = rows(1, 40, heads=2)
    positions = torch.arange(40)[None]
    found = read_codes(codec, p, k, v, positions, *runtime.angles(1, positions))[side == "v"]
    x, kappa = (k, 0.96) if side == "k" else (v, 0.92)
    for head in range(2):
        forth = p[f"{side}_basis"][head].double().numpy()
        wanted = by_hand(x[0, head].double().numpy(), forth, kappa)
        apart = np.abs(found[0, head].double().numpy() - wanted).max(-1) / np.abs(wanted).max()
        assert np.median(apart) <= 2e-3 and (apart > 5e-3).mean() <= 0.1
    eye = torch.eye(HEAD_DIM)
    assert (p[f"{side}_basis"] @ p[f"{side}_unbasis"].mT - eye).abs().max() <= 1e-4
    assert (p[f"{side}_basis"].mT @ p[f"{side}_basis"] - eye).abs().max() > 0.1  # no rotation


def test_errors_as_queries_meet_them_are_smaller_than_behind_a_rotation() -> None:
    """Rows of the stock model, logits of its own queries; a Hadamard matrix alone is the same codec without calibration."""
    plain = kvsink.get_method("wush")
    turned = replace(plain.key, transform="hadamard", metric="none", spread="none")
    hadamard = replace(plain, key=turned, value=replace(turned))
    model, ids = build("llama"), tokens(4, 64, seed=11)
    with torch.no_grad():
        wanted = model(ids).logits
    errors = []
    for method in (plain, hadamard):
        coded = build("llama")
        kvsink.rewrite(coded, method, calibration=tokens(64, 64, seed=1), protect="none", window=0, key_bits=3, value_bits=3)
        with torch.no_grad():
            cache = kvsink.KVSinkCache.for_model(coded, 4, max_length=64, strict=True)
            found = coded(ids, cache=cache).logits
        errors.append(float((found - wanted).square().mean()))
    assert errors[0] < errors[1]


@pytest.mark.parametrize(("dim", "wanted"), [(128, 2.25), (64, 2.5)])
def test_counted_bits_are_the_formula(dim: int, wanted: float) -> None:
    """Codes, step and minimum; 320 exact rows are 1.07 bits at 4,096 tokens."""
    m, n = kvsink.get_method("wush"), 4096
    sides = [m.side(which, 2).resolved(8, dim) for which in ("key", "value")]
    bits = counted_bits(Codec(*sides, segments=(64,), window=256), 8, dim, n)
    small = 32 * 256 + 64 + 64 * 64 + 40 * n  # slots of the ring, length, slots and scores of exact rows, positions and real slots
    assert bits == pytest.approx([wanted + 16 * 320 / n + small / (16 * dim * n)] * 2, abs=1e-9)
    assert sides[0].clip == 0.96 and sides[1].clip == 0.92 and m.side("key", 3).clip == 1.0


def test_where_attention_shows_nothing_that_factor_is_the_identity() -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    report = kvsink.rewrite(model, "wush", calibration=tokens(4, 64))
    assert "layers [0, 1]: no queries, or no plain projection behind attention; errors of their values count alike" in report.notes
    plan = runtime_of(model).plans[0].codec
    assert plan.key.metric == plan.value.metric == "none" and plan.key.own_inverse
