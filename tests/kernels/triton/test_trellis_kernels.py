"""Trellis-coded rows in Triton: levels by the formula, bit by bit, and the codes of the definition; in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsink.cache.cache import KVSinkCache
from kvsink.codecs import Codec, SideSpec
from kvsink.kernels.trellis import trellis_encode
from kvsink.kernels.triton import append as append_triton
from kvsink.kernels.triton import attend as attend_triton
from kvsink.kernels.triton.attend import _walks, power
from kvsink.tools.bench_model import rewritten
from tests import states
from tests.kernels.test_trellis import gauss, read_row
from tests.kernels.triton.test_attend import INTERPRETED, _decoder, interpreter, run_in_the_interpreter

triton = pytest.importorskip("triton")
tl = triton.language
kernels: Any = importlib.import_module("kvsink.kernels.triton.trellis_kernels")

READ = (
    (1, 4),
    (2,) * 8,
    (4, 4, 3, 3, 2, 2, 1, 1, 1, 1),
    (3, 1, 2) * 4,
    (2,) * 16,
    (1, 2, 3, 4) * 8,
    (6, 5, 4, 3, 2, 1),
    (5, 1),
    (6,),
    (6,) * 9 + (5,) * 7,
)
WRITTEN = (
    ((1, 4), 300),
    ((3, 2, 1), 130),
    ((2,) * 8, 40),
    ((4, 4, 3, 3, 2, 2, 1, 1, 1, 1), 20),
    ((3, 1) * 8, 20),
    ((2,) * 32, 9),
    ((6, 5, 4, 1), 60),
    ((5,), 20),
)


@triton.jit  # type: ignore[untyped-decorator]
def read_kernel(codes, meta, odd, out, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, BYTES: tl.constexpr):
    n, c = tl.arange(0, N), tl.arange(0, DP)
    x = kernels.walk_levels(codes, n * BYTES, meta, odd, N, D, DP, W, BYTES)
    x = x * kernels.byte_gains(codes, n * BYTES, BYTES)[:, None]
    tl.store(out + n[:, None] * D + c[None, :], x, mask=(c < D)[None, :])


@interpreter
@pytest.mark.parametrize("widths", READ, ids=lambda w: str(8 * len(w)))
def test_levels_are_those_of_the_formula(widths: tuple[int, ...]) -> None:
    dim, size = 8 * len(widths), sum(widths) + 1
    codes = torch.randint(0, 256, (8, size), generator=torch.Generator().manual_seed(dim), dtype=torch.uint8)
    codes[:3, -1] = torch.tensor([255, 0, 1])
    got = torch.zeros(8, dim)
    read_kernel[(1,)](codes, *_walks(widths, "cpu"), got, N=8, D=dim, DP=power(dim), W=max(widths), BYTES=size)
    wanted = torch.tensor([read_row(row, [1.0] * dim, list(widths)) for row in codes.tolist()], dtype=torch.float64)
    assert got[0].isnan().all() and (got[1] == 0).all()
    assert ((got - wanted)[1:].abs() <= 2.0**-22 * wanted[1:].abs().amax(-1, keepdim=True)).all()


def written(x: Tensor, sigma: Tensor, widths: tuple[int, ...], first: int) -> tuple[Tensor, Tensor]:
    """Codes [1, H, S, bytes] of rows x that the kernel stored from slot `first` on among bytes of 77, and the slots around them."""
    from kvsink.kernels.triton import append_kernels

    side = SideSpec(bits=2, kind="trellis", widths=widths)
    _, heads, rows, _ = x.shape
    codes = torch.full((1, heads, first + rows + 2, sum(widths) + 1), 77, dtype=torch.uint8)
    held = {
        "v_codes": codes,
        "v_scale": torch.zeros(1, heads, codes.shape[2], 0, dtype=torch.float16),
        "length": torch.tensor(first),
    }
    none = x.new_empty(1, rows, 0)
    angles, positions = (none, none, 0), torch.arange(first, first + rows)[None]
    codec: Any = SimpleNamespace()
    append_triton._code(append_kernels, codec, "v", side, x, positions, 0, angles, held, {"v_sigma": sigma}, True)
    return codes[:, :, first : first + rows], torch.cat([codes[:, :, :first], codes[:, :, first + rows :]], 2)


@interpreter
@pytest.mark.parametrize(("widths", "rows"), WRITTEN, ids=lambda w: str(8 * len(w)) if isinstance(w, tuple) else "")
def test_codes_are_those_of_the_definition(widths: tuple[int, ...], rows: int) -> None:
    """Bit for bit, where no transform comes before: rows of every gain, of zeros and with entries that are not finite."""
    dim, heads = 8 * len(widths), 2 if len(widths) < 10 else 1
    sigma = gauss(heads, dim, seed=1).exp()
    x = gauss(1, heads, rows, dim, seed=2) * sigma[:, None] * torch.linspace(-12, 9, rows).exp2()[:, None]
    if heads == 2:  # rows with ties between states before and between first states
        sigma[1], x[:, 1, 6:] = 1.0, gauss(1, rows - 6, dim, seed=3).sign()
    x[:, :, 3], x[:, 0, 4, 3], x[:, -1, 5, 7] = 0.0, float("nan"), -float("inf")
    wanted = trellis_encode(x, sigma, widths)
    got, rest = written(x, sigma, widths, 3)
    assert torch.equal(got, wanted) and (rest == 77).all()
    assert {0, 255} < set(wanted[..., -1].flatten().tolist()) and int(wanted[..., -1].unique().numel()) > 4
    for row in (4, rows - 1):
        one, rest = written(x[:, :, row : row + 1], sigma, widths, 3)
        assert torch.equal(one, wanted[:, :, row : row + 1]) and (rest == 77).all()


TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}


def compiled(kernel: Any, given: tuple[Any, ...], options: dict[str, Any]) -> None:
    """A launch's kernel compiled for an H100, which need not be there: the interpreter lets types pass that differ by branch."""
    values = dict(zip(kernel.arg_names, given, strict=False)) | {n: x for n, x in options.items() if n in kernel.arg_names}
    constants = {n: x for n, x in values.items() if isinstance(x, bool | str | tl.dtype) or n in kernel.fn.__annotations__}
    plain = {n: TYPES[x.dtype] if isinstance(x, Tensor) else "fp32" if isinstance(x, float) else "i32" for n, x in values.items()}
    signature = {n: "constexpr" if n in constants else plain[n] for n in kernel.arg_names}
    source = importlib.import_module("triton.compiler").ASTSource(kernel, signature, constants)
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    launch = {n: x for n, x in options.items() if n in ("num_warps", "num_stages", "enable_fp_fusion")}
    assert triton.compile(source, target=target, options=launch).asm["cubin"]


