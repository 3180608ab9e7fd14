"""Keys that are coded in a basis that is not orthogonal and come back by another table: exported graphs give each stage its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

from kvsink.codecs import Codec, codec
from kvsink.codecs.steps import Stage, stages_back
from kvsink.export import ExportError, OnnxGenerator, flavours, onnx, past
from kvsink.model.runtime import runtime_of
from tests.graphs import rewritten
from tests.models import build

WORD = "a basis of its own"
NAMES, BEYOND = Codec.param_names, codec._beyond


def _names(c: Codec) -> tuple[str, ...]:
    """Behind every basis of keys, the table that takes it back."""
    return tuple(name for known in NAMES(c) for name in ((known, "k_unbasis") if known == "k_basis" else (known,)))


def _back(s: Any, prefix: str, own: bool = False) -> tuple[Stage, ...]:
    def other(stage: Stage) -> Stage:
        def run(do: Any, x: Any, at: Any) -> Any:
            return stage.run(do, x, replace(at, tables={**at.tables, "k_basis": at.tables["k_unbasis"]}))

        return replace(stage, run=run)

    return tuple(other(stage) if prefix == "k" and s.transform == "klt" else stage for stage in stages_back(s, prefix, own))


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What is changed of codecs, with none left that was read before or meanwhile."""
    yield monkeypatch
    monkeypatch.undo()
    Codec.parse.cache_clear()


def skewed(bits: int, patch: pytest.MonkeyPatch) -> Any:
    """A tiny Llama whose keys are coded in U A for a random A of condition 4, with deviations that follow, and read back by
    `k_unbasis`: k^ = z^ k_unbasis^T. Kernels are told of a word that they do not know, so that definitions run."""
    runtime = runtime_of(model := rewritten("llama", method="klt-trellis", key_bits=bits, value_bits=bits))
    tables = runtime.tables
    for i in range(len(runtime.plans)):
        basis, sigma = tables[f"layers.{i}.k_basis"].double(), tables[f"layers.{i}.k_sigma"].double()
        u, _, v = torch.linalg.svd(torch.randn(basis.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
        a = u @ torch.diag_embed(torch.linspace(0.5, 2.0, basis.shape[-1], dtype=torch.float64)) @ v
        there = basis @ a
        tables[f"layers.{i}.k_basis"] = there.float()
        tables[f"layers.{i}.k_unbasis"] = torch.linalg.inv(there).mT.float().contiguous()
        tables[f"layers.{i}.k_sigma"] = (sigma[:, :, None] * a).square().sum(1).sqrt().float()
    patch.setattr(Codec, "param_names", _names)
    patch.setattr(codec, "stages_back", _back)
    patch.setattr(codec, "_beyond", lambda s, prefix: (*BEYOND(s, prefix), *((WORD,) if s.transform == "klt" else ())))
    Codec.parse.cache_clear()
    runtime.plans = tuple(replace(plan, codec=replace(plan.codec)) for plan in runtime.plans)
    return model


def logits(path: Path) -> Any:
    """Of twelve tokens behind a coded past of 48."""
    runner, ids, ones = OnnxGenerator(path), (np.arange(60)[None] * 7 + 5) % 97, np.ones((1, 60), dtype=np.int64)
    at = np.arange(60)[None]
    _, held = runner.step(ids[:, :48], ones[:, :48], at[:, :48], runner.empty(1))
    return runner.step(ids[:, 48:], ones, at[:, 48:], held)[0]


def test_keys_come_back_near_those_of_the_stock_model(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    """In 8 bits; by the basis they were coded in they do not."""
    model = skewed(8, patch)
    with pytest.raises(ExportError, match=f"'{WORD}' of keys has no node"):
        onnx(model, tmp_path / "right.onnx")
    patch.setattr(flavours, "CARRIED", (WORD,))
    with torch.no_grad():
        stock = build("llama")((torch.arange(60)[None] * 7 + 5) % 97).logits[:, 48:].numpy()
    onnx(model, tmp_path / "right.onnx")
    tables = runtime_of(model).tables
    tables.update({f"layers.{i}.k_unbasis": tables[f"layers.{i}.k_basis"] for i in range(2)})
    onnx(model, tmp_path / "wrong.onnx")
    right, wrong = (np.abs(logits(tmp_path / name) - stock).max() for name in ("right.onnx", "wrong.onnx"))
    assert right <= 0.02 * np.abs(stock).max() and wrong > 5 * right


@pytest.mark.parametrize("flavour", ["functions", "custom"])
def test_walks_in_such_a_basis(flavour: str, tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    """Single nodes, and the one node that reads a past from its codes, each beside the torch model step by step."""
    model = skewed(2, patch)
    patch.setattr(flavours, "CARRIED", (WORD,))
    patch.setattr(past, "takes_packed", lambda c: True)
    found = onnx(model, tmp_path / "model.onnx", flavour)["check"]
    assert found["packed_bytes"] > 1000 and found["different_bytes"] == 0 and found["largest_logit_difference"] < 1e-5
