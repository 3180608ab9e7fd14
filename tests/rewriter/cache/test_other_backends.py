"""A cache saved by one backend goes on in another process by another one: the tokens are those of one run without a break."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.cache.layer import KVSinkLayer
from kvsink.kernels import backends
from kvsink.kernels.cuda import launch
from tests.close import largest_difference
from tests.graphs import rewritten
from tests.kernels.cuda.emulated import Emulated, act_as_on_a_gpu
from tests.kernels.triton.test_attend import here
from tests.models import tokens
from tests.rewriter.cache.test_layer import served_as_on_a_gpu

PROMPT, EACH = 21, 4  # tokens of the prompt, and of every process
PERIOD = 7  # tokens after which a prompt of `repeating` says the same again
TIE = 4  # times the largest difference of logits: what the most likely token is to be ahead of the next one


def served_by(name: str, patch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    """Attention to one new row is by this backend alone; asked: grows with every such question."""
    if name == "triton":
        served_as_on_a_gpu(patch, asked)
        return
    if name == "cuda (tiles)":

        def library(codec: Any, repeats: int, rotary: int, place: Any) -> Emulated:
            return Emulated(launch.variant_of(codec, repeats or 1, rotary))

        act_as_on_a_gpu(patch, library, asked.append)
        return

    def kept(b: backends.Backend) -> backends.Backend:
        if b.attend is None or b.name not in (name, "torch"):
            return b if b.step is not None and b.attend is None else replace(b, append=None, attend=None, step=None)
        run = b.attend.run
        return replace(b, attend=b.attend._replace(run=lambda call: asked.append(b.name == name) or run(call)))

    table = tuple(map(kept, backends.table()))
    patch.setattr(backends, "table", lambda: table)
    patch.setattr(backends, "choose", cache(backends.choose.__wrapped__))


def repeating() -> Any:
    """A Llama of two layers that goes on with a text as it went before, sure of every token: keys and values of the first one
    tell which token came before each, and the second one looks for the newest token among those."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=1024,
        pad_token_id=0,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    words, basis = F.normalize(torch.randn(97, 32), dim=1), torch.linalg.qr(torch.randn(32, 32)).Q
    model.model.embed_tokens.weight.zero_()[:, :32] = words
    model.lm_head.weight.zero_()[:, :32] = 4 * words
    before, same = (layer.self_attn for layer in model.model.layers)
    for part in (before, same):
        part.v_proj.weight.view(2, 128, 64)[:, :32, :32] += torch.eye(32)
    angles = 10000.0 ** (-torch.arange(24) / 64)  # of one token, in the channels that turn fastest
    before.k_proj.bias.view(2, 2, 64)[:, 0, :24] = 6
    before.q_proj.bias.view(4, 2, 64)[..., :24] = 6 * torch.stack([angles.cos(), -angles.sin()])
    before.o_proj.weight.zero_().view(64, 4, 128)[32:, :, :32] = torch.eye(32)[:, None] / 4
    same.q_proj.weight.view(4, 128, 64)[:, 96:, :32] = 8 * basis  # channels that hardly turn
    same.k_proj.weight.view(2, 128, 64)[:, 96:, 32:] = 8 * basis
    same.o_proj.weight.zero_().view(64, 4, 128)[:32, :, :32] = torch.eye(32)[:, None]
    kvsink.rewrite(model, "klt:even", calibration=tokens(4, 256), key_bits=2, value_bits=4, protect="first:2")
    return model


