"""`kvsink-bench generate`: `generate()` as a user calls it, its first call, prefill and decoding apart, 16 bit beside it.

Formula    prefill = median time of generate() for one token;  decoding = (median time for n + 1 tokens - prefill) / n
Shapes     prompts of random tokens [B, T] with an attention mask of ones; greedy, no end token
Differs    every call makes its own cache, as generate() does without one; compiled code is dropped before each row, so its first
           call compiles (Inductor's cache on disk may help it), and what recording CUDA graphs for a new cache costs is in decoding
"""

from __future__ import annotations

import cProfile
import gc
import io
import pstats
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kvsink.tools.bench_model import rewritten

__all__ = ["CACHES", "generate_rows", "generate_table", "profile_text"]

CACHES = ("dynamic", "static")
"""Sides in 16 bit: transformers' growing cache, and its cache of a fixed length, which it compiles on a GPU."""

_LINES = 30  # of a table of a profile


def generate_rows(
    model: Any,
    sides: Sequence[str],
    prompts: Sequence[tuple[int, int]],
    steps: int,
    repeats: int,
    say: Callable[[str], None],
    profile: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """One row per side and prompt, as soon as it is measured; `profile` takes a profile of each row's prefill as text.

    Ratios are to the fastest 16-bit side measured before at the same prompt, each of prefill and decoding by itself.
    """
    stock: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for side in sides:
        for prompt in prompts:
            row = _row(model, side, *prompt, steps, repeats, profile)
            if side in CACHES and "decode_ms" in row:
                stock.setdefault(prompt, []).append(row)
            row = {**row, **ratios(row, stock.get(prompt, ()))}
            say("  ".join(f"{k}={v}" for k, v in row.items() if k != "kind"))
            yield row


def ratios(row: dict[str, Any], stock: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many times faster than 16 bit a row decodes, and how many times its prefill takes; nothing without either."""
    if not stock or "decode_ms" not in row:
        return {}
    decode, prefill = (min(s[name] for s in stock) for name in ("decode_ms", "prefill_s"))
    return {"decode_speedup": round(decode / row["decode_ms"], 3), "prefill_ratio": round(row["prefill_s"] / prefill, 3)}


def _ready(model: Any, side: str) -> dict[str, Any]:
    """Give the model what one side needs and forget what was compiled; returns what generate() is told."""
    from kvsink.hf import install_generate
    from kvsink.model.runtime import detach

    for name in ("_compiled_call", "_last_compile_config"):
        vars(model).pop(name, None)
    torch._dynamo.reset()
    model.config._attn_implementation = "sdpa"
    model.generation_config.compile_config = model.generation_config.eos_token_id = None
    if side in CACHES:
        detach(model)
        return {"cache_implementation": side}
    rewritten(model, side)()
    install_generate(model)
    return {}


def _row(model: Any, side: str, b: int, t: int, steps: int, repeats: int, profile: Path | None) -> dict[str, Any]:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    options = _ready(model, side)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (b, t), generator=g).to(model.device)
    row: dict[str, Any] = {
        "kind": "generate",
        "side": side,
        "layers": model.config.num_hidden_layers,
        "B": b,
        "T": t,
        "decoded": steps,
        "dtype": str(model.dtype).removeprefix("torch."),
    }

    def run(tokens: int) -> None:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **options)
        assert out.shape[1] == t + tokens

    try:
        first = seconds(run, steps + 1)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        seconds(run, 1)
        prefill = sorted(seconds(run, 1) for _ in range(2 * repeats + 1))
        whole = sorted(seconds(run, steps + 1) for _ in range(repeats))
    except torch.OutOfMemoryError:
        return {**row, "note": "out of memory"}
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    if profile is not None:
        with open(profile, "a", encoding="utf-8") as file:
            file.write(f"{side}, B{b} T{t}, {row['layers']} layers\n{profile_text(lambda: run(1))}\n")
    held = prefill[len(prefill) // 2]
    step = (whole[len(whole) // 2] - held) / steps
    return {
        **row,
        "first_call_s": round(first, 2),
        "prefill_s": round(held, 5),
        "prefill_least_s": round(prefill[0], 5),
        "prefill_most_s": round(prefill[-1], 5),
        "whole_s": round(whole[len(whole) // 2], 5),
        "decode_ms": round(step * 1e3, 4),
        "tokens_per_s": round(b / step, 1),
        "peak_gib": round(peak, 2),
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[..., object], *args: Any) -> float:
    """Seconds of one call, with all that it started on a GPU."""
    _synchronize()
    begun = time.perf_counter()
    call(*args)
    _synchronize()
    return time.perf_counter() - begun


def profile_text(call: Callable[[], object]) -> str:
    """Where the time of a call goes: operators by their own time on the GPU and on the CPU, CUDA calls, Python functions.

    Each kind of profile is a call of its own, since one slows the other down.
    """
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    for warm in (True, False):  # the profiler itself starts slowly
        with profile(activities=activities) as traced:
            took = seconds(torch.ones, 1) if warm else seconds(call)
    averages = traced.key_averages()
    keys = ["self_cpu_time_total", *(["self_cuda_time_total"] if gpu else [])]
    tables = [averages.table(sort_by=key, row_limit=_LINES, max_name_column_width=80) for key in reversed(keys)]
    runtime = sorted(((e.count, e.key) for e in averages if re.match(r"cu(da)?[A-Z]", e.key)), reverse=True)
    launches = "  ".join(f"{name} {count}" for count, name in runtime)
    python = cProfile.Profile()
    python.runcall(seconds, call)
    parts = [f"{took * 1e3:.1f} ms under the profiler; CUDA calls: {launches or 'none'}", *tables]
    for order in ("tottime", "cumulative"):
        text = io.StringIO()
        pstats.Stats(python, stream=text).strip_dirs().sort_stats(order).print_stats(_LINES)
        parts.append(text.getvalue())
    return "\n".join(parts)


def generate_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    lines = [
        "| prompt | side | first call, s | prefill, s | of 16 bit | a token, ms | against 16 bit | peak, GiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        shape = f"| B{r['B']} T{r['T']} | `{r['side']}` |"
        if "decode_ms" not in r:
            lines.append(f"{shape} {r['note']} | | | | | |")
            continue
        prefill, decode = (f"{r[n]:.2f}x" if n in r else "" for n in ("prefill_ratio", "decode_speedup"))
        lines.append(
            f"{shape} {r['first_call_s']:.1f} | {r['prefill_s']:.4f} | {prefill} | {r['decode_ms']:.3f} | {decode} | "
            f"{r['peak_gib']:.1f} |"
        )
    return "\n".join(lines)
