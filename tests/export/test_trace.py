"""The short way from a module to a graph: the same numbers as the module, and torch's decompositions where they are needed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

from kvsink.export import onnx
from kvsink.export.graph import build_graph
from kvsink.export.trace import trace
from tests.graphs import rewritten


class _Shapes(nn.Module):
    """Casts that do something and casts that do not, `&`, axes as one and as several."""

    def forward(self, x: Tensor) -> Tensor:
        seen = (x.to(torch.float32) > 0) & (x.double() < 1.0)
        y = x.unflatten(-1, (-1, 2)) * seen.unflatten(-1, (3, 2)).to(torch.float32)
        return y.flatten(-2) + y.flatten(1, 2).mean((1, 2))[:, None, None] + x.flatten(0, 1).unflatten(0, x.shape[:2])


class _InPlace(nn.Module):
    """Rows written through a view: the tensor behind it changes."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2.0
        y[:, 1:].copy_(x[:, 1:])
        y.select(1, 0).add_(1.0)
        return y


def _ran(module: nn.Module, x: Tensor) -> Any:
    import onnx_ir as ir
    import onnxruntime

    axis = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        model = trace(module, {"x": x}, {"x": {0: axis, 1: axis}}, 18, {})
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    other = torch.cat([x, x + 0.3, x - 1.0])[:, 1:]  # of other lengths
    return model, [(session.run(None, {"x": given.numpy()})[0], module(given.clone()).numpy()) for given in (x, other)]


def test_numbers_are_those_of_the_module(monkeypatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("nothing here needs decomposing")

    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patch:
        patch.setattr(torch.export.ExportedProgram, "run_decompositions", never)
        with pytest.raises(AssertionError, match="nothing here"):
            torch.export.export(nn.Identity(), (x,)).run_decompositions()
        build_graph(rewritten("llama", method="static"), 18, 64, "gqa")
    _, pairs = _ran(_Shapes(), x)
    for here, there in pairs:
        assert here.shape == there.shape and np.abs(here - there).max() < 1e-6


def test_what_writes_in_place_is_decomposed() -> None:
    for here, there in _ran(_InPlace(), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1)))[1]:
        assert here.shape == there.shape and np.array_equal(here, there)


def test_an_export_warns_of_no_old_names(tmp_path) -> None:
    model = rewritten("llama", method="static")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        onnx(model, tmp_path / "model.onnx", "gqa")
    assert not [w for w in told if "past_key_values" in str(w.message)]


@pytest.mark.parametrize(("method", "flavour"), [("klt", "functions"), ("static", "gqa")])
def test_keys_that_turn_in_pairs(method: str, flavour: str, tmp_path) -> None:
    """Neighbouring channels of Cohere make a pair: the graph codes them in the order in which the torch cache does."""
    from kvsink.tools.families import rewritten as of_family

    model, _ = of_family("cohere", method, torch.float32, protect="first:1" if flavour == "functions" else "none")
    found = onnx(model, tmp_path / "model.onnx", flavour)["check"]
    assert found["different_bytes"] == 0 and found["largest_logit_difference"] < 1e-5 and found["packed_bytes"] > 1000
