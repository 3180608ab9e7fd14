"""RoPE and its inverse: equal to transformers', undone exactly, also with partial channels and scaled angles."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvsink.kernels import stages
from kvsink.kernels.rope import rope, unrope
from tests.close import EXACT_FLOAT64


def angles(length: int, dim: int, scaling: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    position = torch.arange(length, dtype=torch.float64)[:, None] * 37.0
    half = position / 10_000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    both = torch.cat([half, half], dim=-1)
    return both.cos() * scaling, both.sin() * scaling


@pytest.mark.parametrize("scaling", [1.0, 1.2])
@pytest.mark.parametrize("rotary", [16, 8])
def test_unrope_undoes_rope(rotary: int, scaling: float) -> None:
    x = torch.randn(2, 3, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = angles(9, rotary, scaling)
    turned = rope(x, cos, sin)
    assert (turned - x)[..., :rotary].abs().max() > 0.1 and torch.equal(turned[..., rotary:], x[..., rotary:])
    assert (unrope(turned, cos, sin) - x).abs().max() <= EXACT_FLOAT64
    assert (rope(unrope(x, cos, sin), cos, sin) - x).abs().max() <= EXACT_FLOAT64


def test_equal_to_transformers() -> None:
    x = torch.randn(2, 3, 9, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = (t.float()[None] for t in angles(9, 16))
    assert (apply_rotary_pos_emb(x, x, cos, sin)[0] - rope(x, cos[:, None], sin[:, None])).abs().max() <= 2.0**-21


def test_without_rope_rows_stay() -> None:
    x, none = torch.randn(1, 2, 3, 8), torch.empty(1, 3, 0)
    assert rope(x, none, none) is x and unrope(x, none, none) is x


@pytest.mark.parametrize("block", [1, 4, 64])
def test_offset_and_block_start_make_up_the_whole_angle(block: int) -> None:
    """R_{j - d} R_d = R_j with d = j mod block: what lets a codec store keys that are turned by d alone."""
    positions = torch.tensor([[0, 3, 4, 63, 64, 130]])
    step = 1.0 / 100 ** (torch.arange(0, 16, 2) / 16)

    def table(position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = position[..., None].double() * step.double()
        both = torch.cat([half, half], dim=-1)
        return both.cos(), both.sin()

    x = torch.randn(1, 2, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = stages.rope_rows(x, *table(positions))
    offset = stages.rope_offset(x, *table(torch.arange(block)), positions, block)
    again = stages.rope_start(offset, *table(torch.arange(131 // block + 1) * block), positions, block)
    assert (again - whole).abs().max() <= EXACT_FLOAT64


def test_centring_after_rope_equals_centring_before() -> None:
    x = torch.randn(1, 2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = torch.randn(2, 16, dtype=torch.float64)
    cos, sin = (t.float().double()[None] for t in angles(9, 16))
    wanted = stages.rope_rows(stages.center(x, mean), cos, sin)
    assert (stages.center_roped(stages.rope_rows(x, cos, sin), mean, cos, sin) - wanted).abs().max() <= 2.0**-20


def test_grouped_heads_turn_together_and_back() -> None:
    x = torch.randn(2, 4, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = stages.hadamard_heads(x, 64, 4)
    assert (turned[:, :, :, 0] - stages.hadamard_heads(x, 16)[:, :, :, 0]).abs().max() > 0.1  # heads are mixed
    assert (stages.hadamard_heads(turned, 64, 4, inverse=True) - x).abs().max() <= EXACT_FLOAT64
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stages.reorder_heads(stages.reorder_heads(x, order), order.argsort()), x)
