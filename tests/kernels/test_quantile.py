"""The quantile clamp against a sort in numpy, one group at a time, and what it does to a row with an outlier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsink.kernels.dequantize import dequantize_ref
from kvsink.kernels.quantile import quantile_clamp
from kvsink.kernels.quantize import quantize_ref


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([8, 16, 64]), share=st.floats(0.01, 1.0))
def test_entries_end_at_the_quantile_of_their_group(seed: int, size: int, share: float) -> None:
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(seed))
    got = quantile_clamp(x, size, share).numpy()
    for row, found in zip(x.numpy().reshape(-1, size), got.reshape(-1, size), strict=True):
        t = sorted(abs(v) for v in row)[min(int(share * size), size - 1)]
        assert np.array_equal(found, np.clip(row, -t, t))


@pytest.mark.parametrize(("dim", "share", "beyond"), [(128, 0.96, 5), (128, 0.92, 10), (64, 0.96, 2), (64, 0.92, 5), (64, 1.0, 0)])
def test_how_many_entries_leave_the_range(dim: int, share: float, beyond: int) -> None:
    x = torch.arange(1, dim + 1).float()
    assert int((quantile_clamp(x, dim, share) != x).sum()) == beyond


def test_an_outlier_does_not_take_the_levels_of_its_row() -> None:
    x = torch.randn(1, 2, 50, 64, generator=torch.Generator().manual_seed(0))
    x[..., 7] = 40.0
    rest = [c for c in range(64) if c != 7]

    def error(kind: str, clip: float) -> float:
        back = dequantize_ref(*quantize_ref(x, None, kind, (2,) * 8, 64, clip, False), None, kind, (2,) * 8, 64, False)
        return float((back - x)[..., rest].square().mean())

    assert error("uniform-quantile", 0.96) < 0.25 * error("uniform", 1.0)
    assert error("uniform-quantile", 1.0) == error("uniform", 1.0)
