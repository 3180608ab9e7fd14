"""Every function body against the torch op it stands for: the same numbers, packed bytes equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="needs kvsink[onnx]")
ort = pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

from kvsink.export import nodes  # noqa: E402
from kvsink.export.bodies import DOMAIN, OPSET, function_proto  # noqa: E402
from kvsink.kernels import dequantize, hadamard, quantize, select_sinks, stages  # noqa: E402
from kvsink.kernels.quantize import SIGMA_KINDS  # noqa: E402
from kvsink.kernels.static import static_decode, static_encode  # noqa: E402
from kvsink.kernels.vector import normed_encode, vector_decode, vector_encode  # noqa: E402
from tests.close import SOFTMAX_IN_FLOAT32  # noqa: E402


def run(op: str, attributes: dict[str, Any], inputs: list[Any], outputs: int) -> list[Any]:
    """One node with its body, in onnxruntime; None leaves an input out."""
    from onnx import checker, helper

    given = tuple(x is not None for x in inputs)
    names = [f"x{i}" if g else "" for i, g in enumerate(given)]
    arrays = {n: x.numpy() for n, x in zip(names, inputs, strict=True) if n}
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), [None] * a.ndim) for n, a in arrays.items()
    ]
    results = [helper.make_empty_tensor_value_info(f"y{i}") for i in range(outputs)]
    node = helper.make_node(op, names, [r.name for r in results], domain=DOMAIN, **attributes)
    node.overload = "1"
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    function = function_proto(op, "1", attributes, given, OPSET)
    graph = helper.make_graph([node], "one", values, results)
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    from onnx import shape_inference

    model = shape_inference.infer_shapes(model)
    checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, arrays)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SCALAR = [
    *(("uniform", (w,) * 4, 16, 1.0, False) for w in range(1, 9)),
    ("uniform", (2,) * 4, 32, 0.8, False),
    *(("uniform-int", (w,) * 4, 32, 1.0, False) for w in (2, 3, 4, 8)),
    *(("uniform-quantile", (2,) * 4, n, q, False) for n in (16, 32) for q in (0.96, 0.92, 1.0)),
    *(("gauss", (w,) * 4, 32, 1.0, False) for w in range(1, 9)),
    ("lloyd", (2, 2, 2, 2), 32, 1.0, True),
    ("lloyd", (4, 3, 1, 0), 32, 1.0, True),
    ("lloyd", (8, 6, 5, 5), 32, 1.0, False),
    ("lloyd", (0, 2, 0, 7), 32, 1.0, False),
    ("lloyd-even", (4, 3, 2, 1), 32, 1.0, True),
]


@pytest.mark.parametrize("case", SCALAR, ids=str)
def test_scalar_quantizers(case: Any) -> None:
    kind, widths, size, clip, gain = case
    x = rows(2, 3, 11, 32)
    sigma = rows(3, 32, seed=1).abs() + 0.5 if kind in SIGMA_KINDS else None
    attributes = {"kind": kind, "widths": list(widths), "group_size": size, "gain": int(gain)}
    codes, scale = quantize(x, sigma, kind, list(widths), size, clip, gain)
    got_codes, got_scale = run("QuantizeKV", {**attributes, "clip": clip}, [x, *([sigma] if sigma is not None else [])], 2)
    assert got_codes.dtype == np.uint8 and got_scale.dtype == np.float16
    np.testing.assert_array_equal(got_codes, codes.numpy())
    np.testing.assert_array_equal(got_scale, scale.numpy())
    back = dequantize(codes, scale, sigma, kind, list(widths), size, gain)
    held = scale if kind not in SIGMA_KINDS or gain else None
    inputs = [codes, held, *([sigma] if sigma is not None else [])]
    np.testing.assert_allclose(run("DequantizeKV", attributes, inputs, 1)[0], back.numpy(), rtol=1e-6, atol=1e-6)
    empty = [None if t is None else t[:, :, :0].contiguous() if t is codes or t is held else t for t in inputs]
    assert run("DequantizeKV", attributes, empty, 1)[0].shape == (2, 3, 0, 32)


@pytest.mark.parametrize("setting", [(4, 8, False, 3), (4, 9, False, 3), (8, 10, True, 3), (2, 5, True, 1)], ids=str)
def test_codebooks(setting: Any) -> None:
    couple, bits, gain, heads = setting
    x, book = rows(2, 3, 7, 32), rows(heads, 32 // couple, 2**bits, couple, seed=1)
    codes, scale = vector_encode(x, book, bits, gain)
    attributes = {"kind": "vector", "code_bits": bits, "gain": int(gain), "book": list(book.shape)}
    if heads == 1:
        book = book.expand(3, -1, -1, -1).contiguous()  # what a body is given is what its attributes say
        attributes["book"] = list(book.shape)
    got_codes, got_scale = run("QuantizeKV", attributes, [x, book], 2)
    np.testing.assert_array_equal(got_codes, codes.numpy())
    np.testing.assert_array_equal(got_scale, scale.numpy())
    back = vector_decode(codes, scale, book, bits)
    got = run("DequantizeKV", attributes, [codes, scale if gain else None, book], 1)[0]
    np.testing.assert_allclose(got, back.numpy(), rtol=1e-6)


def test_codebooks_with_a_norm_of_the_token() -> None:
    x, book = 7 * rows(2, 3, 11, 32), rows(3, 4, 256, 8, seed=1)
    codes, scale = normed_encode(x, book, 8)
    attributes = {"kind": "vector-normed", "code_bits": 8, "gain": 0, "book": list(book.shape)}
    got_codes, got_scale = run("QuantizeKV", attributes, [x, book], 2)
    np.testing.assert_array_equal(got_scale, scale.numpy())
    np.testing.assert_array_equal(got_codes, codes.numpy())
    got = run("DequantizeKV", attributes, [codes, scale, book], 1)[0]
    np.testing.assert_allclose(got, vector_decode(codes, scale, book, 8).numpy(), rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fixed_steps(bits: int) -> None:
    x, step = rows(2, 3, 7, 32), rows(3, 32, seed=1).abs() * 0.3 + 0.05
    codes, scale = static_encode(x, step, bits)
    attributes = {"kind": "static", "code_bits": 0, "gain": 0, "book": [3, 32], "widths": [bits] * 4}
    got_codes, got_scale = run("QuantizeKV", attributes, [x, step], 2)
    np.testing.assert_array_equal(got_codes, codes.numpy())
    assert got_scale.shape == tuple(scale.shape)
    got = run("DequantizeKV", attributes, [codes, None, step], 1)[0]
    np.testing.assert_array_equal(got, static_decode(codes, step, bits).numpy())


def test_a_shared_codebook() -> None:
    x, book = rows(2, 3, 7, 32), rows(1, 8, 256, 4, seed=1)
    attributes = {"kind": "vector", "code_bits": 8, "gain": 0, "book": list(book.shape)}
    codes, scale = vector_encode(x, book, 8, False)
    np.testing.assert_array_equal(run("QuantizeKV", attributes, [x, book], 2)[0], codes.numpy())
    got = run("DequantizeKV", attributes, [codes, None, book], 1)[0]
    np.testing.assert_array_equal(got, vector_decode(codes, scale, book, 8).numpy())


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("shape", "order"), [((2, 3, 5, 16), 16), ((2, 3, 0, 24), 8), ((2, 5, 48), 24)])
def test_hadamard(shape: tuple[int, ...], order: int, inverse: bool) -> None:
    x = rows(*shape)
    attributes = {"order": order, "inverse": int(inverse), "channels": shape[-1], "rank": len(shape)}
    got = run("HadamardRotate", attributes, [x], 1)[0]
    np.testing.assert_allclose(got, hadamard(x, order, inverse).numpy(), atol=SOFTMAX_IN_FLOAT32)


def test_reorder() -> None:
    x, permutation = rows(2, 3, 5, 8), torch.randperm(24, generator=torch.Generator().manual_seed(0))
    got = run("ChannelReorder", {"heads": 3, "head_dim": 8}, [x, permutation], 1)[0]
    np.testing.assert_array_equal(got, stages.reorder_heads(x, permutation).numpy())


@pytest.mark.parametrize("rotary", [8, 4])
def test_rope(rotary: int) -> None:
    x, cos, sin = rows(2, 3, 5, 8), rows(6, rotary, seed=1), rows(6, rotary, seed=2)
    positions = torch.tensor([[0, 1, 2, 9, 70], [-2, -1, 0, 5, 6]])
    sizes = {"rotary": rotary, "head_dim": 8}
    for start, step in ((0, stages.rope_offset), (1, stages.rope_start)):
        got = run("RotateBlock", {**sizes, "block": 6, "start": start, "rows": 6}, [x, cos, sin, positions], 1)[0]
        np.testing.assert_allclose(got, step(x, cos, sin, positions, 6).numpy(), atol=1e-6)
    angles = rows(2, 5, rotary, seed=3), rows(2, 5, rotary, seed=4)
    got = run("UndoRope", sizes, [x, *angles], 1)[0]
    np.testing.assert_allclose(got, stages.unrope_rows(x, *angles).numpy(), rtol=1e-5, atol=1e-5)
    mean = rows(3, 8, seed=5)
    got = run("CenterRoped", sizes, [x, mean, *angles], 1)[0]
    np.testing.assert_allclose(got, stages.center_roped(x, mean, *angles).numpy(), atol=1e-5)
    table = rows(3, 4, 8, seed=6)
    np.testing.assert_array_equal(run("MeanRows", {"block": 4}, [table, positions], 1)[0], stages.table_rows(table, positions))


@pytest.mark.parametrize("entries", [False, True])
@pytest.mark.parametrize("length", [1, 9])
def test_select_and_preserve(entries: bool, length: int) -> None:
    """Two chunks through the running selection; a row that two segments name is held once."""
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, : length // 3] = False
    positions = torch.arange(length).expand(2, -1)
    channels, weights = torch.tensor([3, 7]), torch.tensor([1.0, 0.5])
    attributes = {"count": 4, "entries": int(entries), "width": 16}
    state = [torch.full((2, 6), -1, dtype=torch.int32), torch.full((2, 6), -torch.inf), rows(2, 3, 6, 8), rows(2, 3, 6, 8)]
    for chunk in range(2):
        hidden, k, v = rows(2, length, 16, seed=chunk), rows(2, 3, length, 8, seed=chunk + 2), rows(2, 3, length, 8, seed=chunk + 4)
        best = select_sinks(hidden, valid, channels, weights, 4, entries)
        for got, wanted in zip(run("SelectSinks", attributes, [hidden, valid, channels, weights], 2), best, strict=True):
            np.testing.assert_array_equal(got, wanted.numpy())
        first = nodes.first_rows(positions + chunk * length, valid, 2)
        for got, wanted in zip(run("SelectFirst", {"count": 2}, [positions + chunk * length, valid], 2), first, strict=True):
            seen = first[0].numpy() > -np.inf  # the order of rows that are no candidates means nothing
            np.testing.assert_allclose(np.where(seen, got, 0), np.where(seen, wanted.numpy(), 0))
        begin = torch.full((2,), chunk * length)
        after = nodes.preserve_sinks(*state, k, v, begin, [*best, *first], [4, 2])
        got = run("PreserveSinks", {"segments": [4, 2]}, [*state, k, v, begin, *best, *first], 4)
        held = after[0].numpy() != -1
        np.testing.assert_array_equal(got[0], after[0].numpy())
        np.testing.assert_array_equal(got[1], after[1].numpy())
        for rows_got, rows_wanted in zip(got[2:], after[2:], strict=True):
            np.testing.assert_array_equal(rows_got.transpose(0, 2, 1, 3)[held], rows_wanted.numpy().transpose(0, 2, 1, 3)[held])
        state = list(after)
    assert (state[0] < -1).any() or length == 1


@pytest.mark.parametrize("room", [0, 4])
def test_rows_that_are_laid_over_others(room: int) -> None:
    """New rows behind the seven held, exact ones before them; what stands behind all of them stays."""
    full, new, exact = rows(2, 3, 9 + room, 8), rows(2, 3, 2, 8, seed=1), rows(2, 3, 4, 8, seed=2)
    slot, first = torch.tensor([[6, -1, -8, 0], [3, 8, -1, -1]], dtype=torch.int32), torch.full((2,), 7)
    wanted = full.clone()
    wanted[:, :, 7:9] = new
    np.testing.assert_array_equal(run("LayRows", {}, [full, new, first], 1)[0], wanted.numpy())
    assert torch.equal(nodes.lay_rows(full, new, first, []), wanted)
    wanted[0, :, 6], wanted[0, :, 0], wanted[1, :, 3] = exact[0, :, 0], exact[0, :, 3], exact[1, :, 0]
    np.testing.assert_array_equal(run("LayRows", {}, [full, new, first, exact, slot], 1)[0], wanted.numpy())
    assert torch.equal(nodes.lay_rows(full, new, first, [exact, slot]), wanted)


def test_written_rows() -> None:
    past, new, first = rows(2, 3, 5, 4), rows(2, 3, 2, 4, seed=1), torch.tensor([0, 3])
    written = nodes.write_rows(past, new, first)
    assert torch.equal(written[0, :, :2], new[0]) and torch.equal(written[1, :, 3:], new[1])
    assert torch.equal(written[0, :, 2:], past[0, :, 2:]) and torch.equal(written[1, :, :3], past[1, :, :3])
    assert torch.equal(nodes.write_rows(past[:, 0, :, 0], new[:, 0, :, 0], first), written[:, 0, :, 0])


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attend(kv_heads: int, kind: str) -> None:
    q, k, v = rows(2, 4, 3, 8), rows(2, kv_heads, 7, 8, seed=1), rows(2, kv_heads, 7, 6, seed=2)
    mask = torch.ones(3, 7, dtype=torch.bool).tril(4).expand(2, 1, 3, 7).contiguous()
    given = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -1e4)
    attributes = {"scale": 0.3, "mask": kind, "heads": 4, "kv_heads": kv_heads, "head_dim": 8, "value_dim": 6}
    got = run("Attend", attributes, [q, k, v, given], 1)[0]
    wanted = nodes.attend(q, k, v, mask, 0.3)
    np.testing.assert_allclose(got, wanted.numpy(), atol=SOFTMAX_IN_FLOAT32)
    k, v = (torch.cat([x, 1e3 * rows(2, kv_heads, 5, x.shape[3], seed=3)], dim=2) for x in (k, v))  # room that nothing reads
    np.testing.assert_array_equal(run("Attend", attributes, [q, k, v, given], 1)[0], got)
    assert torch.equal(nodes.attend(q, k, v, mask, 0.3), wanted)
