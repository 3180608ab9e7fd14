"""A decoder: what is known of a model once, and that a runtime attached for a while leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

import kvsink
from kvsink.errors import ModelError
from kvsink.model.anatomy import anatomy
from kvsink.model.decoder import Decoder
from kvsink.model.fingerprint import fingerprint
from kvsink.model.tables import LayerPlan
from tests.models import build, tokens


def test_what_is_known_of_a_model() -> None:
    model = build("llama", dtype=torch.bfloat16)
    decoder = Decoder(model)
    assert decoder.where == anatomy(model)
    assert decoder.dtype == torch.bfloat16 and decoder.device == torch.device("cpu")
    assert decoder.attention(1) is model.model.layers[1].self_attn
    assert torch.equal(decoder.fingerprint(), fingerprint(model))
    assert decoder.name == "LlamaForCausalLM"
    marker = object()
    assert list(decoder.given(marker).values()) == [marker]


def test_a_runtime_for_a_while() -> None:
    model = build("llama")
    kvsink.rewrite(model, "rtn", calibration=tokens(2, 32), check=False)
    decoder, hooks = Decoder(model), len(model.model._forward_pre_hooks)
    earlier = decoder.runtime
    other = decoder.carrying((LayerPlan(None),) * len(decoder.where.attentions), {}, (), "other")
    with pytest.raises(RuntimeError, match="in between"), decoder.attached(other):
        assert decoder.runtime is other
        raise RuntimeError("in between")
    assert decoder.runtime is earlier and earlier is not None and earlier.method == "rtn"
    assert len(model.model._forward_pre_hooks) == hooks


def test_damaged_weights_are_named() -> None:
    model = build("llama")
    Decoder(model).check_weights()
    model.model.norm.weight.data[3] = float("inf")
    with pytest.raises(ModelError, match=r"weight model\.norm\.weight holds NaN or infinite numbers"):
        Decoder(model).check_weights()