@pytest.mark.sample(3)
@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("widths", [(), (6, 5, 2, 1)], ids=str)
@pytest.mark.parametrize("what", ["attend", "code", "code_rows"])
def test_kernels_compile(what: str, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if widths:
        monkeypatch.setattr("kvsink.calibrate.design.water_fill", lambda *_, **__: widths)
    layer = KVSinkCache.for_model(rewritten(_decoder(32, 1), "klt-2/2", "first:3")(), 1, 64).packed_layers()[0]
    codec, rows = Codec.parse(layer.codec_text), 20 if what == "code_rows" else 1
    state = [x.half() if n.startswith(("exact_k", "exact_v")) else x for n, x in codec.named(layer.state()).items()]
    x = torch.zeros(1, 2, rows, 32, dtype=torch.float16)
    launched = []
    for name, members in (
        ("attend", ("rotate_query", "attend", "merge")),
        ("append", ("code", "enter")),
        ("rows", ("code_rows", "enter_rows")),
    ):
        module = importlib.import_module(f"kvsink.kernels.triton.{name}_kernels")
        for member in members:
            kernel = getattr(module, f"{member}_kernel")

            def launch(*given: Any, kernel: Any = kernel, member: str = member, **options: Any) -> None:
                if member == what:
                    launched.append((kernel, given, options))

            monkeypatch.setattr(module, f"{member}_kernel", defaultdict(lambda launch=launch: launch))
    if what == "attend":
        attend_triton.attend(states.asking(x, x, x, state, layer.params, None, 0.1, codec))
    else:
        append_triton.append(states.coding(**{**states.append_arguments(layer, x, x), "state": state}))
    compiled(*launched[-1])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, len(READ) + len(WRITTEN))
