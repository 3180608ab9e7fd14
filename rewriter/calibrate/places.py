"""How many rows of a serving engine's page stay exact, where each row decides for itself: counted over calibration text.

Formula    a page of 128 tokens needs a place for every row that asks: the first N positions, and rows above a share T of a stage's
           size. It overflows where more ask than it has places; the fewest places that at most 1 % of pages overflow are taken
Source     ours
Shapes     ids int64 [N, T] windows of tokens
Cost       one forward pass over at most four windows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvsink.codecs.protect import Segment, SinkStage
from kvsink.kernels.pages import PAGE
from kvsink.model.anatomy import last_projection
from kvsink.model.candidates import passes
from kvsink.model.decoder import Decoder

__all__ = ["Places", "count_places"]

WINDOWS, MOST, SHARE = 4, 8, 0.01


@dataclass(frozen=True)
class Places:
    """places: exact rows of a page; overflow: share of pages where more rows ask, for 1 place, 2, …; pages: how many were seen."""

    places: int
    overflow: tuple[float, ...]
    pages: int

    @property
    def note(self) -> str:
        """One line for the report."""
        shares = ", ".join(f"{100 * x:.1f} % with {i + 1}" for i, x in enumerate(self.overflow[: self.places]))
        return f"a page of {PAGE} tokens needs {self.places} places for exact rows: {shares} overflow, of {self.pages} seen"


def count_places(decoder: Decoder, ids: Tensor, segments: Sequence[tuple[Segment, ...]], stages: Sequence[SinkStage]) -> Places:
    """segments: of every layer. The layer that needs most decides."""
    of = {stage.block: stage for stage in stages}
    blocks = {int(s.source.split(":")[1]) for layer in segments for s in layer if s.source.startswith("sinks:")}
    written: dict[int, Tensor] = {}

    def see(block: int, module: nn.Module, args: Any, output: Tensor) -> None:
        written[block] = output[..., of[block].channels[0]].detach().cpu()

    projections = {b: decoder.model.get_submodule(last_projection(decoder.model, decoder.where, b)) for b in sorted(blocks)}
    handles = [module.register_forward_hook(partial(see, block)) for block, module in projections.items()]
    asked: dict[tuple[Segment, ...], list[Tensor]] = {layer: [] for layer in segments if layer}
    try:
        for row in ids[:WINDOWS]:
            with torch.no_grad():
                decoder.model(input_ids=row[None].to(decoder.device), use_cache=False)
            for layer, counts in asked.items():
                rows = torch.zeros(len(row), dtype=torch.bool)
                for s in layer:
                    if s.source == "first":
                        rows[: s.count] = True
                    elif s.source.startswith("sinks:"):
                        _, block, share = s.source.split(":")
                        rows |= passes(written[int(block)][0], float(share) * of[int(block)].size)
                counts += [page.sum() for page in rows.split(PAGE)]
    finally:
        for handle in handles:
            handle.remove()
    tables = [torch.stack(counts) for counts in asked.values()]
    overflow = [max((float((t > r).double().mean()) for t in tables), default=0.0) for r in range(1, MOST + 1)]
    places = next((r for r, share in enumerate(overflow, 1) if share <= SHARE), MOST)
    return Places(places, tuple(overflow), len(tables[0]) if tables else 0)
