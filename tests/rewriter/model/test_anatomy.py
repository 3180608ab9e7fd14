"""Which modules of a model are its decoder, by its own names and its config, and which belong to a tower beside it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from kvsink.model.anatomy import Heads, anatomy, is_tower, rope_types, towers
from tests.models import FAMILIES, HEAD_DIM, HEADS, KV_HEADS, LAYERS, build

ATTENTIONS = {"gpt2": "transformer.h.{}.attn"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_is_found_by_its_modules(family: str) -> None:
    model = build(family)
    found = anatomy(model)
    named = ATTENTIONS.get(family, "model.layers.{}.self_attn")
    assert found.attentions == tuple(named.format(i) for i in range(LAYERS))
    assert found.blocks == tuple(named.format(i).rsplit(".", 1)[0] for i in range(LAYERS))
    assert isinstance(model.get_submodule(found.base).get_submodule("wte" if family == "gpt2" else "embed_tokens"), nn.Embedding)
    assert found.rotary == (None if family == "gpt2" else "model.rotary_emb")
    assert found.layers == (Heads(HEADS, HEADS if family == "gpt2" else KV_HEADS, HEAD_DIM, HEAD_DIM),) * LAYERS and found.even
    windows = {"mistral-sliding": ("sliding_attention",) * 2, "gemma3": ("sliding_attention", "full_attention")}
    assert found.layer_types == windows.get(family, ("full_attention",) * LAYERS)


def test_towers_are_known_by_their_names() -> None:
    assert not is_tower("model.layers.0.self_attn")
    assert is_tower("model.vision_tower.encoder.layers.0.self_attn") and is_tower("visual.blocks.1.attn")

    class Attention(nn.Module):
        pass

    inner = nn.ModuleDict({"vision_tower": nn.ModuleList([Attention(), Attention()]), "layers": nn.ModuleList([Attention()])})
    assert towers(nn.ModuleDict({"model": inner})) == {"model.vision_tower": 2}


def test_kinds_of_rope_are_those_of_every_kind_of_layer() -> None:
    one = SimpleNamespace(rope_parameters={"rope_type": "yarn", "factor": 2.0})
    several = SimpleNamespace(rope_parameters={"full_attention": {"rope_type": "linear"}, "sliding_attention": {"type": "default"}})
    assert rope_types(one) == {"yarn"} and rope_types(several) == {"linear", "default"}
    assert rope_types(SimpleNamespace(rope_scaling=None)) == frozenset()
