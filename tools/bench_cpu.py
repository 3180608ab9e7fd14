"""`kvsink-bench cpu`: decoding on this machine's processor behind a long prompt, beside the same model in 16 bit and in float32.

Formula    median time of a step of one token; the prompt is fed in chunks through each side's own cache
Shapes     one sequence; weights in float32 for kvsink and its float32 baseline, bfloat16 for the other
Differs    both baselines run eagerly through transformers' own SDPA attention on a DynamicCache
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvsink.model.passing import given_cache

__all__ = ["cpu_rows"]

_CHUNK = 512


def cpu_rows(
    name: str,
    method: str,
    key_bits: float | None,
    value_bits: float | None,
    tokens: int,
    steps: int,
    compiled: bool,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One row per side: kvsink eager (and compiled), float32 and bfloat16 on a DynamicCache."""
    from transformers import DynamicCache

    import kvsink
    from kvsink.evaluate.evaluation import token_windows
    from kvsink.evaluate.texts import evaluation_text
    from kvsink.folder.demo import resolve_model_dir
    from kvsink.folder.loading import load_model, load_tokenizer

    folder = resolve_model_dir(name)
    ids = token_windows(evaluation_text(), load_tokenizer(folder), 1, tokens + steps)
    rows = []

    def measured(side: str, model: nn.Module, cache: Any, step: Callable[..., Any]) -> None:
        times = step_times(model, step, cache, ids, tokens, steps)
        row = {
            "kind": "cpu",
            "side": side,
            "model": name,
            "B": 1,
            "T": tokens,
            "threads": torch.get_num_threads(),
            "p20_ms": round(times[len(times) // 5] * 1e3, 2),
            "p50_ms": round(times[len(times) // 2] * 1e3, 2),
            "p80_ms": round(times[len(times) * 4 // 5] * 1e3, 2),
            "torch": torch.__version__,
        }
        rows.append(row)
        say("  ".join(f"{k}={v}" for k, v in row.items()))

    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder, "cpu").to(dtype)
        measured(str(dtype).removeprefix("torch."), model, DynamicCache(config=model.config), model)
    model = load_model(folder, "cpu").to(torch.float32)
    kvsink.rewrite(model, method, key_bits=key_bits, value_bits=value_bits)
    slots = -(-(tokens + steps) // 256) * 256
    label = f"{method} {key_bits or ''}/{value_bits or ''}".strip(" /")
    measured(label, model, kvsink.KVSinkCache.for_model(model, 1, slots), model)
    if compiled:
        step = torch.compile(model, backend="kvsink", fullgraph=True)
        measured(f"{label} compiled", model, kvsink.KVSinkCache.for_model(model, 1, slots), step)
    return rows


def step_times(model: nn.Module, step: Callable[..., Any], cache: Any, ids: Tensor, tokens: int, steps: int) -> list[float]:
    """Seconds of each step behind the prompt, sorted; the first two warm up and do not count."""
    given = {**given_cache(model, cache), "use_cache": True}
    times = []
    with torch.no_grad():
        for start in range(0, tokens, _CHUNK):
            model(ids[:, start : min(start + _CHUNK, tokens)], logits_to_keep=1, **given)
        for i in range(tokens, tokens + steps):
            begun = time.perf_counter()
            step(ids[:, i : i + 1], **given)
            times.append(time.perf_counter() - begun)
    return sorted(times[2:])
