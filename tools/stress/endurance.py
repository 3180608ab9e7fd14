"""Long lives: very many tokens through one cache, and one cache used and reset very many times.

long     a tiny model generates token by token. At every checkpoint the length, the positions and the bytes the cache may hold are
         compared with what they must be, and its rows with those of a second cache that was given the same tokens in chunks
reuse    prompt, a few steps, reset, again: memory, tensors and objects must be after the last round what they were after a
         warm-up
Source   ours
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsink.cache.cache import KVSinkCache
from kvsink.cache.storage import BLOCK
from kvsink.model.passing import given_cache
from kvsink.tools.stress.models import rewritten, tokens

__all__ = ["Reuse", "generate_long", "reuse"]


def _bytes_due(cache: KVSinkCache, batch: int, slots: int) -> int:
    """Bytes a cache of so many slots has to hold, from the layouts of its codecs, the positions and what is real."""
    due = batch * slots * 5
    for layer in cache.packed_layers():
        held = layer.codec.layout(batch, layer.num_heads, layer.head_dim, layer.value_dim, slots, layer.dtype)
        for shape, dtype, _ in held.values():
            count = 1
            for n in shape:
                count *= n
            due += count * dtype.itemsize
    return due


@torch.no_grad()
def generate_long(
    count: int, method: str = "klt", every: int = 1000, told: Callable[[int], None] | None = None, **options: Any
) -> str | None:
    """Generate `count` tokens, drawn from the model's own distribution and each attending to all before it; what drifted, or None.

    Every step reads all codes, so the cost grows with the square of `count`; on the CPU they are read by the C kernel where
    there is a compiler (`kvsink.kernels.cpu.attend`).
    """
    model = rewritten(method, layers=1, positions=count + 64, **options)
    cache = KVSinkCache.for_model(model)
    token = tokens(1, 1, seed=5)
    fed: list[Tensor] = []
    draw = torch.Generator().manual_seed(7)
    for i in range(count):
        out = model(token, **given_cache(model, cache), position_ids=torch.tensor([[i]]))
        fed.append(token)
        token = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=draw)
        if (i + 1) % every == 0 or i + 1 == count:
            if wrong := _drift(cache, i + 1):
                return f"after {i + 1} tokens: {wrong}"
            if told is not None:
                told(i + 1)
    return _against_chunks(model, cache, torch.cat(fed, 1))


def _drift(cache: KVSinkCache, count: int) -> str | None:
    slots = -(-count // BLOCK) * BLOCK
    assert cache.shared.positions is not None
    if int(cache.get_seq_length()) != count or any(int(layer.length) != count for layer in cache.packed_layers()):
        return f"length {int(cache.get_seq_length())}"
    if not torch.equal(cache.shared.positions[0, :count], torch.arange(count, dtype=torch.int32)):
        return "positions are not 0, 1, 2 ..."
    if cache.nbytes() != (due := _bytes_due(cache, 1, slots)):
        return f"{cache.nbytes()} bytes are held, {due} are due"
    return None


def _against_chunks(model: Any, cache: KVSinkCache, ids: Tensor) -> str | None:
    """Codes of the first layer depend on token and position alone: fed in chunks they must be the same, one float16 rounding of
    a scale aside."""
    other = KVSinkCache.for_model(model)
    for start in range(0, ids.shape[1], 512):
        chunk = ids[:, start : start + 512]
        places = torch.arange(start, start + chunk.shape[1])
        mask = (torch.arange(int(places[-1]) + 1)[None] <= places[:, None]) & (places[:, None] < 1 << 30)
        mask = mask & (torch.arange(int(places[-1]) + 1)[None] > places[:, None] - 2)
        model(chunk, **given_cache(model, other), attention_mask=mask[None, None], position_ids=places[None], cache_position=places)
    a, b = cache.packed_layers()[0], other.packed_layers()[0]
    n = ids.shape[1]
    for name in ("k_codes", "v_codes"):
        differ = (getattr(a, name)[:, :, :n] != getattr(b, name)[:, :, :n]).float().mean()
        if float(differ) > 1e-3:
            return f"{name}: {100 * float(differ):.2f} % of the bytes differ from those of the same tokens in chunks"
    return None


@dataclass
class Reuse:
    """What a loop of uses and resets took, after a warm-up and at its end."""

    rounds: int
    seconds: float
    rss: tuple[int, int]
    traced: tuple[int, int]
    objects: tuple[int, int]
    nbytes: tuple[int, int]

    def wrong(self) -> str | None:
        """What has grown, or None."""
        if self.nbytes[0] != self.nbytes[1]:
            return f"the cache grew from {self.nbytes[0]} to {self.nbytes[1]} bytes"
        if self.objects[1] > self.objects[0] + 100:
            return f"{self.objects[1] - self.objects[0]} objects more than after the warm-up"
        if self.traced[1] > self.traced[0] + 64 * 1024:
            return f"{self.traced[1] - self.traced[0]} bytes of Python memory more than after the warm-up"
        if self.rss[1] > self.rss[0] + 32 * 2**20:
            return f"{(self.rss[1] - self.rss[0]) / 2**20:.1f} MiB of resident memory more than after the warm-up"
        return None


def _rss() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:  # no /proc: what is resident is then not looked at
        return 0


@torch.no_grad()
def reuse(rounds: int, method: str = "klt", told: Callable[[int], None] | None = None, **options: Any) -> Reuse:
    """Prefill, two steps, crop, reset, `rounds` times with one cache; a hundred rounds before the first look warm it up."""
    model = rewritten(method, layers=1, **options)
    cache = KVSinkCache.for_model(model)
    prompts = [tokens(1, n, seed=n) for n in (5, 17, 40)]
    step = tokens(1, 1, seed=9)
    began, first = time.monotonic(), None

    def look() -> tuple[int, int, int, int]:
        gc.collect()
        return _rss(), tracemalloc.get_traced_memory()[0], len(gc.get_objects()), cache.nbytes()

    tracemalloc.start()
    try:
        for i in range(rounds + 100):
            if i == 100:
                first = look()
            model(prompts[i % 3], **given_cache(model, cache))
            model(step, **given_cache(model, cache))
            cache.crop(-1)
            model(step, **given_cache(model, cache))
            cache.reset()
            if told is not None and i % 100 == 0:
                told(max(0, i - 100))
        last = look()
    finally:
        tracemalloc.stop()
    assert first is not None
    pairs = list(zip(first, last, strict=True))
    return Reuse(rounds, time.monotonic() - began, *pairs)
