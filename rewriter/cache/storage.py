"""The tensors of one attention layer in the packed cache: made once or growing, cropped, reset, and mapped to other batches.

Shapes     see kvsink.codecs.STATE_NAMES: codes uint8 [B, H, L, bytes] and float16 scales, exact rows [B, H, E, D] with their
           slots, an optional window of recent rows, the length; of the whole cache positions [B, L], and real bool [B, L],
           False where a slot holds padding
Exact      a crop leaves codes as they are; rows of a block that it opens are exact again as far as they are still held
Raises     KvsinkError when a crop asks for more than is held
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvsink.codecs import ANCHOR_NAMES, SHARED_NAMES, STATE_NAMES, Codec
from kvsink.codecs.protect import Segment
from kvsink.errors import KvsinkError
from kvsink.kernels.read import put_rows
from kvsink.model.frame import Frame
from kvsink.model.runtime import Runtime

__all__ = ["BLOCK", "HELD", "Shared", "Storage"]

BLOCK = 256  # slots by which a growing cache grows
HELD = tuple(n for n in (*STATE_NAMES, *ANCHOR_NAMES) if n not in SHARED_NAMES)  # of one layer
_BATCHED = tuple(n for n in HELD if n not in ("recent_slot", "length"))


class Shared:
    """What the layers of one cache have in common: the frame of the running forward pass, positions, which slots are real
    (no padding), and for codes in tiles the rotation of every row by its anchor (slot minus position of its first token)."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.frame: Frame | None = None
        self.positions: Tensor | None = None
        self.real: Tensor | None = None
        self.origin_cos: Tensor | None = None
        self.origin_sin: Tensor | None = None
        self._nothing: dict[tuple[Any, ...], Tensor] = {}

    def nothing(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor without elements that stands for what no layer of this kind holds: one for all of them, so that compiled code
        is given, and looks at, one."""
        key = name, shape, dtype, device
        if key not in self._nothing:
            self._nothing[key] = torch.empty(shape, dtype=dtype, device=device)
        return self._nothing[key]

    def tables(self) -> dict[str, Tensor]:
        """The anchors as tables of a codec."""
        held = {"origin_cos": self.origin_cos, "origin_sin": self.origin_sin}
        return {name: t for name, t in held.items() if t is not None}

    def map(self, pick: Any, in_place: bool = False) -> None:
        """Apply `pick` to every tensor with one row per sequence."""
        for name in (*SHARED_NAMES, "origin_cos", "origin_sin"):
            old = getattr(self, name)
            if old is not None and in_place:
                old.copy_(pick(old))
            elif old is not None:
                setattr(self, name, pick(old))


class Storage(CacheLayerMixin):
    """What one layer holds. With `max_length` all tensors are allocated once and never move, else they grow."""

    length: Tensor  # int64 []: tokens held; one of the tensors of `state`
    is_sliding = False
    is_croppable = True

    def __init__(self, shared: Shared, layer: int, codec: Codec, segments: tuple[Segment, ...], max_length: int | None) -> None:
        super().__init__()
        self.shared, self.layer, self.codec, self.segments = shared, layer, codec, segments
        self.codec_text = codec.text()
        self.sources = [(s, s.key if s.source != "massive" else f"{s.key}@{layer}") for s in segments]
        self.max_length = max_length
        self.is_compileable = max_length is not None
        self.params: list[Tensor] = []
        self.order: tuple[Tensor, Tensor] | None = None  # channels of a key in canonical order, and back
        self.distant = False  # a number of its tensors is read only after a wait
        self._held = 0  # tokens held, for growing caches only
        self._unseen: tuple[Tensor, Tensor] | None = None  # new rows whose attention has not been observed yet
        self._fresh: tuple[Tensor, list[Tensor]]  # positions and candidates of rows that attention will store
        self._ahead: float | None = None  # how far positions run ahead of tokens; NaN: not all as far, which no GPU kernel reads
        self._reach: int | None = None  # positions below it are in the tables of block starts, where there are any
        self._given: tuple[Tensor, Tensor] | None = None  # new rows that attention is to ask for
        self._asked = True  # False from an update that left the reading to attention until attention has asked

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.distant = self.device.type != "cpu"
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.head_dim, self.value_dim = key_states.shape[-1], value_states.shape[-1]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]  # models ask whether a layer holds any of its own
        self.order = self.shared.runtime.order(self.layer, self.device)
        c, b, dev = self.codec, self.batch_size, self.device
        slots = self.max_length if self.max_length is not None else BLOCK
        for name, (shape, dtype, fill) in self._layout(slots).items():
            held = (
                torch.full(shape, fill, dtype=dtype, device=dev) if 0 not in shape else self.shared.nothing(name, shape, dtype, dev)
            )
            setattr(self, name, held)
        if self.shared.positions is None or self.shared.positions.shape != (b, slots):
            self.shared.positions = torch.zeros(b, slots, dtype=torch.int32, device=dev)
            self.shared.real = torch.ones(b, slots, dtype=torch.bool, device=dev)
        if c.tiles and c.key.center and (self.shared.origin_cos is None or self.shared.origin_cos.shape[0] != b):
            channels = self.shared.runtime.rotary_channels(self.layer)
            self.shared.origin_cos = torch.ones(b, channels, device=dev)
            self.shared.origin_sin = torch.zeros(b, channels, device=dev)
        self._set_params(slots)
        self._held = 0
        self._mark_static()
        self.is_initialized = True

    def _mark_static(self) -> None:
        """Tell dynamo which tensors of a cache of a fixed length never move."""
        if self.is_compileable and not torch.compiler.is_compiling():
            for tensor in (*self.state(), *(getattr(self, n) for n in ANCHOR_NAMES), *self.params):
                torch._dynamo.mark_static_address(tensor)

    def _set_params(self, tokens: int) -> None:
        self.params = self.shared.runtime.params(self.layer, self.codec, tokens, self.device, self.shared.tables())
        names, self._reach = self.codec.param_names(), None
        if not self.codec.tiles and "start_cos" in names:  # codes in tiles count by slots, which the tables always reach
            self._reach = (self.params[names.index("start_cos")].shape[0] - 1) * self.codec.table_tokens

    def state(self) -> list[Tensor]:
        """The tensors of this layer in the order of STATE_NAMES."""
        return [getattr(self.shared if n in SHARED_NAMES else self, n) for n in STATE_NAMES]

    def _layout(self, slots: int) -> dict[str, tuple[tuple[int, ...], torch.dtype, float]]:
        heads, dims = self.num_heads, (self.head_dim, self.value_dim)
        return self.codec.layout(self.batch_size, heads, *dims, slots, self.dtype)

    def _grow(self, slots: int) -> None:
        if slots <= self.k_codes.shape[2]:
            return
        wanted = -(-slots // BLOCK) * BLOCK
        grown: dict[str, Tensor] = {}  # all of them before one is taken: memory may run out between two
        for name, (shape, dtype, fill) in self._layout(wanted).items():
            old = getattr(self, name)
            if shape != old.shape:
                grown[name] = torch.full(shape, fill, dtype=dtype, device=old.device)
                grown[name][tuple(slice(n) for n in old.shape)] = old
        for name, new in grown.items():
            setattr(self, name, new)
        positions, real = self.shared.positions, self.shared.real
        assert positions is not None and real is not None
        if more := max(0, wanted - positions.shape[1]):
            self.shared.positions, self.shared.real = F.pad(positions, (0, more)), F.pad(real, (0, more), value=True)
        self._set_params(wanted)

    def _note_positions(self, ahead: float | None, reach: int = 0) -> None:
        """How far positions now run ahead of tokens, which the codec tells compiled graphs too, and behind the last of them."""
        self._ahead, uneven = ahead, ahead is not None and math.isnan(ahead)
        if uneven != self.codec.uneven:
            self._recode(replace(self.codec, uneven=uneven))
        if self._reach is not None and reach > self._reach:
            self._set_params(2 * reach)

    def _recode(self, codec: Codec) -> None:
        """Read what is stored in another way."""
        self.codec, self.codec_text = codec, codec.text()

    def stored_text(self) -> str:
        """The codec of what is stored, wherever its rows stand."""
        return replace(self.codec, uneven=False).text()

    def get_seq_length(self) -> Any:
        if not self.is_initialized:
            return 0
        # A copy: a mask function may be asked after the length has moved on.
        return self.length.clone() if self.max_length is not None else self._held

    def get_max_length(self) -> int:
        return -1 if self.max_length is None else self.max_length

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self._held + query_length if self.max_length is None else self.max_length), 0

    def reset(self) -> None:
        if not self.is_initialized:
            return
        for name, (*_, fill) in self._layout(self.k_codes.shape[2]).items():  # rows too: one that is NaN is not hidden by a mask
            getattr(self, name).fill_(fill)
        if self.shared.real is not None and self.shared.positions is not None:
            self.shared.real.fill_(True)
            self.shared.positions.zero_()  # no table of angles may reach those that compiled steps have brought
        if self.shared.origin_cos is not None and self.shared.origin_sin is not None:
            self.shared.origin_cos.fill_(1.0)
            self.shared.origin_sin.zero_()
        self._held = 0
        self._note_positions(None)
        self._unseen, self._asked = None, True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last |n| tokens (a negative count; a positive one is the length to keep).

        Codes are not touched. Where the cut opens a block of tokens that had been coded, its rows are exact again as far
        as the ring of recent rows still holds them; the others go on as the rows their codes say.
        """
        if not self.is_initialized or tokens_to_remove == 0:
            return
        held = int(self.length)
        keep = held + tokens_to_remove if tokens_to_remove < 0 else min(tokens_to_remove, held)
        if keep < 0:
            raise KvsinkError(f"layer {self.layer}: cannot crop {-tokens_to_remove} tokens from a cache of {held}")
        self._reopen(keep)
        self.length.fill_(keep)
        assert self.shared.real is not None
        self.shared.real[:, keep:] = True
        self._unseen, self._asked = None, True
        self._held = keep
        named = torch.where(self.exact_slot < -1, -self.exact_slot - 2, self.exact_slot)
        gone = named >= keep
        self.exact_slot.masked_fill_(gone, -1)
        self.exact_score.masked_fill_(gone, float("-inf"))

    def _reopen(self, keep: int) -> None:
        """Put rows back into the ring that it has gone past: those of the block that is open at `keep` rows, and for codes in tiles
        all of the window, which the kernels take to be there."""
        sides = (self.codec.key, self.codec.value)
        flush = [s.flush for s in sides if s.by_token_block]
        start = min((keep // n * n for n in flush), default=keep)
        if self.codec.tiles and self.codec.window:
            start = max(0, keep + 1 - self.codec.window)
        held = set(self.recent_slot.tolist())
        gone = [slot for slot in range(start, keep) if slot not in held]
        if not gone:
            return
        params = self.codec.tables(self.params)
        state = self.codec.named(self.state())
        slots = torch.tensor(gone, device=self.device)
        place = slots % self.codec.ring
        inside = (self.exact_slot >= gone[0]) & (self.exact_slot <= gone[-1])
        for recent, exact, rows in (
            (self.recent_k, self.exact_k, self.codec.read_keys(state, params, gone[0], gone[-1] + 1)),
            (self.recent_v, self.exact_v, self.codec.read_values(state, params, gone[0], gone[-1] + 1)),
        ):
            if self.codec.tiles:  # elsewhere exact rows are laid over the window's when it is read
                put_rows(rows, exact, torch.where(inside, self.exact_slot - gone[0], -1))
            recent.index_copy_(2, place, rows.index_select(2, slots - gone[0]).to(recent.dtype))
        self.recent_slot.index_copy_(0, place, slots.to(self.recent_slot.dtype))
        if self.codec.anchors is not None:  # what their codes say is no row to keep
            self.recent_score[:, place] = float("-inf")

    def _map_batch(self, pick: Any, in_place: bool) -> None:
        picked = {} if in_place else {name: pick(getattr(self, name)) for name in _BATCHED}
        for name in _BATCHED:
            if in_place:
                getattr(self, name).copy_(pick(getattr(self, name)))
            else:
                setattr(self, name, picked[name])
        self.batch_size = self.k_codes.shape[0]

    def _take(self, state: Mapping[str, Tensor], slots: int) -> None:
        """Go on with other tensors, those of a joined batch."""
        for name, tensor in state.items():
            setattr(self, name, tensor)
        self.batch_size = self.k_codes.shape[0]
        self._held = int(self.length)
        self._set_params(slots)
        self._mark_static()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self._map_batch(lambda t: t.index_select(0, beam_idx.to(t.device)), in_place=True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._map_batch(lambda t: t.repeat_interleave(repeats, dim=0), in_place=False)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._map_batch(lambda t: t[indices.to(t.device) if indices.dtype != torch.bool else indices], in_place=False)

    def offload(self) -> None:
        if self.is_initialized:
            for name in _BATCHED:
                setattr(self, name, getattr(self, name).to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized and self.k_codes.device != self.device:
            for name in _BATCHED:
                setattr(self, name, getattr(self, name).to(self.device, non_blocking=True))
