"""A compiled step: what is right passes, and a stage that it skips is found."""

from __future__ import annotations

from typing import Any

import pytest

import kvsink
from kvsink.errors import UnsupportedError
from kvsink.evaluate.stepcheck import check_step
from kvsink.model.runtime import runtime_of
from tests.models import build, tokens

ids = tokens(8, 64, seed=1)


def rewritten(family: str = "llama", method: str = "klt", model: Any = None, **options: Any) -> Any:
    model = build(family) if model is None else model
    kvsink.rewrite(model, method, **{"key_bits": 4, "value_bits": 4, "calibration": ids, **options})
    return model


def test_a_compiled_graph_that_skips_a_stage_is_found(monkeypatch: Any) -> None:
    model = rewritten(protect="none")
    assert check_step(model, runtime_of(model), []) < 1e-5
    monkeypatch.setattr("kvsink.passes.attach._before_rope", lambda site, cos, sin: site.k_rope)
    with pytest.raises(UnsupportedError, match="self-check: a compiled step gives logits"):
        check_step(model, runtime_of(model), [])
