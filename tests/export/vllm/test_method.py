"""A layer of vLLM takes its pages in place of the attention it was made with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.export.vllm.plans import layer, planted

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/serving installs it")

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvsink.export.vllm.backend import KVSinkBackend, KVSinkImpl
from kvsink.export.vllm.method import KVSinkMethod
from kvsink.export.vllm.page import LayerPages
from kvsink.export.vllm.sinks import Sinks
from kvsink.model.runtime import runtime_of


def test_a_layer_is_given_its_backend() -> None:
    asked: list[int] = []

    def pages_of(made: Any, index: int) -> LayerPages:
        asked.append(index)
        return LayerPages(runtime_of(planted()), index, 0, 2, 256, 2, torch.float32, Sinks((), 1))

    made = layer(num_kv_heads=2, num_heads=4, head_size=16, kv_cache_dtype="auto")
    made.impl.scale = 0.5
    method = KVSinkMethod(SimpleNamespace(pages_of=pages_of))
    method.create_weights(made)
    method.process_weights_after_loading(made)
    assert asked == [2] and isinstance(made.impl, KVSinkImpl) and made.impl.scale == 0.5
    assert issubclass(made.attn_backend, KVSinkBackend) and made.backend is AttentionBackendEnum.CUSTOM
    assert made.attn_backend.slot_bytes == made.impl.pages.format.slot_bytes > 0
    assert not hasattr(made, "k_scale")
