"""A large key bias: which methods survive it, and what centring in front of them repairs. `python -m kvsink.tools.bias`.

A random Qwen2 with one layer gets a k_proj bias of 50 standard deviations of its keys on 4 channels. The error is that of the
attention output (before the output projection) against the exact one, when rows pass through the real cache in chunks and
every row is read back from its code, nothing protected.

Formula    error = ||O^ - O|| / ||O||,  ratio = error with the bias / error without it
Source     ours
Shapes     O [B, T, Hq·D]; D 128, 2 key-value heads
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsink.calibrate.calibration import calibrate
from kvsink.calibrate.design import gather_needs
from kvsink.calibrate.record import Calibration
from kvsink.errors import KvsinkError
from kvsink.evaluate.evaluation import dynamic_cache, packed_cache
from kvsink.methods import Method, get_method, methods
from kvsink.model.passing import given_cache
from kvsink.rewrite import rewrite

__all__ = ["BiasRow", "biased", "markdown", "random_qwen2", "study"]

CHANNELS, DEVIATIONS, BITS, CHUNK = 4, 50.0, 2.0, 64


@dataclass(frozen=True)
class BiasRow:
    """One method: errors without and with the bias, and with the bias and centred keys; or why there is no figure."""

    method: str
    plain: float | None = None
    biased: float | None = None
    centred: float | None = None
    reason: str = ""
    centred_reason: str = ""

    @property
    def ratio(self) -> float | None:
        """Error with the bias over error without it."""
        return None if self.plain is None or self.biased is None else self.biased / self.plain


def random_qwen2(head_dim: int = 128, kv_heads: int = 2, seed: int = 0, layers: int = 1) -> Any:
    """A Qwen2 with random weights; its biases are zero and its queries and keys have deviations near 1."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden = 2 * kv_heads * head_dim
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.data.zero_()
            elif "proj" in name:
                weight.data.normal_(std=hidden**-0.5)
    return model.eval().requires_grad_(False)


