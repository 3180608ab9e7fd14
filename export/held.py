"""A cache outside of its graph: tensors with room for more tokens than they hold, so that a step writes into them.

Formula    slots grow by whole blocks of 64 (tiles: 128), and only when a step finds none left; what they held is copied then, once
           a block
Shapes     every tensor has `slots` on one axis, or none: rows kept exact have as many places as ever
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BLOCK", "Held", "arrays", "axis_of", "dtype_of", "grown", "nbytes", "slots_for"]

BLOCK = 64
"""What standard operators decode and nobody reads is at most one block less one slot; a copy in 64 steps is no time."""
_GROWING = ("slots", "past")  # of flavours functions and custom, of gqa
_DTYPES = {"float": "float32", "double": "float64"}  # other types have the names of numpy


@dataclass
class Text:
    """What the caches of one text know together, whose tensors are the same."""

    ended: bool = False  # nobody goes on with it, so that another may take its tensors
    taken: bool = False


class Held(dict[str, Any]):
    """Values of onnxruntime by name without prefix, which hold `tokens` tokens a row.

    A step writes behind them and hands on the same tensors: of two steps from one cache the later one writes over what the
    earlier left, which is then `lost`. So is a cache in tiles itself that a step has gone on from: its exact rows are among them;
    and every cache of a text that has ended, when another takes its tensors.
    """

    def __init__(self, values: Mapping[str, Any], tokens: int) -> None:
        super().__init__(values)
        self.tokens, self.overwritten, self.text = tokens, False, Text()
        self.bound: Any = None  # what a step binds, where it binds the same each time
        self._behind: Held | None = None

    def end(self) -> None:
        """Say that nobody goes on with this text: `OnnxGenerator.begin` may take its tensors."""
        self.text.ended = True

    @property
    def lost(self) -> bool:
        """Whether its tensors hold something else by now."""
        return self.overwritten or self.text.taken

    def leads_to(self, behind: Held) -> None:
        """`behind` is what a step wrote into these tensors."""
        earlier = self._behind
        while earlier is not None:
            earlier.overwritten, earlier = True, earlier._behind
        self._behind, behind.text = behind, self.text


def slots_for(tokens: int, multiple: int = BLOCK) -> int:
    """Slots of a cache that is to hold `tokens`, a multiple of a number."""
    return -(-tokens // multiple) * multiple


def axis_of(entry: Mapping[str, Any]) -> int | None:
    """The axis of slots of a tensor of the manifest, or None."""
    return next((axis for axis, size in enumerate(entry["shape"]) if size in _GROWING), None)


def dtype_of(entry: Mapping[str, Any]) -> str:
    """The type of a tensor of the manifest, as numpy calls it."""
    return str(_DTYPES.get(entry["dtype"], entry["dtype"]))


def grown(past: Mapping[str, Any], entries: Mapping[str, Any], slots: int, value: Callable[[Any], Any]) -> dict[str, Any]:
    """The same cache in tensors of `slots` slots; `value` makes a value of an array. Room is zeros, which are numbers."""
    out = {}
    for name, held in past.items():
        axis = axis_of(entries[name])
        if axis is None:  # rows kept exact, into which a step may write too
            out[name] = value(held.numpy().copy())
            continue
        shape = list(held.shape())
        array = np.zeros([*shape[:axis], slots, *shape[axis + 1 :]], dtype=dtype_of(entries[name]))
        if held_slots := shape[axis]:
            array[(slice(None),) * axis + (slice(held_slots),)] = held.numpy()
        out[name] = value(array)
    return out


def arrays(past: Mapping[str, Any], entries: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """A cache as arrays of numpy, without the room behind its tokens."""
    out = {}
    for name, held in past.items():
        axis, array = axis_of(entries[name]), held.numpy()
        out[name] = array if axis is None else array[(slice(None),) * axis + (slice(tokens),)]
    return out


def nbytes(past: Mapping[str, Any], entries: Mapping[str, Any], tokens: int) -> int:
    """Bytes of a cache without the room behind its tokens."""
    total = 0
    for name, held in past.items():
        axis, shape = axis_of(entries[name]), list(held.shape())
        if axis is not None:
            shape[axis] = min(tokens, shape[axis])
        total += int(np.prod(shape)) * np.dtype(dtype_of(entries[name])).itemsize
    return total
