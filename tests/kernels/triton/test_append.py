"""One new row coded by Triton equals the definition, code for code, with the same rows exact; in Triton's interpreter."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsink.codecs import STATE_NAMES, Codec
from kvsink.kernels.append import append_ref
from kvsink.kernels.triton import append as append_triton
from tests import states
from tests.kernels.triton.test_attend import INTERPRETED, LIKE_OTHERS, here, interpreter, run_in_the_interpreter, sampled
from tests.kernels.triton.test_attend import OPTIONS as ATTENDED

OPTIONS = (
    *ATTENDED,
    ("klt:best", ()),
    ("static", ()),
    ("centred:even", (("key_bits", 2), ("value_bits", 3))),
    ("rtn", (("key_bits", 5), ("value_bits", 7))),
    ("klt:best", (("protect", "none"),)),
    ("klt:best", (("protect", "first:1+massive:2+first:3"),)),
)
IDS = [f"{m}-{'-'.join(f'{k}={v}' for k, v in options)}" for m, options in OPTIONS]
EXACT = ("exact_k", "exact_v", "exact_slot", "exact_score")


def held(st: dict[str, Tensor], row: int) -> dict[int, tuple[float, Tensor, Tensor]]:
    """Score, key and value of every exact row of one sequence by its slot; repeats are left out."""
    places = enumerate(st["exact_slot"][row].tolist())
    return {s: (float(st["exact_score"][row, i]), st["exact_k"][row, :, i], st["exact_v"][row, :, i]) for i, s in places if s >= 0}


@here
@interpreter
@pytest.mark.parametrize(
    ("method", "options", "roped", "dtype"),
    sampled([(*o, i % 2 == 0, torch.float16 if i % 2 else torch.float32) for i, o in enumerate(OPTIONS)]),
    ids=IDS,
)
def test_equals_the_definition(method: str, options: tuple, roped: bool, dtype: torch.dtype) -> None:
    layer, k, _ = states.filled(method, options, batch=2, lengths=(20, 7))
    layer.length.add_(7)
    codec, entered = Codec.parse(layer.codec_text), 0
    for step in range(5):
        g = torch.Generator().manual_seed(step)
        new = [torch.randn(2, k.shape[1], 1, k.shape[3], generator=g).to(dtype) for _ in range(2)]
        call: dict[str, Any] = states.append_arguments(layer, *new, seed=step)
        call["positions"] = call["positions"].expand(2, -1) - torch.tensor([[0], [3]])  # row 1 is padded on the left
        call["cos"], call["sin"] = layer.shared.runtime.angles(1, call["positions"])
        call["roped"] = roped
        assert append_triton.declines(codec.format, states.shape_of(new[0]), states.GPU) == ""
        mine = [x.clone() for x in call["state"]]
        for name, x in codec.named(mine).items():  # what is not written must not pass for right
            if name in ("k_codes", "v_codes", "k_scale", "v_scale"):
                x[:, :, int(layer.length)] = 77
        append_triton.append(states.coding(**{**call, "state": mine}))
        append_ref(**call)
        a, b = codec.named(mine), codec.named(call["state"])
        for name in a:
            assert name in EXACT or torch.equal(a[name], b[name]), name
        for row in range(2):
            got, wanted = held(a, row), held(b, row)
            assert got.keys() == wanted.keys()
            entered += int(layer.length) in got
            for slot, (score, key, value) in got.items():
                assert score == wanted[slot][0]
                assert torch.equal(key, wanted[slot][1]) and torch.equal(value, wanted[slot][2])
        layer.length.add_(1)
    assert entered or codec.exact_rows == 0


@here
@interpreter
@pytest.mark.parametrize(
    ("method", "options", "roped", "dtype"),
    sampled([(*o, i % 2 == 1, torch.float32 if i % 2 else torch.float16) for i, o in enumerate(OPTIONS)]),
    ids=IDS,
)
def test_chunks_equal_the_definition(
    method: str, options: tuple, roped: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(append_triton, "_ROWS", 16)  # several tiles, the last of them not full
    layer, k, _ = states.filled(method, options, batch=2, lengths=(3,))
    layer.length.add_(3)
    codec, entered = Codec.parse(layer.codec_text), 0
    mine = [x.clone() for x in layer.state()]
    for seed, rows in enumerate((37, 2, 18)):
        g = torch.Generator().manual_seed(seed)
        new = [torch.randn(2, rows, k.shape[1], k.shape[3], generator=g).to(dtype).transpose(1, 2) for _ in range(2)]
        call: dict[str, Any] = states.append_arguments(layer, *new, seed=seed)
        call["positions"] = call["positions"].expand(2, -1) - torch.tensor([[0], [3]])  # row 1 is padded on the left
        call["cos"], call["sin"] = layer.shared.runtime.angles(1, call["positions"])
        call["roped"] = roped
        assert append_triton.declines(codec.format, states.shape_of(new[0]), states.GPU) == ""
        held_before = [x.clone() for x in mine]
        mine[STATE_NAMES.index("length")].copy_(layer.length)
        append_triton.append(states.coding(**{**call, "state": mine}))
        append_ref(**call)
        first, last = int(layer.length), int(layer.length) + rows
        a, b, old = codec.named(mine), codec.named(call["state"]), codec.named(held_before)
        for name in a:
            if name in ("k_codes", "v_codes", "k_scale", "v_scale"):
                got, wanted = a[name][:, :, first:last], b[name][:, :, first:last]
                same = (got.float() - wanted.float()).abs() <= (2**-9 * wanted.float().abs() if "scale" in name else 0)
                assert not got.numel() or same.float().mean() >= 0.998, name  # sums in another order: a tie may fall either way
                for untouched in (slice(first), slice(last, None)):
                    assert torch.equal(a[name][:, :, untouched], old[name][:, :, untouched]), name
            elif name not in EXACT:
                assert torch.equal(a[name], b[name]), name
        for row in range(2):
            got_rows, wanted_rows = held(a, row), held(b, row)
            assert got_rows.keys() == wanted_rows.keys()
            entered += sum(slot >= first for slot in got_rows)
            for slot, (score, key, value) in got_rows.items():
                assert score == wanted_rows[slot][0]
                assert torch.equal(key, wanted_rows[slot][1]) and torch.equal(value, wanted_rows[slot][2])
        layer.length.add_(rows)
    assert entered or codec.exact_rows == 0


@here
@interpreter
def test_rows_behind_the_last_slot_are_left_out() -> None:
    layer, k, _ = states.filled("klt:best", (), batch=1, lengths=(3,))
    layer.length.fill_(states.SLOTS - 5)
    rows = torch.randn(1, k.shape[1], 9, k.shape[3])
    call: dict[str, Any] = states.append_arguments(layer, rows, rows)
    beyond = [torch.nn.functional.pad(x, (0, 0, 0, 8), value=77) if x.dim() == 4 else x for x in call["state"]]
    state = [x[:, :, :-8] if x.dim() == 4 else x for x in beyond]  # what stands behind is seen
    before = [x.clone() for x in beyond]
    codec = Codec.parse(layer.codec_text)
    names = codec.named(state)
    held = [x if n.startswith(("k_codes", "v_codes")) else x.contiguous() for n, x in names.items()]
    append_triton.append(states.coding(**{**call, "state": held}))
    for name, x, y in zip(names, beyond, before, strict=True):
        if name in ("k_codes", "v_codes"):
            assert torch.equal(x[:, :, states.SLOTS :], y[:, :, states.SLOTS :]) and not torch.equal(x, y)


@here
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 2 * (len(OPTIONS) - len(LIKE_OTHERS)) + 10)


@here
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_others_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 2 * len(LIKE_OTHERS), marked="slow")


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("rotatekv", (), "a rotation across heads"),
        ("kvquant", (), "rows of kind nuq"),
        ("klt:best", (("protect", "first:1+massive:1+first:2+massive:2+first:3"),), "5 protection segments"),
        ("klt:best", (("protect", "anchors:2"),), "rows by modality, or anchors"),
    ],
)
def test_what_it_does_not_serve_is_named(method: str, options: tuple, reason: str) -> None:
    layer, k, _ = states.filled(method, options, batch=1, lengths=(5,))
    f = Codec.parse(layer.codec_text).format
    assert append_triton.declines(f, states.shape_of(k[:, :, :1]), states.GPU) == reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((m, (("protect", p),)) for m in ("klt:best", "cq", "rtn") for p in ("none", "first:2", "kvsink:2+first:1")),
        ("klt:best", (("protect", "first:1+massive:2+first:3"), ("window", 5))),
        ("klt:best-dense", ()),
        ("klt", ()),
        ("centred", (("window", 3),)),
    ],
)
@pytest.mark.parametrize("rows", [1, 30])
def test_natively_on_a_gpu(method: str, options: tuple, dtype: torch.dtype, rows: int) -> None:
    layer, k, _ = states.filled(method, options, batch=2, lengths=(20, 7))
    layer.length.add_(7)
    codec = Codec.parse(layer.codec_text)
    g = torch.Generator().manual_seed(1)
    new = [torch.randn(2, k.shape[1], rows, k.shape[3], generator=g).to(dtype) for _ in range(2)]
    call: dict[str, Any] = states.append_arguments(layer, *new, seed=1)
    call["candidates"] = [x + 9.0 if x.is_floating_point() else x for x in call["candidates"]]  # the new row enters
    call["state"] = [
        x.to(dtype) if n.startswith(("exact_k", "exact_v", "recent_k", "recent_v")) else x
        for n, x in codec.named(call["state"]).items()
    ]
    there = {
        n: [t.cuda() for t in x] if isinstance(x, list | tuple) else x.cuda() if isinstance(x, Tensor) else x
        for n, x in call.items()
    }
    append_triton.append(states.coding(**there))
    append_ref(**call)
    mine, wanted = codec.named([x.cpu() for x in there["state"]]), codec.named(call["state"])
    for name, a in mine.items():
        if name in ("k_codes", "v_codes", "k_scale", "v_scale"):  # sums in another order: a code on a threshold may fall either way
            same = (a.float() - wanted[name].float()).abs() <= (2**-9 * wanted[name].float().abs() if "scale" in name else 0)
            assert not a.numel() or same.float().mean() >= 0.999, name
        elif name not in EXACT:
            assert torch.equal(a, wanted[name]), name
    for row in range(2):
        got, expected = held(mine, row), held(wanted, row)
        assert got.keys() == expected.keys() and (max(got, default=0) >= int(layer.length) or not codec.exact_rows)
        for slot, (score, key, value) in got.items():
            assert score == expected[slot][0]
            assert torch.allclose(key.float(), expected[slot][1].float(), rtol=2**-7) and torch.equal(value, expected[slot][2])


@pytest.mark.parametrize(
    "name", ["triton/append_kernels", "triton/attend_kernels", "triton/rows_kernels", "triton/trellis_kernels", "select_sinks"]
)
def test_no_loop_declares_a_constant(name: str) -> None:
    """Triton 3.6 refuses to declare a constexpr a second time, as an unrolled loop does; later versions let it pass."""
    path = Path(append_triton.__file__).parents[1] / f"{name}.py"
    loops = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.For)]
    declared = [n for loop in loops for n in ast.walk(loop) if isinstance(n, ast.AnnAssign)]
    assert not [n.lineno for n in declared if "constexpr" in ast.unparse(n)]
