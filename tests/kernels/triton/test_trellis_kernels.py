"""Trellis-coded rows in Triton: levels by the formula, bit by bit, and the codes of the definition; in Triton's interpreter."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsink.codecs import SideSpec
from kvsink.kernels.trellis import trellis_encode
from kvsink.kernels.triton import append as append_triton
from kvsink.kernels.triton.attend import _walks, power
from tests.kernels.test_trellis import gauss, read_row
from tests.kernels.triton.test_attend import INTERPRETED, interpreter, run_in_the_interpreter

triton = pytest.importorskip("triton")
tl = triton.language
kernels: Any = importlib.import_module("kvsink.kernels.triton.trellis_kernels")

READ = ((1, 4), (2,) * 8, (4, 4, 3, 3, 2, 2, 1, 1, 1, 1), (3, 1, 2) * 4, (2,) * 16, (1, 2, 3, 4) * 8)
WRITTEN = (((1, 4), 300), ((3, 2, 1), 130), ((2,) * 8, 40), ((4, 4, 3, 3, 2, 2, 1, 1, 1, 1), 20), ((3, 1) * 8, 20), ((2,) * 32, 9))


@triton.jit  # type: ignore[untyped-decorator]
def read_kernel(codes, meta, cubic, out, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, BYTES: tl.constexpr):
    n, c = tl.arange(0, N), tl.arange(0, DP)
    x = kernels.walk_levels(codes, n * BYTES, meta, cubic, N, D, DP, W, BYTES)
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
    x[:, :, 3], x[:, 0, 4, 3], x[:, -1, 5, 7] = 0.0, float("nan"), -float("inf")
    wanted = trellis_encode(x, sigma, widths)
    got, rest = written(x, sigma, widths, 3)
    assert torch.equal(got, wanted) and (rest == 77).all()
    assert {0, 255} < set(wanted[..., -1].flatten().tolist()) and int(wanted[..., -1].unique().numel()) > 5
    for row in (4, rows - 1):
        one, rest = written(x[:, :, row : row + 1], sigma, widths, 3)
        assert torch.equal(one, wanted[:, :, row : row + 1]) and (rest == 77).all()


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, len(READ) + len(WRITTEN))
