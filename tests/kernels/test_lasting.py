"""Tables are made once for each combination of arguments; that CUDA graphs do not own them, see test_compiled_on_a_gpu."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvsink.kernels.lasting import kept


def test_a_table_is_made_once_for_each_combination() -> None:
    calls = []

    @kept
    def table(width: int, device: str) -> Tensor:
        calls.append(width)
        return torch.full((4,), float(width), device=device)

    assert table(2, "cpu") is table(2, device="cpu") is not table(3, "cpu")
    assert calls == [2, 3] and table.__name__ == "table"


def test_what_fails_is_raised_and_not_kept() -> None:
    @kept
    def table(width: int, device: str) -> Tensor:
        raise ValueError(f"no table of {width} on {device}")

    for _ in range(2):
        with pytest.raises(ValueError, match="no table of 5 on cpu"):
            table(5, "cpu")
