"""What one forward pass knows about its new rows and a cache cannot see: the model's hooks write it, the cache's layers read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Frame"]


@dataclass
class Frame:
    """What one forward pass knows about its new rows; lives from the start of the base model to its end."""

    positions: Tensor | None = None  # [B or 1, S]
    cos: Tensor | None = None  # [B or 1, S, R]
    sin: Tensor | None = None
    valid: Tensor | None = None  # [B, S], False at padding
    visual: Tensor | None = None  # [B, S], True at image and video tokens
    candidates: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    start: Any = None  # rows held before this pass, int or a tensor; None where nobody asks
    origins_set: bool = False  # the origins of rows whose codes stand in tiles have been seen to
    reach: tuple[Tensor, int, float] | None = None  # positions that were looked at, and what a cache found
    asks: bool | None = None  # `Runtime.asks`, looked up once
    before: int | None = None
    begun: set[int] = field(default_factory=set)  # layers that have asked whether they begin
    roomy: bool = False  # sliding layers have made room for the new rows
    sizes: list[Any] = field(default_factory=list)  # `ranges.RowSizes` that the end of the pass looks at
    order: Tensor | None = None  # [B or 1, S], the number of every row among the real ones of its sequence
    marked: dict[bool, bool] = field(default_factory=dict)  # caches, sliding or not, that have noted `valid`
    one_axis: bool = False  # positions and angles are those of one axis of several, and stay so

    def rows_before(self) -> int:
        """`start` as a number; a GPU is asked once."""
        if self.before is None:
            self.before = int(self.start)
        return self.before
