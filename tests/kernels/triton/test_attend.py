"""The Triton kernel equals the definition: in Triton's interpreter on a CPU (a process of its own), natively on a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsink.cache.cache import KVSinkCache
from kvsink.codecs import Codec
from kvsink.kernels.attend import attend_ref
from kvsink.kernels.backends import GROWS
from kvsink.kernels.triton import attend as attend_triton
from kvsink.tools.bench_model import Shape, llama, rewritten
from tests import states
from tests.close import FUSED_FLOAT32
from tests.kernels.test_attend import SCALE, make_mask

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF = 2e-3  # relative error of an output in 16 bit: the rounding of the operands of its products

here = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter, see test_in_the_interpreter")

OPTIONS: tuple[tuple[Any, tuple[tuple[str, Any], ...]], ...] = (
    ("klt:best", ()),
    ("klt:best", (("protect", "first:2+massive:3"), ("window", 5))),
    *(("klt:best", (("key_bits", bits), ("value_bits", 4))) for bits in (1.5, 3, 5)),
    ("klt:codebooks", (("key_bits", 1), ("value_bits", 2))),
    ("klt:codebooks", (("key_bits", 2), ("value_bits", 2.25), ("windows", 12))),
    *(("centred", (("key_bits", bits), ("value_bits", bits), ("protect", "first:1"))) for bits in (1, 2, 3, 6, 8)),
    ("centred", (("window", 3),)),
    ("klt:even", (("key_bits", 2.25), ("value_bits", 2))),
    ("rtn", (("key_bits", 2), ("value_bits", 4), ("window", 4))),
    ("cq", (("key_bits", 2), ("value_bits", 2), ("windows", 12))),
    ("cq", (("key_bits", 1.25), ("windows", 18), ("value_bits", 2), ("protect", "first:2"))),
    ("static:rotated", ()),
    ("klt:best-dense", ()),
    ("klt", ()),
    ("klt", (("key_bits", 3.5), ("value_bits", 3), ("window", 5), ("protect", "first:2"))),
    ("klt-dense", (("key_bits", 1.5), ("value_bits", 4))),
    ("klt:even", (("key_bits", 0.5), ("value_bits", 1))),  # a run of 0 bits
)
SLOW = {
    *(("klt:best", bits) for bits in (1.5, 3, 5)),
    *(("centred", bits) for bits in (1, 3, 6, 8)),
    *(("klt:codebooks", bits) for bits in (1, 2)),
    *(("cq", bits) for bits in (1.25, 2)),
    ("klt-dense", 1.5),
}
"""Method and bits of keys."""
IDS = [f"{m}-{'-'.join(f'{k}={v}' for k, v in options)}" for m, options in OPTIONS]
LIKE_OTHERS = {i for i, (m, o) in enumerate(OPTIONS) if (m, dict(o).get("key_bits")) in SLOW}
TILED = [(*o, 64 if i % 5 == 0 else 16) for i, o in enumerate(OPTIONS)]  # slots of a step


def sampled(cases: list[Any]) -> list[Any]:
    """Cases of the options in turn; those whose code is that of others are slow tests."""
    return [pytest.param(*c, marks=pytest.mark.slow) if i in LIKE_OTHERS else c for i, c in enumerate(cases)]


def compared(layer: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dtype: torch.dtype) -> float:
    """Relative error of the kernel for one new row, in `dtype`, against the definition in float32 of the same numbers."""
    codec = Codec.parse(layer.codec_text)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    shape = states.shape_of(k, q.shape[1], mask="" if mask is None else "slots", exact=layer.exact_k.shape[2])
    assert attend_triton.declines(codec.format, shape, states.GPU) == ""
    held = ("exact_k", "exact_v", "recent_k", "recent_v")
    state = [x.to(dtype) if n in held else x for n, x in codec.named(layer.state()).items()]
    got = attend_triton.attend(states.asking(q, k, v, state, layer.params, mask, SCALE, codec))
    wanted = attend_ref(q.float(), k.float(), v.float(), state, layer.params, mask, SCALE, mask is None, layer.codec_text)
    assert got.shape == q.shape and got.dtype == dtype and torch.isfinite(got).all()
    return float((got.float() - wanted).norm() / wanted.norm())


@here
@interpreter
@pytest.mark.parametrize(("method", "options", "tile"), sampled(TILED), ids=IDS)
def test_equals_the_definition(method: Any, options: tuple, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_triton, "_BY_QUERY", (tile, 2, 16))
    monkeypatch.setattr(attend_triton, "_BY_KEY", (tile, 4, 8))
    for strict, lengths, kind in ((False, (37, 20, 1), "bool"), (True, (3, 1), "none"), (False, (40, 1), "none")):
        layer, k, v = states.filled(method, options, batch=2, lengths=lengths, strict=strict)
        q = torch.randn(2, 2 * k.shape[1], 1, k.shape[3], generator=torch.Generator().manual_seed(1))
        mask = make_mask(kind, 2, q.shape[1], int(layer.length), 1, states.SLOTS)
        for dtype, bound in ((torch.float32, FUSED_FLOAT32), (torch.float16, HALF)):
            assert compared(layer, q, k[:, :, -1:], v[:, :, -1:], mask, dtype) <= bound


@cache
def _decoder(dim: int, repeats: int) -> Any:
    torch.manual_seed(0)
    return llama(1, torch.float32, 64, 256, Shape(64, 64, 2, 1e4, 32 * repeats, 2 * repeats, dim), "cpu")


@here
@interpreter
@pytest.mark.parametrize(
    ("side", "dim", "repeats"),
    [
        *((s, *shape) for s in ("klt:codebooks-2", "klt:best-dense-2/4", "centred-3") for shape in ((64, 1), (96, 3), (256, 5))),
        *(("klt-2/3", *shape) for shape in ((80, 1), (128, 4), (256, 2))),
        ("klt-dense-2.5/2", 96, 2),
    ],
)
def test_head_dimensions_and_ratios(side: str, dim: int, repeats: int) -> None:
    model = rewritten(_decoder(dim, repeats), side, "first:3")()
    layer = KVSinkCache.for_model(model, 1, 128).packed_layers()[0]
    g = torch.Generator().manual_seed(dim)
    k, v = (torch.randn(1, 2, 101, dim, generator=g) for _ in range(2))
    for a, b in ((0, 100), (100, 101)):
        states.append_(**states.append_arguments(layer, k[:, :, a:b], v[:, :, a:b]))
        layer.length.add_(100 * (a == 0))
    q = torch.randn(1, 2 * repeats, 1, dim, generator=g)
    assert compared(layer, q, k[:, :, 100:], v[:, :, 100:], None, torch.float32) <= FUSED_FLOAT32
    assert compared(layer, q, k[:, :, 100:], v[:, :, 100:], None, torch.float16) <= HALF


@here
@interpreter
def test_positions_that_begin_late_and_rows_that_see_nothing() -> None:
    layer, k, v = states.filled("klt:best", (), batch=2, lengths=(40, 1))
    layer.shared.positions.add_(9)
    q = torch.randn(2, 2 * k.shape[1], 1, k.shape[3], generator=torch.Generator().manual_seed(1))
    assert compared(layer, q, k[:, :, -1:], v[:, :, -1:], None, torch.float32) <= FUSED_FLOAT32
    mask = torch.ones(2, 1, 1, states.SLOTS, dtype=torch.bool)
    mask[1] = False
    codec = Codec.parse(layer.codec_text)
    got = attend_triton.attend(states.asking(q, k[:, :, -1:], v[:, :, -1:], layer.state(), layer.params, mask, SCALE, codec))
    assert torch.isfinite(got).all() and (got[1] == 0).all() and (got[0] != 0).any()


@here
@interpreter
def test_positions_that_run_ahead_of_the_slots_are_never_a_wrong_number() -> None:
    layer, k, v = states.filled("klt:best", (), batch=1, lengths=(40, 1))
    layer.shared.positions[:, 20:] += 2000  # further than any cache of this length can name
    layer.shared.positions[:, 40] = 40
    q = torch.randn(1, 2 * k.shape[1], 1, k.shape[3], generator=torch.Generator().manual_seed(1))
    codec = Codec.parse(layer.codec_text)
    got = attend_triton.attend(states.asking(q, k[:, :, -1:], v[:, :, -1:], layer.state(), layer.params, None, SCALE, codec))
    assert got.isnan().all()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of rows [.., S, D] in halves, cos and sin [.., S, D]."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


@here
@interpreter
@pytest.mark.parametrize("method", ["klt:best", "klt:best-dense", "klt", "klt-dense"])
def test_a_basis_of_the_reader(method: str) -> None:
    """Keys written as y T are read as z^ T^-1, T not orthogonal: against softmax in float64 over rows of the formula."""
    layer, _, _ = states.filled(method, (("protect", "none"),), batch=2, lengths=(1,))
    codec, (heads, dim) = Codec.parse(layer.codec_text), (states.KV_HEADS, states.HEAD_DIM)
    g = torch.Generator().manual_seed(3)
    # Singular values 0.5 to 2: rows and columns scaled between two orthogonal matrices.
    left, right = (torch.linalg.qr(torch.randn(heads, dim, dim, generator=g, dtype=torch.float64))[0] for _ in range(2))
    basis = left * torch.linspace(-1, 1, dim, dtype=torch.float64).exp2() @ right
    names, back = codec.param_names(), torch.linalg.inv(basis).mT
    params = [basis.float() if n == "k_basis" else x for n, x in zip(names, layer.params, strict=True)]
    k, v = states.rows(2, 40, seed=4)
    layer.length.zero_()
    states.append_(**{**states.append_arguments(layer, k[:, :, :39], v[:, :, :39]), "params": params})
    layer.length.fill_(39)
    states.append_(**{**states.append_arguments(layer, k[:, :, 39:], v[:, :, 39:]), "params": params})
    q = torch.randn(2, 2 * heads, 1, dim, generator=g)
    call = states.asking(q, k[:, :, 39:], v[:, :, 39:], layer.state(), params, None, SCALE, codec)
    call.p["k_unbasis"] = back.float().contiguous()
    got = attend_triton.attend(call)

    p, st = codec.tables(params), codec.named(layer.state())
    z = codec.dequantize("k", st["k_codes"][:, :, :39], st["k_scale"][:, :, :39], p).double()
    positions = st["positions"][:, :39].long()
    start = positions // codec.key.block
    cos, sin = (p[n].double()[start][:, None] for n in ("start_cos", "start_sin"))
    rows = turned(z @ back.mT + p["k_table"].double()[:, positions % p["k_table"].shape[1]].movedim(0, 1), cos, sin)
    assert (rows - k[:, :, :39]).norm() < 0.8 * k[:, :, :39].norm()
    rows = torch.cat([rows, k[:, :, 39:].double()], 2).repeat_interleave(2, 1)
    values = torch.cat([codec.read_values(st, p, 0, 39).double(), v[:, :, 39:].double()], 2).repeat_interleave(2, 1)
    wanted = (q.double() @ rows.mT * SCALE).softmax(-1) @ values
    assert (got - wanted).norm() <= FUSED_FLOAT32 * wanted.norm()
    call.p["k_unbasis"] = call.p["k_basis"]
    assert (attend_triton.attend(call) - wanted).norm() > 0.01 * wanted.norm()


@here
@interpreter
def test_a_gain_that_is_not_a_number_counts_where_it_is_seen() -> None:
    layer, k, v = states.filled("klt", (("protect", "first:2"),), batch=2, lengths=(40, 1))
    q = torch.randn(2, 2 * k.shape[1], 1, k.shape[3], generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 1, 1, states.SLOTS, dtype=torch.bool)
    exact = layer.exact_slot[:, 0].tolist()
    row = next(slot for slot in range(40) if slot not in layer.exact_slot)
    mask[1, ..., row] = False
    codec, last = Codec.parse(layer.codec_text), (q, k[:, :, -1:], v[:, :, -1:])
    rest = layer.state(), layer.params, mask, SCALE
    wanted = attend_ref(*last, *rest, False, layer.codec_text)
    for codes in (layer.k_codes, layer.v_codes):  # an exact row of each, the new one and one that is hidden
        codes[0, :, exact[0], -1] = codes[1, :, exact[1], -1] = codes[:, :, 40, -1] = codes[1, :, row, -1] = 255
    got = attend_triton.attend(states.asking(*last, *rest, codec))
    assert (got - wanted).norm() <= FUSED_FLOAT32 * wanted.norm()
    layer.v_codes[0, 1, row, -1] = 255  # seen by two heads
    got = attend_triton.attend(states.asking(*last, *rest, codec))
    assert got[0, 2:].isnan().all() and torch.isfinite(got[0, :2]).all() and torch.isfinite(got[1]).all()


def run_in_the_interpreter(file: str, count: int, which: str = "", marked: str = "not slow") -> None:
    """The tests of a file, or those named so, in a process whose Triton interprets: `count` of them pass."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        marked,
        file,
        *(("-k", which) if which else ()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.findall(r"(\d+) passed", done.stdout.splitlines()[-1]) == [str(count)], done.stdout[-400:]


@here
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, len(TILED) - len(LIKE_OTHERS) + 24)


