"""The attention backend that vLLM calls: what a page is to it, what a step is to our layers.

Source     vLLM's interface of 0.30 and later (`customize_spec`, caches as [blocks, heads, tokens, C])
Shapes     as `kvsink.export.vllm.page`
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionImpl, AttentionMetadataBuilder, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from kvsink.errors import UnsupportedError
from kvsink.export.vllm.page import LayerPages, Step
from kvsink.export.vllm.tiles import TilePages, TileStep, graphs_at_once, tile_step
from kvsink.kernels.pages import PAGE, Batch

__all__ = ["KVSinkBackend", "KVSinkBuilder", "KVSinkImpl", "backend_of"]


class KVSinkBackend(AttentionBackend):
    """Packed pages. A layer has a subclass of its own, made by `backend_of`, which knows the bytes of its pages."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar = ["auto", "float16", "bfloat16"]
    slot_bytes: ClassVar[int] = 0

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KVSinkImpl]:
        return KVSinkImpl

    @staticmethod
    def get_builder_cls() -> type[KVSinkBuilder]:
        return KVSinkBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(PAGE)]

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        return __name__, KVSinkBackend.__qualname__  # layers share the metadata of a step

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # a page of one head is one run of bytes

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if spec.state_content_bytes is not None:
            return spec
        if spec.block_size != PAGE:
            raise UnsupportedError(f"kvsink in vLLM: --block-size {spec.block_size} is not the page of {PAGE} tokens")
        return replace(spec, dtype=torch.uint8, state_content_bytes=cls.slot_bytes)


def backend_of(pages: LayerPages | TilePages) -> type[KVSinkBackend]:
    """The backend of one layer."""
    return type("KVSinkBackendOfLayer", (KVSinkBackend,), {"slot_bytes": pages.format.slot_bytes, "__module__": __name__})


class KVSinkBuilder(AttentionMetadataBuilder[Any]):
    """The rows of a step, as the scheduler puts them together."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if device.type == "cuda":
            self._init_reorder_batch_threshold(1)  # sequences with one new row come first
            graphs_at_once(device, 16 + 2 * len(vllm_config.compilation_config.cudagraph_capture_sizes or ()))

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        on_gpu = current_platform.device_type == "cuda"
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if on_gpu else AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step | TileStep:
        c = common_attn_metadata
        starts = c.query_start_loc_cpu.tolist()
        slots = c.slot_mapping[: starts[-1]].to(torch.int64)
        if self.device.type == "cuda":
            return tile_step(starts, c.seq_lens_cpu_upper_bound, c.seq_lens, slots, c.block_table_tensor)
        return Step(slots, Batch(starts, c.seq_lens[: len(starts) - 1].tolist(), c.block_table_tensor))


class KVSinkImpl(AttentionImpl[Any]):
    """Attention of one layer of vLLM's model over its pages, in place of the one that the layer was made with."""

    def __init__(self, layer: Any, pages: LayerPages | TilePages) -> None:
        self.num_heads, self.num_kv_heads, self.head_size = layer.num_heads, layer.num_kv_heads, layer.head_size
        self.scale, self.kv_cache_dtype, self.pages = layer.impl.scale, layer.kv_cache_dtype, pages

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None or kv_cache.numel() == 0:  # the engine measures how much memory a step takes
            return output.zero_()
        n = attn_metadata.rows
        self.pages.step(query[:n], key[:n], value[:n], kv_cache, attn_metadata, self.scale, output[:n])
        return output
