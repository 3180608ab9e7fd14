"""A kind that nothing but its registration and its two bodies names: stored, read, compiled, exported; kernels leave it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.codecs import SideSpec
from kvsink.codecs.quantizers import QUANTIZERS, Quantizer
from kvsink.errors import UnsupportedError
from kvsink.export import ExportError, bodies, onnx
from kvsink.export.body import look_up, pack
from kvsink.graph.backend import last_report
from kvsink.kernels.packing import pack_bits, unpack_bits
from kvsink.methods.registry import Method, Paper
from kvsink.model.runtime import runtime_of
from tests.close import FUSED_FLOAT32
from tests.graphs import rewritten
from tests.models import tokens

SIGN = Quantizer(
    encode=lambda x, s, p, prefix: (pack_bits((x > 0).to(torch.uint8), 1), x.abs().mean(-1, keepdim=True).half()),
    decode=lambda codes, scale, s, p, prefix: scale.float() * (2.0 * unpack_bits(codes, 1, 8 * codes.shape[-1]) - 1.0),
    tables=lambda s, prefix: (),
    row_bytes=lambda s, dim: dim // 8,
    row_scales=lambda s, dim: 1,
    check=lambda s: "" if s.bits == 1 else f"signs of {s.bits:g} bits",
)


def _quantize(b: Any, a: Any, x: str) -> tuple[str, str]:
    codes = b.cast(b.Greater(x, b.const(0)), "INT32")
    return pack(b, codes, 1, 8 * len(a["widths"])), b.half(b.reduce("ReduceMean", b.Abs(x)))


def _dequantize(b: Any, a: Any, codes: str, scale: str, table: str) -> str:
    signs = look_up(b, codes, 1, 8 * len(a["widths"]), np.array([-1, 1], dtype=np.float32))
    return str(b.Mul(signs, b.cast(scale, "FLOAT")))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny Llama that stores one bit for an entry."""
    monkeypatch.setitem(QUANTIZERS, "sign", SIGN)
    side = SideSpec(bits=1, transform="hadamard", kind="sign")
    return rewritten("llama", "sdpa", Method("signs", "signs", Paper("ours"), side, side, 1, 1), protect="first:1", fold=False)


def test_it_is_stored_as_its_formula_says_and_runs_on_the_definition(model: Any) -> None:
    codec = runtime_of(model).plans[1].codec
    v = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    z = v.double() @ h / 4
    wanted = z.abs().mean(-1, keepdim=True) * z.sign() @ h.T / 4
    found = codec.decode_values(*codec.encode_values(v, {}), {})
    assert (found - wanted).abs().max() <= 2.0**-11 * 4 * float(z.abs().mean(-1).max())  # float16 of the size, in sixteen channels
    assert "cpu (C): rows of kind sign" in kvsink.explain(model)
    with pytest.raises(UnsupportedError, match="signs of 2 bits"):
        SideSpec(bits=2, kind="sign")


def test_it_is_compiled(model: Any) -> None:
    outs = []
    for run in (model, torch.compile(model, backend="kvsink", options={"kvsink.inner": "eager"})):
        cache = KVSinkCache.for_model(model, 1, max_length=32)
        with torch.no_grad():
            outs.append(torch.cat([run(ids, past_key_values=cache).logits for ids in tokens(1, 12).split((9, 1, 1, 1), 1)], 1))
    report = last_report()
    assert report is not None and len(report.done("fuse")) == 2
    assert (outs[0] - outs[1]).abs().max() <= FUSED_FLOAT32 * float(outs[0].abs().max())


def test_it_leaves_once_it_has_bodies(model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="quantizer sign of keys has no body"):
        onnx(model, tmp_path / "model.onnx")
    monkeypatch.setitem(bodies.QUANTIZER_BODIES, "sign", (_quantize, _dequantize))
    check = onnx(model, tmp_path / "model.onnx")["check"]
    assert check["packed_bytes"] > 500 and check["different_bytes"] <= 1e-3 * check["packed_bytes"]
