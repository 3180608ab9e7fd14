"""Tiny random Llamas for stress: in memory, rewritten by any method in a second; or as a folder with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB, HEADS, KV_HEADS, HEAD_DIM = 97, 4, 2, 16


def tiny(layers: int = 2, positions: int = 128) -> Any:
    """A Llama of hidden size 64 with weights spread enough that its attention is not uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=positions,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.data.normal_(std=0.15)
    return model.eval().requires_grad_(False)


def tokens(batch: int = 1, length: int = 64, seed: int = 1) -> torch.Tensor:
    """Token ids [B, S] without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def rewritten(method: Any, layers: int = 2, positions: int = 128, **options: Any) -> Any:
    """A tiny Llama rewritten by a method, by name or as it is, calibrated on random tokens."""
    import kvsink

    model = tiny(layers, positions)
    kvsink.rewrite(model, method=method, calibration=tokens(8, 64), **options)
    return model


def tiny_folder(folder: Path) -> Path:
    """A model folder whose tokenizer knows single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<pad>", "<s>", "</s>", "<unk>", *(chr(c) for c in range(33, 33 + VOCAB - 5)), " "]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tiny().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
