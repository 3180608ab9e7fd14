"""Sliding-window layers in the packed cache: a window of rows that moves over fixed storage, a bound on what is held.

Formula    slots hold the last n tokens, w - 1 + back <= n <= capacity; slot s is token dropped + s. Before rows are added that
           do not fit, the oldest beyond w - 1 + back go: codes, scales and positions move to the front, exact rows that leave
           are given up. The mask of the model hides what a query may not see
Source     ours
Differs    from a ring of exactly w rows: rows move once in `slack` tokens, so that slots stay in the order of tokens and every
           codec that works row by row goes on unchanged; `back` rows more than the window stay for `crop`
Shapes     as in kvsink.cache.cache, with min(max_length, capacity) slots; positions int32 and real bool [B, slots] and dropped
           int64 [1] are common to all sliding layers of a cache
Exact      rows move as bytes; protected rows stay exact while any query can see them
Declines   codecs that code blocks of tokens together, records of outliers, and anchors: see `sliding_refusal`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvsink.codecs import SHARED_NAMES, Codec
from kvsink.errors import KvsinkError
from kvsink.model.runtime import Frame, Runtime

__all__ = ["BACK", "SLACK", "WINDOWED", "SlidingWindow", "check_crop", "sliding_refusal", "window_of"]

WINDOWED = ("sliding_attention", "chunked_attention")  # kinds of layers that see a bounded number of tokens
BACK = 32  # rows behind the window that a crop may take back
SLACK = 256  # tokens between two moves

_SLOTTED = ("k_codes", "k_scale", "v_codes", "v_scale")


def window_of(config: Any, kind: str) -> int:
    """Tokens that a layer of a windowed kind holds: of its sliding window, or of its chunk."""
    return int(config.attention_chunk_size if kind == "chunked_attention" else config.sliding_window)


def sliding_refusal(codec: Codec) -> str:
    """Why a codec cannot serve a sliding-window layer, or an empty string."""
    for name, side in (("keys", codec.key), ("values", codec.value)):
        if side.packed and side.by_token_block:
            return f"{name} are coded by blocks of tokens, which the end of a moving window would cut"
        if side.packed and side.outliers:
            return f"{name} keep outliers in records of blocks, which the end of a moving window would cut"
        if side.packed and side.newest:
            return f"{name} keep their newest rows on one side alone, which a moving window does not"
    if codec.anchors is not None:
        return "anchors are chosen over the whole sequence, of which a sliding window sees the end"
    return ""


class SlidingWindow:
    """What the sliding layers of one cache have in common; stands where other layers have the shared state of the cache."""

    def __init__(self, shared: Any, runtime: Runtime, window: int, max_length: int | None) -> None:
        self.main, self.runtime, self.window, self.total = shared, runtime, window, max_length
        self.layers: list[Any] = []
        self.positions: Tensor | None = None
        self.real: Tensor | None = None
        self.dropped: Tensor | None = None  # int64 [1], tokens before slot 0
        self.anchor_cos = self.anchor_sin = None

    @property
    def frame(self) -> Frame | None:
        """Of the running forward pass."""
        frame: Frame | None = self.main.frame
        return frame

    @property
    def keep(self) -> int:
        """Rows that stay when the window moves."""
        return self.window - 1 + BACK

    @property
    def capacity(self) -> int:
        """Slots of the fixed storage."""
        ring = max((layer.codec.ring for layer in self.layers), default=0)
        room = self.keep + max(SLACK, 2 * ring)
        return room if self.total is None else min(room, self.total)

    def tables(self) -> dict[str, Tensor]:
        """Tables of a codec that belong to the cache: none."""
        return {}

    def map(self, pick: Any, in_place: bool = False) -> None:
        """Apply `pick` to what has one row per sequence."""
        for name in SHARED_NAMES:
            old = getattr(self, name)
            if old is not None and in_place:
                old.copy_(pick(old))
            elif old is not None:
                setattr(self, name, pick(old))

    def reset(self) -> None:
        """Nothing is held any more."""
        if self.dropped is not None:
            self.dropped.zero_()

    def before(self) -> int:
        """Tokens before slot 0; outside compiled graphs."""
        return 0 if self.dropped is None else int(self.dropped)

    def make_room(self, new: int) -> None:
        """Let every sliding layer have slots for `new` rows. Called before the mask of a forward pass is made."""
        if self.dropped is None or not all(layer.is_initialized for layer in self.layers):
            return
        held = int(self.layers[0].length)
        if any(int(layer.length) != held for layer in self.layers[1:]):
            return  # in the middle of a pass: room was made when it began
        drop = 0
        if held + new > self.capacity and (self.total is None or self.total > self.capacity):
            drop = max(0, held - self.keep)
            ring = max(layer.codec.ring for layer in self.layers)
            drop -= drop % ring if ring else 0  # the ring of recent rows is placed by slot
        slots = self.capacity if held - drop + new <= self.capacity else -(-(held - drop + new) // 128) * 128
        if drop:
            self._shift(held, drop)
        if self.total is not None and self.layers[0].k_codes.shape[2] != slots:
            self._store_in(held - drop, slots)
        elif self.total is None and drop and self.layers[0].k_codes.shape[2] > 2 * max(slots, 256):
            self._store_in(held - drop, -(-slots // 256) * 256)

    def _shift(self, held: int, drop: int) -> None:
        assert self.positions is not None and self.real is not None and self.dropped is not None
        for shared in (self.positions, self.real):
            shared[:, : held - drop] = shared[:, drop:held].clone()
        self.real[:, held - drop :] = True
        for layer in self.layers:
            for name in _SLOTTED:
                rows = getattr(layer, name)
                rows[:, :, : held - drop] = rows[:, :, drop:held].clone()
            slot = layer.exact_slot
            named = torch.where(slot < -1, -slot - 2, slot) - drop
            gone = named < 0
            layer.exact_slot.copy_(torch.where(gone, -1, torch.where(slot < -1, -named - 2, named)))
            layer.exact_score.masked_fill_(gone, float("-inf"))
            layer.recent_slot.copy_((layer.recent_slot - drop).clamp_min(-1))
            layer.length.sub_(drop)
            layer._held -= drop if layer.max_length is None else 0
        self.dropped.add_(drop)

    def _store_in(self, held: int, slots: int) -> None:
        """Move what is held to storage of `slots` slots: the fixed one where it has that many, which never moves."""
        fixed = self.total is not None and slots == self.capacity
        assert self.positions is not None and self.real is not None
        both = self.positions, self.real
        for layer in self.layers:
            now = {name: getattr(layer, name) for name in _SLOTTED}
            if layer.fixed is None and self.total is not None:
                layer.fixed = (now, both)
            for name, rows in now.items():
                target = layer.fixed[0][name] if fixed else rows.new_zeros((*rows.shape[:2], slots, rows.shape[3]))
                target[:, :, :held] = rows[:, :, :held]
                setattr(layer, name, target)
            if self.total is not None:
                layer.max_length = slots
        targets = self.layers[0].fixed[1] if fixed else tuple(t.new_ones((t.shape[0], slots)) for t in both)
        for target, rows in zip(targets, both, strict=True):
            target[:, :held] = rows[:, :held]
        self.positions, self.real = targets
        self.real[:, held:] = True
        for layer in self.layers:
            layer._set_params(slots)


def check_crop(window: SlidingWindow, keep: int, layer: int) -> None:
    """Raise KvsinkError when rows that the window would see again are gone; `keep`: rows left in their slots."""
    if window.before() and keep < window.window - 1:
        raise KvsinkError(
            f"layer {layer} slides over {window.window} tokens and has given up the rows that a crop to {window.before() + keep} "
            f"tokens would need; crop by at most {BACK} tokens, or prefill the prompt again"
        )
