"""A model is given its runtime and hooks, and rid of them, whole."""

from __future__ import annotations

from typing import Any

import pytest

from kvsink.errors import UnsupportedError
from kvsink.model.runtime import attach, detach, runtime_of
from tests.graphs import rewritten
from tests.models import build


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("protect", ["none", "first:2+massive:3", "anchors:10%"])
def test_a_model_has_one_set_of_hooks_or_none(protect: str) -> None:
    model, attention = rewritten("llama", "sdpa", "rtn", protect=protect), build("llama").config._attn_implementation
    runtime, count = runtime_of(model), hooks(model)
    attach(model, runtime)
    assert hooks(model) == count > 0 and runtime_of(model) is runtime
    detach(model)
    detach(model)
    assert hooks(model) == 0 and model.config._attn_implementation == attention
    assert not any(name.startswith("_kvsink") for m in model.modules() for name in vars(m))
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM is not rewritten; call kvsink\.rewrite"):
        runtime_of(model)
