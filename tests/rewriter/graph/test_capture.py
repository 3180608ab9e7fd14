"""Captured graphs compute what the model computes, for every cache, and say where their inputs came from."""

from __future__ import annotations

import pytest
import torch

from kvsink.errors import UnsupportedError
from kvsink.graph.capture import capture, capture_all, capture_export
from tests.close import SOFTMAX_IN_FLOAT32, largest_difference
from tests.graphs import run, stock_graph
from tests.models import FAMILIES, build, stock_cache, tokens


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_one_graph_with_the_model_s_outputs(cache: str) -> None:
    model = build("llama")
    with torch.no_grad():
        wanted = model(tokens(length=5, seed=5), past_key_values=stock_cache(cache, model)).logits
    outputs, _ = run(stock_graph("llama", "sdpa", cache, 5))
    assert min(largest_difference(out, wanted) for out in outputs if out.shape == wanted.shape) <= SOFTMAX_IN_FLOAT32


def test_placeholders_keep_their_origin() -> None:
    gm = stock_graph("llama", "sdpa", "static", 1)
    sources = [node.meta["kvsink_source"] for node in gm.graph.find_nodes(op="placeholder")]
    assert any(source.endswith("layers[1].values") for source in sources)


def test_running_a_captured_graph_leaves_its_inputs() -> None:
    gm = stock_graph("llama", "sdpa", "static", 1)
    first, second = run(gm), run(gm)
    assert largest_difference(first, second) == 0.0


def test_several_graphs_are_named() -> None:
    class Broken(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            doubled = input_ids * 2
            torch._dynamo.graph_break()
            return doubled + 1

    assert len(capture_all(Broken(), tokens())) == 2
    with pytest.raises(UnsupportedError, match="Broken was captured in 2 graphs, not one"):
        capture(Broken(), tokens())


@pytest.mark.parametrize(
    "family",
    [f if f in ("llama", "gpt2", "gemma3") else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "mistral"],
)
def test_an_export_serves_other_sizes(family: str) -> None:
    model = build(family)
    gm = capture_export(model)
    ids = tokens(1, 7, seed=3)
    empty = [torch.empty(1, past.shape[1], 0, past.shape[3]) for past in gm.meta["kvsink_inputs"]["past"]]
    with torch.no_grad():
        out = gm(input_ids=ids, attention_mask=torch.ones(1, 7, dtype=torch.long), position_ids=torch.arange(7)[None], past=empty)
        wanted = model(ids).logits
    assert (out[0] - wanted).abs().max() <= SOFTMAX_IN_FLOAT32
