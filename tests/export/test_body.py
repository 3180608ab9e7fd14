"""Codes of every width as bytes and back by nodes of ONNX, against whole numbers of Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs kvsink[onnx]")
ort = pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

from kvsink.export.body import Body, look_up, pack, pack_any, unpack  # noqa: E402


def run(make: Callable[[Body, str], str], x: np.ndarray, dtype: str = "float32") -> Any:
    """What the nodes that `make` appends leave of x."""
    from onnx import helper

    b = Body(dtype)
    out = make(b, "x")
    given = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), [None] * x.ndim)
    graph = helper.make_graph(b.nodes, "one", [given], [helper.make_empty_tensor_value_info(out)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def stored(codes: np.ndarray, width: int) -> np.ndarray:
    """Rows of codes as bytes, the first code in the lowest bits."""
    size = -(-codes.shape[-1] * width // 8)
    rows = [
        sum(int(c) << (i * width) for i, c in enumerate(row)).to_bytes(size, "little") for row in codes.reshape(-1, codes.shape[-1])
    ]
    return np.array([list(row) for row in rows], dtype=np.uint8).reshape(*codes.shape[:-1], size)


@pytest.mark.parametrize("width", range(1, 13))
def test_codes_become_bytes_and_come_back(width: int) -> None:
    for count in (8, 24, 5) if width > 8 else (8, 24):
        codes = np.random.default_rng(width).integers(0, 2**width, (2, 1, 3, count)).astype(np.int32)
        packed = stored(codes, width)
        writers = [pack_any] if width > 8 else [pack, pack_any]
        for dtype in ("float32", "float64"):
            for writer in writers:
                got = run(lambda b, x, writer=writer, count=count: writer(b, x, width, count), codes, dtype)
                assert got.dtype == np.uint8 and np.array_equal(got, packed)
            assert np.array_equal(run(lambda b, x, count=count: unpack(b, x, width, count), packed, dtype), codes)


@pytest.mark.parametrize("width", range(1, 9))
def test_codes_name_entries_of_a_table(width: int) -> None:
    codes = np.random.default_rng(width).integers(0, 2**width, (2, 1, 3, 16))
    table = np.arange(2**width)[::-1] * 3 - 7
    got = run(lambda b, x: look_up(b, x, width, 16, table, np.int32), stored(codes, width))
    assert got.dtype == np.int32 and np.array_equal(got, table[codes])
    assert run(lambda b, x: look_up(b, x, width, 16, table), stored(codes, width)).dtype == np.float32


def test_equal_constants_are_one_node() -> None:
    b = Body()
    assert b.const([1, 2]) == b.const([1.0, 2.0]) != b.const([1, 2], np.int64) and len(b.nodes) == 2
