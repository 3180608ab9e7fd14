"""Tiny random models built in memory: every attention spelling the passes must know, in milliseconds on a CPU.

Shapes     2 layers, hidden 64, 4 query heads, 2 key-value heads (GPT-2 and the encoders: 4), head_dim 16, 97 tokens
Weights    drawn once per family from a fixed seed, with a spread large enough that attention is not uniform
Families   `FAMILIES` have sites to rewrite; `LEFT_ALONE` have sites that must be declined, each for its own reason
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, WINDOW, MAX_LENGTH = 97, 64, 2, 4, 2, 16, 8, 64

_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GEMMA = {"query_pre_attn_scalar": HEAD_DIM, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_ENCODER = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}

_BUILD: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER)),
    "llama-24": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**{**_DECODER, "head_dim": 24})),  # of a Hadamard that is not symmetric
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_DECODER, sliding_window=None)),
    "mistral-sliding": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_DECODER, sliding_window=WINDOW)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_DECODER)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_DECODER, partial_rotary_factor=0.5)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_DECODER, **_GEMMA)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCAB, n_positions=128, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, bos_token_id=1, eos_token_id=2
        )
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_DECODER, **_MOE)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_DECODER, **_GEMMA, attn_logit_softcapping=5.0)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**_DECODER)),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    ),
    "clip-vision": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**_ENCODER, image_size=16, patch_size=8)),
}

FAMILIES: tuple[str, ...] = ("llama", "mistral", "mistral-sliding", "qwen2", "qwen3", "phi3", "gemma3", "gpt2", "qwen3-moe")
LEFT_ALONE: tuple[str, ...] = ("gemma2", "cohere", "bart", "clip-vision")
EAGER_ONLY: tuple[str, ...] = ("gemma2",)


def build(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """One tiny model of `family` with attention "sdpa" or "eager", frozen and in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, family)))
        model = _BUILD[family]()
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.data += 0.1 * torch.randn_like(weight)  # biases and norms that are not trivially 0 and 1
            elif "proj" in name or "c_attn" in name:
                weight.data.normal_(std=0.15)
    model.set_attn_implementation("eager" if family in EAGER_ONLY else attention)
    return model.to(dtype).eval().requires_grad_(False)


def tokens(batch: int = 1, length: int = 5, seed: int = 0) -> torch.Tensor:
    """Token ids [B, S] that avoid the special tokens 0, 1 and 2."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def stock_cache(kind: str, model: Any) -> Any:
    """A stock cache for `model`: kind is "none", "dynamic" or "static"."""
    match kind:
        case "none":
            return None
        case "dynamic":
            return hf.DynamicCache(config=model.config)
        case "static":
            return hf.StaticCache(config=model.config, max_cache_len=MAX_LENGTH)
    raise ValueError(f"no stock cache is called {kind!r}")
