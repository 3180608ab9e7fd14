"""Tiny decoders with a massive activation planted in one feed-forward part: where it is, is known.

The trigger token alone has a large entry in channel MARK; one neuron of one part reads it and writes OUT. In blocks behind,
the norm leaves of that token little but OUT, which the attention may be made to look for (`sinks=True`).
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from kvsink.model.anatomy import anatomy
from kvsink.profiling.layout import Layout, find_layout

TRIGGER, MARK, OUT, CONSTANT = 5, 0, 7, 3
LAYERS, EXPERTS = 4, 8
_BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROUTED = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA = {
    **_BASE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 8,
}
_MAKE = {
    "llama": lambda **other: hf.LlamaForCausalLM(hf.LlamaConfig(**_BASE | other)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_BASE, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=None)
    ),
    "qwen2-moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**_BASE, **_ROUTED, shared_expert_intermediate_size=32, decoder_sparse_step=1)
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_BASE, **_ROUTED)),
    "olmoe": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**_BASE, num_experts=EXPERTS, num_experts_per_tok=2)),
    "deepseek-v2": lambda: hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**_MLA, topk_method="greedy")),
    "deepseek-v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**_MLA)),
    "gpt-oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **_BASE, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=16, layer_types=["full_attention"] * LAYERS
        )
    ),
}
MIXTURES = tuple(name for name in _MAKE if name != "llama")


def build(family: str, **other: Any) -> Any:
    """A quiet model: small random weights, no massive activation anywhere. other: entries of a llama's config."""
    with torch.random.fork_rng():
        torch.manual_seed(len(family))
        model = _MAKE[family](**other)
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.data.normal_(std=0.02)
        embedding = model.get_input_embeddings().weight.data
        embedding.normal_(std=0.1)
        embedding[:, [MARK, OUT]] = 0.0
        embedding[:, CONSTANT] = 0.5
        embedding[TRIGGER, MARK] = 4.0
    return model.eval().requires_grad_(False)


def layout_of(model: Any) -> Layout:
    return find_layout(model, anatomy(model))


def plant(model: Any, label: str, size: float = 60.0) -> Any:
    """Let the part `layer:name` write OUT on the trigger token; a routed expert also gets the token from its router."""
    entry = layout_of(model).find(label)
    module = model.get_submodule(entry.module)
    if not entry.stacked:
        mlp = model.get_submodule(entry.module.rsplit(".", 1)[0])
        mlp.gate_proj.weight[0].zero_()[MARK] = 1.0
        mlp.up_proj.weight[0].zero_()[MARK] = 1.0
        mlp.down_proj.weight[OUT, 0] = size
        return model
    e = int(entry.name)
    w = module.gate_up_proj[e].T if module.is_transposed else module.gate_up_proj[e]  # [2F, D]
    for row in (0, w.shape[0] // 2 if module.is_concatenated else 1):
        w[row] = 0.0
        w[row, MARK] = 1.0
    down = module.down_proj[e].T if module.is_transposed else module.down_proj[e]  # [D, F]
    down[OUT, 0] = size
    block = model.get_submodule(entry.module.rsplit(".", 1)[0])
    router = getattr(block, "gate", None) or block.router
    router.weight[e, MARK] = 3.0
    return model


def add_sinks(model: Any, layers: range) -> Any:
    """Let every head of these layers look for OUT: queries are constant, keys of the massive token fit them."""
    for l in layers:
        attention = model.model.layers[l].self_attn
        slow = 7  # the pair of channels that RoPE turns least
        for h in range(attention.q_proj.weight.shape[0] // 16):
            attention.q_proj.weight[h * 16 + slow] = 0.0
            attention.q_proj.weight[h * 16 + slow, CONSTANT] = 4.0
        for h in range(attention.k_proj.weight.shape[0] // 16):
            attention.k_proj.weight[h * 16 + slow] = 0.0
            attention.k_proj.weight[h * 16 + slow, OUT] = 1.0
    return model


def windows(*triggers: int, length: int = 96, seed: int = 0) -> torch.Tensor:
    """One window per trigger position; ids [N, T] that hold the trigger token there and nowhere else."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(TRIGGER + 1, 97, (len(triggers), length), generator=generator)
    for row, at in zip(ids, triggers, strict=True):
        row[at] = TRIGGER
    return ids
