"""The codecs and tables of all layers, from what was chosen and what was observed.

Source     ours
Raises     CalibrationError when statistics are missing, UnsupportedError when a shape cannot carry a declaration
"""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvsink.cache.ranges import layer_sizes, ranged, seen_sizes
from kvsink.calibrate.choices import Chosen
from kvsink.calibrate.design import Design, design_key, design_value
from kvsink.calibrate.observing import CALIBRATION_WINDOW, Progress
from kvsink.calibrate.record import Calibration
from kvsink.model.decoder import Decoder
from kvsink.model.runtime import Runtime
from kvsink.model.tables import LayerPlan

__all__ = ["design"]

_FIRST = 16  # rows of a text that keep their place when keys are spread over the context


def design(
    decoder: Decoder, chosen: Chosen, record: Calibration, made: MutableMapping[Any, Design], progress: Progress | None = None
) -> dict[int, tuple[Design, Design]]:
    """Key and value design of every layer that is packed. made: designs by layer, side and declaration; those that are in it
    already are taken, the others are put there."""
    where, n = decoder.where, len(decoder.where.attentions)
    coded = [i for i, w in enumerate(chosen.wanted) if w is not None]
    sizes = {i: pair for i in coded if (pair := seen_sizes(record, i)) is not None}
    if decoder.stream is None and (unseen := [i for i in coded if i not in sizes]):
        sizes |= layer_sizes(decoder, unseen)
    probe = decoder.carrying(tuple(LayerPlan(None) for _ in range(n)), {}, (), chosen.method.name)
    device = decoder.device if decoder.stream is None else torch.device("cpu")
    designed: dict[int, tuple[Design, Design]] = {}
    for i, w in enumerate(chosen.wanted):
        if w is None:
            continue
        held = sizes.get(i, (1.0, 1.0))
        if i in sizes:
            w = ranged(w[0], held[0]), ranged(w[1], held[1], values=True)
        w = record.measurable(i, *w)
        angles = partial(probe.offset_angles, i, device=torch.device("cpu"))
        _, kv, key_dim, value_dim = where.layers[i]
        key_design, value_design = made.get((i, "key", w[0])), made.get((i, "value", w[1]))
        if key_design is None:
            turn = partial(_turn, probe, decoder.config, i)
            key_design = made[i, "key", w[0]] = design_key(w[0], i, kv, key_dim, record, angles, device, turn, held[0])
        if value_design is None:
            value_design = made[i, "value", w[1]] = design_value(w[1], i, kv, value_dim, record, device, held[1])
        if progress is not None and chosen.samples:
            progress("learning codebooks", i + 1, n)
        designed[i] = key_design, value_design
    return designed


def _turn(runtime: Runtime, config: Any, layer: int, positions: Tensor, spread: bool) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Positions and their angles. spread: over the context the model serves; the first rows, sinks among them, stay in place."""
    if not spread:
        return positions, runtime.angles(layer, positions[None])
    limit = getattr(config, "max_position_embeddings", None) or CALIBRATION_WINDOW
    drawn = torch.randint(_FIRST, max(_FIRST + 1, limit), positions.shape, generator=torch.Generator().manual_seed(0))
    at = torch.where(positions < _FIRST, positions, drawn)
    return at, runtime.angles(layer, at[None])
