"""The way into transformers: a quantizer for folders made by kvsink-rewrite, and a cache for `generate()`.

`import kvsink` registers both. `AutoModelForCausalLM.from_pretrained(out_dir)` then reads the sidecar, checks that it belongs to
the weights just loaded, and attaches the runtime. `generate()` makes its own KVSinkCache unless the caller brings a cache.

Declines   `cache_implementation` "quantized", "offloaded…" and "paged", and continuous batching: those caches are transformers'
           own, so a rewritten model would silently run on them
Differs    `_prepare_cache_for_generation` is private to transformers; `tests/rewriter/test_hf.py` names it and its
           replacement, which is to pass cache=kvsink.KVSinkCache.for_model(...) to generate()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kvsink.cache.cache import KVSinkCache
from kvsink.cache.reuse import fixed_cache
from kvsink.errors import KvsinkError, SidecarError, UnsupportedError
from kvsink.folder.sidecar import SIDECAR_JSON, SIDECAR_TENSORS, read_sidecar
from kvsink.folder.snapshot import beside
from kvsink.model.adapters import check_prompts, watch
from kvsink.model.anatomy import rope_types
from kvsink.model.attention import install_attention
from kvsink.model.instead import instead
from kvsink.model.passing import cache_name
from kvsink.model.ranks import check_ranks, ranks_of, split
from kvsink.model.runtime import attach
from kvsink.saving import save_pretrained

__all__ = ["KvsinkConfig", "KvsinkQuantizer", "install_generate"]


@register_quantization_config("kvsink")
class KvsinkConfig(QuantizationConfigMixin):
    """`quantization_config` of a rewritten folder: the method and the counted bits; the plan is in the sidecar."""

    def __init__(self, method: str = "klt", bits: float = 16.0, format: int = 1, **kwargs: Any) -> None:
        self.quant_method = "kvsink"
        self.method, self.bits, self.format = method, bits, format


@register_quantizer("kvsink")
class KvsinkQuantizer(HfQuantizer):
    """Leaves the weights alone and attaches the packed cache after they are loaded. The model is not a quantized one then: its
    weights are plain, so that a Trainer takes it, `.half()` works, and `save_pretrained` writes the plan (see `kvsink.saving`)."""

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise UnsupportedError(
                "KvsinkConfig describes a folder that kvsink-rewrite has made; for another model run kvsink-rewrite, or call "
                "kvsink.rewrite(model)"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        self._weights, self._asked = [str(file) for file in checkpoint_files or ()], dict[str, Any]()
        adjust: Any = getattr(model, "adjust_generation_fn", None)

        def listen(*args: Any, **asked: Any) -> Any:  # transformers tells this method alone what was asked of the hub
            self._asked = {n: asked[n] for n in ("token", "proxies", "local_files_only") if n in asked}
            return adjust(*args, **asked)

        if adjust is not None:
            model.adjust_generation_fn = listen  # type: ignore[assignment]
        check_ranks(model)
        if ranks_of(model) > 1 and (files := self._here()):
            with torch.device("cpu"):
                split(model, read_sidecar(model, *files))
        return model

    def _here(self) -> list[str]:
        """Both files of the plan, where they need not be fetched."""
        try:
            return [beside(self._weights, name, {"local_files_only": True}) for name in (SIDECAR_JSON, SIDECAR_TENSORS)]
        except SidecarError:
            return []

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        vars(model).pop("adjust_generation_fn", None)
        files = [beside(self._weights, name, self._asked) for name in (SIDECAR_JSON, SIDECAR_TENSORS)]
        check_ranks(model)
        runtime = read_sidecar(model, *files)
        split(model, runtime)
        attach(model, runtime)
        install_generate(model)
        model.is_quantized = False  # type: ignore[assignment]
        settings: Any = model.config
        configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        for holder in (model, settings.get_text_config(decoder=True), *configs.values()):
            for name in ("hf_quantizer", "quantization_method", "quantization_config", "_is_quantized"):
                vars(holder).pop(name, None)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


_FIXED = ("static", "hybrid", "sliding_window", "hybrid_chunked")  # what transformers calls caches of a fixed length
_GROWING = ("dynamic", None)


def install_generate(model: nn.Module) -> None:
    """Make `generate()` use a packed cache, compiled on CUDA, refuse continuous batching, and let `save_pretrained` write the
    plan. Safe to call again."""
    install_attention()
    watch(model)
    ours: dict[str, Any] = {"_prepare_cache_for_generation": _prepare_cache, "init_continuous_batching": _continuous}
    settings: Any = getattr(model, "config", None)
    if getattr(settings, "model_type", "") == "falcon" and getattr(settings, "alibi", False):
        model.create_masks_for_generate = _flat_mask  # type: ignore[assignment]
    if hasattr(settings, "original_max_position_embeddings"):
        ours["prepare_inputs_for_generation"] = _kept
    instead(model, save_pretrained=save_pretrained, **ours)
    config = getattr(model, "generation_config", None)
    if _uncompilable(model) or config is None or config.compile_config is not None:
        return
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1  # transformers compiles no model that is offloaded
    if next(model.parameters()).device.type == "cuda" and not spread:
        config.compile_config = CompileConfig(backend="kvsink", fullgraph=True, mode="reduce-overhead")


def _prepare_cache(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Put a KVSinkCache into model_kwargs where transformers would make a cache of its own, then go on as it does."""
    name = cache_name(self)
    runtime, given = getattr(self, "_kvsink_runtime", None), model_kwargs.get(name)
    made: KVSinkCache | None = None
    if runtime is not None:
        check_prompts(getattr(self.prepare_inputs_for_generation, "__self__", None))  # a wrapper's, while it generates
    if runtime is not None and isinstance(given, KVSinkCache):
        _check_owner(self, given)
    elif runtime is not None and given is None and generation_config.use_cache is not False:
        made = model_kwargs[name] = _new_cache(self, generation_config, batch_size, max_cache_length)
        generation_config.cache_implementation = None
    original = type(self)._prepare_cache_for_generation
    result = original(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs)
    if made is not None:
        made._is_user_defined = False
        if getattr(generation_config, "is_assistant", False):
            made.activate_past_recording()  # its drafts are taken back, layers that are left alone included
    return result


