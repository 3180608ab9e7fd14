"""The Hadamard rotation is orthogonal, has the right entries, and its inverse undoes it, for every kind of order."""

from __future__ import annotations

import pytest
import torch

from kvsink.kernels.hadamard import hadamard, hadamard_core, hadamard_matrix, hadamard_ref
from tests.close import EXACT_FLOAT64

ORDERS = (1, 2, 8, 64, 128, 12, 24, 96, 192, 20, 40, 80, 160)


@pytest.mark.parametrize("order", ORDERS)
def test_orthogonal_with_entries_of_one_size(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert matrix.dtype == torch.float64
    assert (matrix @ matrix.mT - torch.eye(order, dtype=torch.float64)).abs().max() <= EXACT_FLOAT64
    assert (matrix.abs() - order**-0.5).abs().max() <= EXACT_FLOAT64


@pytest.mark.parametrize("order", ORDERS)
def test_the_inverse_is_the_transpose(order: int) -> None:
    x = torch.randn(3, 2 * order, dtype=torch.float64, generator=torch.Generator().manual_seed(order))
    turned = hadamard_ref(x, order)
    assert (hadamard_ref(turned, order, inverse=True) - x).abs().max() <= EXACT_FLOAT64
    blocks = torch.block_diag(hadamard_matrix(order), hadamard_matrix(order))
    assert (turned - x @ blocks).abs().max() <= EXACT_FLOAT64
    assert (hadamard_ref(x, order, inverse=True) - x @ blocks.mT).abs().max() <= EXACT_FLOAT64


def test_powers_of_two_are_sylvester_s() -> None:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    assert (hadamard_matrix(8) - torch.kron(torch.kron(two, two), two)).abs().max() <= EXACT_FLOAT64


@pytest.mark.parametrize(("order", "core"), [(64, 1), (12, 12), (96, 12), (20, 20), (160, 20)])
def test_cores(order: int, core: int) -> None:
    assert hadamard_core(order) == core


@pytest.mark.parametrize("order", [3, 6, 14, 36, 100])
def test_orders_without_a_core_are_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"order {order}"):
        hadamard_core(order)


def test_runs_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="24 channels"):
        hadamard_ref(torch.zeros(2, 24), 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_rows_are_turned_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(hadamard(x, 80), hadamard_ref(x.float(), 80).to(dtype))


def test_order_one_does_not_alias_its_input() -> None:
    x = torch.randn(4, 8)
    y = hadamard(x, 1)
    assert torch.equal(x, y) and x.data_ptr() != y.data_ptr()
