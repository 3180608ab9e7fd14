"""`KVSinkCache`: a transformers cache whose attention layers hold packed codes, and their sinks exact.

Shapes     see kvsink.codecs.STATE_NAMES: per layer codes uint8 [B, H, L, bytes] and float16 scales, exact rows [B, H, E, D] with
           their slots, an optional window of recent rows, the length, and what all layers share: positions [B, L], and real
           bool [B, L], False where a slot holds padding
Exact      protected, recent and just-appended rows are returned as they came; the rest as its codes say
Raises     KvsinkError when a row does not fit, a crop asks for more than is held, or a saved cache is of another model
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionLayer, StaticCache

from kvsink.cache.joining import joined_shared, joined_state, pads_of
from kvsink.cache.ranges import RowSizes, check_range
from kvsink.cache.served import in_tiles, tiles_serve
from kvsink.cache.sliding import WINDOWED, SlidingWindow, check_crop, window_of
from kvsink.codecs import ANCHOR_NAMES, SHARED_NAMES, STATE_NAMES, Codec
from kvsink.codecs.protect import Segment
from kvsink.errors import KvsinkError, SidecarError
from kvsink.folder.digest import DIGEST, check_digest, digest
from kvsink.kernels import append_, attend, observe, read, release_, settle_
from kvsink.kernels.append import append
from kvsink.kernels.append_attend import append_attend
from kvsink.kernels.attend import attend_ref, attention
from kvsink.kernels.layout import TILE_SLOTS
from kvsink.kernels.read import put_rows
from kvsink.model.offload import place_of
from kvsink.model.runtime import Frame, Runtime, number_of, order_candidates, runtime_of, turns_back

__all__ = ["KVSinkCache", "KVSinkLayer"]

_BLOCK = 256  # slots by which a growing cache grows
_HELD = tuple(n for n in (*STATE_NAMES, *ANCHOR_NAMES) if n not in SHARED_NAMES)  # of one layer
_BATCHED = tuple(n for n in _HELD if n not in ("recent_slot", "length"))
_EXACT = ("exact_k", "exact_v", "exact_slot", "exact_score")
_ANCHOR_STATE = (*_EXACT, "recent_k", "recent_v", "recent_slot", "recent_score")


def _differentiated(*tensors: Tensor) -> bool:
    """Whether autograd follows any of them: then the registered ops run, which say that they have no gradient."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _reached(positions: Tensor, first: Tensor | int) -> tuple[int, float]:
    """The largest position plus one, and how far positions [B, S] run ahead of the numbers of their tokens, which begin at `first`:
    0 where none does, NaN where not all do as far."""
    offset = positions - torch.arange(positions.shape[-1], device=positions.device) - first
    top, low, high = torch.stack([positions.amax(), *offset.aminmax()]).tolist()
    return top + 1, 0 if high <= 0 else high if low == high else math.nan


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory, as views of one are."""
    return one.data_ptr() == two.data_ptr() and (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)


class _Shared:
    """What the layers of one cache have in common: the frame of the running forward pass, positions, which slots are real
    (no padding), and for codes in tiles the rotation of every row by its anchor (slot minus position of its first token)."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.frame: Frame | None = None
        self.positions: Tensor | None = None
        self.real: Tensor | None = None
        self.anchor_cos: Tensor | None = None
        self.anchor_sin: Tensor | None = None

    def tables(self) -> dict[str, Tensor]:
        """The anchors as tables of a codec."""
        held = {"anchor_cos": self.anchor_cos, "anchor_sin": self.anchor_sin}
        return {name: t for name, t in held.items() if t is not None}

    def map(self, pick: Any, in_place: bool = False) -> None:
        """Apply `pick` to every tensor with one row per sequence."""
        for name in (*SHARED_NAMES, "anchor_cos", "anchor_sin"):
            old = getattr(self, name)
            if old is not None and in_place:
                old.copy_(pick(old))
            elif old is not None:
                setattr(self, name, pick(old))


