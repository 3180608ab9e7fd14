"""Rewritten folders in vLLM: `vllm serve OUT_DIR` with packed pages, as a plugin that vLLM finds by its entry point.

Needs      vllm 0.30 or later, of which 0.32 has run on a processor and 0.33 on a GPU; without it this package is never imported
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Tell a process of vLLM of the quantization "kvsink" and of the attention that goes with it."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvsink.export.vllm.config import KVSinkConfig

    register_quantization_config("kvsink")(KVSinkConfig)
    register_backend(AttentionBackendEnum.CUSTOM, "kvsink.export.vllm.backend.KVSinkBackend")
