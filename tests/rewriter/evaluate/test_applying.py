"""A design that goes into a model: weights, hooks and runtime, or none of them where a check fails."""

from __future__ import annotations

import pytest
import torch

from kvsink.calibrate.calibration import calibrate
from kvsink.calibrate.choices import RewriteOptions, choose
from kvsink.calibrate.designed import design
from kvsink.calibrate.probing import check
from kvsink.errors import UnsupportedError
from kvsink.evaluate import applying
from kvsink.methods import get_method
from kvsink.model.anatomy import rewritable
from kvsink.model.decoder import Decoder
from tests.models import LAYERS, build, tokens


def applied(monkeypatch: pytest.MonkeyPatch | None, fold: bool = True):  # type: ignore[no-untyped-def]
    decoder = Decoder(*rewritable(build("llama")))
    notes = check(decoder)
    chosen = choose(decoder, get_method("rotatekv"), RewriteOptions(protect="none"), None, notes)
    record = calibrate(decoder.model, tokens(8, 64), chosen.policies, chosen.blocks)
    before = {n: p.clone() for n, p in decoder.model.named_parameters()}
    if monkeypatch is not None:

        def fails(*_: object) -> None:
            raise UnsupportedError("self-check: a fault")

        monkeypatch.setattr(applying, "check_cache", fails)
    made = design(decoder, chosen, record, {})
    return decoder, before, lambda: applying.apply(decoder, chosen, record, made, fold)


def test_rotations_go_into_the_weights_unless_they_are_to_stay_out() -> None:
    decoder, before, run = applied(None)
    report = run()
    turned = [n for n, p in decoder.model.named_parameters() if not torch.equal(p, before[n])]
    changed = {n.split(".")[-2] for n in turned}
    assert changed == {"v_proj", "o_proj"} and report.check.folded is not None
    assert [p.codec.value.folded for p in decoder.runtime.plans] == [True] * LAYERS
    decoder, before, run = applied(None, fold=False)
    run()
    assert all(torch.equal(p, before[n]) for n, p in decoder.model.named_parameters())
    assert [p.codec.value.folded for p in decoder.runtime.plans] == [False] * LAYERS


def test_a_fault_takes_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, before, run = applied(monkeypatch)
    with pytest.raises(UnsupportedError, match="self-check: a fault"):
        run()
    assert decoder.runtime is None and not decoder.model.model._forward_pre_hooks
    assert all(torch.equal(p, before[n]) for n, p in decoder.model.named_parameters())
