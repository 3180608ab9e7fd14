"""What the passes build up at one site: per side the rows on their way into storage, and how to undo each step.

A pass enters the stages that `kvsink.codecs.steps` gives its name: their nodes come behind `side.x`, which moves on.
`quantize` stores `side.x`, reads it back and lets the entered stages follow in the codec's order of the way back; `preserve` lays
the exact rows over the result. On a cache of kvsink's own the steps meet at the packed state. A stock cache has no such
state: rows are quantized and dequantized on their way into it, numbers are right though no memory is saved. A codec whose
rows are coded together (blocks of tokens) keeps the markers of the cache, store and read, until `fuse`.

Formula    keys and values as in `kvsink.codecs.codec`, stage for stage
Exact      all but the quantizer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kvsink.codecs import Codec, SideSpec
from kvsink.codecs.protect import Segment
from kvsink.codecs.steps import At, stages_back, stages_in
from kvsink.graph.targets import value
from kvsink.kernels import stages
from kvsink.passes.base import insert_op, size_of

__all__ = ["Chain", "Side", "SitePlan"]


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
    """Keys "k" or values "v". new: rows as the model made them; x: the same as far as they are encoded; full: read back."""

    prefix: str
    spec: SideSpec
    new: Node
    x: Node
    write_at: Node  # nodes of the way in go before this one
    read_at: Node  # nodes of the way out go before this one
    full: Node | None = None
    placed: list[int] = field(
        default_factory=list
    )  # stages on the way in, by their place in the codec's list, as they were entered


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
    entered: set[str] = field(default_factory=set)  # passes whose stages are in the graph
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

    def put(self, before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """`insert_op`, remembered as this chain's own."""
        node = insert_op(before, target, *args, **kwargs)
        self.inserted.append(node)
        return node

    def size(self, before: Node, node: Node, axis: int) -> Any:
        """A size as an argument: the number itself, or a node of this chain when it is symbolic."""
        size = size_of(before, node, axis)
        if isinstance(size, Node):
            self.inserted.append(size)
        return size

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.keys, self.values

    def passes_of(self, side: Side) -> list[str]:
        """The pass of every stage of one side's codec, in or back."""
        ways = stages_in(side.spec, side.prefix, self.roped_input), stages_back(side.spec, side.prefix, own=not self.packed)
        return [stage.by for way in ways for stage in way] if side.spec.packed else []

    def enter(self, by: str) -> None:
        """Put the stages of a pass behind what stands on the way in."""
        self.entered.add(by)
        for side in self.sides:
            at = At(self.params, self.positions, self.cos, self.sin, side.spec.block)
            for place, stage in enumerate(stages_in(side.spec, side.prefix, self.roped_input) if side.spec.packed else ()):
                if stage.by == by:
                    side.placed.append(place)
                    side.x = stage.run(_Nodes(self, side.write_at), side.x, at)

    def leave(self, side: Side, x: Node, positions: Node) -> Node:
        """Take back the stages that were entered: rows of the quantizer's basis at `positions` become rows of the model's."""
        at = At(self.params, positions, self.cos, self.sin, self.codec.table_tokens)
        for stage in stages_back(side.spec, side.prefix, own=not self.packed):
            if stage.by in self.entered:
                x = stage.run(_Nodes(self, side.read_at), x, at)
        return x

    @property
    def fault(self) -> str:
        """Why what stands on the way in is not what the codec has: a stage is missing, or they came in another order."""
        if self.opaque:
            return ""
        for by in (by for side in self.sides for by in self.passes_of(side)):
            if by not in self.entered:
                return f"its codec has stages of pass {by!r}, which did not run"
        for side in self.sides:
            if side.placed != sorted(side.placed):
                return (
                    f"its passes put the stages of {'keys' if side.prefix == 'k' else 'values'} in another order than its codec has"
                )
        return ""


class _Nodes:
    """The functions of `kvsink.kernels.stages` as nodes before a given one."""

    def __init__(self, chain: Chain, before: Node) -> None:
        self._chain, self._before = chain, before

    def __getattr__(self, name: str) -> Callable[..., Node]:
        return partial(self._chain.put, self._before, getattr(stages, name))

    def add(self, x: Node, rows: Node) -> Node:
        return self._chain.put(self._before, torch.add, x, rows)

    def row_of(self, mean: Node) -> Node:
        return self._chain.put(self._before, "unsqueeze", mean, 1)

    def negated(self, angles: Node) -> Node:
        return self._chain.put(self._before, torch.neg, angles)

    def hadamard_heads(self, x: Node, order: int, heads_per_group: int = 1, inverse: bool = False) -> Node:
        """`kvsink.hadamard` over one head, or over neighbouring heads laid side by side."""

        def rotated(rows: Node) -> Node:
            return self._chain.put(self._before, torch.ops.kvsink.hadamard.default, rows, order, inverse)

        return rotated(x) if heads_per_group == 1 else self._across(x, rotated)

    def reorder_heads(self, x: Node, permutation: Node) -> Node:
        return self._across(x, lambda flat: self._chain.put(self._before, torch.index_select, flat, -1, permutation))

    def _across(self, x: Node, step: Callable[[Node], Node]) -> Node:
        """Apply `step` to [B, S, H·D] and shape the result back to [B, H, S, D]."""
        put, at, heads, dim = self._chain.put, self._before, value(x).shape[1], value(x).shape[3]
        flat = put(at, torch.flatten, put(at, torch.transpose, x, 1, 2), 2)
        split = put(at, "unflatten", step(flat), 2, (heads, dim))
        return put(at, torch.transpose, split, 1, 2)
