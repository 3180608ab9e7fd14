"""Rows that ask to stay exact: by position, by what a watched projection wrote, and blocks that are not found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvsink.codecs.protect import Segment, SinkStage
from kvsink.errors import UnsupportedError
from kvsink.export.vllm.sinks import SHARE, Sinks

STAGE = SinkStage(3, (5, 2), 100.0, 0.1)


@pytest.mark.parametrize(
    ("prefix", "watched"),
    [
        ("model.layers.3.mlp.down_proj", True),
        ("layers.3.mlp.fc2", True),
        ("transformer.h.3.mlp.c_proj", True),
        ("transformer.h.3.attn.c_proj", False),
        ("model.layers.3.self_attn.o_proj", False),
        ("model.layers.3.mlp.gate_up_proj", False),
        ("model.layers.13.mlp.down_proj", False),
        ("model.layers.30.mlp.down_proj", False),
    ],
)
def test_the_last_projection_of_the_block_is_found_by_its_name(prefix: str, watched: bool) -> None:
    sinks = Sinks((STAGE,), 8)
    sinks.watch(prefix, nn.Linear(4, 8))
    assert (3 in sinks.written) == watched
    segment = (Segment("sinks:3:0.25", 2),)
    if watched:
        sinks.check(segment, 4)
        with pytest.raises(UnsupportedError, match="block 3 has several last projections"):
            sinks.watch(prefix, nn.Linear(4, 8))
    else:
        with pytest.raises(UnsupportedError, match="layer 4 keeps rows that block 3 marks, .* was not found; rewrite with"):
            sinks.check(segment, 4)
        sinks.check((Segment("first", 1),), 4)


class Parallel(nn.Linear):
    """As vLLM's projections do, it gives its bias back beside the result."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_are_asked_for_by_what_was_written_in_this_step(compiled: bool) -> None:
    sinks, projection = Sinks((STAGE,), 8), Parallel(6, 6, bias=False)
    projection.weight.data.copy_(torch.eye(6))
    sinks.watch("model.layers.3.mlp.down_proj", projection)
    run = torch.compile(projection, backend="eager", fullgraph=True) if compiled else projection
    rows = torch.zeros(4, 6)
    rows[:, 5] = torch.tensor([24.0, 26.0, -30.0, 51.0])
    rows[:, 0] = 99.0  # another channel
    run(rows)
    positions = torch.tensor([0, 1, 7, 3])
    for segments, wanted in (
        ((Segment("sinks:3:0.25", 2),), [False, True, True, True]),
        ((Segment("sinks:3:0.5", 2),), [False, False, False, True]),
        ((Segment("stage:3", 5),), [100 * SHARE < 24, True, True, True]),
        ((Segment("first", 1), Segment("sinks:3:0.5", 2)), [True, False, False, True]),
        ((), [False] * 4),
    ):
        assert sinks.asks(segments, positions).tolist() == wanted
    run(torch.zeros(2, 6))
    assert not sinks.asks((Segment("sinks:3:0.25", 2),), positions[:2]).any()
    assert "kvsink_written" not in projection.state_dict()
