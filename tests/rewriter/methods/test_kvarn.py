"""KVarN as its paper counts it, and without a calibration."""

from __future__ import annotations

import pytest

import kvsink
from kvsink.codecs import Codec
from kvsink.model.runtime import runtime_of
from kvsink.report import counted_bits
from tests.models import build


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [(2, 2), (4, 2)])
def test_counted_bits_are_the_formula(dim: int, bits: tuple[int, int]) -> None:
    """Codes, and of 16 bit: step and minimum of a channel and a scale of a token, or the other way round."""
    m, heads, n = kvsink.get_method("kvarn"), 8, 4096
    sides = [m.side(which, b).resolved(heads, dim) for which, b in zip(("key", "value"), bits, strict=True)]
    found = counted_bits(Codec(*sides), heads, dim, n)
    small = (32 * 128 / 2 + 64 / 2 + 40 * n / 2) / (heads * dim * n)  # slots of the ring, the length, positions and real slots
    beside = small + 16 * 128 / n  # recent rows
    wanted = bits[0] + 32 / 128 + 16 / dim, bits[1] + 16 / 128 + 32 / dim
    assert found == pytest.approx([w + beside for w in wanted], abs=1e-9)


def test_it_needs_no_text() -> None:
    model = build("llama")
    report = kvsink.rewrite(model, "kvarn")
    assert report.calibration_tokens == 0 and report.table_bytes == 0
    assert report.layers[0].key == (
        "hadamard, uniform 2 bit, scales of tokens and channels in 8 steps, per channel over 128 tokens, in blocks of 128"
    )
    assert [s.key for s in runtime_of(model).plans[0].segments] == ["first:128"]
