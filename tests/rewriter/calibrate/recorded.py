"""A model with a planted massive activation, and how records of it are compared."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvsink.calibrate.record import Calibration
from tests.models import LAYERS, build, tokens

FLOAT32_SUMS = 1e-5
"""Sums of products taken in float32 and added in float64, relative to the largest."""
PLANTED, CHANNEL = 5, 7
"""A token whose embedding carries a massive activation, and its channel."""

BLOCKS = {0: (64,), 1: (64, 1)}
NOTHING = [()] * LAYERS


def planted(size: float) -> Any:
    model = build("llama")
    model.model.embed_tokens.weight[PLANTED, CHANNEL] = size
    return model


def ending_in_the_planted_token(windows: int = 6, length: int = 40) -> Tensor:
    ids = tokens(windows, length, seed=3)
    ids[ids == PLANTED] = PLANTED + 1
    ids[:, -1] = PLANTED
    return ids


def sums(record: Calibration) -> list[Tensor]:
    stats = [*(s for _, s in sorted(record.keys.items())), *(s for _, s in sorted(record.values.items()))]
    return [getattr(s, name) for s in stats for name in vars(s)]


def relative(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())
