"""Flavour gqa in float16 on CUDA: steps that are CUDA graphs, and norms of large residuals, in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

import onnxruntime as ort

import kvsink
from kvsink.export import OnnxGenerator, onnx
from kvsink.export.session import load_cuda
from tests.export.test_tiles import stock_of
from tests.export.test_tiles_gpu import on_cuda

CUDA, GRAPHS = ("CUDAExecutionProvider",), (("CUDAExecutionProvider", {"enable_cuda_graph": "1"}),)


@pytest.mark.parametrize("bits", [16, 8, 4])
class TestSteps:
    pytestmark = on_cuda

    def test_a_cuda_graph_says_what_single_launches_and_a_processor_say(self, bits: int, tmp_path: Path) -> None:
        """16 bit: beside the stock model too, whose cache is not coded."""
        load_cuda(ort)
        model, path = stock_of("trellis", layers=2), tmp_path / "model.onnx"
        ids = np.random.default_rng(4).integers(0, 97, (1, 140))
        with torch.no_grad():
            stock = model(torch.from_numpy(ids)).logits.numpy()
        text = torch.randint(0, 97, (8, 128), generator=torch.Generator().manual_seed(1))
        kvsink.rewrite(model, "static:rotated", key_bits=bits, value_bits=bits, protect="none", calibration=text)
        onnx(model, path, "gqa", dtype="float16")
        plain, quick, processor = (OnnxGenerator(path, p) for p in (CUDA, GRAPHS, ("CPUExecutionProvider",)))
        found = []
        for runner in (plain, quick, processor):
            past, logits = runner.empty(1, 192), []
            for a, b in ((0, 100), *((i, i + 1) for i in range(100, 140))):
                out, past = runner.step(ids[:, a:b], None, None, past)
                logits.append(out)
            found.append(np.concatenate(logits, axis=1))
        assert np.array_equal(found[0], found[1]) or np.abs(found[0] - found[1]).max() < 2e-3 * np.abs(found[0]).max()
        bound = {16: 5e-3, 8: 3e-2, 4: 2e-1}[bits] * np.abs(found[0]).max()
        assert np.abs(found[1] - found[2])[:, 100:].max() < bound
        assert bits < 16 or np.abs(found[1] - stock).max() < bound
        texts = [list(range(5, 45)), list(range(50, 90))]
        for _ in range(2):  # the second takes the tensors and the graph of the first
            assert quick.generate(texts, 24, eos_token_id=-1) == plain.generate(texts, 24, eos_token_id=-1)


class TestNorms:
    pytestmark = on_cuda

    def test_a_residual_of_thousands_is_squared_in_float32(self) -> None:
        """Squares of what some channels of a model hold are beyond float16."""
        from onnx import TensorProto, helper

        load_cuda(ort)
        rng = np.random.default_rng(0)
        x, y = (rng.standard_normal((2, 3, 576)).astype(np.float16) for _ in range(2))
        x[..., 7] = 3000.0
        given = {"x": x, "y": y, "scale": rng.uniform(0.5, 1.5, 576).astype(np.float16)}
        info = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, [None] * a.ndim) for n, a in given.items()]
        outs = [helper.make_empty_tensor_value_info(n) for n in ("norm", "sum")]
        node = helper.make_node(
            "SkipSimplifiedLayerNormalization", list(given), ["norm", "", "", "sum"], domain="com.microsoft", epsilon=1e-5
        )
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
        proto = helper.make_model(helper.make_graph([node], "one", info, outs), opset_imports=opsets, ir_version=10)
        norm, total = ort.InferenceSession(proto.SerializeToString(), providers=list(CUDA)).run(None, given)
        wide = x.astype(np.float64) + y
        wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * given["scale"]
        assert np.abs(total - wide).max() <= 2.0 and np.abs(norm - wanted).max() < 2e-3 * np.abs(wanted).max()
