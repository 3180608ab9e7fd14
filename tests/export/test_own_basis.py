"""Keys that are coded in a basis that is not orthogonal and come back by another table: exported graphs give each stage its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

import kvsink
from kvsink.export import OnnxGenerator, onnx, past
from kvsink.model.runtime import runtime_of
from tests.graphs import rewritten
from tests.models import build


def in_eight_bits() -> kvsink.Method:
    """Keys by the metric of attention in scalar levels, which have eight bits."""
    m = kvsink.get_method("klt")
    key, value = m.side("key", 8), m.side("value", 8)
    return replace(m, key=replace(key, metric="attention"), value=value, key_above=None, value_above=None, key_bits=8, value_bits=8)


def is_orthogonal(model: Any) -> bool:
    basis = runtime_of(model).tables["layers.0.k_basis"]
    return bool((basis.mT @ basis - torch.eye(basis.shape[-1])).abs().max() < 0.1)


def logits(path: Path) -> Any:
    """Of twelve tokens behind a coded past of 48."""
    runner, ids, ones = OnnxGenerator(path), (np.arange(60)[None] * 7 + 5) % 97, np.ones((1, 60), dtype=np.int64)
    at = np.arange(60)[None]
    _, held = runner.step(ids[:, :48], ones[:, :48], at[:, :48], runner.empty(1))
    return runner.step(ids[:, 48:], ones, at[:, 48:], held)[0]


def test_keys_come_back_near_those_of_the_stock_model(tmp_path: Path) -> None:
    """By the basis they were coded in they do not."""
    model = rewritten("llama", method=in_eight_bits())
    assert not is_orthogonal(model)
    with torch.no_grad():
        stock = build("llama")((torch.arange(60)[None] * 7 + 5) % 97).logits[:, 48:].numpy()
    onnx(model, tmp_path / "right.onnx")
    tables = runtime_of(model).tables
    tables.update({f"layers.{i}.k_unbasis": tables[f"layers.{i}.k_basis"] for i in range(2)})
    onnx(model, tmp_path / "wrong.onnx")
    right, wrong = (np.abs(logits(tmp_path / name) - stock).max() for name in ("right.onnx", "wrong.onnx"))
    assert right <= 0.02 * np.abs(stock).max() and wrong > 5 * right


@pytest.mark.parametrize("method", ["wush", pytest.param("tasq", marks=pytest.mark.slow)])
def test_methods_with_bases_of_their_own(method: str, tmp_path: Path) -> None:
    """Standard operators alone: keys after RoPE in ranges that end at a quantile, keys in groups with one norm a token."""
    model = rewritten("llama", method=method, window=0, protect="first:2")
    assert not is_orthogonal(model)
    found = onnx(model, tmp_path / "model.onnx")["check"]
    assert found["packed_bytes"] > 1000 and found["different_bytes"] == 0 and found["largest_logit_difference"] < 1e-5


@pytest.mark.parametrize("bits", [2, 1.25])
@pytest.mark.parametrize("flavour", ["functions", "custom"])
def test_walks_and_codebooks_in_such_a_basis(flavour: str, bits: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single nodes, and the one node that reads a past from its codes, each beside the torch model step by step."""
    model = rewritten("llama", method="klt", key_bits=bits, value_bits=bits)
    assert not is_orthogonal(model)
    monkeypatch.setattr(past, "takes_packed", lambda c: True)
    found = onnx(model, tmp_path / "model.onnx", flavour)["check"]
    assert found["packed_bytes"] > 1000 and found["different_bytes"] == 0 and found["largest_logit_difference"] < 1e-5
