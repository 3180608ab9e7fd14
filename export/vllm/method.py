"""What vLLM calls for an attention layer that a plan codes: its pages in place of a 16-bit cache.

Source     vLLM's `BaseKVCacheMethod`, whose `create_weights` is the last step of making a layer
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvsink.export.vllm.backend import KVSinkImpl, backend_of

if TYPE_CHECKING:
    from kvsink.export.vllm.config import KVSinkConfig

__all__ = ["KVSinkMethod"]


class KVSinkMethod(BaseKVCacheMethod):
    """Gives a layer its pages; there are no scales to load."""

    quant_config: KVSinkConfig

    def create_weights(self, layer: Any) -> None:
        pages = self.quant_config.pages_of(layer, extract_layer_index(layer.layer_name))
        layer.impl, layer.attn_backend, layer.backend = KVSinkImpl(layer, pages), backend_of(pages), AttentionBackendEnum.CUSTOM

    def process_weights_after_loading(self, layer: Any) -> None:
        """Nothing: tables are those of the folder."""
