"""The way into transformers: a quantizer for folders made by kvsink-rewrite, and a cache for `generate()`.

`import kvsink` registers both. `AutoModelForCausalLM.from_pretrained(out_dir)` then reads the sidecar, checks that it belongs to
the weights just loaded, and attaches the runtime. `generate()` makes its own KVSinkCache unless the caller brings a cache.

Differs    `_prepare_cache_for_generation` is private to transformers; `tests/rewriter/test_hf.py` names it and its
           replacement, which is to pass past_key_values=kvsink.KVSinkCache.for_model(...) to generate()
"""

from __future__ import annotations

import inspect
import os
import types
from typing import Any

from torch import nn
from transformers import CompileConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from kvsink.attention import install_attention
from kvsink.cache import KVSinkCache
from kvsink.errors import SidecarError
from kvsink.runtime import attach
from kvsink.sidecar import SIDECAR_JSON, SIDECAR_TENSORS, read_sidecar

__all__ = ["KvsinkConfig", "KvsinkQuantizer", "install_generate"]


@register_quantization_config("kvsink")
class KvsinkConfig(QuantizationConfigMixin):
    """`quantization_config` of a rewritten folder: the method and the counted bits; the plan is in the sidecar."""

    def __init__(self, method: str = "klt", bits: float = 16.0, format: int = 1, **kwargs: Any) -> None:
        self.quant_method = "kvsink"
        self.method, self.bits, self.format = method, bits, format


@register_quantizer("kvsink")
class KvsinkQuantizer(HfQuantizer):
    """Leaves the weights alone and attaches the packed cache after they are loaded."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        folder = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
        attach(model, read_sidecar(model, _sidecar_path(folder, SIDECAR_JSON), _sidecar_path(folder, SIDECAR_TENSORS)))
        install_generate(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _sidecar_path(folder: str, name: str) -> str:
    if os.path.isdir(folder):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise SidecarError(f"{folder} says it is a kvsink model but {name} is missing; run kvsink-rewrite again")
        return path
    try:
        found = cached_file(folder, name)
    except (OSError, ValueError) as error:
        raise SidecarError(f"{folder!r} says it is a kvsink model but {name} cannot be had ({error})") from error
    assert found is not None
    return str(found)


def install_generate(model: nn.Module) -> None:
    """Make `generate()` use a packed cache, compiled on CUDA. Safe to call again."""
    install_attention()
    if "_prepare_cache_for_generation" not in vars(model) and hasattr(model, "_prepare_cache_for_generation"):
        model._prepare_cache_for_generation = types.MethodType(_prepare_cache, model)  # type: ignore[assignment]
    config = getattr(model, "generation_config", None)
    if config is not None and next(model.parameters()).device.type == "cuda" and config.compile_config is None:
        config.compile_config = CompileConfig(backend="kvsink", fullgraph=True, mode="reduce-overhead")


def _prepare_cache(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
    max_cache_length: int, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Put a KVSinkCache into model_kwargs where transformers would make its own dynamic cache, then go on as it does."""
    name = "cache" if "cache" in inspect.signature(type(self).forward).parameters else "past_key_values"  # since 5.24, before
    free = (
        model_kwargs.get(name) is None
        and generation_config.use_cache is not False
        and generation_config.cache_implementation in (None, "hybrid", "static")
        and getattr(self, "_kvsink_runtime", None) is not None
    )
    if free:
        generation_config.cache_implementation = None
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        compiling = getattr(generation_config, "compile_config", None) is not None
        if compiling or self.device.type == "cuda":
            # whole blocks, so that two prompts of nearly the same length share one compiled graph
            max_cache_length = -(-max_cache_length // 256) * 256
            model_kwargs[name] = KVSinkCache.for_model(self, rows, max_cache_length)
        else:
            model_kwargs[name] = KVSinkCache.for_model(self)
    original = type(self)._prepare_cache_for_generation
    result = original(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
    )
    cache = model_kwargs.get(name)
    if free and isinstance(cache, KVSinkCache):
        cache._is_user_defined = False
    return result
