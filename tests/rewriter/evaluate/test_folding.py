"""Folds: trials leave the weights as they were, and what would change the model is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvsink
from kvsink.errors import UnsupportedError
from kvsink.evaluate import folding
from kvsink.model.decoder import Decoder
from tests.models import build, tokens

ids = tokens(8, 64, seed=1)


def rewritten(family: str = "llama", method: str = "klt", model: Any = None, **options: Any) -> Any:
    model = build(family) if model is None else model
    kvsink.rewrite(model, method, **{"key_bits": 4, "value_bits": 4, "calibration": ids, **options})
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_a_fold_past_a_gate_is_refused_and_runs_online() -> None:
    model = build("llama")
    torch.manual_seed(0)
    gate = torch.rand(64)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * gate,))
    before, x = weights(model), tokens(1, 12, seed=2)
    with torch.no_grad():
        wanted = model(x, use_cache=False).logits
        report = kvsink.rewrite(model, "klt", key_bits=4, value_bits=4, calibration=ids)
        found = model(x, use_cache=False).logits
    assert set(report.check.online) == {0, 1}
    assert "something stands between its values and the projection" in report.check.online[0]
    assert torch.equal(found, wanted)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_trials_leave_the_weights_as_they_were() -> None:
    model = build("llama")
    before = weights(model)
    refused, worst, logits = folding.refused_folds(Decoder(model), {0: 16, 1: 16}, torch.float16)
    assert logits is not None and logits.shape == (2, 12, 97)
    assert refused == {} and 0 < worst < 8e-3
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_weights_in_one_memory_are_not_folded() -> None:
    """Two parameters over one storage: what turns one turns the other."""
    model = build("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.v_proj.weight = nn.Parameter(first.v_proj.weight.data, requires_grad=False)
    x = tokens(1, 12, seed=2)
    with torch.no_grad():
        wanted = model(x, use_cache=False).logits
        report = kvsink.rewrite(model, "klt", key_bits=4, value_bits=4, calibration=ids)
        assert torch.equal(model(x, use_cache=False).logits, wanted)
    assert "shared with another module" in report.check.online[0] and "shared with another module" in report.check.online[1]


def test_folds_that_are_right_alone_and_wrong_together_are_found(monkeypatch: Any) -> None:
    """Weights in one memory, were they not noticed."""
    model = build("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.v_proj.weight = nn.Parameter(first.v_proj.weight.data, requires_grad=False)
    before = weights(model)
    monkeypatch.setattr(folding, "shared_weights", lambda named: frozenset())
    with pytest.raises(UnsupportedError, match="self-check: with value rotations in its weights the model's own logits"):
        rewritten(model=model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
