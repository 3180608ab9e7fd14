"""Tiny configurations of every decoder that transformers can build: its defaults, made small by the names of their fields.

Shapes     hidden 64, 4 query heads, 2 key-value heads, head_dim 16, windows of 8, 97 tokens; one layer of every kind that the
           defaults mix, at least 2, at most 5
Experts    4, all of them chosen, so that rounding never changes which
Rope       as the defaults have it, scaling included
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

__all__ = ["VOCAB", "WINDOW", "class_names", "shrink", "tiny_config"]

VOCAB, WINDOW = 97, 8

_RULES: dict[str, Any] = {
    r"type_vocab_size|task_type_vocab_size": 2,
    r"(\w+_)?vocab_size(_\w+)?": VOCAB,
    r"(pronunciation|shape)_embed_dim|hidden_size_per_layer_input|laurel_rank|d_rel|\w*gate_rank|gated_norm_rank": 16,
    r"hidden_size|d_model|n_embd|embed_dim|embedding_size|word_embed_proj_dim|hidden_dim|dim_model|dim|emb_dim": 64,
    r"(moe|expert|shared_experts?)_\w*(intermediate|ffn_hidden)_size|intermediate_size_mlp|ffn_hidden_size": 48,
    r"\w*intermediate_size|\w*ffn_dim|n_inner|dff|dim_ff|d_ff": 96,
    r"(swa_)?num_attention_heads|n_heads?|num_heads|(num_)?((en|de)coder_)?attention_heads": 4,
    r"(swa_)?num_key_value_heads|num_kv_heads": 2,
    r"(swa_)?(v_)?head_dim|d_kv|kv_channels|dim_head|attention_head_dim|qk_nope_head_dim|index_head_dim|d_head": 16,
    r"\w*max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_sequence_length": 256,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|top_k_experts|moe_topk|moe_k|moe_top_k": 4,
    r"n_group|topk_group|num_expert_group|o_groups": 1,
    r"sliding_window(_size)?|window_size|local_attention|attention_chunk_size|attention_window_size": WINDOW,
    r"q_lora_rank|o_lora_rank": 32,
    r"kv_lora_rank": 16,
    r"qk_rope_head_dim|rotary_dim": 8,
    r"index_n_heads": 4,
    r"linear_num_value_heads|linear_num_heads": 4,
    r"linear_num_key_heads": 2,
    r"linear_(key_|value_)?head_dim": 16,
    r"mamba_n_heads|mamba_num_heads|n_mamba_heads": 8,
    r"(mamba_)?d_state|mamba_d_state|mamba_d_head|mamba_head_dim|ssm_state_size|state_size|(mamba_)?chunk_size": 16,
    r"mamba_d_ssm|lru_width": 128,
    r"mamba_n_groups|n_groups|mamba_ngroups": 1,
    r"first_k_dense_replace": 1,
    r"num_nextn_predict_layers|num_mtp_layers": 0,
    r"out_hidden_size|text_hidden_size|adapter_(in|out)_dim|adapter_input_size|codebook_dim|output_proj_dims": 64,
    r"image_size": 16,
    r"patch_size": 8,
    r"depth": 2,
    r"attention_multiplier": 0.25,
    r"is_decoder|use_cache": True,
    r"query_pre_attn_scalar": 16,
    r"use_mamba_kernels": False,
    r"pad_token_id": 0,
    r"bos_token_id": 1,
    r"eos_token_id": 2,
    r"image_token_(id|index)|video_token_(id|index)|\w+_token_(id|index)": 2,
}
_RULE = [(re.compile(pattern), value) for pattern, value in _RULES.items()]
_ALWAYS = (
    "num_key_value_heads",
    "head_dim",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers", "decoder_layers", "encoder_layers")
_MIXED = ["sliding_attention", "full_attention"]
_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_OVERRIDES: dict[str, dict[str, Any]] = {  # by the name of the configuration class: what its fields do not tell by their names
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {"encoder_hash_byte_group_vocab": VOCAB},
    "CohereCompassTextConfig": {"layer_types": _MIXED, "rope_parameters": {"sliding_attention": _AXES, "full_attention": None}},
    "DbrxAttentionConfig": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "DoryConfig": {"layer_types": _MIXED * 2, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 4},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [48, 48], "rope_parameters": {**_AXES, "mrope_section": [3, 3, 2]}},
    "Gemma2Config": {"attn_logit_softcapping": 5.0},
    "Gemma3nTextConfig": {
        "layer_types": _MIXED * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "Gemma4TextConfig": {"global_head_dim": 32},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 32},
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0},
    "Glm46VTextConfig": {"rope_parameters": _AXES},
    "Glm4vTextConfig": {"rope_parameters": _AXES},
    "Glm4vMoeTextConfig": {"rope_parameters": {**_AXES, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "GlmOcrTextConfig": {"rope_parameters": _AXES},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "LongcatFlashConfig": {"zero_expert_num": 2},
    "HunYuanVLTextConfig": {"rope_parameters": {**_AXES, "mrope_section": [2, 2, 2, 2]}},
    "Mamba2Config": {"num_heads": 8},
    "Mistral4Config": {"qk_nope_head_dim": 8},
    "Step3p7TextConfig": {"layer_types": _MIXED, "sliding_window": WINDOW},
    "PaddleOCRTextConfig": {"rope_parameters": _AXES},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 2},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 2},
    "Qwen2VLTextConfig": {"rope_parameters": _AXES},
    "Qwen2_5_VLTextConfig": {"rope_parameters": _AXES},
    "Qwen2_5OmniTextConfig": {"rope_parameters": _AXES},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "ReformerConfig": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 32, "num_key_value_heads": 4},
    "ZayaConfig": {"num_experts_per_tok": 1},
}


def class_names() -> dict[str, tuple[str, str]]:
    """The name of a family for every decoder class of transformers, each class once, with its model type and class name."""
    kinds: dict[str, list[str]] = {}
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for kind, name in names.items():
            if isinstance(name, str):
                kinds.setdefault(name, []).append(kind)
    out = {}
    for name, under in kinds.items():
        spelled = [k for k in under if name.lower().startswith(re.sub("[^a-z0-9]", "", k))]
        kind = (spelled or under)[0]
        seeing = name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or "Conditional" in name
        family = kind.replace("_", "-").removesuffix("-text").removesuffix("-vl")
        out[f"{family}-vl" if seeing else family] = kind, name
    return out


def tiny_config(model_type: str, class_name: str, **more: Any) -> PreTrainedConfig:
    """A tiny configuration for a class, `more` fields of its text part set. Raises whatever transformers raises where its
    defaults cannot be made small."""
    return shrink(getattr(model_class(class_name), "config_class", None) or CONFIG_MAPPING[model_type], **more)


def shrink(kind: type[PreTrainedConfig], given: PreTrainedConfig | None = None, **more: Any) -> PreTrainedConfig:
    """A tiny configuration of a class, from its defaults or from `given`, with `more` fields set."""
    own = {**_OVERRIDES.get(kind.__name__, {}), **more}
    whole = given if given is not None else kind()
    values, names = vars(whole), _parameters(kind)
    count = next((int(values[n]) for n in _COUNTS if n in names and isinstance(values.get(n), int)), 0)
    by_layer = {n: v for n, v in values.items() if n in names and isinstance(v, list | tuple) and count and len(v) == count}
    layers = _layers(by_layer, count)
    small: dict[str, Any] = {}
    for name in names:
        value = values[name] if name in values else _renamed(whole, name)
        if isinstance(value, PreTrainedConfig):
            small[name] = shrink(type(value), value)
        elif name in by_layer:
            small[name] = [value[i] for i in layers]
        elif name in _COUNTS:
            small[name] = len(layers)
        elif (rule := _rule(name)) is not None and (value is not None or name in _ALWAYS):
            small[name] = [rule] * len(value) if isinstance(value, list | tuple) else rule
        elif "rope" in name and isinstance(value, dict):
            small[name] = {k: _sections(v, values) if k == "mrope_section" else v for k, v in value.items()}
    if values.get("kv_lora_rank") is not None:  # multi-head latent attention: one latent serves all heads
        small |= {"num_key_value_heads": 4} if "num_key_value_heads" in names else {}
        small |= {"head_dim": 8} if "head_dim" in names else {}
    kinds = next((own[n] for n in ("layer_types", "layers_block_type") if n in own), None)
    if kinds is not None:
        small |= {n: len(kinds) for n in _COUNTS if n in names}
    return kind(**{**small, **own})


def _renamed(whole: PreTrainedConfig, name: str) -> Any:
    """A field that is kept under another name, or None where it differs by layer."""
    return getattr(whole, type(whole).attribute_map[name], None) if name in type(whole).attribute_map else None


def _sections(sections: list[int], values: dict[str, Any]) -> list[int]:
    """The shares of several axes of positions in a head of 16 channels."""
    head = values.get("qk_rope_head_dim") or values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    total = sum(sections) * (8 if values.get("qk_rope_head_dim") else 16) // head
    rest = [s * total // sum(sections) for s in sections[1:]]
    return [total - sum(rest), *rest]


def _rule(name: str) -> Any:
    return next((value for pattern, value in _RULE if pattern.fullmatch(name)), None)


def _parameters(kind: type[PreTrainedConfig]) -> set[str]:
    names = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    return names | {n for n in inspect.signature(kind.__init__).parameters if n not in ("self", "kwargs", "args")}


def _layers(by_layer: dict[str, Any], count: int) -> list[int]:
    """Which layers of the defaults are kept: the first of every kind, full attention last."""
    kinds: dict[str, int] = {}
    for i in range(count):
        kinds.setdefault(str([v[i] for n, v in by_layer.items() if isinstance(v[i], str | int | bool)]), i)
    chosen = list(kinds.values())[:5]
    chosen += [i for i in range(min(count, 2)) if i not in chosen][: max(0, 2 - len(chosen))]
    full = [i for i in sorted(chosen) if _is_full(by_layer, i)]
    return [i for i in sorted(chosen) if i not in full[-1:]] + full[-1:]


def _is_full(by_layer: dict[str, Any], layer: int) -> bool:
    return by_layer.get("layer_types", by_layer.get("layers_block_type", [""] * (layer + 1)))[layer] == "full_attention"


def model_class(name: str) -> Any:
    """A class of transformers by its name."""
    return getattr(importlib.import_module("transformers"), name)
