"""Whose weights they are: the same at every precision, others for every other model."""

from __future__ import annotations

import copy

import torch

from kvsink.model.fingerprint import fingerprint, same_model
from tests.models import build


def test_the_fingerprint_survives_16_bit_and_nothing_else() -> None:
    model = build("llama")
    mark = fingerprint(model)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert same_model(mark, fingerprint(copy.deepcopy(model).to(dtype)))
    assert not same_model(mark, fingerprint(build("qwen2"))) and not same_model(mark, fingerprint(build("mistral")))
    model.model.layers[1].self_attn.q_proj.weight.mul_(1.05)
    assert not same_model(mark, fingerprint(model))
