"""Which new rows ask to stay exact: a row decides for itself, by its position and by what a block wrote for it.

Formula    first:N asks for positions below N; sinks:T for rows of which the last projection of the emergence block wrote more than
           T times the stage's size into the outlier channel; kvsink:K, a choice among rows, is taken as sinks:0.25
Source     ours; stages are KVSink's, arXiv 2508.04257 section 3
Shapes     written float32 [tokens of a step at most], of the newest step; positions int64 [n] → bool [n]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvsink.codecs.protect import Segment, SinkStage
from kvsink.errors import UnsupportedError
from kvsink.model.anatomy import LAST
from kvsink.model.candidates import passes

__all__ = ["SHARE", "Sinks", "note_written"]

SHARE = 0.25  # of kvsink:K, which names none


@torch.library.custom_op("kvsink::note_written", mutates_args=("written",))
def note_written(rows: Tensor, written: Tensor, channel: int) -> None:
    """One channel of rows [n, E] into the first n entries of `written`; an op, so that a compiled model keeps it."""
    written[: rows.shape[0]].copy_(rows[:, channel])


@note_written.register_fake
def _nothing(rows: Tensor, written: Tensor, channel: int) -> None:
    return None


class Sinks:
    """What the emergence blocks of a model wrote for the rows of the running step. tokens: of a step at most."""

    def __init__(self, stages: Sequence[SinkStage], tokens: int) -> None:
        self.stages, self.tokens = {stage.block: stage for stage in stages}, tokens
        self.written: dict[int, Tensor] = {}

    def watch(self, prefix: str, projection: nn.Module) -> None:
        """Look at what a projection puts out, if it is the last of an emergence block. prefix: its name in the model."""
        found = re.fullmatch(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.(?!.*attn)(?:\w+\.)*(\w+)", prefix)
        if found is None or found[2] not in LAST or int(found[1]) not in self.stages:
            return
        block = int(found[1])
        if block in self.written:
            raise UnsupportedError(f"kvsink in vLLM: block {block} has several last projections ({prefix}); rewrite with first:N")
        channel = self.stages[block].channels[0]
        self.written[block] = torch.zeros(self.tokens)
        projection.register_buffer("kvsink_written", self.written[block], persistent=False)

        def see(module: nn.Module, args: Any, output: Any) -> None:
            rows = output[0] if isinstance(output, tuple) else output
            torch.ops.kvsink.note_written(rows.flatten(0, -2), module.kvsink_written, channel)

        projection.register_forward_hook(see)

    def check(self, segments: Sequence[Segment], layer: int) -> None:
        """Raise UnsupportedError where a layer's rows hang on a block that was not found."""
        for segment in segments:
            if (block := _of(segment)[0]) >= 0 and block not in self.written:
                raise UnsupportedError(
                    f"kvsink in vLLM: layer {layer} keeps rows that block {block} marks, and the last projection of that block was "
                    "not found; rewrite with --protect first:N"
                )

    def asks(self, segments: Sequence[Segment], positions: Tensor) -> Tensor:
        """Rows of the running step that ask for a place."""
        out = torch.zeros_like(positions, dtype=torch.bool)
        for segment in segments:
            block, share = _of(segment)
            if block < 0:
                out |= positions < segment.count
            else:
                out |= passes(self.written[block][: len(positions)], share * self.stages[block].size)
        return out


def _of(segment: Segment) -> tuple[int, float]:
    """Block and share of a segment; -1 for the first rows."""
    kind, _, rest = segment.source.partition(":")
    if kind == "first":
        return -1, 0.0
    block, _, share = rest.partition(":")
    return int(block), float(share) if share else SHARE
