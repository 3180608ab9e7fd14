"""Prompts of whole models for `kvsink-bench`: seconds of one in one piece, and of ranking its rows for protection."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvsink.model.passing import given_cache
from kvsink.tools.bench_model import rewritten, set_stock_length, stock_cache
from kvsink.tools.timing import event_times

__all__ = ["prefill_rows", "sink_prediction_ms"]


def prefill_rows(
    model: Any, sides: Sequence[str], length: int, say: Callable[[str], None], repeats: int = 3
) -> list[dict[str, Any]]:
    """Seconds of one prompt of `length` tokens in one piece; the logits of its last token only."""
    from kvsink.cache.cache import KVSinkCache
    from kvsink.model.runtime import detach

    ids = torch.randint(0, 1000, (1, length), device="cuda")
    rows = []
    for side in sides:
        model.config._attn_implementation = "sdpa"
        if side == "stock":
            detach(model)
            cache: Any = stock_cache(model, 1, length + 128)

            def reset(cache: Any = cache) -> None:
                set_stock_length(cache, 0)
        else:
            cache = KVSinkCache.for_model(rewritten(model, side)(), 1, length + 128)

            def reset(cache: Any = cache) -> None:
                cache.reset()

        times = []
        with torch.no_grad():
            for _ in range(repeats + 1):
                reset()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                begun = time.monotonic()
                model(ids, **given_cache(model, cache), use_cache=True, logits_to_keep=1)
                torch.cuda.synchronize()
                times.append(time.monotonic() - begun)
        times = sorted(times[1:])
        row = {
            "kind": "prefill",
            "side": side,
            "B": 1,
            "T": length,
            "seconds": round(times[len(times) // 2], 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }
        if side != "stock":
            row["sink_prediction_ms"] = round(sink_prediction_ms(cache, length, model.config.hidden_size), 4)
        rows.append(row)
        say("  ".join(f"{k}={v}" for k, v in row.items()))
        del cache
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def sink_prediction_ms(cache: Any, length: int, hidden_size: int, repeats: int = 20) -> float:
    """Median time of ranking the rows of a prompt by the outlier channel of their emergence block, all stages of a plan."""
    from kvsink.kernels import select_sinks

    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(1, length, hidden_size, device="cuda", dtype=torch.bfloat16, generator=g)
    valid = torch.ones(1, length, dtype=torch.bool, device="cuda")
    channel, weight = torch.tensor([7], device="cuda"), torch.ones(1, device="cuda")
    segments = {s.key: s.count for layer in cache.packed_layers() for s in layer.segments if s.source.startswith("stage:")}

    def rank() -> None:
        for count in segments.values():
            select_sinks(hidden, valid, channel, weight, count, False)

    for _ in range(3):
        rank()
    times = sorted(event_times(rank, repeats))
    return times[len(times) // 2]