def biased(
    model: Any, ids: Tensor, channels: int = CHANNELS, deviations: float = DEVIATIONS, seed: int = 1, layers: Sequence[int] = (0,)
) -> Any:
    """A copy where the k_proj of some layers has a bias of so many deviations of its outputs on a few channels of every head."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for layer in sorted(range(len(model.model.layers))[i] for i in layers):
        attention = model.model.layers[layer].self_attn
        seen: list[Tensor] = []
        handle = attention.k_proj.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.flatten(0, 1)))
        with torch.no_grad():
            model(ids)
        handle.remove()
        spread = torch.cat(seen).std(0)  # [H·D]
        dim = attention.head_dim
        for head in range(len(spread) // dim):
            chosen = head * dim + torch.randperm(dim, generator=generator)[:channels]
            sign = torch.where(torch.rand(channels, generator=generator) < 0.5, -1.0, 1.0)
            attention.k_proj.bias.data[chosen] = (deviations * sign * spread[chosen].cpu()).to(spread)
    return model


def attention_output(model: Any, cache: Any, ids: Tensor, chunk: int = CHUNK) -> Tensor:
    """What the attention of the first layer puts out before its output projection, rows fed in chunks: [B, T, Hq·D]."""
    seen: list[Tensor] = []
    projection = model.model.layers[0].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            for start in range(0, ids.shape[1], chunk):
                model(ids[:, start : start + chunk], use_cache=True, **given_cache(model, cache))
    finally:
        handle.remove()
    return torch.cat(seen, 1)


def error_of(model: Any, method: Method, bits: float, record: Calibration, ids: Tensor, chunk: int = CHUNK) -> float:
    """Relative error of the attention output of a method on one model; values are not folded, so that outputs compare."""
    work = copy.deepcopy(model)
    exact = attention_output(model, dynamic_cache(model, len(ids), ids.shape[1]), ids, chunk)
    rewrite(work, method, key_bits=bits, value_bits=bits, protect="none", calibration=record, fold=False)
    found = attention_output(work, packed_cache(work, len(ids), ids.shape[1], strict=True), ids, chunk)
    return float((found - exact).norm() / exact.norm())


def study(
    names: Sequence[str] | None = None,
    bits: float = BITS,
    head_dim: int = 128,
    tokens: int = 1024,
    windows: int = 2,
    calibration_tokens: int = 8192,
    device: str = "cpu",
    chunk: int = CHUNK,
) -> list[BiasRow]:
    """Every method and variant with and without the bias, on hidden states of random tokens."""
    plain = random_qwen2(head_dim).to(device)
    generator = torch.Generator().manual_seed(2)
    vocabulary = plain.config.vocab_size
    ids = torch.randint(3, vocabulary, (windows, tokens), generator=generator).to(device)
    text = torch.randint(3, vocabulary, (calibration_tokens // tokens, tokens), generator=generator)
    models = (plain, biased(plain, ids))
    found: list[BiasRow] = []
    every = sorted([*methods(), *(f"{m.name}:{v}" for m in methods().values() for v in m.variants)])
    for name in names or every:
        method = get_method(name)
        try:
            errors = [error_of(m, method, bits, _record(m, method, bits, text), ids, chunk) for m in models]
        except KvsinkError as reason:
            found.append(BiasRow(name, reason=str(reason)))
            continue
        row = BiasRow(name, errors[0], errors[1])
        if method.key.center:
            row = replace(row, centred_reason="centred already")
        else:
            try:
                front = replace(method, key=replace(method.key, center=True))
                record = _record(models[1], front, bits, text)
                row = replace(row, centred=error_of(models[1], front, bits, record, ids, chunk))
            except KvsinkError:
                row = replace(row, centred_reason="its codec takes no mean")
        found.append(row)
    return found


def _record(model: Any, method: Method, bits: float, ids: Tensor) -> Calibration:
    config = model.config
    dim = config.hidden_size // config.num_attention_heads
    sides = method.side("key", bits), method.side("value", bits)
    blocks, need = gather_needs([sides], config.num_key_value_heads, dim)
    return calibrate(model, ids, [()], {0: blocks or (64,)}, 1, None, {} if need is None else {0: need})


def markdown(rows: Sequence[BiasRow], bits: float = BITS, command: str = "python -m kvsink.tools.bias") -> str:
    """The study as a page."""
    lines = [
        "# A large key bias",
        "",
        f"Random Qwen2, one layer, head dimension 128, 2 key-value heads; the k_proj bias of {CHANNELS} channels per head",
        f"is {DEVIATIONS:g} standard deviations of the keys. Error of the attention output at {bits:g} bits for keys and values,",
        "nothing protected, every row read back from its code. `center` subtracts the calibrated mean of the keys before RoPE.",
        "",
        "```",
        command,
        "```",
        "",
        "| method | error without bias | error with bias | ratio | with bias and `center` in front |",
        "|---|---:|---:|---:|---:|",
    ]
    for r in sorted(rows, key=lambda r: (r.ratio is None, r.ratio or 0.0)):
        if r.ratio is None:
            lines.append(f"| {r.method} | declined: {' '.join(r.reason.split())} | | | |")
            continue
        centred = f"{r.centred:.4f}" if r.centred is not None else r.centred_reason
        lines.append(f"| {r.method} | {r.plain:.4f} | {r.biased:.4f} | {r.ratio:.2f} | {centred} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study and write docs/key_bias.md."""
    parser = argparse.ArgumentParser("python -m kvsink.tools.bias", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--bits", type=float, default=BITS)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/key_bias.md"))
    o = parser.parse_args(argv)
    rows = study(bits=o.bits, tokens=o.tokens, device=o.device)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    o.out.write_text(markdown(rows, o.bits), encoding="utf-8")
    print(o.out.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
