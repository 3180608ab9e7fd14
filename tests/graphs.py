"""Captured graphs for the tests of sites and passes: run them on copies, look at single values, build packed ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .models import HEAD_DIM, KV_HEADS, build, stock_cache, tokens

PAST = 13
"""Tokens in the cache before a captured step: more than one window of the sliding models."""


def inputs_of(gm: fx.GraphModule) -> list[Any]:
    """Fresh copies of the values a dynamo graph was captured with; weights are shared."""
    return [
        value.clone() if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) else value
        for value in gm.meta["kvsink_inputs"]
    ]


def run(gm: fx.GraphModule) -> tuple[list[Tensor], list[Any]]:
    """Outputs of the graph, and its inputs after the call: caches are written in place."""
    inputs = inputs_of(gm)
    with torch.no_grad():
        out = gm(*inputs)
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor)], inputs


class _Recorder(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.seen[n] = result.clone() if isinstance(result, Tensor) else result
        return result


def values_of(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """What every node computes, as it was right after the node ran."""
    recorder = _Recorder(gm)
    with torch.no_grad():
        recorder.run(*inputs_of(gm))
    return recorder.seen


def stock_graph(family: str, attention: str, cache: str, length: int, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """A step of `length` tokens over a stock cache; a step of one token has `PAST` tokens before it."""
    from kvsink.graph.capture import capture

    model = build(family, attention, dtype)
    held = stock_cache(cache, model)
    if held is not None and length == 1:
        with torch.no_grad():
            model(tokens(length=PAST), past_key_values=held)
    return capture(model, tokens(length=length, seed=5), held)


def rewritten(family: str, attention: str = "sdpa", method: str = "klt", **options: Any) -> Any:
    """A tiny model rewritten by a method, calibrated on random tokens."""
    import kvsink

    model = build(family, attention)
    windows = options.pop("windows", None)
    kvsink.rewrite(model, method=method, calibration=text_for(method, windows, **options), **options)
    return model


def text_for(method: Any, windows: int | None = None, **options: Any) -> Tensor:
    """Random tokens that a method is calibrated on: eight texts of 64, or as many as its codebooks ask for, and longer ones where
    all of 64 would stay exact."""
    from kvsink.codecs.quantizers import QUANTIZERS
    from kvsink.errors import KvsinkError
    from kvsink.methods import get_method

    m, needs = get_method(method) if isinstance(method, str) else method, [0]
    protect = options.get("protect") or m.protect
    try:
        sides = m.side("key", options.get("key_bits") or m.key_bits), m.side("value", options.get("value_bits") or m.value_bits)
        needs = [QUANTIZERS[s.kind].learns(s) for side in sides if (s := side.resolved(KV_HEADS, HEAD_DIM)).packed]
    except KvsinkError:
        pass  # the rewrite will say so
    first = max((int(part[6:]) for part in protect.split("+") if part.startswith("first:")), default=0)
    return tokens(windows or max(8, -(-max(needs, default=0) // 60)), 64 + (first if first >= 64 else 0), seed=1)


def packed_graph(
    family: str, attention: str = "sdpa", method: str = "klt", length: int = 1, batch: int = 1, strict: bool = False, **options: Any
) -> fx.GraphModule:
    """The same step over kvsink's own cache, with its append and read markers."""
    import kvsink
    from kvsink.graph.capture import capture

    model = rewritten(family, attention, method, **options)
    cache = kvsink.KVSinkCache.for_model(model, batch, max_length=64, strict=strict)
    if length == 1:
        with torch.no_grad():
            model(tokens(batch, PAST), past_key_values=cache)
    return capture(model, tokens(batch, length, seed=5), cache)


def generated_graph(model: Any, given: dict[str, Tensor]) -> fx.GraphModule:
    """The step behind a prompt as `generate()` of a rewritten model compiles it: masks, and positions of pictures, come ready."""
    from transformers import CompileConfig

    import kvsink
    from kvsink.graph.capture import note_sources

    graphs: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        note_sources(gm)
        graphs.append(gm)
        return gm.forward

    config = CompileConfig(backend=record, fullgraph=True, mode=None)
    config._compile_all_devices = True
    cache = kvsink.KVSinkCache.for_model(model, len(given["input_ids"]), max_length=128)
    torch._dynamo.reset()
    with torch.no_grad():
        model.generate(**given, past_key_values=cache, compile_config=config, max_new_tokens=2, do_sample=False)
    torch._dynamo.reset()
    (graph,) = graphs
    return graph


def plan_of(model: Any) -> Any:
    """A rewritten model's codecs as a plan for stock caches."""
    from kvsink.model.runtime import runtime_of
    from kvsink.passes.chain import SitePlan

    runtime = runtime_of(model)

    def plan(site: Any) -> SitePlan | None:
        layer = runtime.plans[site.layer]
        if layer.codec is None:
            return None
        tables = runtime.params(site.layer, layer.codec, 128, torch.device("cpu"))
        named = dict(zip(layer.codec.param_names(), tables, strict=True))
        return SitePlan(layer.codec, named, layer.segments, {stage.block: stage.channels for stage in runtime.stages})

    return plan
