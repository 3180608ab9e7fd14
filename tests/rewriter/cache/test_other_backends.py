"""A cache saved by one backend goes on in another process by another one: the tokens are those of one run without a break."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvsink.cache.cache import KVSinkCache
from kvsink.cache.layer import KVSinkLayer
from kvsink.kernels import backends
from kvsink.kernels.cuda import launch
from tests.graphs import rewritten
from tests.kernels.cuda.emulated import Emulated, act_as_on_a_gpu
from tests.kernels.cuda.test_tiles import rewritten as wide
from tests.kernels.triton.test_attend import here
from tests.models import tokens
from tests.rewriter.cache.test_layer import served_as_on_a_gpu

PROMPT, EACH = 21, 4  # tokens of the prompt, and of every process


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


def generated(model: Any, held: KVSinkCache, ids: torch.Tensor, count: int) -> list[list[int]]:
    """The most likely tokens [B][count] behind ids [B, n], of which the last ones are not held yet; row 1 is left-padded by 3."""
    mask = torch.ones(2, ids.shape[1] + count, dtype=torch.int64)
    mask[1, :3] = 0
    for _ in range(count):
        new = ids[:, int(held.get_seq_length()) :]
        places = (mask[:, : ids.shape[1]].cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
        with torch.no_grad():
            out = model(new, attention_mask=mask[:, : ids.shape[1]], position_ids=places, past_key_values=held).logits[:, -1:]
        ids = torch.cat([ids, out.argmax(-1)], 1)
    return ids[:, -count:].tolist()


def one_process(backend: str, folder: str, tiles: bool, half: bool, before: list[list[int]], source: str, target: str) -> str:
    """Go on with the cache of a file, or begin one; the new tokens as JSON."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16 if half else torch.float32)
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        served_by(backend, patch, asked)
        patch.setattr(KVSinkLayer, "_defers", lambda self, frame: frame.cos is not None)  # tiles are asked too, as on a GPU
        held = KVSinkCache.load(source, model, 128) if source else KVSinkCache.for_model(model, 2, 128, tiles=tiles)
        ids = torch.cat([tokens(2, PROMPT, seed=4), torch.tensor(before, dtype=torch.int64).reshape(2, -1)], 1)
        out = generated(model, held, ids, EACH)
        assert asked and all(asked) and held.packed_layers()[0].codec.tiles == tiles
        held.save(target)
    return json.dumps(out)


@cache
def folder_of(tiles: bool, root: Path) -> tuple[Path, Any]:
    if tiles:
        model = wide("klt:even", 4, key_bits=2, value_bits=4, protect="first:2")
    else:
        model = rewritten("llama", "sdpa", "klt", window=4, protect="first:2+kvsink:3")
    folder = root / f"model-{tiles}"
    model.save_pretrained(folder)
    return folder, model


CHAINS = {
    "rows": ("torch", "cpu (C)", "triton", "torch"),
    "rows-back": ("torch", "triton", "cpu (C)", "torch"),
    "tiles": ("torch", "cuda (tiles)", "torch"),
}
"""Every ordered pair of backends that a processor can run and that store alike; the first writes the cache."""


@pytest.mark.slow
@here
@pytest.mark.parametrize("chain", CHAINS)
def test_a_cache_goes_on_by_another_backend(chain: str, tmp_path: Path) -> None:
    tiles = chain == "tiles"
    folder, model = folder_of(tiles, tmp_path)
    if tiles:
        model = model.half()  # what the kernels compute in
    names, out, source = CHAINS[chain], list[list[int]]([[], []]), ""
    for i, name in enumerate(names):
        target = str(tmp_path / f"cache-{i}")
        given = json.dumps([name, str(folder), tiles, tiles, out, source, target])
        env = {**os.environ, "TRITON_INTERPRET": "1" if name == "triton" else "0"}
        done = subprocess.run([sys.executable, "-m", __name__, given], capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        out = [a + b for a, b in zip(out, json.loads(done.stdout.splitlines()[-1]), strict=True)]
        source = target
    whole = KVSinkCache.for_model(model, 2, 128, tiles=tiles)
    assert generated(model, whole, tokens(2, PROMPT, seed=4), EACH * len(names)) == out
    assert len({n for row in out for n in row}) > 4  # no row says the same over and over


if __name__ == "__main__":
    print(one_process(*json.loads(sys.argv[1])))
