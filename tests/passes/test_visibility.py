"""A decode step whose mask hides nothing but the future attends without one; any other mask is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from kvsink.cache.cache import KVSinkCache
from kvsink.graph.targets import kind
from kvsink.passes.visibility import only_causal

from ..kernels.cuda.test_tiles import model_of


def _masks(graph: fx.Graph) -> list[Any]:
    return [n.args[7] for n in graph.nodes if kind(n) == "kvsink.append_attend_"]


@pytest.mark.parametrize("given", ["none", "causal", "padding", "window"])
def test_only_a_mask_that_hides_the_future_alone_is_left_out(given: str, seen: list[fx.Graph]) -> None:
    model, slots, held = model_of(2), 128, 9
    ids = torch.randint(3, 97, (2, held + 1), generator=torch.Generator().manual_seed(1))
    place = torch.arange(slots)
    masks = {
        "none": None,
        "causal": (place <= held)[None, None, None].expand(2, 1, 1, -1),  # made outside: may say anything
        "padding": torch.ones(2, held + 1, dtype=torch.int64),
        "window": ((place <= held) & (place > held - 5))[None, None, None].expand(2, 1, 1, -1),
    }
    results = []
    for call in (model, torch.compile(model, backend="kvsink", options={"kvsink.inner": "eager"}, fullgraph=True)):
        torch._dynamo.reset()
        cache = KVSinkCache.for_model(model, 2, max_length=slots, tiles=True)
        with torch.no_grad():
            model(ids[:, :held], past_key_values=cache)
            out = call(ids[:, held:], attention_mask=masks[given], position_ids=torch.tensor([[held]]), past_key_values=cache)
        results.append(out.logits)
    found = _masks(seen[-1])
    assert found and all((m is None) == (given == "none") for m in found)
    assert (results[0] - results[1]).abs().max() <= 1e-4 * results[0].abs().max()


def _graph(build: Any) -> tuple[Any, fx.Node]:
    graph = fx.Graph()
    length = graph.placeholder("length")
    length.meta["example_value"] = torch.zeros((), dtype=torch.int64)
    return build(graph, length), length


def _mask(g: fx.Graph, length: fx.Node, *, first: int = 0, compare: str = "le", new: int = 1, shift: int = 0) -> fx.Node:
    def put(value: torch.Tensor, target: Any, *args: Any) -> fx.Node:
        node = g.call_function(target, args)
        node.meta["example_value"] = value
        return node

    import operator

    held = put(torch.zeros(64), torch.arange, *((first, 64 + first) if first else (64,)))
    held = put(torch.zeros(64), operator.add, held, shift)
    asking = put(torch.zeros(new), operator.add, put(torch.zeros(new), torch.arange, new), length)
    held = put(torch.zeros(1, 1, 1, 64), operator.getitem, held, (None, None, None, slice(None)))
    asking = put(torch.zeros(1, 1, new, 1), operator.getitem, asking, (None, None, slice(None), None))
    return put(torch.zeros(1, 1, new, 64, dtype=torch.bool), getattr(operator, compare), held, asking)


def test_what_the_mask_must_be() -> None:
    def verdict(lengths: int = 1, **change: Any) -> bool:
        mask, length = _graph(lambda g, n: _mask(g, n, **change))
        return only_causal(mask, 64, [length] * lengths)

    assert verdict()
    assert not verdict(lengths=0)  # the length of something else
    assert not verdict(first=1)
    assert not verdict(shift=3)
    assert not verdict(compare="lt")
    assert not verdict(new=2)
    mask, length = _graph(_mask)
    assert not only_causal(mask, 65, [length]) and not only_causal(None, 64, [length])
