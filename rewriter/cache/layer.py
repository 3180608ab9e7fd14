"""One attention layer of the packed cache: new rows in, attention over everything held out.

Shapes     key_states, value_states [B, H, S, D], keys after RoPE; see kvsink.cache.storage for what is held
Exact      protected, recent and just-appended rows are returned as they came; the rest as its codes say
Raises     KvsinkError when rows do not fit, or when attention does not come for what was left to it, or for something else
"""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from kvsink.cache.new_rows import NewRows
from kvsink.cache.ranges import RowSizes, check_range
from kvsink.errors import KvsinkError
from kvsink.kernels import append_, attend, backends, observe, read, release_, settle_
from kvsink.kernels.backends import Call, LayerState
from kvsink.kernels.base import resolve_codec
from kvsink.model.attention import ASKED
from kvsink.model.frame import Frame
from kvsink.model.turning import turns_back

__all__ = ["KVSinkLayer"]

_EXACT = ("exact_k", "exact_v", "exact_slot", "exact_score")
_ANCHOR_STATE = (*_EXACT, "recent_k", "recent_v", "recent_slot", "recent_score")


def _differentiated(*tensors: Tensor) -> bool:
    """Whether autograd follows any of them: then the registered ops run, which say that they have no gradient."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class KVSinkLayer(NewRows):
    """The packed keys and values of one attention layer.

    With `max_length` all tensors are allocated once and never move (`torch.compile`, CUDA graphs); without it they grow.
    """

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
        candidates = self._candidates(frame, new)
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
            self._set_origins(frame, positions)
        defers = self._defers(frame)
        if defers:  # attention asks the layer, see kvsink.model.attention
            ASKED.leave(key_states, ref(self))
            self._asked, self._given = False, (key_states, value_states)
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
        if direct and not _differentiated(k, v):
            call = self._call(k, v, positions=positions, candidates=candidates, turn=angles)
            backends.choose("append", *call.facts).run(call)
        else:
            append_(k, v, positions, *angles, candidates, self.state(), self.params, self.codec_text, True)

    def _call(self, k: Tensor, v: Tensor, **more: Any) -> Call:
        """What the kernels are asked about new rows, k after RoPE."""
        return Call(resolve_codec(self.codec_text), self.codec_text, k, v, LayerState(*self.state()), self.params, **more)

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
        k, v = self._given or (None, None)
        if key is not k or value is not v or key.shape[:3] != value.shape[:3]:
            self._given = None
            raise KvsinkError(
                f"layer {self.layer}: attention reads its keys more than once, or with other values than they were stored with; "
                'load the model with attn_implementation="eager"'
            )

    def begins(self) -> bool:
        """Whether the rows that `update` was given are all there is to attend to, as they came; then the length moves on."""
        assert self._given is not None
        k, v = self._given
        rows = k.shape[2]
        if self.codec.strict or (rows == 1 and self.distant) or self._rows_before():
            return False
        if self.codec.tiles:
            positions, candidates = self._fresh
            none = k.new_empty(1, rows, 0)
            self._store(k, v, positions, (none, none), candidates, True)
        self._asked, self._given = True, None
        self._advance(rows)
        return True

    def _advance(self, rows: int) -> None:
        self.length.add_(rows)
        if self.max_length is None:
            self._held += rows

    def attend(self, q: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
        """Attention of queries [B, Hq, S, D] of the rows that `update` was given over everything held; then the length moves on."""
        assert self._given is not None
        (k, v), self._asked, self._given = self._given, True, None
        if not self.codec.tiles and _differentiated(q, k, v):
            out: Tensor = attend(q, k, v, self.state(), self.params, mask, scale, is_causal, self.codec_text)
        else:
            call = self._call(k, v, q=q, mask=mask, scale=scale, causal=is_causal)
            if self.codec.tiles:  # they have not been stored yet
                call.positions, call.candidates = self._fresh
            out = backends.choose("step" if self.codec.tiles else "attend", *call.facts).run(call)
        self._advance(k.shape[2])
        return out
