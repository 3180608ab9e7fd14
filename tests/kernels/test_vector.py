"""Coupled codes: the nearest code vector is taken, codes come back, the gain fits, chunks do not matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvsink.kernels import vector
from kvsink.kernels.vector import nearest, normed_encode, token_rms, vector_decode, vector_encode


def some(heads: int = 2, dim: int = 32, couple: int = 4, code_bits: int = 6, books: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(couple * code_bits)
    book = torch.randn(books, dim // couple, 2**code_bits, couple, generator=g)
    return torch.randn(2, heads, 5, dim, generator=g), book


@pytest.mark.parametrize(("couple", "code_bits"), [(2, 8), (4, 9), (8, 10), (16, 12), (32, 3), (4, 1)])
@pytest.mark.parametrize("books", [1, 2])
def test_every_row_takes_its_nearest_vector(couple: int, code_bits: int, books: int) -> None:
    x, book = some(couple=couple, code_bits=code_bits, books=books)
    codes, scale = vector_encode(x, book, code_bits, False)
    assert codes.shape == (2, 2, 5, -(-32 // couple * code_bits // 8)) and scale.shape == (2, 2, 5, 0)
    back = vector_decode(codes, scale, book, code_bits)
    for head in range(2):
        for group in range(32 // couple):
            part = slice(group * couple, (group + 1) * couple)
            rows, words = x[:, head, :, part].reshape(-1, couple).double(), book[head % books, group].double()
            wanted = words[torch.cdist(rows, words).argmin(-1)].reshape(2, 5, couple)
            assert (back[:, head, :, part] - wanted).abs().max() < 1e-6


def test_ties_take_the_lower_index() -> None:
    book = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]])
    assert nearest(torch.tensor([[[2.0, 0.0], [0.5, 0.5], [0.0, 0.0]]]), book).tolist() == [[0, 0, 0]]


def test_code_vectors_code_themselves() -> None:
    _, book = some()
    pick = torch.randint(0, 64, (8,), generator=torch.Generator().manual_seed(0))
    x = torch.stack([book[h, torch.arange(8), pick].flatten() for h in range(2)])[None, :, None]
    assert torch.equal(vector_decode(*vector_encode(x, book, 6, False), book, 6), x)
    scaled = 3.0 * x  # with a gain the same directions serve every size
    codes, scale = vector_encode(scaled, book, 6, True)
    assert (vector_decode(codes, scale, book, 6) - scaled).abs().max() <= 2.0**-10 * scaled.abs().max()


def test_the_gain_is_the_least_squares_one() -> None:
    x, book = some()
    codes, scale = vector_encode(x, book, 6, True)
    unit = vector_decode(codes, torch.ones_like(scale), book, 6)
    best = (x * unit).sum(-1, keepdim=True) / unit.square().sum(-1, keepdim=True)
    assert scale.dtype == torch.float16 and scale.shape == (2, 2, 5, 1)
    assert (scale.float() - best).abs().max() <= 2.0**-11 * best.abs().max()


def test_one_norm_serves_all_heads_of_a_token() -> None:
    """Codes of a row do not depend on its size, and the norm is that of the whole token."""
    x, book = some()
    size = torch.tensor([1.0, 8.0, 0.125, 64.0, 0.5])[:, None]
    codes, norm = normed_encode(x * size, book, 6)
    assert norm.shape == (2, 1, 5, 1) and norm.dtype == torch.float16
    wanted = (x * size).double().square().mean((1, 3), keepdim=True).sqrt()
    assert ((norm.double() - wanted).abs() <= 2.0**-11 * wanted).all()
    assert torch.equal(codes, normed_encode(x, book, 6)[0])  # powers of two
    back = vector_decode(codes, norm, book, 6)
    unit = vector_decode(*vector_encode(x * size / norm.float(), book, 6, False), book, 6)
    assert torch.equal(back, unit * norm.float())
    for extreme in (0.0, 1e-12, 1e6):
        assert (
            torch.isfinite(token_rms(torch.full((1, 2, 1, 8), extreme))).all() and token_rms(torch.full((1, 2, 1, 8), extreme)) > 0
        )


def test_zero_rows_stay_zero() -> None:
    _, book = some()
    x = torch.zeros(1, 2, 3, 32)
    codes, scale = vector_encode(x, book, 6, True)
    assert torch.isfinite(scale).all() and vector_decode(codes, scale, book, 6).abs().max() <= 1e-3


@pytest.mark.parametrize("gain", [False, True])
def test_chunks_do_not_matter(gain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, book = some()
    whole = vector_encode(x, book, 6, gain)
    monkeypatch.setitem(vector._CHUNK, "cpu", 1)
    parts = vector_encode(x, book, 6, gain)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
