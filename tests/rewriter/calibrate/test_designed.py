"""Designs of all layers: made once for one record and declaration, and taken again where they are known."""

from __future__ import annotations

from typing import Any

import torch

import kvsink
from kvsink.calibrate.calibration import calibrate
from kvsink.calibrate.choices import RewriteOptions, choose
from kvsink.calibrate.design import Design
from kvsink.calibrate.designed import design
from kvsink.calibrate.probing import check
from kvsink.methods import get_method
from kvsink.model.anatomy import rewritable
from kvsink.model.decoder import Decoder
from tests.models import LAYERS, build, tokens


def test_a_design_is_made_once() -> None:
    decoder = Decoder(*rewritable(build("llama")))
    notes = check(decoder)
    chosen = choose(decoder, get_method("klt"), RewriteOptions(protect="none"), None, notes)
    record = calibrate(decoder.model, tokens(8, 64), chosen.policies, chosen.blocks)
    made: dict[Any, Design] = {}
    first = design(decoder, chosen, record, made)
    assert sorted(first) == list(range(LAYERS)) and len(made) == 2 * LAYERS
    again = design(decoder, chosen, record, made)
    assert all(a is b for i in first for a, b in zip(first[i], again[i], strict=True))
    chosen.planned("0:key_bits=4")
    other = design(decoder, chosen, record, made)
    assert other[0][0] is not first[0][0] and other[0][0].spec.bits == 4
    assert other[1] == first[1] and len(made) == 2 * LAYERS + 1


def test_what_is_left_alone_is_not_designed() -> None:
    decoder = Decoder(*rewritable(build("gemma3")))  # a layer with a window, and one without
    notes = check(decoder)
    chosen = choose(decoder, get_method("rtn"), RewriteOptions(protect="none"), None, notes)
    none = kvsink.calibrate.record.Calibration((), {}, {}, torch.zeros(0), 0)
    packed = [i for i, kind in enumerate(decoder.where.layer_types) if kind == "full_attention"]
    assert sorted(design(decoder, chosen, none, {})) == packed and 0 < len(packed) < LAYERS
