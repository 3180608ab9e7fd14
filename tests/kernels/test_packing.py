"""Packing is exact for every width, and its layout is the little-endian word that the kernels read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsink.kernels.packing import pack_bits, pack_codes, packed_bytes, unpack_bits, unpack_codes


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


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 12), count=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_any_count_of_codes_comes_back(width: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**width, (2, 3, count), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, width)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, packed_bytes(count, width)) == (2, 3, -(-count * width // 8))
    assert torch.equal(unpack_codes(packed, width, count), codes)
    if width <= 8 and count % 8 == 0:  # one layout for both
        assert torch.equal(packed, pack_bits(codes.to(torch.uint8), width))


@pytest.mark.parametrize("width", [9, 10, 12])
def test_wide_codes_lie_little_endian(width: int) -> None:
    codes = torch.randint(0, 2**width, (16,), generator=torch.Generator().manual_seed(width))
    number = sum(int(c) << (i * width) for i, c in enumerate(codes))
    assert bytes(pack_codes(codes, width).tolist()) == number.to_bytes(2 * width, "little")


def test_codes_of_13_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="codes of 13 bits cannot be packed; widths are 1 to 12"):
        packed_bytes(8, 13)