def prompt(tiles: bool) -> Tensor:
    """Random tokens [2, PROMPT], for `repeating` the same ones every PERIOD."""
    return tokens(2, PERIOD, seed=4).repeat(1, PROMPT // PERIOD) if tiles else tokens(2, PROMPT, seed=4)


def generated(model: Any, held: KVSinkCache, ids: Tensor, count: int) -> Tensor:
    """Logits float32 [B, count, V] of the most likely tokens behind ids [B, n], of which the last ones are not held yet; row 1 is
    left-padded by 3."""
    mask, out = torch.ones(2, ids.shape[1] + count, dtype=torch.int64), []
    mask[1, :3] = 0
    for _ in range(count):
        new = ids[:, int(held.get_seq_length()) :]
        places = (mask[:, : ids.shape[1]].cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
        with torch.no_grad():
            out.append(model(new, attention_mask=mask[:, : ids.shape[1]], position_ids=places, past_key_values=held).logits[:, -1:])
        ids = torch.cat([ids, out[-1].argmax(-1)], 1)
    return torch.cat(out, 1).float()


def one_process(backend: str, folder: str, tiles: bool, half: bool, before: list[list[int]], source: str, target: str) -> str:
    """Go on with the cache of a file, or begin one; the logits of the new tokens as JSON."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16 if half else torch.float32)
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        served_by(backend, patch, asked)
        patch.setattr(KVSinkLayer, "_defers", lambda self, frame: frame.cos is not None)  # tiles are asked too, as on a GPU
        held = KVSinkCache.load(source, model, 128) if source else KVSinkCache.for_model(model, 2, 128, tiles=tiles)
        ids = torch.cat([prompt(tiles), torch.tensor(before, dtype=torch.int64).reshape(2, -1)], 1)
        out = generated(model, held, ids, EACH)
        assert asked and all(asked) and held.packed_layers()[0].codec.tiles == tiles
        held.save(target)
    return json.dumps(out.tolist())


@cache
def folder_of(tiles: bool, root: Path) -> tuple[Path, Any]:
    model = repeating() if tiles else rewritten("llama", "sdpa", "klt", window=4, protect="first:2+kvsink:3")
    folder = root / f"model-{tiles}"
    model.save_pretrained(folder)
    return folder, model


CHAINS = {
    "rows": ("torch", "cpu (C)", "triton", "torch"),
    "rows-back": ("torch", "triton", "cpu (C)", "torch"),
    "tiles": ("torch", "cuda (tiles)", "torch"),
}
"""Every ordered pair of backends that a processor can run and that store alike; the first writes the cache."""


COMPILED = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler to emulate the CUDA kernels with")


@pytest.mark.parametrize("chain", [pytest.param(c, marks=COMPILED if c == "tiles" else (here, pytest.mark.slow)) for c in CHAINS])
def test_a_cache_goes_on_by_another_backend(chain: str, tmp_path: Path) -> None:
    tiles = chain == "tiles"
    folder, model = folder_of(tiles, tmp_path)
    if tiles:
        model = model.half()  # what the kernels compute in
    names, parts, source = CHAINS[chain], list[Tensor](), ""
    for i, name in enumerate(names):
        target = str(tmp_path / f"cache-{i}")
        before = torch.cat(parts, 1).argmax(-1).tolist() if parts else [[], []]
        given = json.dumps([name, str(folder), tiles, tiles, before, source, target])
        env = {**os.environ, "TRITON_INTERPRET": "1" if name == "triton" else "0"}
        done = subprocess.run([sys.executable, "-m", __name__, given], capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        parts.append(torch.tensor(json.loads(done.stdout.splitlines()[-1])))
        source = target
    out = torch.cat(parts, 1)
    whole = generated(model, KVSinkCache.for_model(model, 2, 128, tiles=tiles), prompt(tiles), EACH * len(names))
    assert torch.equal(out.argmax(-1), whole.argmax(-1))
    assert -whole.topk(2).values.diff().max() > TIE * largest_difference(out, whole)  # no token is one of two as likely
    assert len(whole.argmax(-1).unique()) > 4  # no row says the same over and over
    if tiles:
        assert torch.equal(whole.argmax(-1), prompt(tiles).repeat(1, 2)[:, PROMPT : PROMPT + whole.shape[1]])


if __name__ == "__main__":
    print(one_process(*json.loads(sys.argv[1])))
