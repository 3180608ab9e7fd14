"""nn.Module -> FX graph, as `torch.compile` or `torch.export` would hand it over; for inspection, export and tests.

Dynamo     torch-level operators before autograd, in-place cache writes kept, weights lifted to placeholders
Export     ATen operators, past keys and values as explicit inputs and outputs, sizes dynamic
Metadata   the values a graph was traced with are in `gm.meta["kvsink_inputs"]` (a list; of an export, by name), the
           origin of a placeholder (`L['kwargs']['cache'].layers[0].keys`) in `node.meta["kvsink_source"]`, since dynamo
           clears its own record
Differs    gradients are off; a captured graph is never trained
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from kvsink.errors import UnsupportedError
from kvsink.model.passing import given_cache

_NEVER_RETRACE_LIMIT: dict[str, Any] = {"recompile_limit": 10_000, "accumulated_recompile_limit": 100_000}


def capture(model: nn.Module, inputs: Tensor | dict[str, Any], cache: Any = None, dynamic: bool | None = False) -> fx.GraphModule:
    """The one dynamo graph of `model(**inputs, cache=cache)`; the call is carried out: `cache` advances."""
    graphs = capture_all(model, inputs, cache, dynamic)
    if len(graphs) != 1:
        raise UnsupportedError(f"{type(model).__name__} was captured in {len(graphs)} graphs, not one; use capture_all to see each")
    return graphs[0]


def capture_all(
    model: nn.Module, inputs: Tensor | dict[str, Any], cache: Any = None, dynamic: bool | None = False
) -> list[fx.GraphModule]:
    """Every dynamo graph of one call, in order; more than one means that Python between them could not be traced."""
    graphs: list[fx.GraphModule] = []

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        note_sources(gm)
        gm.meta["kvsink_inputs"] = [_snapshot(value) for value in example_inputs]
        graphs.append(gm)
        return gm.forward

    arguments: dict[str, Any] = dict(inputs) if isinstance(inputs, dict) else {"input_ids": inputs}
    if cache is not None:
        arguments |= {**given_cache(model, cache), "use_cache": True}
    elif "use_cache" not in arguments and hasattr(model, "config"):
        arguments["use_cache"] = False
    with torch.no_grad(), torch._dynamo.config.patch(**_NEVER_RETRACE_LIMIT):
        torch.compile(model, backend=record, dynamic=dynamic)(**arguments)
    if not graphs:
        raise UnsupportedError(
            f"dynamo traced nothing of {type(model).__name__}: it was compiled too often in this process; "
            "call torch._dynamo.reset() first"
        )
    return graphs


def note_sources(gm: fx.GraphModule) -> None:
    """Keep where each placeholder came from; only possible inside the backend call."""
    for node in gm.graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        name = getattr(source, "name", None)
        if name is not None:
            node.meta["kvsink_source"] = name() if callable(name) else name


class ExplicitPast(nn.Module):
    """A causal language model whose cache is plain tensors: (ids, mask, positions, past...) -> (logits, present...)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]) -> list[Tensor]:
        from transformers import DynamicCache

        cache = DynamicCache()  # without a config: a sliding layer would put a guard on the length of the past
        layers = len(past) // 2
        for layer, (keys, values) in enumerate(zip(past[:layers], past[layers:], strict=True)):
            cache.layers.append(cache.layer_class_to_replicate())
            cache.layers[layer].lazy_initialization(keys, values)
            cache.layers[layer].keys, cache.layers[layer].values = keys, values  # update() would add cat([], past)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **given_cache(self.model, cache),
        )
        return [out.logits, *(layer.keys for layer in cache.layers), *(layer.values for layer in cache.layers)]


def export_inputs(model: nn.Module, batch: int = 2, length: int = 3, past: int = 5) -> dict[str, Any]:
    """Example inputs of `ExplicitPast(model)`; head counts are those of a real cache."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config(decoder=True).vocab_size  # type: ignore[union-attr, operator]
    ids = torch.arange(3, 3 + past + length, device=device).expand(batch, -1) % vocabulary
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :past], use_cache=True, **given_cache(model, cache))
    return {
        "input_ids": ids[:, past:],
        "attention_mask": torch.ones(batch, past + length, dtype=torch.long, device=device),
        "position_ids": torch.arange(past, past + length, device=device).expand(batch, length).contiguous(),
        "past": [layer.keys for layer in cache.layers] + [layer.values for layer in cache.layers],
    }


def capture_export(model: nn.Module, inputs: dict[str, Any] | None = None) -> fx.GraphModule:
    """The ATen graph of `ExplicitPast(model)`, every batch, length and past dynamic; its guard call is removed."""
    arguments = inputs or export_inputs(model)
    axis = torch.export.Dim.DYNAMIC
    shapes: dict[str, Any] = {name: {0: axis, 1: axis} for name in ("input_ids", "attention_mask", "position_ids")}
    shapes["past"] = [{0: axis, 2: axis} for _ in arguments["past"]]
    with torch.no_grad():
        program = torch.export.export(ExplicitPast(model), (), kwargs=arguments, dynamic_shapes=shapes, strict=False)
    gm = program.module()
    for node in gm.graph.find_nodes(op="call_module"):
        if node.target == "_guards_fn":
            gm.graph.erase_node(node)
    gm.recompile()
    gm.meta["kvsink_inputs"] = dict(arguments)
    return gm


def _snapshot(value: Any) -> Any:
    """A tensor the call may write gets a copy; weights and sizes are kept as they are."""
    return value.clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value