@here
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_others_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, len(LIKE_OTHERS), marked="slow")


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("rotatekv", (), "a rotation across heads"),
        ("klt:best", (("value_bits", 16),), "rows of kind none"),
        ("kivi/8", (), "ranges along tokens"),
    ],
)
def test_what_it_does_not_serve_is_named(method: str, options: tuple, reason: str) -> None:
    layer, k, _ = states.filled(method, options, batch=1, lengths=(5, 1))
    shape = states.shape_of(k[:, :, :1].half(), exact=6)
    assert attend_triton.declines(Codec.parse(layer.codec_text).format, shape, states.GPU) == reason


def test_limits_are_named() -> None:
    layer, k, _ = states.filled("klt:best", (), batch=1, lengths=(5, 1))
    codec = Codec.parse(layer.codec_text)
    f, shape = codec.format, states.shape_of(k[:, :, :1].half(), exact=6)
    for change, reason in (
        ({"exact": 65}, "65 exact rows, more than 64"),
        ({"exact": GROWS}, "exact rows whose number grows with the slots"),
        ({"dtype": torch.float64}, "torch.float64 is not float32 or a 16-bit type"),
        ({"dim": 512, "value_dim": 512}, "512 channels, not 16 to 256"),
        ({"dim": 64, "value_dim": 32}, "keys of 64 channels and values of 32"),
        ({"rows": 2}, "more than one new row"),
        ({"mask": "other"}, "a mask that is not one of visible slots"),
    ):
        assert attend_triton.declines(f, shape._replace(**change), states.GPU) == reason
    assert attend_triton.declines(f, shape, replace(states.GPU, triton=False)) == "Triton is not installed"
    assert attend_triton.declines(f, shape, states.CPU) == "the device is cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "side", ["klt:best-2/4", "klt:codebooks-2", "klt:codebooks-dense-2", "klt-2", "klt-dense-2.5/3", "cq-2", "centred-3", "rtn-4"]
)
def test_natively_on_a_gpu(side: str, dtype: torch.dtype) -> None:
    shape = Shape(64, 64, 2, 1e4, 256, 8, 128)
    torch.manual_seed(0)
    model = rewritten(llama(1, dtype, 64, 2048, shape, "cuda"), side, "first:3")()
    layer = KVSinkCache.for_model(model, 2, 1024).packed_layers()[0]
    k, v = (torch.randn(2, 2, 701, 128, device="cuda", dtype=dtype) for _ in range(2))
    for a, b in ((0, 700), (700, 701)):
        positions = torch.arange(a, b, device="cuda")[None]
        cos, sin = layer.shared.runtime.angles(0, positions)
        scores = [torch.randn(2, b - a, device="cuda"), torch.arange(b - a, device="cuda").expand(2, -1)]
        scores = [x[:, :3] for x in scores]
        rest = (positions, cos, sin, scores, layer.state(), layer.params, layer.codec_text, True)
        states.append_(k[:, :, a:b], v[:, :, a:b], *rest)
        layer.length.add_(700 * (a == 0))
    q = torch.randn(2, 8, 1, 128, device="cuda", dtype=dtype)
    codec, last = Codec.parse(layer.codec_text), slice(700, 701)
    if codec.tiles:
        pytest.skip("the CUDA kernel serves it")
    mask = torch.ones(2, 1, 1, 1024, dtype=torch.bool, device="cuda")
    mask[1, ..., :37] = False
    got = attend_triton.attend(states.asking(q, k[:, :, last], v[:, :, last], layer.state(), layer.params, mask, 0.09, codec))
    state = [x.float() if x.dtype == dtype else x for x in layer.state()]
    wanted = attend_ref(
        q.float(), k[:, :, last].float(), v[:, :, last].float(), state, layer.params, mask, 0.09, False, layer.codec_text
    )
    bound = {torch.float32: 1e-5, torch.float16: HALF, torch.bfloat16: 5e-3}[dtype]
    assert float((got.float() - wanted).norm() / wanted.norm()) <= bound
