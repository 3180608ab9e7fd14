"""Attention that somebody looks at, and models where nobody can."""

from __future__ import annotations

import pytest

import kvsink
from kvsink.errors import UnsupportedError
from tests.models import build


def test_attention_that_cannot_be_observed_is_refused() -> None:
    capped = build("gemma2")
    with pytest.raises(UnsupportedError, match="caps its attention logits.*protect without anchors"):
        kvsink.rewrite(capped, "rtn", protect="anchors:1%")
    assert capped.config._attn_implementation == "eager" and "_kvsink_runtime" not in vars(capped)
