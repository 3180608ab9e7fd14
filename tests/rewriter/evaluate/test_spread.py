"""Spread of rows against that of calibration: a formula in float64, a text of another kind, and the line that tells of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvsink
from kvsink.evaluate.spread import FAR, spread, spread_line
from kvsink.model.runtime import runtime_of
from tests.models import LAYERS, build, tokens


def rewritten(method: str, ids: Tensor, **options: Any) -> Any:
    model = build("llama")
    kvsink.rewrite(model, method, calibration=ids, fold=False, protect="none", check=False, **options)
    return model


def test_values_are_measured_by_their_deviations_in_the_rotated_basis() -> None:
    """`klt` values: less their mean, by Sylvester's matrix, over the deviations; all in float64 by numpy."""
    model, ids = rewritten("klt", tokens(6, 64, seed=1)), tokens(2, 48, seed=2)
    found = spread(model, ids)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for i in range(LAYERS):
        table = {n: runtime_of(model).tables[f"layers.{i}.v_{n}"].double().numpy() for n in ("mean", "sigma")}
        v = cache.layers[i].values.double().numpy() - table["mean"][:, None]
        h = np.ones((1, 1))
        while len(h) < v.shape[-1]:
            h = np.block([[h, h], [h, -h]])
        e = ((v @ h / np.sqrt(len(h)) / table["sigma"][:, None]) ** 2).mean(-1)
        assert found[i][1] == pytest.approx(float(np.sort(e.ravel())[(e.size - 1) // 2]) ** 0.5, rel=1e-4)


def test_rows_of_calibration_are_near_and_longer_ones_are_told() -> None:
    seen = tokens(8, 64, seed=3)
    model = rewritten("klt", seen)
    near = spread(model, seen[:2])
    assert all(0.8 < x < FAR for pair in near for x in pair if x is not None) and spread_line(near) == ""
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(3.0)
    far = spread(model, seen[:2])
    assert far[1][1] == pytest.approx(3 * near[1][1], rel=0.2) and far[0] == near[0]
    assert f"values of {sum((v or 0) >= FAR for _, v in far)} of {LAYERS} layers" in spread_line(far)


def test_sides_without_deviations_are_not_measured() -> None:
    assert spread(rewritten("rtn", tokens(4, 64, seed=1)), tokens(1, 20, seed=2)) == ((None, None),) * LAYERS
