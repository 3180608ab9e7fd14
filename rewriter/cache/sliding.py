"""Sliding-window layers in the packed cache: a window of rows that moves over fixed storage, a bound on what is held.

Formula    slots hold the last n tokens, w - 1 + back <= n <= capacity; slot s is token dropped + s. Before rows are added that
           do not fit, the oldest beyond w - 1 + back go: codes, scales and positions move to the front, exact rows that leave
           are given up. The mask of the model hides what a query may not see
Source     ours
Differs    from a ring of exactly w rows: rows move once in `slack` tokens, so that slots stay in the order of tokens and every
           codec that works row by row goes on unchanged; `back` rows more than the window stay for `crop`
Shapes     as in kvsink.cache.storage, with min(max_length, capacity) slots; positions int32 and real bool [B, slots] and dropped
           int64 [1] are common to all sliding layers of a cache
Exact      rows move as bytes; protected rows stay exact while any query can see them
Declines   codecs that code blocks of tokens together, records of outliers, and anchors: see `sliding_refusal`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvsink.cache.layer import KVSinkLayer
from kvsink.codecs import SHARED_NAMES, Codec
from kvsink.codecs.protect import Segment
from kvsink.errors import KvsinkError
from kvsink.model.frame import Frame
from kvsink.model.runtime import Runtime

__all__ = ["BACK", "SLACK", "WINDOWED", "KVSinkSlidingLayer", "SlidingWindow", "check_crop", "sliding_refusal", "window_of"]

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
    """What the sliding layers of one cache have in common; stands where other layers have the shared state of the cache.

    back: rows behind the window that a crop may take back; slack: tokens between two moves.
    """

    def __init__(
        self, shared: Any, runtime: Runtime, window: int, max_length: int | None, back: int = BACK, slack: int = SLACK
    ) -> None:
        self.back, self.slack = back, slack
        self.main, self.runtime, self.window, self.total = shared, runtime, window, max_length
        self.nothing = shared.nothing
        self.layers: list[Any] = []
        self.positions: Tensor | None = None
        self.real: Tensor | None = None
        self.dropped: Tensor | None = None  # int64 [1], tokens before slot 0
        self.origin_cos = self.origin_sin = None

    @property
    def frame(self) -> Frame | None:
        """Of the running forward pass."""
        frame: Frame | None = self.main.frame
        return frame

    @property
    def keep(self) -> int:
        """Rows that stay when the window moves."""
        return self.window - 1 + self.back

    @property
    def capacity(self) -> int:
        """Slots of the fixed storage."""
        ring = max((layer.codec.ring for layer in self.layers), default=0)
        room = self.keep + max(self.slack, 2 * ring)
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


class KVSinkSlidingLayer(KVSinkLayer):
    """The packed rows of one sliding-window layer: see the head of this file."""

    is_sliding = True

    def __init__(
        self, window: SlidingWindow, layer: int, codec: Codec, segments: tuple[Segment, ...], max_length: int | None
    ) -> None:
        super().__init__(window, layer, codec, segments, max_length)  # type: ignore[arg-type]
        self.moving = window
        self.fixed: Any = None  # the storage that never moves, while a long chunk is held elsewhere
        window.layers.append(self)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        window = self.moving
        if self.max_length is not None:
            self.max_length = window.capacity
        if window.dropped is None:
            window.dropped = torch.zeros(1, dtype=torch.int64, device=key_states.device)
            if self.is_compileable and not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(window.dropped)
        self.fixed = None
        super().lazy_initialization(key_states, value_states)

    def _set_params(self, tokens: int) -> None:
        super()._set_params(max(tokens, self.moving.total or 0))  # positions go on where slots do not

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        frame = self.shared.frame
        if not torch.compiler.is_compiling() and not (frame is not None and frame.roomy):
            self.moving.make_room(key_states.shape[2])
            if frame is not None and frame.start is not None:
                frame.roomy = True
        return super().update(key_states, value_states, *args, **kwargs)

    def _first_position(self) -> Tensor:
        dropped = self.moving.dropped
        assert dropped is not None
        return self.length + dropped

    def get_seq_length(self) -> Any:
        if not self.is_initialized:
            return 0
        return self._first_position() if self.max_length is not None else self._held + self.moving.before()

    def get_max_length(self) -> int:
        return -1 if self.moving.total is None else self.moving.total

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if torch.compiler.is_compiling():
            raise KvsinkError(
                f"layer {self.layer}: a packed sliding window moves between two compiled steps, and this graph makes its mask "
                "inside; compile through generate(compile_config=…), or rewrite with sliding=False"
            )
        self.moving.make_room(query_length)
        if self.max_length is None:
            return self._held + query_length, self.moving.before()
        return (self.max_length if self.is_initialized else max(self.moving.capacity, query_length)), self.moving.before()

    def reset(self) -> None:
        super().reset()
        self.moving.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """As the other layers; rows that the window has left behind do not come back, see the head of this file."""
        if not self.is_initialized or tokens_to_remove == 0:
            return
        held, before = int(self.length), self.moving.before()
        keep = held + tokens_to_remove if tokens_to_remove < 0 else min(tokens_to_remove - before, held)
        check_crop(self.moving, keep, self.layer)
        if keep < held:
            super().crop(keep - held)


def check_crop(window: SlidingWindow, keep: int, layer: int) -> None:
    """Raise KvsinkError when rows that the window would see again are gone; `keep`: rows left in their slots."""
    if window.before() and keep < window.window - 1:
        raise KvsinkError(
            f"layer {layer} slides over {window.window} tokens and has given up the rows that a crop to {window.before() + keep} "
            f"tokens would need; crop by at most {window.back} tokens, or prefill the prompt again"
        )
