"""Tiny random models, one per family of attention that transformers has: what the table of families is made with.

Shapes     2 to 4 layers, hidden 64, 4 query heads, mostly 2 key-value heads, head_dim 16, 97 tokens
Weights    drawn once per family from a fixed seed, with a spread large enough that attention is not uniform
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

__all__ = ["FAMILIES", "VOCAB", "build_family"]

VOCAB, WINDOW = 97, 8
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, **_SPECIAL,
}  # fmt: skip
_GQA: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2}
_HEAD: dict[str, Any] = {**_GQA, "head_dim": 16}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_SLIDES = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 128,
}  # fmt: skip
_MLA: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 2, "num_key_value_heads": 4,
}  # fmt: skip
_ENCDEC: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 128,
    "decoder_start_token_id": 2, "forced_eos_token_id": None, **_SPECIAL,
}  # fmt: skip


def _neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_SHAPE, rotary_pct=0.25))


def _falcon(**more: Any) -> nn.Module:
    shape = {k: v for k, v in _SHAPE.items() if k not in ("intermediate_size",)}
    return hf.FalconForCausalLM(hf.FalconConfig(**shape, **more))


FAMILIES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "llama": ("Llama", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_HEAD))),
    "llama3": ("Llama 3 (scaled RoPE)", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_HEAD, rope_parameters=_LLAMA3))),
    "llama-yarn": ("Llama (yarn)", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_HEAD, rope_parameters=_YARN))),
    "llama-dynamic": ("Llama (dynamic RoPE)", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_HEAD, rope_parameters=_DYNAMIC))),
    "llama-80": ("Llama, head_dim 80", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GQA, head_dim=80))),
    "llama-96": ("Llama, head_dim 96", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GQA, head_dim=96))),
    "mistral": ("Mistral", lambda: hf.MistralForCausalLM(hf.MistralConfig(**_HEAD, sliding_window=None))),
    "mistral-sliding": ("Mistral (sliding)", lambda: hf.MistralForCausalLM(hf.MistralConfig(**_HEAD, sliding_window=WINDOW))),
    "mixtral": ("Mixtral", lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_GQA, num_local_experts=4, num_experts_per_tok=2))),
    "qwen2": ("Qwen2", lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GQA))),
    "qwen2-moe": ("Qwen2-MoE", lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**_GQA, **_MOE, shared_expert_intermediate_size=48))),
    "qwen3": ("Qwen3", lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_HEAD))),
    "qwen3-moe": ("Qwen3-MoE", lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_HEAD, **_MOE))),
    "qwen3-next": ("Qwen3-Next (linear attention)", lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(**_HEAD, **_MOE, **_LINEAR, shared_expert_intermediate_size=48))),
    "phi": ("Phi", lambda: hf.PhiForCausalLM(hf.PhiConfig(**_SHAPE, partial_rotary_factor=0.5))),
    "phi3": ("Phi-3", lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GQA))),
    "phi3-longrope": ("Phi-3 (longrope)", lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(**_GQA, rope_parameters=_LONGROPE, original_max_position_embeddings=128))),
    "gemma": ("Gemma", lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_HEAD))),
    "gemma2": ("Gemma 2 (softcap, sliding)", lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**_HEAD, **_SLIDES, query_pre_attn_scalar=16, attn_logit_softcapping=5.0))),
    "gemma3": ("Gemma 3 (sliding)", lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_HEAD, **_SLIDES, query_pre_attn_scalar=16))),
    "gpt2": ("GPT-2", lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_positions=256, n_embd=64, n_layer=2, n_head=4, **_SPECIAL))),
    "gpt-neox": ("GPT-NeoX (partial RoPE)", _neox),
    "falcon-mqa": ("Falcon (MQA)", lambda: _falcon(multi_query=True, alibi=False, new_decoder_architecture=False)),
    "falcon-alibi": ("Falcon (ALiBi)", lambda: _falcon(
        multi_query=False, alibi=True, new_decoder_architecture=False, parallel_attn=False)),
    "bloom": ("BLOOM (ALiBi)", lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, **_SPECIAL))),
    "mpt": ("MPT (ALiBi)", lambda: hf.MptForCausalLM(
        hf.MptConfig(vocab_size=VOCAB, d_model=64, n_layers=2, n_heads=4, max_seq_len=256, expansion_ratio=2,
                     use_cache=True, **_SPECIAL))),
    "opt": ("OPT (learned positions)", lambda: hf.OPTForCausalLM(
        hf.OPTConfig(vocab_size=VOCAB, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
                     word_embed_proj_dim=64, max_position_embeddings=256, **_SPECIAL))),
    "stablelm": ("StableLM", lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**_GQA))),
    "olmo": ("OLMo", lambda: hf.OlmoForCausalLM(hf.OlmoConfig(**_GQA))),
    "olmo2": ("OLMo 2", lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_GQA))),
    "cohere": ("Cohere (interleaved RoPE)", lambda: hf.CohereForCausalLM(hf.CohereConfig(**_GQA))),
    "granite": ("Granite", lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**_GQA))),
    "gpt-oss": ("gpt-oss (learned sinks, sliding)", lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**{**_HEAD, "max_position_embeddings": 256}, **_SLIDES, num_local_experts=4, num_experts_per_tok=2))),
    "deepseek-v2": ("DeepSeek-V2 (MLA)", lambda: hf.DeepseekV2ForCausalLM(
        hf.DeepseekV2Config(**_SHAPE, **_MLA, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2))),
    "deepseek-v3": ("DeepSeek-V3 (MLA)", lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(**_SHAPE, **_MLA, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2))),
    "bamba": ("Bamba (Mamba 2 hybrid)", lambda: hf.BambaForCausalLM(
        hf.BambaConfig(**_GQA, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_expand=2,
                       mamba_n_groups=1, mamba_chunk_size=16))),
    "smollm3": ("SmolLM3 (NoPE layers)", lambda: hf.SmolLM3ForCausalLM(
        hf.SmolLM3Config(**_GQA, no_rope_layers=[1, 0]))),
    "starcoder2": ("StarCoder2", lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**_GQA, sliding_window=None))),
    "t5": ("T5 (encoder-decoder)", lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0,
                    pad_token_id=0, eos_token_id=2))),
    "bart": ("BART (encoder-decoder)", lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_ENCDEC))),
}  # fmt: skip


def build_family(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """One tiny model, frozen and in evaluation mode, with the attention that transformers chooses for it."""
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, family)))
        model = FAMILIES[family][1]()
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.data += 0.1 * torch.randn_like(weight)  # biases and norms that are not trivially 0 and 1
            elif any(part in name for part in ("proj", "c_attn", "query_key_value", "Wqkv", "dense", "out_")):
                weight.data.normal_(std=0.15)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "batched_mm"  # one that takes float64 and can be traced
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]  # every row runs to its full length
    return model.to(dtype).eval().requires_grad_(False)
