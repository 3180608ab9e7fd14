"""What the hooks tell a cache of the running pass: pivots of a prompt, and the rows of images."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.errors import UnsupportedError
from kvsink.model.runtime import Runtime, attach, runtime_of
from tests.graphs import rewritten
from tests.models import tokens
from tests.planted import TRIGGER, plant, windows
from tests.planted import build as quiet
from tests.rewriter.codecs.test_anchors import feed
from tests.rewriter.model.test_vision import IMAGES, salient, seen_by
from tests.vision import FAMILIES, IMAGE, prompt


def test_pivots_are_fixed_at_the_end_of_the_prompt() -> None:
    """Layer 1 shares what block 0 marks; a step of one token adds none, however large."""
    model = rewritten("llama", "sdpa", "rtn")
    from kvsink.codecs import Codec
    from kvsink.codecs.protect import Segment, SinkStage
    from kvsink.model.tables import LayerPlan

    codec = runtime_of(model).plans[0].codec
    plans = [LayerPlan(Codec(codec.key, codec.value, (s.count,)), (s,)) for s in (Segment("first", 1), Segment("pivots:0:50:2", 3))]
    attach(model, Runtime(model, tuple(plans), {}, (SinkStage(0, (0,), 1.0, 1.0),), "rtn"))
    cache, ids = KVSinkCache.for_model(model), tokens(1, 22)
    at = [0]

    def grow(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        for place in (4, 9, 20):
            if at[0] <= place < at[0] + hidden.shape[1]:
                hidden[:, place - at[0], 5] = 300.0 + place
        at[0] += hidden.shape[1]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    hook = model.model.layers[0].register_forward_hook(grow, with_kwargs=True, prepend=True)
    for begin, end in pairwise((0, 6, 20, 21, 22)):
        feed(model, cache, ids[:, begin:end], (end - begin,))
    hook.remove()
    first, pivots = cache.packed_layers()
    assert first.exact_slot.tolist() == [[0]] and sorted(pivots.exact_slot[0].tolist()) == [-1, 4, 9]


def kept(model: Any, ids: Tensor, *ends: int) -> list[set[int]]:
    """Slots of the exact rows of every layer behind the chunks of a sequence that end there."""
    cache = KVSinkCache.for_model(model)
    with torch.no_grad():
        for begin, end in pairwise((0, *ends)):
            model(ids[:, begin:end], past_key_values=cache)
    return [{s for s in layer.exact_slot[0].tolist() if s >= 0} for layer in cache.packed_layers()]


def test_rows_above_a_share_of_the_largest_activation_stay_the_first_first() -> None:
    """Layers behind the block that writes keep the first of its rows, whatever comes behind them and in whatever chunks."""
    model = plant(quiet("llama"), "1:dense")
    kvsink.rewrite(model, "rtn", protect="sinks:0.25:3+first:1", calibration=windows(3, 40, 70, 11))
    ids = windows(9)
    ids[0, [9, 30, 31, 50, 80]] = TRIGGER
    for ends in ((96,), (30, 31, 96), (10, *range(11, 97))):
        assert kept(model, ids, *ends) == [{0}, {0}, {0, 9, 30, 31}, {0, 9, 30, 31}]
    assert kept(model, windows(95), 96)[-1] == {0, 95}
    (stage,) = runtime_of(model).stages
    weak = model.model.layers[stage.block].mlp.down_proj.weight
    weak[stage.channels[0]] *= 0.2  # below a quarter of what calibration saw
    assert kept(model, ids, 96)[-1] == {0}


def test_a_block_without_one_last_projection_is_named() -> None:
    model = plant(quiet("qwen2-moe"), "1:3")
    with pytest.raises(UnsupportedError, match=r"block 1 \(model.layers.1\).* has mlp.experts as well, .*; protect by kvsink:5"):
        kvsink.rewrite(model, "rtn", protect="sinks:0.25", calibration=windows(3, 40, 70, 11))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma3"])
def test_the_mask_of_each_row_reaches_the_cache(family: str) -> None:
    given = prompt(family, IMAGES)
    masks = seen_by(salient(family), given)
    assert torch.equal(masks[0], given["input_ids"] == IMAGE) and len(masks) == 6
    assert not any(m.any() for m in masks[1:])  # what is generated is text


def test_the_processor_is_believed_before_the_ids() -> None:
    given = prompt("llava", IMAGES)
    kinds = (given["input_ids"] == IMAGE).long()
    kinds[0, -1] = 2  # the processor calls this token video

    def forward(model: Any, inputs: dict[str, Tensor]) -> None:
        model(**inputs, past_key_values=KVSinkCache.for_model(model, 2, 64))

    assert torch.equal(seen_by(salient("llava"), {**given, "mm_token_type_ids": kinds}, forward)[0], kinds != 0)
