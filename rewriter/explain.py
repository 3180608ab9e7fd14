"""`kvsink.explain(model)`: one attention site before and after the passes, which kernels serve every layer and why no faster ones
do, then every layer left alone and why, as text."""

from __future__ import annotations

import torch
from torch import nn
from transformers.cache_utils import StaticCache

from kvsink.cache.cache import KVSinkCache
from kvsink.cache.served import served_lines
from kvsink.graph.capture import capture_all
from kvsink.graph.pipeline import explain_graph
from kvsink.model.offload import number_of, place_of
from kvsink.model.passing import given_cache

__all__ = ["explain"]

_SLOTS, _PROMPT = 64, 4


def explain(model: nn.Module, onnx: bool = False) -> str:
    """What the compiler does to one decoding step of `model`: rewritten models on their packed cache, others on a stock one.

    Runs a few tokens. The graph shown last is the one that is compiled. onnx: also whether the model leaves as ONNX, or why not.
    """
    device = place_of(model)
    runtime = getattr(model, "_kvsink_runtime", None)
    if runtime is not None:
        cache = KVSinkCache.for_model(model, batch_size=1, max_length=_SLOTS)
    else:
        cache = StaticCache(model.config.get_text_config(decoder=True), max_cache_len=_SLOTS)  # type: ignore[union-attr, operator]
    ids = torch.zeros(1, _PROMPT, dtype=torch.int64, device=device)
    torch._dynamo.reset()
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **given_cache(model, cache))
    lines = [explain_graph(gm) for gm in capture_all(model, ids[:, :1], cache)]
    torch._dynamo.reset()
    if runtime is not None:
        lines += served_lines(runtime, number_of(model).dtype, device)
        for layer, plan in enumerate(runtime.plans):
            if plan.codec is None:
                lines.append(f"left alone: {runtime.anatomy.attentions[layer]}: {plan.reason}")
        if onnx:
            from kvsink.export.flavours import explain_flavours

            lines.append(explain_flavours(model, runtime))
    return "\n".join(line for line in lines if line)
