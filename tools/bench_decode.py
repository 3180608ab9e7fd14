"""Steps of whole models for `kvsink-bench`: time, bytes and the largest batch of each side, and what vision-language models gain.

Differs    codes are random bits under plausible scales where only the time counts; kernels are checked in `kernels`
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from kvsink.model.passing import given_cache
from kvsink.tools.bench_model import SIXTEEN, fill, rewritten, set_stock_length, stock_cache, use_attention

__all__ = ["DECODE_SHAPES", "decode_rows", "vision_rows"]

DECODE_SHAPES = ((1, 1024), (1, 131072), (0, 4096))
"""Batch and length; batch 0 is the largest that fits."""
_STEPS = 24


def _decode(step: Callable[..., Any], cache: Any, reset: Callable[[], None], batch: int, length: int) -> tuple[float, float]:
    """Median seconds of a step and the seconds of the first call; greedy, the token stays on the device."""
    token = torch.randint(0, 1000, (batch, 1), device="cuda")
    begun = time.monotonic()
    first, times = 0.0, []
    with torch.no_grad():
        for turn in range(4):
            reset()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(_STEPS + 1)]
            events[0].record()
            for i in range(_STEPS if turn else 4):
                torch.compiler.cudagraph_mark_step_begin()
                position = torch.full((1, 1), length - _STEPS + i, device="cuda")
                logits = step(token, position_ids=position, use_cache=True, **given_cache(step, cache)).logits
                token = logits[:, -1:].argmax(-1)
                events[i + 1].record()
            torch.cuda.synchronize()
            if not turn:
                first = time.monotonic() - begun
            else:
                times += [a.elapsed_time(b) for a, b in pairwise(events[2:])]
    times.sort()
    return times[len(times) // 2] / 1e3, first


def _largest(per_sequence: int, per_row: int, reserve: int) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    return max(1, (free - reserve) // (per_sequence + per_row) // 8 * 8)


def _attempts(batch: int, fixed: bool) -> list[int]:
    return [batch] if fixed else [batch, int(batch * 0.94) // 8 * 8, int(batch * 0.88) // 8 * 8]


def _run(
    make: Callable[[int], tuple[Callable[..., Any], Any, Callable[[], None]]], batch: int, fixed: bool, length: int
) -> dict[str, Any]:
    """Decode at a batch, or at the largest of a few that does not run out of memory."""
    for b in _attempts(batch, fixed):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()
        cache: Any = None
        try:
            step, cache, reset = make(b)
            seconds, first = _decode(step, cache, reset, b, length)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            return {
                "B": b,
                "step_ms": round(seconds * 1e3, 4),
                "tokens_per_s": round(b / seconds, 1),
                "first_call_s": round(first, 1),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                "graphs": graphs,
                "cuda_graphs": not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"],
            }
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if "out of memory" not in str(error) and "GiB are free" not in str(error):
                raise
            del cache
        finally:
            torch._dynamo.utils.counters.clear()
    return {"B": 0, "step_ms": None, "tokens_per_s": 0.0, "note": "out of memory"}


def _held_bytes(model: Any, length: int) -> int:
    """Bytes that the cache of one sequence takes, of a model as it is rewritten now."""
    from kvsink.cache.cache import KVSinkCache
    from kvsink.cache.served import tiles_serve
    from kvsink.model.runtime import runtime_of

    runtime, weight = runtime_of(model), next(model.parameters())
    a = runtime.anatomy
    empty = KVSinkCache(runtime, length, tiles_serve(runtime, weight.dtype, weight.device))
    shape = a.kv_heads, a.head_dim, a.head_dim
    layouts = (i.codec.layout(1, *shape, i.get_max_length(), weight.dtype) for i in empty.packed_layers())
    return sum(math.prod(size) * dtype.itemsize for held in layouts for size, dtype, _ in held.values())


def decode_rows(
    model: Any,
    sides: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    backends: dict[tuple[int, int], str],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Tokens per second of each side ("stock", "static", or a method with its bits, "centred:even-2") at each shape."""
    rows = []
    for batch, length in shapes:
        for side in sides:
            row = {"kind": "decode", "side": side, "T": length, **_side(model, side, batch, length, backends)}
            rows.append(row)
            say(f"decode T{length} {side}: " + "  ".join(f"{k}={row[k]}" for k in row if k not in ("kind", "side", "T")))
    return rows


def _side(model: Any, side: str, batch: int, length: int, backends: dict[tuple[int, int], str]) -> dict[str, Any]:
    from kvsink.cache.cache import KVSinkCache
    from kvsink.model.runtime import detach

    a = model.config
    model.config._attn_implementation = "sdpa"
    per_row = 2 * a.vocab_size * 4
    if side in SIXTEEN:
        detach(model)
        if side != "static":
            use_attention(model, backends[(batch, length)])
        per = a.num_hidden_layers * a.num_key_value_heads * 2 * a.head_dim * 2 * length

        def make(b: int) -> tuple[Callable[..., Any], Any, Callable[[], None]]:
            cache = stock_cache(model, b, length)
            options: dict[str, Any] = {"triton.cudagraphs": True, "combo_kernels": side == "stock-combo"}
            step = torch.compile(model, options=options, fullgraph=True)
            return step, cache, lambda: set_stock_length(cache, length - _STEPS)

    else:
        attach = rewritten(model, side)
        attach()
        per = _held_bytes(model, length)

        def make(b: int) -> tuple[Callable[..., Any], Any, Callable[[], None]]:
            cache = KVSinkCache.for_model(model, b, length)
            fill(cache, length - _STEPS)
            step = torch.compile(model, backend="kvsink", mode="reduce-overhead", fullgraph=True)

            def reset() -> None:
                for layer in cache.packed_layers():
                    layer.length.fill_(length - _STEPS)

            return step, cache, reset

    fixed = batch > 0
    return _run(make, batch if fixed else _largest(per, per_row, 3 << 30), fixed, length)


def vision_rows(
    model: Any, baseline: str, sides: Sequence[str], length: int, backends: dict[tuple[int, int], str], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Each side at the largest batch of the 16-bit side and at its own, and what it gains over it.

    Peak memory counts weights, cache and everything else; it is compared at the same batch, throughput at the largest of each.
    """
    stock = decode_rows(model, [baseline], [(0, length)], backends, say)[0]
    rows = [stock]
    for side in sides:
        same = decode_rows(model, [side], [(stock["B"], length)], backends, say)[0]
        most = decode_rows(model, [side], [(0, length)], backends, say)[0]
        gain = {"kind": "vlm", "side": side, "against": baseline, "T": length}
        if stock["B"] and same["B"] and most["B"]:
            gain |= {
                "same_batch": stock["B"],
                "memory_smaller": round(stock["peak_gib"] / same["peak_gib"], 3),
                "batch_larger": round(most["B"] / stock["B"], 3),
                "throughput_higher": round(most["tokens_per_s"] / stock["tokens_per_s"], 3),
            }
        say("  ".join(f"{k}={v}" for k, v in gain.items()))
        rows += [same, most, gain]
    return rows