def _new_cache(model: Any, config: Any, batch_size: int, max_length: int) -> KVSinkCache:
    """The packed cache that a call of `generate()` asks for. Raises UnsupportedError for a kind that is not packed."""
    asked = config.cache_implementation
    if asked not in _FIXED + _GROWING:
        raise UnsupportedError(
            f"cache_implementation={asked!r} is a cache of transformers' own, and {type(model).__name__} is rewritten to keep "
            f"{model._kvsink_runtime.method} codes; leave it out, or say 'static' or 'dynamic'"
        )
    compiling = getattr(config, "compile_config", None) is not None or model.device.type == "cuda"
    if reason := _uncompilable(model):
        if getattr(config, "compile_config", None) is not None:
            raise UnsupportedError(f"{type(model).__name__} cannot be compiled: {reason}; leave compile_config out")
        compiling, config.disable_compile = False, True
    if not compiling and asked in _GROWING:
        return KVSinkCache.for_model(model)
    rows = batch_size * max(config.num_beams or 1, config.num_return_sequences or 1)
    length = max(max_length, getattr(config, "max_cache_len", None) or 0)
    if compiling:  # whole blocks, so that two prompts of nearly the same length share one compiled graph
        length = -(-length // 256) * 256
    return (
        KVSinkCache.for_model(model, rows, length) if getattr(config, "is_assistant", False) else fixed_cache(model, rows, length)
    )


def _uncompilable(model: Any) -> str:
    """Why a decode step of a model cannot be one graph, or an empty string."""
    if "dynamic" in rope_types(model.config.get_text_config(decoder=True)):
        return "rope type dynamic computes its angles anew, outside the graph, whenever the length grows"
    if (ranks := getattr(model, "_tp_size", None) or 1) > 1:
        return f"its weights are split over {ranks} processes, which speak to each other within a step"
    return ""


def _check_owner(model: Any, cache: KVSinkCache) -> None:
    """Raise KvsinkError when a cache was made for another model, or for this one before it was rewritten again."""
    ours, theirs = model._kvsink_runtime, cache.shared.runtime
    if theirs is ours or (
        theirs.plans == ours.plans
        and theirs.tables.keys() == ours.tables.keys()
        and all(torch.equal(t, theirs.tables[n].to(t.device)) for n, t in ours.tables.items())
    ):
        return
    raise KvsinkError(
        f"this cache was made for another model than {type(model).__name__}, or before it was rewritten; make one with "
        "kvsink.KVSinkCache.for_model(model)"
    )


def _flat_mask(
    config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Any = None, **kwargs: Any
) -> Tensor | None:
    """In place of transformers' 4-D mask over a cache of a fixed length, for a forward that computes its ALiBi from a 2-D one:
    int64 [B, slots], 0 at padding and at slots that hold nothing yet."""
    cache = kwargs.get("past_key_values") if cache is None else cache
    if attention_mask is not None and attention_mask.dim() != 2:
        return attention_mask
    slots, (batch, new) = cache.get_max_length(), inputs_embeds.shape[:2]
    if attention_mask is not None:
        return nn.functional.pad(attention_mask, (0, max(0, slots - attention_mask.shape[1])))
    held = torch.arange(slots, device=inputs_embeds.device) < cache.get_seq_length() + new
    return held.to(torch.int64).expand(batch, -1)


def _kept(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of `prepare_inputs_for_generation` of a model that throws its cache away where its angles change (longrope): the
    packed one is given back, empty, and takes the rows anew; transformers would go on with a stock one."""
    inputs = type(self).prepare_inputs_for_generation(self, *args, **kwargs)
    for name in ("cache", "past_key_values"):
        held = kwargs.get(name)
        if isinstance(held, KVSinkCache) and inputs.get(name) is None:
            held.reset()
            inputs[name] = held
    return inputs


def _continuous(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of `init_continuous_batching`, which every way to transformers' continuous batching goes through."""
    if getattr(self, "_kvsink_runtime", None) is None:
        return type(self).init_continuous_batching(self, *args, **kwargs)
    raise UnsupportedError(
        "continuous batching (generate_batch, cache_implementation='paged') keeps keys and values in transformers' own 16-bit "
        "pages, which hold no packed rows; serve the folder with vLLM (docs/serving.md), let rows join and leave one cache with "
        "KVSinkCache.batch_join and batch_select_indices, or load the model without its rewrite"
    )
