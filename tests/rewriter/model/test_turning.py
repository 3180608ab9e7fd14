"""The spelling of RoPE is found in numbers that transformers' own functions made, and the canonical order undoes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama4 import modeling_llama4 as llama4

from kvsink.kernels.rope import unrope
from kvsink.model.turning import NONE, Turning, find_turning, tables_of

DIM, POSITIONS = 16, (1, 7, 43)


def frequencies(channels: int = DIM) -> Tensor:
    return 10000.0 ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def angles(position: int, channels: int = DIM) -> Tensor:
    return position * frequencies(channels)


def halves(x: Tensor, position: int) -> tuple[Tensor, Any]:
    """LLaMA's function; x [N, H, D]."""
    table = angles(position).repeat(2)
    cos, sin = table.cos()[None, None], table.sin()[None, None]
    return llama.apply_rotary_pos_emb(x[None], x[None], cos, sin)[1][0], (cos[0, 0], sin[0, 0])


def pairs(x: Tensor, position: int) -> tuple[Tensor, Any]:
    """Cohere's function."""
    table = angles(position).repeat_interleave(2)
    cos, sin = table.cos()[None, None], table.sin()[None, None]
    return cohere.apply_rotary_pos_emb(x[None], x[None], cos, sin)[1][0], (cos[0, 0], sin[0, 0])


def once(x: Tensor, position: int) -> tuple[Tensor, Any]:
    """gpt-oss's function, whose tables hold each angle once."""
    table = angles(position)
    cos, sin = table.cos()[None, None], table.sin()[None, None]
    return gpt_oss.apply_rotary_pos_emb(x[None], x[None], cos, sin)[1][0], (cos[0, 0], sin[0, 0])


def complex_pairs(x: Tensor, position: int) -> tuple[Tensor, Any]:
    """Llama 4's function, on [B, S, H, D] and one complex table."""
    table = torch.polar(torch.ones(DIM // 2, dtype=torch.float64), angles(position))[None, None]
    turned = llama4.apply_rotary_emb(x.float()[:, None], x.float()[:, None], table.to(torch.complex64).expand(len(x), 1, -1))[1]
    return turned[:, 0].double(), table[0, 0]


def first_half(x: Tensor, position: int) -> tuple[Tensor, Any]:
    """Half of the channels in halves, the others left alone."""
    table = angles(position, DIM // 2).repeat(2)
    cos, sin = table.cos()[None, None], table.sin()[None, None]
    head = llama.apply_rotary_pos_emb(x[None, ..., : DIM // 2], x[None, ..., : DIM // 2], cos, sin)[1][0]
    return torch.cat((head, x[..., DIM // 2 :]), -1), (cos[0, 0], sin[0, 0])


def last_half(x: Tensor, position: int) -> tuple[Tensor, Any]:
    """The same with the rotary channels behind."""
    turned, tables = first_half(x.roll(DIM // 2, -1), position)
    return turned.roll(DIM // 2, -1), tables


def nothing(x: Tensor, position: int) -> tuple[Tensor, Any]:
    table = angles(position).repeat(2)
    return x, (table.cos(), table.sin())


SPELLED = {
    halves: Turning(DIM, "halves", "halves"),
    pairs: Turning(DIM, "pairs", "pairs"),
    once: Turning(DIM, "halves", "once"),
    complex_pairs: Turning(DIM, "pairs", "once"),
    first_half: Turning(DIM // 2),
    last_half: Turning(DIM // 2, start=DIM // 2),
    nothing: NONE,
}


def rows() -> Tensor:
    return torch.randn(6, 2, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spell", SPELLED, ids=lambda f: f.__name__)
def test_found_and_undone(spell: Any) -> None:
    x = rows()
    turned, tables = zip(*(spell(x, p) for p in POSITIONS), strict=True)
    found = find_turning(x, turned, [tables_of(t) for t in tables], 1e-5)  # type: ignore[misc]
    assert found == SPELLED[spell]
    assert found is not None
    order = found.order(DIM)
    index = torch.arange(DIM) if order is None else torch.tensor(order)
    for y, table in zip(turned, tables, strict=True):
        cos, sin = found.canonical(*tables_of(table))  # type: ignore[misc]
        back = unrope(y[..., index], cos, sin)[..., index.argsort()]
        assert float((back - x).abs().max()) <= 1e-5


def test_rounding_of_half_precision_is_allowed_for_and_no_more() -> None:
    x = rows()
    turned, tables = zip(*(halves(x, p) for p in POSITIONS), strict=True)
    coarse = [y.to(torch.bfloat16).double() for y in turned]
    assert find_turning(x, coarse, tables, 0.1) == SPELLED[halves]
    assert find_turning(x, coarse, tables, 1e-4) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_on_channels_that_hardly_turn_hides_no_turning(dtype: torch.dtype) -> None:
    """Qwen2 has such layers: position moves their keys by less than what half precision may round."""
    slow = torch.zeros(DIM, dtype=torch.float64)
    slow[DIM // 2 - 1] = slow[-1] = 600.0
    plain = torch.randn(5, 2, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + slow
    told = [halves(plain, p) for p in POSITIONS]
    coarse, turned = plain.to(dtype).double(), [x.to(dtype).double() for x, _ in told]
    tolerance = 16 * torch.finfo(dtype).eps
    assert max((x - coarse).norm() / x.norm() for x in turned) <= tolerance  # as if nothing had turned
    assert find_turning(coarse, turned, [t for _, t in told], tolerance) == Turning(DIM)
    assert find_turning(coarse, [coarse] * 3, [t for _, t in told], tolerance) == NONE


def test_what_is_no_known_turning_is_none_of_them() -> None:
    x = rows()
    turned, tables = zip(*(halves(x, p) for p in POSITIONS), strict=True)
    assert find_turning(x, [y.flip(-1) for y in turned], tables, 0.1) is None


def test_tables_in_any_form() -> None:
    cos, sin = torch.ones(3, 1, 5, 8), torch.zeros(3, 1, 5, 8)
    assert [t.shape for t in tables_of((cos, sin)) or ()] == [(1, 5, 8)] * 2
    assert [t.shape for t in tables_of(torch.complex(cos[0], sin[0])) or ()] == [(1, 5, 8)] * 2
    assert tables_of(None) is None
    assert tables_of(cos) is None
