"""What the passes build up at one site: per side the rows on their way into storage, and how to undo each step.

A pass that adds a stage inserts its nodes behind `side.x`, moves `side.x` on, and pushes onto `side.undo` how the stage
is taken back. `quantize` stores `side.x`, reads it back and runs the undo steps, last stage first; `preserve` lays the
exact rows over the result. On a cache of kvsink's own the steps meet at the packed state. A stock cache has no such
state: rows are quantized and dequantized on their way into it, numbers are right though no memory is saved. A codec whose
rows are coded together (blocks of tokens) keeps the markers of the cache, store and read, until `fuse`.

Formula    keys and values as in `kvsink.codecs.codec`, stage for stage
Exact      all but the quantizer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kvsink.codecs import Codec, SideSpec
from kvsink.codecs.protect import Segment
from kvsink.graph.targets import value
from kvsink.passes.base import insert_op, size_of

__all__ = ["Chain", "Side", "SitePlan"]

Undo = Callable[[Node, Node], Node]  # (rows, positions) -> rows


@dataclass(frozen=True)
class SitePlan:
    """The codec of one site with a stock cache. tables: by the names of `codec.param_names()`.

    segments: rows to keep exact; channels: of each emergence block, the channels that mark its sinks.
    """

    codec: Codec
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    segments: tuple[Segment, ...] = ()
    channels: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class Side:
    """Keys or values. new: rows as the model made them; x: the same as far as they are encoded; full: read back."""

    spec: SideSpec
    new: Node
    x: Node
    write_at: Node  # nodes of the way in go before this one
    read_at: Node  # nodes of the way out go before this one
    undo: list[Undo] = field(default_factory=list)
    full: Node | None = None


@dataclass
class Chain:
    """Both sides of one site, the constants they use, and every node the passes put there."""

    codec: Codec
    codec_text: str
    params: dict[str, Node]
    state: dict[str, Node]  # empty on a stock cache
    positions: Node
    cos: Node
    sin: Node
    keys: Side
    values: Side
    append: Node | None = None  # the markers of kvsink's own cache
    read: Node | None = None
    markers: tuple[Any, ...] = ()  # arguments of the append marker
    plan: SitePlan | None = None
    k_pre: Node | None = None  # the new keys before RoPE, where encoding starts there
    slots: Node | None = None
    inserted: list[Node] = field(default_factory=list)
    preserved: bool = False
    fused: Node | None = None

    @property
    def packed(self) -> bool:
        """True on kvsink's own cache, where rows meet packed state."""
        return bool(self.state)

    @property
    def opaque(self) -> bool:
        """Whether coding stays inside the cache ops: rows that are coded together are no chain of steps."""
        return self.packed and self.codec.opaque

    @property
    def roped_input(self) -> bool:
        """Whether encoding starts at the key after RoPE."""
        spec = self.codec.key
        return self.codec.tiles or not (spec.packed and (spec.domain == "block" or spec.center))

    def put(self, anchor: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """`insert_op`, remembered as this chain's own."""
        node = insert_op(anchor, target, *args, **kwargs)
        self.inserted.append(node)
        return node

    def size(self, anchor: Node, node: Node, axis: int) -> Any:
        """A size as an argument: the number itself, or a node of this chain when it is symbolic."""
        size = size_of(anchor, node, axis)
        if isinstance(size, Node):
            self.inserted.append(size)
        return size

    def hadamard(self, side: Side, x: Node, anchor: Node, inverse: bool = False) -> Node:
        """`kvsink.hadamard` over one head, or over neighbouring heads laid side by side."""
        op, spec = torch.ops.kvsink.hadamard.default, side.spec
        if spec.heads_per_group == 1:
            return self.put(anchor, op, x, spec.order, inverse)
        return self.across_heads(anchor, x, lambda flat: self.put(anchor, op, flat, spec.order, inverse))

    def across_heads(self, anchor: Node, x: Node, step: Callable[[Node], Node]) -> Node:
        """Apply `step` to [B, S, H·D] and shape the result back to [B, H, S, D]."""
        heads, dim = value(x).shape[1], value(x).shape[3]
        flat = self.put(anchor, torch.flatten, self.put(anchor, torch.transpose, x, 1, 2), 2)
        split = self.put(anchor, "unflatten", step(flat), 2, (heads, dim))
        return self.put(anchor, torch.transpose, split, 1, 2)
