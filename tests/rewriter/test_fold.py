"""Folding the value rotation into the weights keeps the model the same function, to float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kvsink.fold import fold_value_rotation, foldable
from kvsink.kernels.hadamard import hadamard_matrix
from kvsink.runtime import anatomy
from tests.close import EXACT_FLOAT64, largest_difference
from tests.models import HEAD_DIM, KV_HEADS, build, tokens


def attentions(model: Any) -> list[Any]:
    return [model.get_submodule(name) for name in anatomy(model).attentions]


@pytest.mark.parametrize("order", [HEAD_DIM, 8])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_logits_do_not_change(family: str, order: int) -> None:
    model = build(family, dtype=torch.float64)
    if family == "qwen2":
        assert all(a.v_proj.bias is not None for a in attentions(model))
    ids = tokens(2, 20, seed=1)
    with torch.no_grad():
        before, weight = model(ids).logits, attentions(model)[0].v_proj.weight.clone()
        for attention in attentions(model):
            assert foldable(attention) is None
            fold_value_rotation(attention, order)
        after = model(ids).logits
    assert largest_difference(after, before) <= EXACT_FLOAT64 * max(1.0, float(before.abs().max()))
    assert largest_difference(attentions(model)[0].v_proj.weight, weight) > 0.01


def test_values_are_turned_forwards() -> None:
    model = build("qwen2", dtype=torch.float64)
    attention = attentions(model)[0]
    x = torch.randn(5, attention.v_proj.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = attention.v_proj(x)
    fold_value_rotation(attention, HEAD_DIM)
    turned = (before.unflatten(-1, (KV_HEADS, HEAD_DIM)) @ hadamard_matrix(HEAD_DIM)).flatten(-2)
    assert largest_difference(attention.v_proj(x), turned) <= EXACT_FLOAT64


def test_weights_are_rounded_once_to_the_storage() -> None:
    plain, stored, wide = (attentions(build("llama"))[0] for _ in range(3))
    fold_value_rotation(stored, HEAD_DIM, torch.float16)
    fold_value_rotation(wide, HEAD_DIM)
    assert stored.v_proj.weight.dtype == torch.float32
    assert torch.equal(stored.v_proj.weight, stored.v_proj.weight.half().float())
    doubled = copy.deepcopy(plain).double()
    fold_value_rotation(doubled, HEAD_DIM)
    for name in ("v_proj", "o_proj"):
        exact = getattr(doubled, name).weight
        assert torch.equal(getattr(stored, name).weight, exact.half().float())
        assert torch.equal(getattr(wide, name).weight, exact.float())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: delattr(a, "v_proj"), "v_proj is nothing, not a plain Linear"),
        (lambda a: setattr(a, "o_proj", nn.Identity()), "o_proj is Identity, not a plain Linear"),
        (lambda a: setattr(a, "v_norm", nn.Identity()), "values are normalised after v_proj"),
    ],
)
def test_what_cannot_be_folded_says_why(change: Any, words: str) -> None:
    attention = attentions(build("llama"))[0]
    change(attention)
    assert foldable(attention) == words


def test_a_fused_projection_is_not_folded() -> None:
    assert foldable(attentions(build("phi3"))[0]) == "v_proj is nothing, not a plain Linear"
