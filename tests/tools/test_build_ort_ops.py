"""The custom-op library: every node of flavour custom against its body in ONNX operators, whole models, and what goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

from kvsink.codecs import Codec, SideSpec
from kvsink.export import ExportError, OnnxGenerator, onnx
from kvsink.export.bodies import DOMAIN, OPSET, QUANTIZER_BODIES, function_proto
from kvsink.export.flavours import LIBRARY, refusal
from kvsink.kernels.quantize import SIGMA_KINDS
from kvsink.tools import build_ort_ops
from tests.close import FUSED_FLOAT32
from tests.export.test_bodies import SCALAR, rows
from tests.export.test_trellis_body import WIDTHS, coding, drawn
from tests.graphs import rewritten

PROMPTS = ([5, 6, 7, 8, 9], [9, 10], [40])


@pytest.fixture(scope="module")
def library() -> Path:
    if build_ort_ops.compiler() is None:
        pytest.skip("no C++ compiler")
    return build_ort_ops.build()


def test_what_the_library_has_no_kernel_for_is_declined_before_it_is_written(library: Path) -> None:
    attributes = {"kind": "uniform-quantile", "widths": [2] * 4, "group_size": 16, "gain": 0, "clip": 1.0}
    with pytest.raises(Exception, match="quantizer uniform-quantile has no kernel"):
        both(library, "QuantizeKV", attributes, [rows(2, 3, 5, 32)], 2)
    others = set(QUANTIZER_BODIES) - set(LIBRARY)
    assert others >= {"uniform-quantile", "vector-normed"}
    for kind in others:
        assert kind in refusal("custom", Codec(SideSpec(), SideSpec(bits=2, kind=kind).resolved(4, 32)))


def both(
    library: Path, op: str, attributes: dict[str, Any], inputs: list[Any], outputs: int, bodies: bool = True
) -> tuple[list[Any], list[Any]]:
    """What one node leaves by its body, and by the library; None leaves an input out."""
    import onnxruntime as ort
    from onnx import helper

    given = tuple(x is not None for x in inputs)
    arrays = {f"x{i}": x.numpy() for i, x in enumerate(inputs) if x is not None}
    kinds = {name: helper.np_dtype_to_tensor_dtype(a.dtype) for name, a in arrays.items()}
    values = [helper.make_tensor_value_info(name, kinds[name], [None] * a.ndim) for name, a in arrays.items()]
    results = [helper.make_empty_tensor_value_info(f"y{i}") for i in range(outputs)]
    found = []
    for overload in ("1", "") if bodies else ("",):
        names = [f"x{i}" if g else "" for i, g in enumerate(given)]
        node = helper.make_node(op, names, [r.name for r in results], domain=DOMAIN, overload=overload, **attributes)
        graph = helper.make_graph([node], "one", values, results)
        functions = [function_proto(op, "1", attributes, given, OPSET)] if overload else []
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        if not overload:
            options.register_custom_ops_library(str(library))
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found.append(session.run(None, arrays))
    return found[0], found[-1]


def same(library: Path, op: str, attributes: dict[str, Any], inputs: list[Any], outputs: int = 1, atol: float = 0.0) -> list[Any]:
    body, own = both(library, op, attributes, inputs, outputs)
    for one, two in zip(body, own, strict=True):
        assert one.dtype == two.dtype and one.shape == two.shape
        np.testing.assert_allclose(two, one, rtol=atol, atol=atol)
    return body


@pytest.mark.parametrize("case", [case for case in SCALAR if case[0] in LIBRARY], ids=str)
def test_scalar_quantizers(library: Path, case: Any) -> None:
    kind, widths, size, clip, gain = case
    sigma = [rows(3, 32, seed=1).abs() + 0.5] if kind in SIGMA_KINDS else []
    attributes = {"kind": kind, "widths": list(widths), "group_size": size, "gain": int(gain)}
    x = rows(2, 3, 41, 32)
    codes, scale = (torch.from_numpy(t) for t in same(library, "QuantizeKV", {**attributes, "clip": clip}, [x, *sigma], 2))
    scaled = scale if kind not in SIGMA_KINDS or gain else None
    for length in (41, 0):
        past = [t if t is None else t[:, :, :length].contiguous() for t in (codes, scaled)]
        same(library, "DequantizeKV", attributes, [*past, *sigma], atol=1e-6)


@pytest.mark.parametrize("setting", [(4, 8, False, 3), (4, 9, False, 3), (8, 10, True, 3)], ids=str)
def test_codebooks(library: Path, setting: Any) -> None:
    couple, bits, gain, heads = setting
    x, book = rows(2, 3, 7, 32), rows(heads, 32 // couple, 2**bits, couple, seed=1)
    attributes = {"kind": "vector", "code_bits": bits, "gain": int(gain), "book": list(book.shape)}
    codes, scale = (torch.from_numpy(t) for t in same(library, "QuantizeKV", attributes, [x, book], 2))
    same(library, "DequantizeKV", attributes, [codes, scale if gain else None, book], atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fixed_steps(library: Path, bits: int) -> None:
    x, step = rows(2, 3, 7, 32), rows(3, 32, seed=1).abs() * 0.3 + 0.05
    attributes = {"kind": "static", "code_bits": 0, "gain": 0, "book": [3, 32], "widths": [bits] * 4}
    codes, _ = (torch.from_numpy(t) for t in same(library, "QuantizeKV", attributes, [x, step], 2))
    same(library, "DequantizeKV", attributes, [codes, None, step])


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_walks(library: Path, widths: tuple[int, ...]) -> None:
    x, sigma = drawn(widths)
    codes, _ = (torch.from_numpy(t) for t in same(library, "QuantizeKV", coding(widths), [x, sigma], 2))
    same(library, "DequantizeKV", coding(widths), [codes, None, sigma], atol=1e-6)


@pytest.mark.parametrize("inverse", [0, 1])
@pytest.mark.parametrize(("shape", "order"), [((2, 3, 5, 64), 16), ((2, 3, 0, 24), 24), ((2, 5, 80), 40), ((300, 3, 1, 64), 64)])
def test_hadamard(library: Path, shape: tuple[int, ...], order: int, inverse: int) -> None:
    attributes = {"order": order, "inverse": inverse, "channels": shape[-1], "rank": len(shape)}
    same(library, "HadamardRotate", attributes, [rows(*shape)], atol=FUSED_FLOAT32)


@pytest.mark.parametrize("length", [5, 70])
@pytest.mark.parametrize("rotary", [8, 4])
def test_rotations_and_reorderings(library: Path, rotary: int, length: int) -> None:
    x, cos, sin = rows(2, 3, length, 8), rows(6, rotary, seed=1), rows(6, rotary, seed=2)
    positions = torch.stack([torch.arange(length) * 3, torch.arange(length) - 2])
    sizes = {"rotary": rotary, "head_dim": 8}
    for start in (0, 1):
        for p in (positions, positions.int(), positions[:1]):
            same(library, "RotateBlock", {**sizes, "block": 6, "start": start, "rows": 6}, [x, cos, sin, p], atol=1e-6)
    for batch in (2, 1):
        angles = rows(batch, length, rotary, seed=3), rows(batch, length, rotary, seed=4)
        same(library, "UndoRope", sizes, [x, *angles], atol=FUSED_FLOAT32)
        same(library, "CenterRoped", sizes, [x, rows(3, 8, seed=5), *angles], atol=FUSED_FLOAT32)
    same(library, "MeanRows", {"block": 4}, [rows(3, 4, 8, seed=6), positions])
    permutation = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    same(library, "ChannelReorder", {"heads": 3, "head_dim": 8}, [x, permutation])


@pytest.mark.parametrize("entries", [0, 1])
@pytest.mark.parametrize("length", [1, 9])
def test_sinks(library: Path, entries: int, length: int) -> None:
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, : length // 3] = False
    state = [torch.full((2, 6), -1, dtype=torch.int32), torch.full((2, 6), -torch.inf), rows(2, 3, 6, 8), rows(2, 3, 6, 8)]
    for chunk in range(3):
        positions = torch.arange(length).expand(2, -1).contiguous() + chunk * length
        hidden, k, v = rows(2, length, 16, seed=chunk), rows(2, 3, length, 8, seed=chunk + 2), rows(2, 3, length, 8, seed=chunk + 4)
        select = [hidden.round(), valid, torch.tensor([3, 7]), torch.tensor([1.0, 0.5])]  # so that scores tie
        best = same(library, "SelectSinks", {"count": 4, "entries": entries, "width": select[0].shape[2]}, select, 2)
        first = same(library, "SelectFirst", {"count": 2}, [positions, valid], 2)
        candidates = [torch.from_numpy(t) for t in (*best, *first)]
        begin = torch.full((2,), chunk * length)
        after = same(library, "PreserveSinks", {"segments": [4, 2]}, [*state, k, v, begin, *candidates], 4)
        order = torch.tensor([2, 0, 3, 1, 5, 4])  # of the places, which decides nothing
        state = [torch.from_numpy(t).index_select(d, order) for t, d in zip(after, (1, 1, 2, 2), strict=True)]
    slot = torch.tensor([[6, -1, -8, 0], [3, 8, -1, -1]], dtype=torch.int32)
    for room in (0, 5, 300):
        laid = [rows(2, 3, 9 + room, 8), rows(2, 3, 2, 8, seed=1), torch.full((2,), 7)]
        same(library, "LayRows", {}, laid)
        same(library, "LayRows", {}, [*laid, rows(2, 3, 4, 8, seed=2), slot])
    with pytest.raises(Exception, match="no room for the new rows"):
        both(library, "LayRows", {}, [rows(2, 3, 9, 8), rows(2, 3, 2, 8), torch.full((2,), 8)], 1, bodies=False)


@pytest.mark.parametrize("sizes", [(2, 4, 2, 3, 7), (1, 4, 4, 1, 700), (1, 6, 2, 40, 1100)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attend(library: Path, sizes: tuple[int, ...], kind: str) -> None:
    """One new row and many, short and long pasts: one task, tiles of rows, pieces of slots."""
    batch, heads, kv_heads, new, length = sizes
    q, k, v = rows(batch, heads, new, 8), rows(batch, kv_heads, length, 8, seed=1), rows(batch, kv_heads, length, 6, seed=2)
    mask = torch.ones(new, length, dtype=torch.bool).tril(length - new).expand(batch, 1, new, length).contiguous()
    mask[0, :, :, : length // 3] = False
    given = mask if kind == "bool" else rows(batch, heads, new, length, seed=3).masked_fill(~mask, -1e30)
    attributes = {"scale": 0.3, "mask": kind, "heads": heads, "kv_heads": kv_heads, "head_dim": 8, "value_dim": 6}
    same(library, "Attend", attributes, [q, k, v, given], atol=FUSED_FLOAT32)
    k, v = (torch.cat([x, 1e3 * rows(batch, kv_heads, 40, x.shape[3], seed=4)], dim=2) for x in (k, v))  # room that nothing reads
    same(library, "Attend", attributes, [q, k, v, given], atol=FUSED_FLOAT32)


PACKED = [
    ("lloyd", dict(widths=[4, 3, 2, 0], gain=1), "klt", True, True),
    ("lloyd-even", dict(widths=[3, 2, 2, 1], gain=1), "klt", True, True),
    ("lloyd", dict(widths=[8, 5, 4, 2], gain=0), "hadamard", True, False),
    ("gauss", dict(widths=[2] * 4, group_size=16), "hadamard", False, False),
    ("uniform", dict(widths=[4] * 4, group_size=8), "none", False, True),
    ("uniform-int", dict(widths=[8] * 4, group_size=32), "hadamard", True, True),
    ("static", dict(widths=[4] * 4, book=[2, 32], code_bits=0), "hadamard", True, False),
    ("trellis", dict(widths=[4, 3, 2, 1], book=[2, 32], code_bits=0), "klt", True, True),
    ("trellis", dict(widths=[6, 5, 2, 1], book=[2, 32], code_bits=0), "klt", True, True),
    ("trellis", dict(widths=[2] * 4, book=[2, 32], code_bits=0), "hadamard", False, False),
    ("vector", dict(book=[2, 4, 256, 8], code_bits=8, gain=1), "klt", True, True),
    ("vector", dict(book=[2, 4, 512, 8], code_bits=9, gain=0), "none", False, False),
]


@pytest.mark.parametrize("sizes", [(1, 150, 3), (1, 40, 0), (3, 150, 3), (2, 0, 3), (1, 0, 0)], ids=str)
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_attend_packed(library: Path, case: Any, sizes: tuple[int, ...]) -> None:
    """The past out of its codes in one node: one new row (never unpacked) and several, with and without exact rows.

    Codes have room behind the rows that the mask knows, filled with others."""
    kind, coding, transform, center, in_block = case
    new, past, places = sizes
    slots = past + new + 5
    batch, heads, kv_heads, dim, span, turns = 2, 6, 2, 32, 16, 12
    coding = {"kind": kind, "group_size": dim, "gain": 0} | coding
    if kind == "vector":
        table = [rows(*coding["book"], seed=9)]
    else:
        table = [rows(kv_heads, dim, seed=9).abs() * 0.3 + 0.3] if kind in (*SIGMA_KINDS, "static") else []
    state = []
    for seed in (1, 2):
        attributes = coding if kind in ("vector", "static") else {**coding, "clip": 1.0}
        attributes = {name: v for name, v in attributes.items() if not (kind == "vector" and name == "group_size")}
        made, _ = both(library, "QuantizeKV", attributes, [rows(batch, kv_heads, slots, dim, seed=seed), *table], 2)
        codes, scale = (torch.from_numpy(t) for t in made)
        state += [codes, scale if scale.shape[-1] else None]
    angles = rows(turns, dim // 2, seed=4).repeat(1, 2)
    cos, sin = (angles.cos(), angles.sin()) if center or in_block else (None, None)
    basis = rows(kv_heads, dim, dim, seed=5) / dim**0.5 if transform == "klt" else None  # it need not be orthogonal
    mean, shift = (rows(kv_heads, span, dim, seed=6), rows(kv_heads, dim, seed=7)) if center else (None, None)
    exact = [None] * 3
    if places:
        slot = torch.tensor([[past + new - 1, 0, -2], [7, -1, past // 2]], dtype=torch.int32)
        exact = [rows(batch, kv_heads, places, dim, seed=10), rows(batch, kv_heads, places, dim, seed=11), slot]
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past).expand(batch, 1, new, past + new).contiguous()
    mask[1, :, :, : past // 3] = False
    positions = torch.stack([torch.arange(slots), (torch.arange(slots) - past // 3).clamp_min(0)]).int()
    sides = {f"{side}_{n}": v for side in "kv" for n, v in coding.items()}
    for side, spec in (("k", transform), ("v", transform)):
        sides |= {f"{side}_transform": spec, f"{side}_order": 16, f"{side}_center": int(center)}
    attributes = sides | {
        "scale": 0.2,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": dim,
        "value_dim": dim,
        "span": span,
        "turns": turns,
        "rotary": dim if cos is not None else 0,
        "in_block": int(in_block),
        "mask": "bool",
    }
    fresh = [rows(batch, kv_heads, new, dim, seed=12), rows(batch, kv_heads, new, dim, seed=13)]
    one = table[0] if table else None
    for given in (mask, rows(batch, heads, new, past + new, seed=14).masked_fill(~mask, -1e30)):
        attributes["mask"] = "bool" if given.dtype == torch.bool else "float"
        inputs = [rows(batch, heads, new, dim), *fresh, given, positions, *state, *exact, cos, sin]
        inputs += [mean, basis, one, shift, basis, one]
        while inputs[-1] is None:
            inputs.pop()
        same(library, "AttendPacked", attributes, inputs, atol=FUSED_FLOAT32)


@pytest.mark.parametrize(
    "options",
    [
        dict(method="klt", protect="kvsink:2+first:1"),
        dict(method="klt", protect="kvsink:2+first:1"),
        pytest.param(dict(method="rotatekv", protect="massive:3+first:2"), marks=pytest.mark.slow),
        pytest.param(dict(method="static", protect="first:1"), marks=pytest.mark.slow),
        pytest.param(dict(method="cq"), marks=pytest.mark.slow),
        pytest.param(dict(method="klt", key_bits=1, value_bits=1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_model_without_bodies_equals_its_twin(library: Path, options: dict[str, str], tmp_path: Path) -> None:
    model = rewritten("llama", **options)
    onnx(model, tmp_path / "functions.onnx")
    onnx(model, tmp_path / "custom.onnx", "custom")
    one = OnnxGenerator(tmp_path / "functions.onnx")
    two = OnnxGenerator(tmp_path / "custom.onnx", library=library, threads=2)
    assert one.generate(PROMPTS, 12, eos_token_id=-1) == two.generate(PROMPTS, 12, eos_token_id=-1)
    for name, held in one.past.items():
        here, there = two.past[name].numpy(), held.numpy()
        if here.dtype == np.float32:
            np.testing.assert_allclose(here, there, rtol=FUSED_FLOAT32, atol=FUSED_FLOAT32)
        elif here.dtype == np.float16:  # one step of float16, where a sum in another order rounds the other way
            np.testing.assert_allclose(here, there, rtol=2.0**-10, atol=2.0**-10)
        else:
            np.testing.assert_array_equal(here, there)


def test_what_goes_wrong_is_said(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    onnx(rewritten("llama", method="rtn"), path := tmp_path / "m.onnx", "custom")
    (tmp_path / "none.so").write_text("no library")
    with pytest.raises(ExportError, match="build it with python -m"):
        OnnxGenerator(path, library=tmp_path / "none.so")
    with pytest.raises(Exception, match="quantizer nuq has no kernel"):
        x = rows(1, 1, 1, 8)
        attributes = {"kind": "nuq", "widths": [2], "group_size": 8, "gain": 0}
        monkeypatch.setattr("tests.tools.test_build_ort_ops.function_proto", lambda *rest: _identity(attributes))
        both(library, "QuantizeKV", attributes, [x], 2)
    assert build_ort_ops.main([str(tmp_path / "nowhere" / "ops.so")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setattr(build_ort_ops, "FLAGS", ("-no-such-flag",))
    assert build_ort_ops.main([str(tmp_path / "ops.so")]) == 2
    assert "could not build" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not (tmp_path / "ops.so").exists()
    monkeypatch.setattr(build_ort_ops, "compiler", lambda: None)
    assert build_ort_ops.main([]) == 2
    assert "install g++" in capsys.readouterr().err


def _identity(attributes: dict[str, Any]) -> Any:
    """A body for a kind that has none."""
    from onnx import helper

    nodes = [helper.make_node("Identity", ["in_0"], [f"out_{i}"]) for i in range(2)]
    proto = helper.make_function(
        DOMAIN, "QuantizeKV", ["in_0"], ["out_0", "out_1"], nodes, [helper.make_opsetid("", OPSET)], attributes=sorted(attributes)
    )
    proto.overload = "1"
    return proto
