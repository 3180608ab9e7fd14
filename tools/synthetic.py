"""Write a large Llama or Mixtral checkpoint of random weights in shards, a layer at a time: to measure memory with.

    python -m kvsink.tools.synthetic FOLDER --gib 16
    python -m kvsink.tools.synthetic FOLDER --gib 16 --experts 8 --intermediate 1792

With experts, each of them has three tensors of its own in the files, as published Mixtral checkpoints have. One layer's
weights are drawn and written for every layer; the norms differ. So writing takes the time of the disk and the memory of one
layer, and the model is a valid one, though it has learnt nothing.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from kvsink.tools.cli import command_line


@click.command("kvsink-synthetic", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--gib", default=16.0, show_default=True, help="Size of the weights, at least.")
@click.option("--hidden", default=4096, show_default=True)
@click.option("--intermediate", default=14336, show_default=True)
@click.option("--layers-per-shard", default=8, show_default=True, type=click.IntRange(1))
@click.option("--experts", default=0, show_default=True, type=click.IntRange(0), help="Experts of a layer; 0: a dense Llama.")
def command(folder: Path, gib: float, hidden: int, intermediate: int, layers_per_shard: int, experts: int) -> None:
    """Write a random bfloat16 model of at least so many GiB, with a tokenizer of single characters, to FOLDER."""
    click.echo(f"{write(folder, gib, hidden, intermediate, layers_per_shard, experts) / 2**30:.2f} GiB in {folder}")


def write(
    folder: Path, gib: float, hidden: int = 4096, intermediate: int = 14336, layers_per_shard: int = 8, experts: int = 0
) -> int:
    """The same for programs; returns the bytes of the weights. `intermediate` neurons per expert, two of which see a token."""
    import torch
    from transformers import LlamaConfig, MixtralConfig

    from kvsink.tools.stress.models import tiny_folder

    head, vocabulary = min(128, hidden // 4), 32000
    heads, kv_heads = hidden // head, max(1, hidden // head // 4)
    tiny_folder(folder)  # for its tokenizer
    (folder / "model.safetensors").unlink()
    draw = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=columns**-0.5, generator=draw)

    layer = {
        "self_attn.q_proj": weight(hidden, hidden),
        "self_attn.k_proj": weight(kv_heads * head, hidden),
        "self_attn.v_proj": weight(kv_heads * head, hidden),
        "self_attn.o_proj": weight(hidden, hidden),
    }
    parts = {f"block_sparse_moe.experts.{e}": ("w1", "w3", "w2") for e in range(experts)}
    for at, (gate, up, down) in (parts or {"mlp": ("gate_proj", "up_proj", "down_proj")}).items():
        layer |= {f"{at}.{gate}": weight(intermediate, hidden), f"{at}.{up}": weight(intermediate, hidden)}
        layer[f"{at}.{down}"] = weight(hidden, intermediate)
    if experts:
        layer["block_sparse_moe.gate"] = weight(experts, hidden)
    size = 2 * (sum(w.numel() for w in layer.values()) + 2 * hidden)
    count = max(2, -(-int(gib * 2**30 - 4 * vocabulary * hidden) // size))
    more = {"num_local_experts": experts, "num_experts_per_tok": min(2, experts), "sliding_window": None}
    make = partial(MixtralConfig, **more) if experts else LlamaConfig
    config = make(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=count,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=[f"{'Mixtral' if experts else 'Llama'}ForCausalLM"],
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    shards = -(-count // layers_per_shard) + 1
    where: dict[str, str] = {}
    total = 0
    for shard in range(shards):
        tensors: dict[str, torch.Tensor] = {}
        if shard == 0:
            tensors = {"model.embed_tokens.weight": weight(vocabulary, hidden), "lm_head.weight": weight(vocabulary, hidden)}
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for i in range((shard - 1) * layers_per_shard, min(shard * layers_per_shard, count)) if shard else ():
            names = {f"model.layers.{i}.{n}.weight": w for n, w in layer.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                names[f"model.layers.{i}.{norm}.weight"] = torch.full((hidden,), 1 - i / (2 * count), dtype=torch.bfloat16)
            tensors.update(names)
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        where.update(dict.fromkeys(tensors, file))
        total += sum(2 * t.numel() for t in tensors.values())
        _save(folder / file, tensors)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def _save(path: Path, tensors: dict[str, Any]) -> None:
    """A safetensors file of tensors that may share memory, written one after the other."""
    import torch

    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, t in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [at, at + 2 * t.numel()]}
        at += 2 * t.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            handle.write(memoryview(t.contiguous().reshape(-1).view(torch.uint8).numpy()))


main = command_line(command)

if __name__ == "__main__":
    sys.exit(main())
