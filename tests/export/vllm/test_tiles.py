"""A layer's pages on a GPU, its kernels emulated, against the same layer's pages on a processor: other code, layout and tables."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsink.codecs.protect import Segment, SinkStage
from kvsink.errors import UnsupportedError
from kvsink.export.vllm.page import LayerPages, Step
from kvsink.export.vllm.sinks import Sinks
from kvsink.export.vllm.tiles import Chunk, TilePages, tile_step
from kvsink.kernels.cuda import launch
from kvsink.kernels.pages import PAGE, Batch
from kvsink.model.runtime import runtime_of
from tests.kernels.cuda.emulated import Emulated
from tests.kernels.cuda.test_tile_shapes import KINDS, KV_HEADS, NAMES, model_of

CPU, TOKENS = torch.device("cpu"), 512
QUICK = (9, 32)
EVERY = [pytest.param(i, id=NAMES[i], marks=() if i in QUICK else pytest.mark.slow) for i in (0, 9, 11, 27, 32)]


def emulated(codec: Any, repeats: int, rotary: int) -> launch.Library:
    return Emulated(launch.variant_of(codec, repeats, rotary), 3)


class Both:
    """Layer 1 of a tiny model of a kind over pages of either form. massive: what block 0 writes for the rows of a step."""

    def __init__(self, index: int, segments: tuple[Segment, ...] | None = None) -> None:
        self.kind, runtime = KINDS[index], runtime_of(model_of(index))
        self.sinks = Sinks((SinkStage(block=0, channels=(0,), size=8.0, median=0.1),), TOKENS)
        self.sinks.written[0] = torch.zeros(TOKENS)
        held = runtime, 1, 0, KV_HEADS, TOKENS, 2
        kept = runtime.plans
        try:
            if segments is not None:
                runtime.plans = tuple(type(p)(p.codec, segments) for p in kept)
            self.plain = LayerPages(*held, torch.float32, self.sinks)
            self.tiles = TilePages(*held, torch.float16, self.sinks, KV_HEADS * self.kind.repeats, CPU, emulated)
        finally:
            runtime.plans = kept
        shapes = [(9, KV_HEADS, PAGE, layer.format.slot_bytes) for layer in (self.plain, self.tiles)]
        self.caches = [torch.randint(0, 255, shape, dtype=torch.uint8) for shape in shapes]

    def run(self, chunks: list[tuple[int, int, list[int]]], seed: int, massive: dict[int, float] | None = None) -> None:
        """Both attend to chunks of sequences: new rows, rows before them, pages."""
        news = torch.tensor([new for new, *_ in chunks])
        starts, lengths = [0, *news.cumsum(0).tolist()], [before + new for new, before, _ in chunks]
        tables = torch.tensor([pages + [0] * (4 - len(pages)) for *_, pages in chunks], dtype=torch.int32)
        batch = Batch(starts, lengths, tables)
        of = torch.cat([torch.full((b - a,), i) for i, (a, b) in enumerate(pairwise(starts))])
        slots = tables[of, batch.positions // PAGE].long() * PAGE + batch.positions % PAGE
        self.sinks.written[0].zero_()
        for row, size in (massive or {}).items():
            self.sinks.written[0][row] = size
        g, n, dim = torch.Generator().manual_seed(seed), starts[-1], self.kind.dim
        k, v = (torch.randn(n, KV_HEADS, dim, generator=g).mul(2).half() for _ in range(2))
        q = torch.randn(n, KV_HEADS * self.kind.repeats, dim, generator=g).half()
        outs = []
        for layer, cache, rows in (
            (self.plain, self.caches[0], (q.float(), k.float(), v.float())),
            (self.tiles, self.caches[1], (q, k, v)),
        ):
            step: Any = Step(slots, batch)
            if layer is self.tiles:
                length = torch.tensor(lengths, dtype=torch.int32)
                step = tile_step(starts, length, length, slots, tables)
            out = torch.full_like(rows[0], float("nan"))
            layer.step(*rows, cache, step, 0.09, out)
            outs.append(out.float())
        for a, b in pairwise(starts):
            assert (outs[1][a:b] - outs[0][a:b]).norm() <= 4e-3 * outs[0][a:b].norm()

    def named(self) -> list[Tensor]:
        return [layer.pages(cache).named for layer, cache in zip((self.plain, self.tiles), self.caches, strict=True)]


@pytest.mark.parametrize("index", EVERY)
def test_prompts_in_chunks_and_rows_that_come_alone(index: int) -> None:
    """Chunks that begin inside pages, one row beside prompts, in front of them and behind; a sequence without a new row."""
    both = Both(index)
    both.run([(50, 0, [4, 1]), (69, 0, [2])], 1)
    both.run([(1, 69, [2]), (130, 50, [4, 1]), (1, 70, [2])], 2)
    both.run([(1, 180, [4, 1]), (1, 71, [2]), (0, 0, [])], 3)
    plain, tiles = both.named()
    for page in (4, 1, 2):
        assert plain[page].tolist() == tiles[page].tolist()


def test_rows_that_a_block_marks_stay_exact() -> None:
    both = Both(32, (Segment("sinks:0:0.25", 2), Segment("first", 1)))
    assert both.tiles.codec.exact_rows == 64
    both.run([(40, 0, [3]), (130, 0, [5, 6])], 4, {7: -9.0, 20: 2.5, 21: 1.9, 40 + 3: 3.0, 40 + 129: 4.0})
    both.run([(1, 40, [3]), (1, 130, [5, 6])], 5, {0: 7.0})
    plain, tiles = both.named()
    for page in (3, 5, 6):
        assert plain[page].tolist() == tiles[page].tolist()
    assert tiles[5].tolist() == [[1, 4]] * KV_HEADS and tiles[6].tolist() == [[2, 0]] * KV_HEADS


def test_a_step_of_rows_alone_asks_nothing_of_the_host() -> None:
    """Lengths that the host knows are not looked at, as those of a captured step change."""
    slots, lengths = torch.arange(3), torch.tensor([5, 0, 9], dtype=torch.int32)
    step = tile_step([0, 1, 2, 3], torch.empty(0), lengths, slots, torch.zeros(3, 2, dtype=torch.int32))
    assert step.alone == step.rows == 3 and not step.chunks and step.positions.tolist() == [4, -1, 8]
    mixed = tile_step([0, 1, 5, 6, 6], torch.tensor([9, 10, 3, 0]), lengths, slots, torch.zeros(4, 2, dtype=torch.int32))
    assert mixed.alone == 1 and mixed.chunks == (Chunk(1, 5, 10, 1), Chunk(5, 6, 3, 2)) and mixed.rows == 6


def test_what_the_kernels_do_not_serve_is_declined_in_one_line() -> None:
    runtime = runtime_of(model_of(9))
    with pytest.raises(UnsupportedError, match="layer 1 is not served on this GPU: the model computes in float32"):
        TilePages(runtime, 1, 0, KV_HEADS, TOKENS, 2, torch.float32, Sinks((), 1), KV_HEADS, CPU, emulated)
