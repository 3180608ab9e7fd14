"""Whether the mask of a decode step says no more than that nothing later is visible, which packed attention knows by itself.

Formula    mask[b, 0, 0, j] = (j <= length) for every slot j, one new row at slot `length`
Source     ours; the spelling is that of transformers' masking_utils: arange(L) + 0 <= arange(1) + a copy of length, viewed
           and expanded
Differs    any other condition (padding, a window, blocks, a mask that the caller made) is read as it stands
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.fx import Node

from kvsink.graph.targets import CASTS, argument, kind, value

__all__ = ["only_causal"]


def _bare(node: Any) -> Any:
    """What a node shows, through views that only add axes and through casts. A slice of values would change what it says."""
    while isinstance(node, Node) and kind(node) in CASTS | {"getitem", "unsqueeze", "expand"}:
        if kind(node) == "getitem" and any(i is not None and i != slice(None) for i in _indices(node)):
            return node
        node = node.args[0]
    return node


def _indices(node: Node) -> tuple[Any, ...]:
    index = node.args[1]
    return index if isinstance(index, tuple) else (index,)


def _counts(node: Any, size: int) -> bool:
    """arange(size)."""
    if kind(node) != "arange" or not isinstance(node, Node):
        return False
    shape = tuple(value(node).shape) if value(node) is not None else ()
    starts_at_zero = len(node.args) == 1 or (len(node.args) == 2 and node.args[0] == 0)
    return bool(starts_at_zero and shape == (size,) and argument(node, 2, "step", 1) == 1)


def only_causal(mask: Any, slots: int, lengths: Collection[Node]) -> bool:
    """Whether a mask [B, 1, 1, slots] is slot <= length, for one of the given nodes that hold the length before the step."""
    found = value(mask)
    if found is None or found.dim() != 4 or found.shape[1] != 1 or found.shape[2] != 1 or found.shape[3] != slots:
        return False
    compared = _bare(mask)
    if kind(compared) != "le":
        return False
    held, asking = (_bare(a) for a in compared.args[:2])
    if kind(held) == "add" and 0 in held.args:
        held = _bare(next((a for a in held.args if isinstance(a, Node)), None))
    if not _counts(held, slots) or kind(asking) != "add":
        return False
    one, length = (_bare(a) for a in asking.args[:2])
    return any(_counts(a, 1) and _before(b) in lengths for a, b in ((one, length), (length, one)))


def _before(length: Any) -> Any:
    """The node that a copy of the length was taken from, where that was before the step moved it on; other nodes themselves."""
    if not isinstance(length, Node) or kind(length) != "clone":
        return length
    held = length.args[0]
    moved = isinstance(held, Node) and any(kind(user) == "add_" and user < length for user in held.users)
    return length if moved else held
