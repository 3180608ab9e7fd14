"""Tiny random models, one per family of attention that transformers has: what the table of families is made with.

Shapes     2 to 4 layers, hidden 64, 4 query heads, mostly 2 key-value heads, head_dim 16, 97 tokens
Weights    drawn once per family from a fixed seed, with a spread large enough that attention is not uniform
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import nn

from kvsink.tools.tiny_configs import VOCAB, class_names, model_class, tiny_config

__all__ = ["FAMILIES", "VOCAB", "build_family"]

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 128,
}
_ENCDEC: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA4 = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {  # title, the family it is a variant of, what it sets
    "llama3": ("Llama 3 (scaled RoPE)", "llama", {"rope_parameters": _LLAMA3}),
    "llama-yarn": ("Llama (yarn)", "llama", {"rope_parameters": _YARN}),
    "llama-dynamic": ("Llama (dynamic RoPE)", "llama", {"rope_parameters": _DYNAMIC}),
    "llama-80": ("Llama, head_dim 80", "llama", {"head_dim": 80}),
    "llama-96": ("Llama, head_dim 96", "llama", {"head_dim": 96}),
    "mistral": ("Mistral", "mistral", {"sliding_window": None}),
    "mistral-sliding": ("Mistral (sliding)", "mistral", {}),
    "phi3-longrope": ("Phi-3 (longrope)", "phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 128}),
    "falcon-mqa": ("Falcon (MQA)", "falcon", {"multi_query": True, "alibi": False, "new_decoder_architecture": False}),
    "falcon-alibi": (
        "Falcon (ALiBi)",
        "falcon",
        {"multi_query": False, "num_kv_heads": 4, "alibi": True, "new_decoder_architecture": False, "parallel_attn": False},
    ),
    "smollm3": ("SmolLM3 (NoPE layers)", "smollm3", {"no_rope_layers": [1, 0]}),
    "starcoder2": ("StarCoder2", "starcoder2", {"sliding_window": None}),
    "bamba": ("Bamba (Mamba 2 hybrid)", "bamba", {}),
    "gemma4-shared": ("Gemma 4 (shared KV)", "gemma4", {**_GEMMA4, "num_kv_shared_layers": 2}),
    "gemma4-keys": ("Gemma 4 (keys as values)", "gemma4", {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
}
_CLASSES = class_names()


def _tiny(family: str, **more: Any) -> nn.Module:
    kind, name = _CLASSES[family]
    return model_class(name)(tiny_config(kind, name, **more))


def _families() -> dict[str, tuple[str, Callable[[], nn.Module]]]:
    out: dict[str, tuple[str, Callable[[], nn.Module]]] = {f: (name, partial(_tiny, f)) for f, (_, name) in _CLASSES.items()}
    known = ((f, v) for f, v in _VARIANTS.items() if v[1] in _CLASSES)
    out |= {f: (title, partial(_tiny, base, **more)) for f, (title, base, more) in known}
    out["t5"] = (
        "T5 (encoder-decoder)",
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=VOCAB,
                d_model=64,
                d_kv=16,
                d_ff=96,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=2,
            )
        ),
    )
    out["bart-decoder"] = out.pop("bart")
    out["bart"] = "BART (encoder-decoder)", lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_ENCDEC))
    return dict(sorted(out.items()))


FAMILIES = _families()
"""Title and builder of every family; the title of a class that needs no other is its name."""


_SPREAD = (
    "proj",
    "c_attn",
    "query",
    "key",
    "value",
    "Wqkv",
    "Wq",
    "Wk",
    "Wv",
    "Wo",
    "Wi",
    "dense",
    "out_",
    "map_inputs",
    "embeddings.word",
    "input_linear",
    "output_linear",
)
"""Parts of the names of weights whose own spread is so small that attention would be uniform."""


def build_family(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One tiny model, frozen and in evaluation mode, with the attention that transformers chooses for it."""
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, family)))
        model = FAMILIES[family][1]()
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.data += 0.1 * torch.randn_like(weight)  # biases and norms that are not trivially 0 and 1
            elif any(part in name for part in _SPREAD):
                weight.data.normal_(std=0.15)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "batched_mm"  # one that takes float64 and can be traced
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]  # every row runs to its full length
    return model.to(dtype).eval().requires_grad_(False)
