"""Norms and rotations as one operator: where they are, where they are not, and the same numbers as the module."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

from kvsink.export import OnnxGenerator, onnx
from kvsink.export.graph import build_graph
from kvsink.export.trace import trace
from kvsink.tools.families import rewritten

HEADS, DIM, WIDTH = 2, 8, 16
FUSED = ("RMSNormalization", "RotaryEmbedding", "SkipSimplifiedLayerNormalization")


class _Layer(nn.Module):
    """A residual, a norm of it and a rotation, each as transformers spells them, or `odd` in one way."""

    def __init__(self, odd: str = "") -> None:
        super().__init__()
        self.odd, self.scale = odd, nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.linspace(1.0, 0.1, DIM // 2))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions[..., None].float() * self.frequencies
        if self.odd == "one row for all":
            angles = angles[:1]
        if self.odd == "one position":
            angles = angles[:, -1:]
        angles = torch.cat([angles, angles * 2.0 if self.odd == "halves differ" else angles], dim=-1)
        times = 2.0 if self.odd == "scaled" else 1.0
        cos, sin = ((f(angles) * times).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))
        total = x + (x[:, :1] if self.odd == "broadcast" else x.tanh())
        wide = total.float()
        norm = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        scale = self.scale[:1] if self.odd == "one scale" else self.scale
        wide_scale = self.odd == "wide scale"
        rows = ((1.0 + scale.float()) * norm).to(x.dtype) if wide_scale else scale * norm.to(x.dtype)
        rows = rows.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        half = DIM // 2 - (self.odd == "unequal halves")
        turned = torch.cat([-rows[..., half:], rows[..., :half]], dim=-1)
        return (rows * cos + turned * sin).transpose(1, 2).flatten(2) + total


@pytest.mark.parametrize(
    ("odd", "runtime", "counts"),
    [
        ("", False, (1, 1, 0)),
        ("", True, (0, 1, 1)),
        ("scaled", True, (0, 1, 1)),
        ("broadcast", True, (1, 1, 0)),
        ("halves differ", True, (0, 0, 1)),
        ("unequal halves", True, (0, 0, 1)),
        ("one row for all", True, (0, 0, 1)),
        ("one position", True, (0, 0, 1)),
        ("one scale", True, (1, 1, 0)),
        ("wide scale", False, (1, 1, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_fused_says_what_the_module_says(odd: str, runtime: bool, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    import onnx_ir as ir
    import onnxruntime

    torch.manual_seed(0)
    module, axis = _Layer(odd).to(dtype), torch.export.Dim.DYNAMIC
    x, positions = torch.randn(2, 3, WIDTH).to(dtype), torch.tensor([[0, 1, 2], [4, 5, 6]])
    positions = positions[:1].expand(2, 3).contiguous() if odd == "one row for all" else positions
    shapes: dict[str, Any] = {"x": {0: axis, 1: axis}, "positions": {0: axis, 1: axis}}
    with torch.no_grad():
        model = trace(module, {"x": x, "positions": positions}, shapes, 24, {}, runtime)
    model.graph.opset_imports["com.microsoft"] = 1
    found = Counter(node.op_type for node in model.graph)
    assert tuple(found[name] for name in FUSED) == counts
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    (got,) = session.run(None, {"x": x.numpy(), "positions": positions.numpy()})
    wanted = module.double()(x.double(), positions).detach()
    assert (torch.from_numpy(got).double() - wanted).abs().max() < {torch.float32: 1e-5, torch.float16: 3e-2}[dtype]


def test_opset_18_has_neither() -> None:
    module, axis = _Layer(), torch.export.Dim.DYNAMIC
    given = {"x": torch.randn(2, 3, WIDTH), "positions": torch.arange(6).reshape(2, 3)}
    model = trace(module, given, {name: {0: axis, 1: axis} for name in given}, 18, {})
    assert not {node.op_type for node in model.graph} & set(FUSED)


@pytest.mark.parametrize(
    ("family", "norms", "rotations"),
    [("llama", 5, 4), ("gemma3", 13, 4), ("smollm3", 5, 2), ("cohere", 0, 0)],  # the last: a mean leaves, neighbours turn
)
def test_families(family: str, norms: int, rotations: int) -> None:
    """Two layers each; what graphs say is compared with torch wherever a model is exported."""
    found = Counter(node.op_type for node in build_graph(rewritten(family, "klt", torch.float32)[0], 24, 64).graph)
    assert (found["RMSNormalization"], found["RotaryEmbedding"]) == (norms, rotations)


@pytest.mark.parametrize("family", ["gemma", "olmo2"])
def test_norms_with_scales_in_float32_leave_in_float16(family: str, tmp_path: Path) -> None:
    """Their rows are widened before the operator, which takes one type, as the norm itself widens them."""
    model = rewritten(family, "klt", torch.float32)[0]
    onnx(model, tmp_path / "half.onnx", dtype="float16")
    onnx(model, tmp_path / "full.onnx")
    ids = np.arange(5, 25)[None]
    half, full = (OnnxGenerator(tmp_path / f"{name}.onnx") for name in ("half", "full"))
    found, wanted = (r.step(ids, None, None, r.empty(1))[0] for r in (half, full))
    assert np.abs(found - wanted).max() < 2e-2 * np.abs(wanted).max()