class KVSinkLayer(CacheLayerMixin):
    """The packed keys and values of one attention layer.

    With `max_length` all tensors are allocated once and never move (`torch.compile`, CUDA graphs); without it they grow.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self, shared: _Shared, layer: int, codec: Codec, segments: tuple[Segment, ...], max_length: int | None
    ) -> None:
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
        self._given: Tensor | None = None  # new values that attention is to ask for
        self._asked = True  # False from an update that left the reading to attention until attention has asked

    # -- storage -----------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.distant = self.device.type != "cpu"
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.head_dim, self.value_dim = key_states.shape[-1], value_states.shape[-1]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]  # models ask whether a layer holds any of its own
        self.order = self.shared.runtime.order(self.layer, self.device)
        c, b, dev = self.codec, self.batch_size, self.device
        slots = self.max_length if self.max_length is not None else _BLOCK
        for name, (shape, dtype, fill) in self._layout(slots).items():
            setattr(self, name, torch.full(shape, fill, dtype=dtype, device=dev))
        if self.shared.positions is None or self.shared.positions.shape != (b, slots):
            self.shared.positions = torch.zeros(b, slots, dtype=torch.int32, device=dev)
            self.shared.real = torch.ones(b, slots, dtype=torch.bool, device=dev)
        if c.tiles and c.key.center and (self.shared.anchor_cos is None or self.shared.anchor_cos.shape[0] != b):
            channels = self.shared.runtime.rotary_channels(self.layer)
            self.shared.anchor_cos = torch.ones(b, channels, device=dev)
            self.shared.anchor_sin = torch.zeros(b, channels, device=dev)
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
            self._reach = self.params[names.index("start_cos")].shape[0] * self.codec.table_tokens

    def state(self) -> list[Tensor]:
        """The tensors of this layer in the order of STATE_NAMES."""
        return [getattr(self.shared if n in SHARED_NAMES else self, n) for n in STATE_NAMES]

    def _layout(self, slots: int) -> dict[str, tuple[tuple[int, ...], torch.dtype, float]]:
        heads, dims = self.num_heads, (self.head_dim, self.value_dim)
        return self.codec.layout(self.batch_size, heads, *dims, slots, self.dtype)

    def _grow(self, slots: int) -> None:
        if slots <= self.k_codes.shape[2]:
            return
        wanted = -(-slots // _BLOCK) * _BLOCK
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

    # -- the cache interface -------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new rows and return all keys and values, in the model's own basis with RoPE applied."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states = self.in_order(key_states)
        new = key_states.shape[2]
        if self.max_length is None:
            self._grow(self._held + new)
        frame = self.shared.frame or Frame()
        if self.max_length is not None and not torch.compiler.is_compiling():
            self._check_room(frame, new, self.max_length)
        self.check_asked()
        positions = frame.positions
        if positions is None:
            positions = torch.arange(new, device=self.device)[None] + self._first_position()
        cos, sin = frame.cos, frame.sin
        if self.codec.tiles:  # keys are coded after RoPE; angles would be computed for nothing
            cos = sin = key_states.new_empty(1, new, 0)
        elif cos is None or sin is None:
            cos, sin = self.shared.runtime.angles(self.layer, positions)
        elif turns_back(self.codec):
            cos, sin = self.shared.runtime.canonical(self.layer, cos, sin)
        self._check_positions(frame, positions, new)
        self._mark_padding(frame, new)
        candidates = self._candidates(frame, key_states)
        if new > 1 and not torch.compiler.is_compiling():
            rows = RowSizes.of(self.layer, self.codec, key_states, value_states, partial(self._spared, frame.valid, candidates))
            if self.distant and frame.start is not None:  # looked at when the pass is over: one wait, not one in every layer
                frame.sizes.append(rows)
            else:
                check_range([rows])
        anchored = self.codec.anchors is not None
        if anchored:
            if self._unseen is not None:
                raise KvsinkError(
                    f"layer {self.layer} keeps anchors exact but its attention was not observed; run the cache through its "
                    "model (kvsink.KVSinkCache.for_model), with the attention implementation that kvsink gave it"
                )
            release_(new, self.length + new, self.anchor_state(), self.codec_text)
        if self.codec.tiles and new > 1 and not torch.compiler.is_compiling():
            self._set_anchors(frame, positions)
        defers = self._defers(frame)
        if defers:  # attention asks the layer, see kvsink.model.attention
            key_states._kvsink_layer, self._asked, self._given = self, False, value_states  # type: ignore[attr-defined]
            if self.codec.tiles:
                self._fresh = positions, candidates
                return key_states, value_states
        self._store(key_states, value_states, positions, (cos, sin), candidates, defers)
        if defers:
            return key_states, value_states
        full_k, full_v = read(key_states, value_states, self.state(), self.params, self.codec_text)
        if self.order is not None:
            full_k = full_k.index_select(-1, self.order[1])
        # Outside the ops: Inductor may delay a read of a tensor past an op that writes it as one of a list.
        self.length.add_(new)
        if anchored:
            self._unseen = (key_states, value_states)
        if self.max_length is None:
            self._held += new
            return full_k[:, :, : self._held], full_v[:, :, : self._held]
        return full_k, full_v

    def _store(
        self, k: Tensor, v: Tensor, positions: Tensor, angles: tuple[Tensor, Tensor], candidates: list[Tensor], direct: bool
    ) -> None:
        """New rows into the state; direct: without the dispatcher, where no gradient is asked for."""
        store = append if direct and not _differentiated(k, v) else append_
        store(k, v, positions, *angles, candidates, self.state(), self.params, self.codec_text, True)

    def in_order(self, rows: Tensor) -> Tensor:
        """Queries or keys [B, heads, S, D] with their channels in the order in which keys are coded."""
        return rows if self.order is None else rows.index_select(-1, self.order[0])

    def observe(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None, scale: float) -> None:
        """See the attention of the chunk just stored, q, out [B, Hq, S, D] over k, v [B, H, L, D], and choose anchors by it."""
        assert self._unseen is not None and self.codec.anchors is not None
        new_k, new_v = self._unseen
        self._unseen = None
        valid = self.shared.frame.valid if self.shared.frame is not None else None
        total = self.length + 0
        scores = observe(q, k, v, out, mask, total - q.shape[2], valid, scale, self.codec.anchors.score)
        settle_(new_k, new_v, scores, valid, total, self.anchor_state(), self.codec_text)

    def anchor_state(self) -> list[Tensor]:
        """The tensors that `release_` and `settle_` write, in their order."""
        return [getattr(self, n) for n in _ANCHOR_STATE]

    def _defers(self, frame: Frame) -> bool:
        """Whether attention will ask this layer itself, so that nothing need be read back: outside compiled graphs, in a model
        whose attention goes through transformers' "sdpa" function."""
        if torch.compiler.is_compiling() or frame.cos is None or self.layer in self.shared.runtime.anatomy.apart:
            return False
        if frame.asks is None:
            frame.asks = self.shared.runtime.asks
        if not frame.asks:
            return False
        if self.codec.tiles:
            return self.device.type == "cuda"
        return (self.codec.key.packed or self.codec.value.packed) and self.codec.anchors is None

    def check_asked(self) -> None:
        """Raise KvsinkError when attention did not come for what the last update left to it: its result would be wrong."""
        if not self._asked:
            self._asked = True
            raise KvsinkError(
                f"layer {self.layer}: the model's attention did not go through transformers' attention functions and saw new "
                'rows alone; load the model with attn_implementation="eager"'
            )

    def check_given(self, key: Tensor, value: Tensor) -> None:
        """Raise KvsinkError where attention asks for something else than the rows that `update` was given last, once: it would
        get what it has not asked for."""
        given, self._given = self._given, None
        if value is not given or key.shape[:3] != value.shape[:3]:
            raise KvsinkError(
                f"layer {self.layer}: attention reads its keys more than once, or with other values than they were stored with; "
                'load the model with attn_implementation="eager"'
            )

    def begins(self, k: Tensor, v: Tensor) -> bool:
        """Whether the rows that `update` was given are all there is to attend to, as they came; then the length moves on."""
        rows = k.shape[2]
        if self.codec.strict or (rows == 1 and self.distant) or self._rows_before():
            return False
        if self.codec.tiles:
            positions, candidates = self._fresh
            none = k.new_empty(1, rows, 0)
            self._store(k, v, positions, (none, none), candidates, True)
        self._asked = True
        self._advance(rows)
        return True

    def _rows_before(self) -> int:
        """Rows held before the new ones, and none only where there are none. A GPU is asked once per forward pass: what the pass
        began with holds for the first question of every layer."""
        frame = self.shared.frame
        if frame is None or frame.start is None or self.layer in frame.begun:
            return int(self.length)
        frame.begun.add(self.layer)
        return frame.rows_before()

    def _check_room(self, frame: Frame, new: int, slots: int) -> None:
        """Raise KvsinkError when new rows do not fit; on a GPU for several rows alone, by what the pass began with."""
        if not self.distant:
            held = int(self.length)
        elif new > 1 and frame.start is not None and not self.is_sliding:
            held = frame.rows_before()
        else:
            return
        if held + new > slots:
            raise KvsinkError(
                f"layer {self.layer}: {new} rows do not fit behind {held} of max_length={slots}; make the cache longer"
            )

    def _advance(self, rows: int) -> None:
        self.length.add_(rows)
        if self.max_length is None:
            self._held += rows

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
        """Attention of the rows that `update` was given, k after RoPE, over everything held; then the length moves on."""
        self._asked = True
        if self.codec.tiles:
            positions, candidates = self._fresh
            out = append_attend(
                q, k, v, positions, candidates, self.state(), self.params, mask, scale, is_causal, self.codec_text
            )
        else:
            run = attend if _differentiated(q, k, v) else attention
            if self.distant and k.shape[2] == 1 and self._ahead is not None and math.isnan(self._ahead):
                run = attend_ref
            out = run(q, k, v, self.state(), self.params, mask, scale, is_causal, self.codec_text)
        self._advance(k.shape[2])
        return out

    def _set_anchors(self, frame: Frame, positions: Tensor) -> None:
        """Before the first rows of a sequence: where its first token stands (left padding), once per forward pass."""
        cos, sin = self.shared.anchor_cos, self.shared.anchor_sin
        if frame.anchored or cos is None or sin is None or cos.shape[1] == 0:
            return
        frame.anchored = True
        rows = positions.expand(self.batch_size, -1)
        first = torch.zeros(self.batch_size, 1, dtype=torch.int64, device=self.device)
        if frame.valid is not None:
            first = frame.valid.to(torch.int64).argmax(1, keepdim=True)
        anchor = (first - rows.gather(1, first))[:, 0]
        new_cos, new_sin = self.shared.runtime.angles(self.layer, anchor[None])
        norm = (new_cos * new_cos + new_sin * new_sin).sqrt().clamp_min(1e-12)
        empty = self.length == 0
        cos.copy_(torch.where(empty, (new_cos / norm)[0], cos))
        sin.copy_(torch.where(empty, (new_sin / norm)[0], sin))

    def _first_position(self) -> Tensor:
        """Tokens before the new ones."""
        return self.length

    def _check_positions(self, frame: Frame, positions: Tensor, new: int) -> None:
        """Make the table of block starts reach the largest position, and note how far positions run ahead of tokens; only outside
        compiled code, where they can be read."""
        if torch.compiler.is_compiling() or self._reach is None:
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        if frame.reach is None or not _same(frame.reach[0], positions):
            found = _reached(positions, self._first_position()) if self.distant else (int(positions.max()) + 1, 0)
            frame.reach = positions, *found
        _, reach, ahead = frame.reach
        self._ahead = ahead if self._ahead in (None, ahead) else math.nan
        if reach > self._reach:
            self._set_params(2 * reach)

    def _mark_padding(self, frame: Frame, new: int) -> None:
        """Note which of the new rows are padding, before any of them is coded; once per forward pass, since layers share it."""
        if frame.valid is None or self.is_sliding in frame.marked:
            return
        frame.marked[self.is_sliding] = True
        assert self.shared.real is not None
        self.shared.real.index_copy_(1, torch.arange(new, device=self.device) + self.length, frame.valid)

    def _order(self, frame: Frame, new: int) -> Tensor:
        """The number of every new row among the real rows of its sequence [B or 1, S], from 0; padding repeats its last."""
        before = self._first_position()
        if frame.valid is None:
            return torch.arange(new, device=self.device)[None] + before
        real = self.shared.real
        assert real is not None
        padding = ~real & (torch.arange(real.shape[1], device=self.device) < self.length)
        return before - padding.sum(1, keepdim=True) + frame.valid.cumsum(1) - 1

    def _spared(self, valid: Tensor | None, candidates: list[Tensor], sizes: Tensor) -> Tensor:
        """bool [B, S], as `sizes`: new rows that are padding, or may stay exact."""
        out = torch.zeros_like(sizes, dtype=torch.bool)
        if valid is not None:
            out |= ~valid
        for score, index in zip(candidates[0 : 2 * len(self.sources) : 2], candidates[1 : 2 * len(self.sources) : 2], strict=True):
            out |= torch.zeros_like(out).scatter_(1, index, score > float("-inf"))
        return out

    def _candidates(self, frame: Frame, rows: Tensor) -> list[Tensor]:
        out: list[Tensor] = []
        for segment, key in self.sources:
            pair = frame.candidates.get(key)
            if pair is None and segment.source in ("first", "random"):
                if frame.order is None:
                    frame.order = self._order(frame, rows.shape[2])
                pair = frame.candidates[key] = order_candidates(frame, frame.order, rows.shape[0], segment)
            if pair is None:
                raise KvsinkError(
                    f"layer {self.layer} keeps {segment.source} rows exact but saw no hidden states; run the cache through "
                    "its model (kvsink.KVSinkCache.for_model), not by hand"
                )
            out += pair
        if self.codec.modal:
            visual = frame.visual
            out.append(rows.new_zeros(rows.shape[::2][:2], dtype=torch.bool) if visual is None else visual)
        return out

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
        self.length.zero_()
        self.exact_slot.fill_(-1)
        self.exact_score.fill_(float("-inf"))
        self.recent_slot.fill_(-1)
        if self.shared.real is not None:
            self.shared.real.fill_(True)
        if self.shared.anchor_cos is not None and self.shared.anchor_sin is not None:
            self.shared.anchor_cos.fill_(1.0)
            self.shared.anchor_sin.zero_()
        self._held = 0
        self._ahead = None
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
            self._map_batch(
                lambda t: t[indices.to(t.device) if indices.dtype != torch.bool else indices], in_place=False
            )

    def offload(self) -> None:
        if self.is_initialized:
            for name in _BATCHED:
                setattr(self, name, getattr(self, name).to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized and self.k_codes.device != self.device:
            for name in _BATCHED:
                setattr(self, name, getattr(self, name).to(self.device, non_blocking=True))


def states_of(config: Any, layer: int) -> dict[str, int]:
    """How many recurrent states a layer holds, as an argument of transformers' own layer; empty where it holds one."""
    count = getattr(DynamicCache(config=config.get_text_config(decoder=True)).layers[layer], "number_of_states", 1)
    return {} if count == 1 else {"number_of_states": count}


class KVSinkHybridLayer(LinearAttentionLayer, KVSinkLayer):
    """The packed rows of a layer that holds a recurrent state beside its keys and values; the state is transformers' own."""

    def __init__(
        self, shared: _Shared, layer: int, codec: Codec, segments: tuple[Segment, ...], max_length: int | None
    ) -> None:
        KVSinkLayer.__init__(self, shared, layer, codec, segments, max_length)
        LinearAttentionLayer.__init__(self, **states_of(shared.runtime.config, layer))

    supports_early_init = True
    is_compileable = property(lambda self: self.max_length is not None, lambda self, value: None)
    get_max_length = KVSinkLayer.get_max_length
    is_croppable = property(LinearAttentionLayer.is_croppable.fget)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """By position: keys and values; by name: a part of the recurrent state."""
        (KVSinkLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        KVSinkLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises RuntimeError, as transformers' own layer, where the recurrent state cannot go back."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        KVSinkLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        KVSinkLayer.reorder_cache(self, beam_idx)

    def _refuse(self, what: str) -> KvsinkError:
        return KvsinkError(f"layer {self.layer} holds a recurrent state, which transformers does not {what}; prefill again")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise self._refuse("repeat")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise self._refuse("select rows of")


class KVSinkSlidingLayer(KVSinkLayer):
    """The packed rows of one sliding-window layer: see `kvsink.cache.sliding`."""

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
        """As the other layers; rows that the window has left behind do not come back, see `kvsink.cache.sliding`."""
        if not self.is_initialized or tokens_to_remove == 0:
            return
        held, before = int(self.length), self.moving.before()
        keep = held + tokens_to_remove if tokens_to_remove < 0 else min(tokens_to_remove - before, held)
        check_crop(self.moving, keep, self.layer)
        if keep < held:
            super().crop(keep - held)


class KVSinkCache(Cache):
    """The cache of a rewritten model. Make it with `KVSinkCache.for_model`, or let `generate()` make it.

    Layers that the plan leaves alone (sliding windows, layers without attention) are transformers' own.
    """

    is_kvsink = True

    def __init__(self, runtime: Runtime, max_length: int | None = None, tiles: bool = False) -> None:
        self.shared = _Shared(runtime)
        self.visual: Tensor | None = None  # bool [B, S] of the forward pass that begins, where a layer asks for it
        if tiles and max_length is not None:
            max_length = -(-max_length // TILE_SLOTS) * TILE_SLOTS
        config = runtime.config.get_text_config(decoder=True)
        self.max_length = max_length
        stock = self._stock_cache()
        layers: list[Any] = []
        kinds = runtime.anatomy.layer_types
        self.sliding: SlidingWindow | None = None
        for i, plan in enumerate(runtime.plans):
            if plan.codec is None:
                layers.append(stock.layers[i])
            elif kinds[i] in WINDOWED:
                if self.sliding is None:
                    self.sliding = SlidingWindow(self.shared, runtime, window_of(config, kinds[i]), max_length)
                layers.append(KVSinkSlidingLayer(self.sliding, i, plan.codec, plan.segments, max_length))
            else:
                codec = replace(plan.codec, tiles=tiles and not in_tiles(runtime, i))
                kind = KVSinkHybridLayer if kinds[i] == "hybrid" else KVSinkLayer
                layers.append(kind(self.shared, i, codec, plan.segments, max_length))
        super().__init__(layers=layers)

    @classmethod
    def for_model(
        cls, model: nn.Module, batch_size: int = 1, max_length: int | None = None, strict: bool = False,
        tiles: bool | None = None,
    ) -> KVSinkCache:  # fmt: skip
        """A cache for a rewritten model. With `max_length` (tokens) every tensor is allocated now, for `batch_size` rows.

        strict: read new rows back from their codes too, as an evaluation may want. tiles: store codes as the GPU kernel reads
        them; None does so where the kernel serves the model. `max_length` is then rounded up to a multiple of 128.
        """
        if max_length is not None and max_length < 1:
            raise KvsinkError(f"max_length={max_length} is not positive")
        runtime = runtime_of(model)
        weight = number_of(model)
        if tiles is None:
            tiles = tiles_serve(runtime, weight.dtype, weight.device)
        cache = cls(runtime, max_length, tiles)
        if strict:
            cache._make_strict()
        if max_length is not None:
            place = place_of(model)
            cache._check_memory(batch_size, weight.dtype, place)
            cache._allocate(batch_size, weight.dtype, place)
        return cache

    def _allocate(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Every layer's tensors, for keys and values of the widths that it stores."""
        for layer, heads in zip(self.layers, self.shared.runtime.anatomy.layers, strict=True):
            if isinstance(layer, CacheLayerMixin) and not layer.is_initialized and getattr(layer, "supports_early_init", True):
                none = torch.zeros((batch, heads.kv, 0, heads.key_dim), dtype=dtype, device=device)
                layer.lazy_initialization(none, none.new_zeros(batch, heads.kv, 0, heads.value_dim))

    def _check_memory(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Say before anything is allocated when a cache cannot fit on its GPU."""
        if device.type != "cuda":
            return
        wanted = 0
        for layer in self.packed_layers():
            assert layer.max_length is not None
            held = layer.codec.layout(batch, *self.shared.runtime.anatomy.layers[layer.layer][1:], layer.max_length, dtype)
            wanted += sum(math.prod(shape) * t.itemsize for shape, t, _ in held.values())
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if wanted > free:
            raise KvsinkError(
                f"a cache of {batch} x {self.packed_layers()[0].max_length} tokens takes {wanted / 2**30:.1f} GiB and "
                f"{free / 2**30:.1f} GiB are free on {device}; make batch or length smaller, or choose fewer bits"
            )

    def _make_strict(self) -> None:
        for layer in self.packed_layers():
            layer.codec = replace(layer.codec, strict=True)
            layer.codec_text = layer.codec.text()

    @property
    def frame(self) -> Frame | None:
        """What the hooks know about the running forward pass."""
        return self.shared.frame

    @frame.setter
    def frame(self, frame: Frame | None) -> None:
        self.shared.frame = frame

    def begin(self, frame: Frame, batch: int | None = None) -> None:
        """A forward pass over `batch` sequences begins. Raises KvsinkError when the last one stopped half-way and left layers of
        different lengths, or when others are held."""
        if self.shared.runtime.replaced:
            raise KvsinkError(self.shared.runtime.replaced)
        layers = [layer for layer in self.packed_layers() if layer.is_initialized]
        last = self.shared.frame
        if last is not None and last.start is not None:
            start = int(last.start)
            if any(int(layer.length) != start or not layer._asked for layer in layers):
                raise KvsinkError(
                    f"the last forward pass over this cache stopped half-way, as when memory runs out; cache.crop({start}) "
                    "brings back the state before it, cache.reset() an empty cache"
                    if start
                    else "the last forward pass over this cache stopped half-way, as when memory runs out; call cache.reset()"
                )
        if batch is not None:
            self.fit_batch(batch)
        if layers:
            frame.start = layers[0]._held if layers[0].max_length is None else layers[0].length.clone()
        else:
            frame.start = 0
        self.shared.frame = frame

    def check_sizes(self) -> None:
        """Before a forward pass is over: raise KvsinkError when it brought rows that codes do not hold. The pass then counts as one
        that stopped half-way."""
        if self.shared.frame is not None:
            check_range(self.shared.frame.sizes)

    def _stock_cache(self) -> Cache:
        """An empty cache of transformers' own, whose layers stand where the plan leaves a layer alone."""
        config = self.shared.runtime.config.get_text_config(decoder=True)
        return DynamicCache(config=config) if self.max_length is None else StaticCache(config, max_cache_len=self.max_length)

    def fit_batch(self, batch: int) -> None:
        """Hold `batch` sequences from now on, where nothing is held yet. Raises KvsinkError where others are."""
        layers = [layer for layer in self.packed_layers() if layer.is_initialized]
        if not layers or layers[0].batch_size == batch:
            return
        self._take_batch(layers, batch)

    @torch.compiler.disable
    def _take_batch(self, layers: list[KVSinkLayer], batch: int) -> None:
        """The same outside graphs, where storage can be made anew."""
        if any(int(layer.length) for layer in layers):
            raise KvsinkError(
                f"the cache holds {layers[0].batch_size} sequences and is given {batch}; call cache.reset() first, or make another "
                "with kvsink.KVSinkCache.for_model"
            )
        for layer in layers:
            empty = torch.empty(batch, layer.num_heads, 0, layer.head_dim, dtype=layer.dtype, device=layer.device)
            layer.lazy_initialization(empty, empty.new_empty(batch, layer.num_heads, 0, layer.value_dim))
        stock = self._stock_cache()
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, KVSinkLayer):
                if getattr(layer, "record_past", False):
                    stock.layers[i].activate_past_recording()
                self.layers[i] = stock.layers[i]

    def reset(self) -> None:
        super().reset()
        self.shared.frame = self.visual = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last |n| tokens of every layer (a negative count; a positive one is the length to keep)."""
        super().crop(tokens_to_remove)
        self.shared.frame = self.visual = None

    def attends_itself(self) -> bool:
        """Whether every layer attends over its codes itself outside compiled graphs; masks may then stay unbuilt."""
        layers = self.layers
        return self.shared.runtime.asks and all(
            isinstance(i, KVSinkLayer) and i.codec.tiles and i.is_initialized and i.device.type == "cuda" for i in layers
        )

    def first_slot(self, moved: bool = False) -> Any:
        """Slot of the next row in the layers whose mask the decoder is given: an int for a growing cache, else a tensor.

        moved: count the tokens that a sliding window has left behind too, as a 2-D mask does.
        """
        packed = [layer for layer in self.packed_layers() if layer.is_initialized]
        layer = next((i for i in packed if not i.is_sliding), packed[0] if packed and all(self.is_sliding) else None)
        if layer is None or moved:
            return self.get_seq_length() if layer is None else layer.get_seq_length()
        return layer.length if layer.max_length is not None else layer._held

    def packed_layers(self) -> list[KVSinkLayer]:
        """The layers kvsink packs."""
        return [layer for layer in self.layers if isinstance(layer, KVSinkLayer)]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor the cache holds, by name; what layers share once."""
        out: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, KVSinkLayer):
                if layer.is_initialized:
                    out.update({f"layers.{i}.{n}": getattr(layer, n) for n in _HELD})
            elif getattr(layer, "is_initialized", False):
                out.update({f"layers.{i}.{n}": t for n, t in vars(layer).items() if isinstance(t, Tensor)})
        out |= {n: t for n in SHARED_NAMES if (t := getattr(self.shared, n)) is not None}
        out.update(self.shared.tables())
        if self.sliding is not None:
            out |= {f"sliding.{n}": t for n in (*SHARED_NAMES, "dropped") if (t := getattr(self.sliding, n)) is not None}
        return out

    def nbytes(self) -> int:
        """Bytes of every tensor the cache holds, allocated slots included."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def held_nbytes(self) -> int:
        """Bytes of what is held at the present length, as a report counts them: codes, scales, exact rows, windows, positions."""
        return self._held()[0]

    def spare_nbytes(self) -> int:
        """Bytes allocated for tokens to come: `nbytes()` without `held_nbytes()`."""
        return self.nbytes() - self.held_nbytes()

    def bits_per_element(self) -> float:
        """Bits held per stored element of keys and values at the present length, spare slots left out; layers of transformers' own
        count like packed ones, and exact rows in the dtype of the model."""
        nbytes, elements = self._held()
        return 8.0 * nbytes / elements if elements else 0.0

    def _held(self) -> tuple[int, int]:
        """(bytes, elements of keys and values) held."""
        nbytes = elements = 0
        positions: dict[int, int] = {}  # once for all layers that share them
        for layer in self.layers:
            if not getattr(layer, "is_initialized", False):
                continue
            if isinstance(layer, KVSinkLayer):
                rows = int(layer.length)
                held = layer._layout(rows).values()
                nbytes += sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in held)
                elements += layer.batch_size * layer.num_heads * (layer.head_dim + layer.value_dim) * rows
                positions[id(layer.shared)] = 5 * layer.batch_size * rows  # a number, and whether the slot is real
            else:
                pair = layer.keys, layer.values
                slots = max(1, pair[0].shape[-2])
                rows = min(int(layer.get_seq_length()), slots)
                nbytes += sum(t.numel() // slots * rows * t.element_size() for t in pair)
                elements += sum(t.numel() // slots * rows for t in pair)
        return nbytes + sum(positions.values()) + sum(t.nbytes for t in self.shared.tables().values()), elements

    def _map_shared(self, pick: Any) -> None:
        self.shared.map(pick)
        if self.sliding is not None:
            self.sliding.map(pick)
        for layer in self.packed_layers():
            if layer.is_initialized:
                layer._set_params(layer.k_codes.shape[2])
                layer._mark_static()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for shared in (self.shared, self.sliding):
            if shared is not None:
                shared.map(lambda t: t.index_select(0, beam_idx.to(t.device)), in_place=True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_shared(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_shared(lambda t: t[indices])

    def batch_join(self, other: KVSinkCache) -> tuple[int, int]:
        """Put the sequences of `other` behind those of this cache, which then end together. `other` is not changed.

        Returns the slots of padding that now stand before the rows of this cache and before those of `other`: the attention mask
        of the next pass has so many zeros more in front. Raises KvsinkError, and changes nothing, where caches do not fit.
        """
        pads = pads_of(self, other)
        pairs = list(zip(self.packed_layers(), other.packed_layers(), strict=True))
        slots = max(layer.k_codes.shape[2] for pair in pairs for layer in pair)
        states = [joined_state(a, b, pads, slots) for a, b in pairs]
        shared = joined_shared(self.shared, other.shared, pads, slots, pairs[0][0])
        for name, joined in shared.items():
            setattr(self.shared, name, joined)
        for (layer, second), state in zip(pairs, states, strict=True):
            layer._take(state, slots)
            layer._ahead = math.nan if layer._ahead or second._ahead else 0
        self.shared.frame = self.visual = None
        return pads

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the packed state to one safetensors file, to be loaded by `KVSinkCache.load` with the same model."""
        if any(not isinstance(layer, KVSinkLayer) for layer in self.layers):
            raise KvsinkError("a cache with layers that kvsink leaves alone cannot be saved; save the prompt instead")
        if self.sliding is not None:
            raise KvsinkError("a cache with packed sliding-window layers cannot be saved; save the prompt instead")
        if not all(layer.is_initialized for layer in self.packed_layers()):
            raise KvsinkError("an empty cache cannot be saved; prefill a prompt first")
        meta = {
            "format": "kvsink-cache-1",
            "codecs": json.dumps([layer.codec_text for layer in self.packed_layers()]),
            "length": str(int(self.get_seq_length())),
            "dtype": str(self.packed_layers()[0].dtype).removeprefix("torch."),
        }
        tensors = {n: t.contiguous() for n, t in self.tensors().items()}
        meta[DIGEST] = digest(tensors, meta)
        partial = Path(f"{path}.partial")  # a full disk or a killed process leaves no half of a cache under its name
        try:
            save_file(tensors, str(partial), metadata=meta)
            partial.replace(path)
        except SafetensorError as error:
            raise KvsinkError(f"the cache cannot be written to {path} ({error}); choose another place") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, max_length: int | None = None) -> KVSinkCache:
        """Read a cache saved by `save`. Raises SidecarError when it was made by another plan or cannot be read."""
        runtime = runtime_of(model)
        device = place_of(model)
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = json.loads(meta.get("codecs", "[]"))
            known = isinstance(found, list) and all(isinstance(text, str) for text in found)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise SidecarError(f"cache file {path} cannot be read ({error}); save it again") from error
        if not known:
            raise SidecarError(f"cache file {path} does not say what it holds; save it again")
        cache = cls(runtime, max_length, tiles=any(Codec.parse(text).tiles for text in found))
        if found and all(Codec.parse(text).strict for text in found):
            cache._make_strict()
        texts = [layer.codec_text for layer in cache.packed_layers()]
        if meta.get("format") != "kvsink-cache-1" or found != texts:
            raise SidecarError(f"cache file {path} was made by another plan or version; prefill the prompt again")
        wanted = {f"layers.{i}.{n}" for i in range(len(texts)) for n in _HELD} | set(SHARED_NAMES)
        if missing := wanted - set(tensors):
            raise SidecarError(f"cache file {path} lacks {min(missing)}; save it again")
        check_digest(tensors, meta, f"cache file {path}", SidecarError, "save it again")
        length = int(meta["length"])
        if max_length is not None and length > max_length:
            raise KvsinkError(f"cache file {path} holds {length} tokens, more than max_length={max_length}")
        dtype = getattr(torch, meta["dtype"])
        for i, layer in enumerate(cache.packed_layers()):
            k = tensors[f"layers.{i}.exact_k"]
            v = tensors[f"layers.{i}.exact_v"]
            layer.lazy_initialization(k[:, :, :0].to(dtype), v[:, :, :0].to(dtype))
            if max_length is None:
                layer._grow(length)
            for name in _HELD:
                saved, held = tensors[f"layers.{i}.{name}"], getattr(layer, name)
                both = tuple(slice(min(a, b)) for a, b in zip(saved.shape, held.shape, strict=True))
                held[both] = saved[both]
            layer._held = length
            layer._ahead = _reached(tensors["positions"][:, :length], 0)[1] if length else None
        for name in SHARED_NAMES:
            getattr(cache.shared, name)[:, :length] = tensors[name][:, :length]
        for name, held in cache.shared.tables().items():
            if name not in tensors:
                raise SidecarError(f"cache file {path} lacks {name}; save it again")
            held.copy_(tensors[name])
        return cache
