"""The bodies of trellis codes: bytes are those of the definition, ties and rows that are no numbers included; what is read is what
the formula says bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

from kvsink.export import OnnxGenerator, onnx
from kvsink.export.trellis_body import _gain_byte, _gain_of
from kvsink.kernels.trellis import trellis_decode, trellis_encode
from tests.export.test_bodies import rows, run
from tests.export.test_body import run as run_nodes
from tests.graphs import rewritten
from tests.kernels.test_trellis import gain, read_row

WIDTHS = [
    (1,),
    (2, 2),
    (4, 3, 1),
    (2,) * 8,
    (4, 4, 3, 2, 2, 1, 1, 1),
    (3,) * 9,
    (4, *(2,) * 15),
    (1, *(2,) * 32),
    (6, 5, 4, 1),
    (5, 5),
]


def coding(widths: tuple[int, ...]) -> dict[str, Any]:
    return {"kind": "trellis", "code_bits": 0, "gain": 0, "book": [3, 8 * len(widths)], "widths": list(widths)}


def drawn(widths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and deviations, and among the rows some of zeros, of equal numbers, of no numbers, and very large and small ones."""
    sigma = rows(3, 8 * len(widths), seed=1).exp()
    x = rows(2, 3, 9, 8 * len(widths)) * sigma[:, None]
    x[0, 0, 0], x[0, 1, 1, 1], x[1, 2, 2, 5], x[1, 0, 3], x[1, 1, 4] = 0.0, torch.nan, -torch.inf, 3e38, 1e-30
    x[0, 2, 5] = 0.75 * sigma[2]
    return x, sigma


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_bytes_are_those_of_the_definition(widths: tuple[int, ...]) -> None:
    x, sigma = drawn(widths)
    for dtype in (torch.float32, torch.float64):
        kind = {"dtype": "float64"} if dtype == torch.float64 else {}
        codes, scale = run("QuantizeKV", coding(widths) | kind, [x.to(dtype), sigma], 2)
        assert codes.dtype == np.uint8 and scale.shape == (2, 3, 9, 0)
        np.testing.assert_array_equal(codes, trellis_encode(x.to(dtype), sigma, widths).numpy())
    empty, _ = run("QuantizeKV", coding(widths), [x[:, :, :0], sigma], 2)
    assert empty.shape == (2, 3, 0, sum(widths) + 1)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_rows_read_as_the_formula_says(widths: tuple[int, ...]) -> None:
    _, sigma = drawn(widths)
    codes = torch.randint(0, 256, (2, 3, 5, sum(widths) + 1), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    codes[0, 0, :2, -1] = torch.tensor([0, 255], dtype=torch.uint8)
    got = run("DequantizeKV", coding(widths), [codes, None, sigma], 1)[0]
    assert got.dtype == np.float32
    exact = run("DequantizeKV", coding(widths) | {"dtype": "float64"}, [codes, None, sigma], 1)[0]
    np.testing.assert_array_equal(exact, trellis_decode(codes, sigma, widths).numpy())
    for at in np.ndindex(2, 3, 5):
        wanted = np.array(read_row(codes[at].tolist(), sigma[at[1]].tolist(), list(widths)))
        np.testing.assert_allclose(got[at], wanted, rtol=2.0**-21)  # eight roundings
    assert run("DequantizeKV", coding(widths), [codes[:, :, :0], None, sigma], 1)[0].shape == (2, 3, 0, 8 * len(widths))


def test_the_nearest_gain_is_stored() -> None:
    """At every gain, half way between two, and one step of float32 to either side: the nearest one, half way the even one."""
    gains = np.array([gain(b) for b in range(255)])
    middle = (gains[1:] + gains[:-1]) / 2
    near = np.concatenate([gains, middle]).astype(np.float32)
    near = np.concatenate(
        [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near[near > 0], np.float32(0)), [1e9, np.inf]]
    )
    off = np.abs(near[:, None].astype(np.float64) - gains)
    with np.errstate(invalid="ignore"):
        best = off == off.min(1, keepdims=True)
    wanted = [
        254 if not row.any() or x > gains[-1] else min(np.flatnonzero(row), key=lambda b: b % 2)
        for row, x in zip(best, near, strict=True)
    ]
    for kind in (np.float32, np.float64):
        got = run_nodes(_gain_byte, near.astype(kind)[:, None], np.dtype(kind).name)[:, 0]
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(run_nodes(_gain_of, np.arange(256, dtype=np.int32)), np.append(gains, np.nan).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_model_leaves_with_the_bytes_of_the_torch_cache(dtype: str, tmp_path) -> None:
    """Functions and their twin; what stock onnxruntime says by itself is what the torch model says."""
    model = rewritten("llama", method="klt", protect="kvsink:2+first:1")
    found = onnx(model, tmp_path / "model.onnx", dtype=dtype)["check"]
    assert found["packed_bytes"] > 1000 and found["different_bytes"] == 0
    assert found["largest_logit_difference"] < (1e-12 if dtype == "float64" else 1e-5)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, 5:]
    assert OnnxGenerator(tmp_path / "model.onnx").generate([ids[0].tolist()], 8, eos_token_id=-1) == [wanted.tolist()]
