"""A model without its weights: every parameter is a shape, buffers are the model's own numbers."""

from __future__ import annotations

import pytest
import torch

from kvsink.calibrate.skeleton import skeleton
from kvsink.errors import ModelError
from tests.models import build


def test_shapes_alone_and_buffers_whole(tmp_path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    bare = skeleton(tmp_path)
    assert {n: p.shape for n, p in bare.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(p.is_meta and p.dtype == torch.float32 for p in bare.parameters())
    wanted = dict(model.named_buffers())
    assert wanted and all(torch.equal(b, wanted[n]) for n, b in bare.named_buffers())
    assert not bare.training
    assert not torch.nn.Linear(2, 2).weight.is_meta  # modules made afterwards have weights again


def test_a_folder_that_is_no_model(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError):
        skeleton(tmp_path)
