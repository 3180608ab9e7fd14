"""One model of `kvsink-eval --images`: answers and perplexity on pictures with text, beside 16 bit, and the plot of attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from kvsink.evaluate import evaluation
from kvsink.evaluate.imagetext import load_processor, prompts, read_examples
from kvsink.evaluate.vision import attention_shares, evaluate_pictures, remember
from kvsink.folder.demo import resolve_model_dir
from kvsink.folder.loading import load_model

__all__ = ["measure_pictures"]


def measure_pictures(
    model: str,
    source: str,
    device: str,
    dtype: str,
    strict: bool,
    plot: str | None,
    chunk: int,
    bar: Callable[[str], Callable[[int, int], None]],
) -> list[Any]:
    """The row at 16 bit, and for a rewritten folder that of its packed cache, with bits by modality."""
    examples = read_examples(source, held_back=True)
    folder = resolve_model_dir(model)
    processor, net = load_processor(folder), load_model(folder, device, dtype)
    seen = prompts(examples, processor, net)
    options: dict[str, Any] = {"chunk": chunk, "model_name": model, "data": source}
    stock = evaluate_pictures(net, seen, cache_factory=evaluation.dynamic_cache, method="16 bit", progress=bar("16 bit"), **options)
    rows = [stock]
    if evaluation.is_rewritten(net):
        factory = partial(evaluation.packed_cache, strict=strict)
        found = remember(net, seen, chunk)
        rows.append(evaluate_pictures(net, seen, cache_factory=factory, reference=found, progress=bar("packed"), **options))
    if plot is not None:
        from kvsink.tools.vision_plot import plot_shares

        total = sum(len(p.visual) for p in seen)
        visual = sum(int(p.visual.sum()) for p in seen) / total
        counted = {"visual": visual, "first": len(seen) / total, "text": 1 - visual - len(seen) / total}
        plot_shares(attention_shares(net, seen[:16]), counted, Path(plot), f"Attention in {Path(model).name}, {source}")
    return rows
