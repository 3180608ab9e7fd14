"""What the new rows of a forward pass are to a layer of the packed cache: positions, padding, and who of them may stay exact.

Shapes     positions int64 [B or 1, S]; candidates: pairs of score float32 [B, n] and index int64 [B, n], as `append_` takes them
Raises     KvsinkError when rows do not fit, or come without the hidden states that name their exact ones
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvsink.cache.storage import Storage
from kvsink.errors import KvsinkError
from kvsink.model.candidates import order_candidates
from kvsink.model.frame import Frame

__all__ = ["NewRows", "reached"]


def reached(positions: Tensor, first: Tensor | int) -> tuple[int, float]:
    """The largest position plus one, and how far positions [B, S] run ahead of the numbers of their tokens, which begin at `first`:
    0 where none does, NaN where not all do as far."""
    offset = positions - torch.arange(positions.shape[-1], device=positions.device) - first
    top, low, high = torch.stack([positions.amax(), *offset.aminmax()]).tolist()
    return top + 1, 0 if high <= 0 else high if low == high else math.nan


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory, as views of one are."""
    return one.data_ptr() == two.data_ptr() and (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)


class NewRows(Storage):
    """A layer that knows what the running forward pass says of its new rows."""

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

    def _set_origins(self, frame: Frame, positions: Tensor) -> None:
        """Before the first rows of a sequence: where its first token stands (left padding), once per forward pass."""
        cos, sin = self.shared.origin_cos, self.shared.origin_sin
        if frame.origins_set or cos is None or sin is None or cos.shape[1] == 0:
            return
        frame.origins_set = True
        rows = positions.expand(self.batch_size, -1)
        first = torch.zeros(self.batch_size, 1, dtype=torch.int64, device=self.device)
        if frame.valid is not None:
            first = frame.valid.to(torch.int64).argmax(1, keepdim=True)
        origin = (first - rows.gather(1, first))[:, 0]
        new_cos, new_sin = self.shared.runtime.angles(self.layer, origin[None])
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
            found = reached(positions, self._first_position()) if self.distant else (int(positions.max()) + 1, 0)
            frame.reach = positions, *found
        _, reach, ahead = frame.reach
        self._note_positions(ahead if self._ahead in (None, ahead) else math.nan, reach)

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

    def _candidates(self, frame: Frame, new: int) -> list[Tensor]:
        out: list[Tensor] = []
        batch = self.k_codes.shape[0]
        for segment, key in self.sources:
            pair = frame.candidates.get(key)
            if pair is None and segment.source in ("first", "random"):
                if frame.order is None:
                    frame.order = self._order(frame, new)
                pair = frame.candidates[key] = order_candidates(frame, frame.order, batch, segment)
            if pair is None:
                raise KvsinkError(
                    f"layer {self.layer} keeps {segment.source} rows exact but saw no hidden states; run the cache through "
                    "its model (kvsink.KVSinkCache.for_model), not by hand"
                )
            out += pair
        if self.codec.modal:
            visual = frame.visual
            out.append(torch.zeros(batch, new, dtype=torch.bool, device=self.device) if visual is None else visual)
        return out
