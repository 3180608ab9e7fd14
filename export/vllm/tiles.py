"""One attention layer of a rewritten folder over vLLM's pages on a GPU: the CUDA kernels over codes in tiles.

Source     ours
Shapes     as `kvsink.export.vllm.page`
Differs    as there, and as `kvsink.kernels.cuda.pages`: the first 64 exact rows of a sequence are read as they came
Declines   what the kernels decline, in one line, when a layer is made
Cost       a step of one new row a sequence asks nothing of the GPU and is captured whole in a CUDA graph; chunks of prompts read
           their sequence back to 16 bit, a piece at a time
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvsink.cache.served import apart
from kvsink.errors import UnsupportedError
from kvsink.export.vllm.page import Paged, held_tables
from kvsink.export.vllm.sinks import Sinks
from kvsink.kernels.backends import Device, Shape, device_of
from kvsink.kernels.cuda import launch, module, pages, variants
from kvsink.kernels.pages import PAGE, PageFormat, Pages
from kvsink.kernels.prefill import attend_chunk
from kvsink.model.runtime import Runtime

__all__ = ["Chunk", "TilePages", "TileStep", "graphs_at_once", "tile_step"]


class Chunk(NamedTuple):
    """New rows start … end - 1 of a step, the last of a sequence of `length` rows."""

    start: int
    end: int
    length: int
    sequence: int

    @property
    def first(self) -> int:
        """The position of its first row."""
        return self.length - (self.end - self.start)


@dataclass
class TileStep:
    """The rows of one step: slots int64 [n] of the new ones; of the first `alone` sequences one each, then those of `chunks`.
    lengths: int32 [sequences], rows of each, new ones included; tables: int32 [sequences, pages]. known: what layers share."""

    slots: Tensor
    lengths: Tensor
    tables: Tensor
    alone: int
    chunks: tuple[Chunk, ...]
    known: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What the first layer that asks makes of this step."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    @property
    def rows(self) -> int:
        """New rows."""
        return self.chunks[-1].end if self.chunks else self.alone

    @property
    def last(self) -> Tensor:
        """int64 [alone], the positions of the rows that are alone; -1 in padding."""
        made: Tensor = self.once("last", lambda: self.lengths[: self.alone].to(torch.int64) - 1)
        return made

    @property
    def positions(self) -> Tensor:
        """int64 [n] of the new rows."""

        def make() -> Tensor:
            of = [torch.arange(c.first, c.length, device=self.slots.device) for c in self.chunks]
            return torch.cat([self.last, *of]) if of else self.last

        made: Tensor = self.once("positions", make)
        return made

    def held(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Slots and positions int64 [length] of all rows of a chunk's sequence."""

        def make() -> tuple[Tensor, Tensor]:
            at = torch.arange(chunk.length, device=self.slots.device)
            return self.tables[chunk.sequence][at // PAGE].to(torch.int64) * PAGE + at % PAGE, at

        made: tuple[Tensor, Tensor] = self.once(chunk, make)
        return made


class TilePages(Paged):
    """A layer of a plan on a GPU, of which this rank holds the heads first … first + heads - 1, with `queries` query heads.

    tokens: positions that its tables reach; places: exact rows of a page; dtype: of the model; lib: the kernels, if others.
    """

    def __init__(
        self, runtime: Runtime, layer: int, first: int, heads: int, tokens: int, places: int, dtype: torch.dtype, sinks: Sinks,
        queries: int, device: torch.device, lib: Callable[[Any, int, int], launch.Library] | None = None,
    ) -> None:  # fmt: skip
        plan, of = runtime.plans[layer], runtime.anatomy.layers[layer]
        assert plan.codec is not None
        self.sinks, self.segments, self.order = sinks, plan.segments, runtime.order(layer, device)
        few = sum(s.count for s in plan.segments) if all(s.source == "first" for s in plan.segments) else pages.EXACT
        self.codec = pages.in_pages(plan.codec, few if few <= variants.FEW else pages.EXACT)
        none, rotary = torch.empty(0, device=device), runtime.rotary_channels(layer)
        shape = Shape(queries, heads, of.key_dim, of.value_dim, rotary, dtype, self.codec.exact_rows)
        places = places if self.segments else 0
        known = Device("cuda", (9, 0)) if lib is not None else device_of(device)
        if why := apart(runtime, layer) or pages.declines(self.codec, shape, known, places):
            raise UnsupportedError(f"kvsink in vLLM: layer {layer} is not served on {known.name}: {why}")
        given = {"origin_cos": none, "origin_sin": none}
        params = held_tables(runtime, layer, self.codec, first, heads, tokens, device, given)
        self.p, self.dims = self.codec.tables(params), (of.key_dim, of.value_dim)
        self.format = PageFormat.of(self.codec, self.dims, places, dtype)
        self.lib = lib(self.codec, shape.repeats, rotary) if lib else launch.library(self.codec, shape.repeats, rotary, device)
        self.opens = all(p.codec is None for p in runtime.plans[:layer])

    def step(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, step: TileStep, scale: float, out: Tensor) -> None:
        """New rows into their pages, then their attention over all rows of their sequences, in place of `out` [n, Hq, D]."""
        held, n = self.pages(cache), step.alone
        if self.opens:  # a step can run twice, the second time under capture
            step.known.clear()
        if self.order is not None:
            q, k = q.index_select(-1, self.order[0]), k.index_select(-1, self.order[0])
        asks = step.once(self.segments, lambda: self.sinks.asks(self.segments, step.positions))
        pages.write(self.lib, self.codec, self.p, held, step.slots, step.positions, k, v, asks)
        if n:
            exact = None
            if held.named.shape[2]:
                listed = "exact", self.segments, self.codec.exact_rows
                exact = step.once(listed, lambda: pages.list_exact(self.lib, self.codec, held, step.tables[:n], step.last))
            pages.attend(self.lib, self.codec, self.p, held, q[:n], step.tables[:n], step.last, exact, scale, out[:n])
        for chunk in step.chunks:
            self._attend(chunk, q, held, step, scale, out)

    def _attend(self, chunk: Chunk, q: Tensor, held: Pages, step: TileStep, scale: float, out: Tensor) -> None:
        slots, at = step.held(chunk)

        def past(start: int, end: int) -> tuple[Tensor, Tensor]:
            rows = pages.decode(self.lib, self.codec, self.p, held, slots[start:end], at[start:end], self.dims, q.dtype)
            return rows[0].transpose(0, 1)[None], rows[1].transpose(0, 1)[None]

        k, v = past(chunk.first, chunk.length)
        query = q[chunk.start : chunk.end].transpose(0, 1)[None]
        found = attend_chunk(past, query, k, v, chunk.first, None, scale, False, False)
        out[chunk.start : chunk.end] = found[0].transpose(0, 1)


def tile_step(starts: Sequence[int], most: Tensor, lengths: Tensor, slots: Tensor, tables: Tensor) -> TileStep:
    """A step of sequences whose new rows begin at `starts`, the end behind; those with one new row that come first are taken as
    alone. most: int [sequences] on the host, their lengths, exact where a sequence has more than one new row."""
    news = [b - a for a, b in pairwise(starts)]
    alone = next((i for i, n in enumerate(news) if n != 1), len(news))
    known = most.tolist() if alone < len(news) else ()
    chunks = (Chunk(starts[i], starts[i + 1], known[i], i) for i in range(alone, len(news)) if news[i])
    return TileStep(slots, lengths, tables, alone, tuple(chunks))


def graphs_at_once(device: torch.device, graphs: int) -> None:
    """Have scratch memory for so many CUDA graphs that are captured one after another."""
    module.scratch(device).reserve(graphs)
