"""Write a dense Llama-type model exactly as a Mixtral-architecture checkpoint: a real mixture of experts without a download.

    python -m kvsink.tools.to_mixtral demo:smollm2 OUT_DIR --experts 8

Formula    neurons of each feed-forward in E equal runs, one per expert; router weights 0, top-k = E, so that every expert
           weighs 1/E; down projections times E
Exact      yes for E a power of two, up to the order of additions
Source     ours
Raises     ModelError for a model that is no Llama, has biases, or whose neurons do not split into E runs
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from kvsink.tools.cli import command_line


def as_mixtral(model: Any, experts: int = 8) -> Any:
    """A MixtralForCausalLM with the logits of the Llama `model`."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from kvsink.errors import ModelError

    c = model.config
    if c.model_type != "llama" or getattr(c, "attention_bias", False) or getattr(c, "mlp_bias", False):
        raise ModelError(f"{type(model).__name__} is not a Llama without biases; only those map onto Mixtral")
    if experts < 2 or c.intermediate_size % experts:
        raise ModelError(f"{c.intermediate_size} neurons do not split into {experts} equal runs; choose a divisor, at least 2")
    width = c.intermediate_size // experts
    config = MixtralConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=width,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=getattr(c, "head_dim", None),
        hidden_act=c.hidden_act,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters=c.rope_parameters,
        sliding_window=None,
        num_local_experts=experts,
        num_experts_per_tok=experts,
        tie_word_embeddings=c.tie_word_embeddings,
        pad_token_id=c.pad_token_id,
        bos_token_id=c.bos_token_id,
        eos_token_id=c.eos_token_id,
    )
    with torch.device("meta"):
        out = MixtralForCausalLM(config)
    held = model.state_dict()
    state: dict[str, torch.Tensor] = {}
    for name, weight in held.items():
        if ".mlp." not in name:
            state[name] = weight
    for l in range(c.num_hidden_layers):
        gate, up, down = (held[f"model.layers.{l}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        at = f"model.layers.{l}.mlp"
        both = torch.stack([gate.unflatten(0, (experts, width)), up.unflatten(0, (experts, width))], 1)  # [E, 2, F, D]
        state[f"{at}.experts.gate_up_proj"] = both.flatten(1, 2)
        state[f"{at}.experts.down_proj"] = down.unflatten(1, (experts, width)).transpose(0, 1).contiguous() * experts
        state[f"{at}.gate.weight"] = torch.zeros(experts, c.hidden_size, dtype=down.dtype, device=down.device)
    out.load_state_dict(state, assign=True)
    out.model.rotary_emb = type(out.model.rotary_emb)(config).to(model.device)
    out.tie_weights()
    out.set_attn_implementation(model.config._attn_implementation)
    return out.eval().requires_grad_(False)


@click.command("to_mixtral", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_dir")
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--experts", default=8, show_default=True, type=click.IntRange(2))
def command(model_dir: str, out_dir: Path, experts: int) -> None:
    """Write the dense Llama MODEL_DIR to OUT_DIR as a Mixtral checkpoint with the same logits."""
    from kvsink.errors import KvsinkError
    from kvsink.folder.demo import resolve_model_dir
    from kvsink.folder.loading import load_model

    source = resolve_model_dir(model_dir)
    if out_dir.exists():
        raise KvsinkError(f"{out_dir} exists; choose another OUT_DIR")
    model = as_mixtral(load_model(source, "cpu"), experts)
    save_model_folder(model, Path(source), out_dir)
    print(f"wrote {out_dir}")


def save_model_folder(model: Any, source: Path, target: Path) -> None:
    """Save `model` with the tokenizer files of `source`; the folder appears complete or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    build = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        model.save_pretrained(build)
        for file in sorted(source.iterdir()):
            wanted = file.suffix in (".json", ".txt", ".model", ".jinja") and not file.name.endswith(".index.json")
            if wanted and file.is_file() and file.name != "kvsink_demo.json" and not (build / file.name).exists():
                shutil.copyfile(file, build / file.name)
        os.chmod(build, 0o755)
        os.rename(build, target)
    except BaseException:
        shutil.rmtree(build, ignore_errors=True)
        raise


main = command_line(command)

if __name__ == "__main__":
    sys.exit(main())
