"""What vLLM is told of a page, and what a step of its scheduler becomes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvsink.errors import UnsupportedError
from tests.export.vllm.plans import layer, planted

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/serving installs it")

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from kvsink.export.vllm.backend import KVSinkBackend, KVSinkBuilder, KVSinkImpl, backend_of
from kvsink.export.vllm.page import LayerPages
from kvsink.export.vllm.sinks import Sinks
from kvsink.kernels.pages import PAGE
from kvsink.model.runtime import runtime_of


def spec(block: int) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block, num_kv_heads=2, head_size=16, dtype=torch.float32)


def pages(method: str = "klt") -> LayerPages:
    return LayerPages(runtime_of(planted(method)), 0, 0, 2, 256, 2, torch.float32, Sinks((), 1))


def test_a_page_has_the_bytes_of_its_parts() -> None:
    made, other = backend_of(pages()), backend_of(pages("rtn"))
    packed = made.customize_spec(spec(PAGE))
    assert packed.page_size_bytes == 2 * PAGE * made.slot_bytes < spec(PAGE).page_size_bytes and packed.dtype == torch.uint8
    assert made.customize_spec(packed) is packed and other.slot_bytes != made.slot_bytes
    assert made.full_cls_name() == other.full_cls_name() and made.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,)
    assert AttentionBackendEnum[made.get_name()] is AttentionBackendEnum.CUSTOM
    with pytest.raises(UnsupportedError, match="--block-size 16 is not the page of 128 tokens"):
        made.customize_spec(spec(16))


def test_a_step_leaves_padding_out() -> None:
    builder = KVSinkBuilder(spec(PAGE), ["a"], SimpleNamespace(), torch.device("cpu"))
    step = builder.build(
        0,
        SimpleNamespace(
            query_start_loc_cpu=torch.tensor([0, 1, 4]),
            seq_lens=torch.tensor([130, 3, 0]),
            block_table_tensor=torch.tensor([[3, 1], [2, 0]], dtype=torch.int32),
            slot_mapping=torch.tensor([129, 256, 257, 258, -1, -1]),
        ),
    )
    assert step.slots.tolist() == [129, 256, 257, 258] and step.batch.positions.tolist() == [129, 0, 1, 2]
    assert step.batch.jobs.tolist() == [[0, 1, 130, 0], [1, 3, 1, 1]]


def test_a_step_that_only_measures_memory_gives_zeros() -> None:
    made = layer(num_kv_heads=2, num_heads=4, head_size=16, kv_cache_dtype="auto")
    made.impl.scale = 0.5
    out, none = torch.full((3, 4, 16), 7.0), torch.empty(0)
    rows = torch.zeros(3, 4, 16)
    KVSinkImpl(made, pages()).forward(made, rows, rows[:, :2], rows[:, :2], none, None, out)
    assert not out.any()
    assert KVSinkBackend.get_impl_cls() is KVSinkImpl and KVSinkBackend.get_builder_cls() is KVSinkBuilder
