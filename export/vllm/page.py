"""One attention layer of a rewritten folder over vLLM's pages: tables of its heads, coding of new rows, attention over all.

Source     ours
Shapes     cache uint8 [pages, H, 128, C]; q [n, Hq, D], k, v [n, H, D], after RoPE as the model turns them
Differs    new rows are read back from their codes as all others are (strict), so that a prompt whose beginning is cached gives what
           it gives without
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvsink.codecs import Codec
from kvsink.errors import UnsupportedError
from kvsink.export.vllm.sinks import Sinks
from kvsink.kernels.pages import Batch, PageFormat, Pages, RowCoder, attend_pages, write_pages
from kvsink.model.runtime import Runtime
from kvsink.model.tables import by_head

__all__ = ["LayerPages", "Paged", "Step", "first_head", "held_tables"]

PLACES = 2  # exact rows of a page where calibration counted none


@dataclass
class Step:
    """The rows of one step: slots int64 [n] of the new ones, and their sequences. known: what layers share, by what it is."""

    slots: Tensor
    batch: Batch
    known: dict[Any, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """New rows."""
        return self.batch.starts[-1]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What the first layer that asks makes of this step."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]


class Paged:
    """Pages of a layer in vLLM's cache, in a format of its own."""

    format: PageFormat
    _pages: tuple[tuple[int, torch.Size], Pages] | None = None

    def pages(self, cache: Tensor) -> Pages:
        """The views of a cache, made once."""
        key = cache.data_ptr(), cache.shape
        if self._pages is None or self._pages[0] != key:
            self._pages = key, self.format.views(cache)
        return self._pages[1]


class LayerPages(Paged):
    """A layer of a plan, of which this rank holds the heads first … first + heads - 1.

    tokens: positions that its tables reach; places: exact rows of a page; dtype: of the model.
    """

    def __init__(
        self, runtime: Runtime, layer: int, first: int, heads: int, tokens: int, places: int, dtype: torch.dtype, sinks: Sinks
    ) -> None:
        plan = runtime.plans[layer]
        assert plan.codec is not None
        self.runtime, self.layer, self.sinks, self.segments = runtime, layer, sinks, plan.segments
        self.codec = replace(plan.codec, segments=(), window=0, strict=True)
        of, device = runtime.anatomy.layers[layer], torch.device("cpu")
        self.params = held_tables(runtime, layer, self.codec, first, heads, tokens, device)
        self.order = runtime.order(layer, device)
        self.format = PageFormat.of(self.codec, (of.key_dim, of.value_dim), places if self.segments else 0, dtype)
        self.coder = RowCoder(self.codec, self.params)

    def step(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, step: Step, scale: float, out: Tensor) -> None:
        """New rows into their pages, then their attention over all rows of their sequences, in place of `out` [n, Hq, D]."""
        pages, positions = self.pages(cache), step.batch.positions
        if self.order is not None:
            q, k = q.index_select(-1, self.order[0]), k.index_select(-1, self.order[0])
        kind = self.runtime.anatomy.layer_types[self.layer], self.runtime.anatomy.turnings[self.layer]
        turn = step.once(kind, lambda: [t[0] for t in self.runtime.angles(self.layer, positions[None])])
        turn = [t.expand(len(positions), -1) for t in turn]
        asks = step.once(self.segments, lambda: self.sinks.asks(self.segments, positions))
        write_pages(pages, step.slots, self.coder(k, v, positions, turn), k, v, asks)
        attend_pages(self.codec, self.params, pages, q, step.batch, scale, out)


def held_tables(
    runtime: Runtime,
    layer: int,
    codec: Codec,
    first: int,
    heads: int,
    tokens: int,
    device: torch.device,
    given: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """The tables of a codec, of these heads alone."""
    names, tables = codec.param_names(), runtime.params(layer, codec, tokens, device, given)
    held, total = slice(first, first + heads), runtime.anatomy.layers[layer].kv
    return [t[held].contiguous() if by_head(n, t, total) else t for n, t in zip(names, tables, strict=True)]


def first_head(total: int, here: int, rank: int, ranks: int) -> int:
    """The first of a rank's key-value heads; where there are more ranks than heads, some hold the same."""
    if here * ranks < total:
        raise UnsupportedError(f"kvsink in vLLM: {ranks} ranks of {here} key-value heads do not hold {total}")
    return rank * here if total >= ranks else rank * total // ranks
