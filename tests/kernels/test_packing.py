"""Packing is exact for every width, and its layout is the little-endian word that the kernels read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsink.kernels.packing import pack_bits, unpack_bits


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 8), runs=st.integers(0, 5), rows=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_round_trip(width: int, runs: int, rows: int, seed: int) -> None:
    codes = torch.randint(0, 2**width, (rows, 8 * runs), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(codes, width)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, width * runs)
    assert torch.equal(unpack_bits(packed, width, 8 * runs), codes)


@pytest.mark.parametrize("width", range(1, 9))
def test_the_layout_is_one_little_endian_word(width: int) -> None:
    codes = torch.randint(0, 2**width, (8,), generator=torch.Generator().manual_seed(width))
    word = sum(int(code) << (i * width) for i, code in enumerate(codes))
    assert pack_bits(codes.to(torch.uint8), width).tolist() == list(word.to_bytes(width, "little"))


@pytest.mark.parametrize("width", [1, 3, 4, 6])
def test_other_strides(width: int) -> None:
    codes = torch.randint(0, 2**width, (16, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).T
    assert not codes.is_contiguous()
    assert torch.equal(unpack_bits(pack_bits(codes, width), width, 16), codes)
    held = torch.full((5, 4 * width), 255, dtype=torch.uint8)
    held[:, 1 : 1 + 2 * width] = pack_bits(codes, width)
    assert torch.equal(unpack_bits(held[:, 1 : 1 + 2 * width], width, 16), codes)


@pytest.mark.parametrize(("count", "width", "words"), [(7, 2, "divisible by 8"), (8, 0, "1 to 8"), (8, 9, "1 to 8")])
def test_refusals(count: int, width: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack_bits(torch.zeros(count, dtype=torch.uint8), width)
    with pytest.raises(ValueError, match=words):
        unpack_bits(torch.zeros(count, dtype=torch.uint8), width, count)
