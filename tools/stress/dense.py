"""A plain model of the packed cache: every row kept dense, and what a reader must see of it worked out the slow way.

Formula    seen(j) = the row as it came   if it was just appended (unless strict), is recent, or is kept exact
                   = decode(encode(row))  otherwise; of blocks of tokens, as the block was last coded
           per protection segment the best `capacity` of (held ∪ candidates) stay exact; a crop takes those behind it away
Source     ours; KVSink, arXiv 2508.04257 section 4 (the running selection)
           a block of tokens is coded per sequence from its real rows alone, as if no others stood there
Shapes     k, v [B, H, T, D]; positions [B, T]; real bool [B, T]: False where a slot holds padding, whose codes are left open
Exact      codes are those of the codec's own pure functions: what is modelled is storage, choice and bookkeeping
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DenseLayer"]


@dataclass
class _Side:
    """One side of a layer: the rows as they came and as their codes say; with outliers, both things a stored entry may be."""

    rows: Tensor  # [B, H, T, D]
    coded: Tensor
    half: Tensor | None = None  # transformed rows in float16, where outliers are kept
    dense: Tensor | None = None  # transformed rows as their dense codes say


@dataclass
class DenseLayer:
    """The plain model of one `KVSinkLayer`."""

    codec: Any
    params: Callable[[int], dict[str, Tensor]]  # tables for so many positions
    k: _Side
    v: _Side
    held: list[list[dict[int, float]]] = field(default_factory=list)  # segment → row → slot → score
    ring: dict[int, tuple[int, Tensor, Tensor]] = field(default_factory=dict)  # place → slot, k [B, H, D], v
    anchors: list[set[int]] = field(default_factory=list)  # row → slots that the cache chose by attention

    @classmethod
    def empty(cls, codec: Any, params: Callable[[int], dict[str, Tensor]], batch: int, heads: int, dim: int) -> DenseLayer:
        def side() -> _Side:
            none = torch.zeros(batch, heads, 0, dim)
            return _Side(none, none, none, none)

        return cls(codec, params, side(), side(), [[{} for _ in range(batch)] for _ in codec.segments])

    @property
    def length(self) -> int:
        """Rows held."""
        return self.k.rows.shape[2]

    # -- what happens --------------------------------------------------------------------------------------------------

    def append(
        self, k: Tensor, v: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, candidates: list[Tensor], real: Tensor
    ) -> None:
        """New rows [B, H, S, D]; candidates: score, index of every segment; real: of all slots, the new ones included."""
        c, first, s = self.codec, self.length, k.shape[2]
        p = self.params(int(positions.max()) + 1)
        self._choose(candidates, first)
        old = dict(self.ring)
        for name, side, spec, rows in (("k", self.k, c.key, k), ("v", self.v, c.value, v)):
            side.rows = torch.cat([side.rows, rows], 2)
            if name == "k":
                turn = lambda x: c.transform_keys(x, cos, sin, positions, p, True)  # noqa: E731
            else:
                turn = lambda x: c.transform_values(x, p)  # noqa: E731
            if not spec.packed:
                new = rows
            elif spec.by_token_block:
                side.coded = self._block(name, spec, side, rows, old, turn, real)
                continue
            else:
                x = turn(rows)
                dense = c.dequantize(name, *c.quantize(name, x, p), p)
                if spec.outliers:
                    side.half = torch.cat([side.half, x.clamp(-65504, 65504).half().float()], 2)  # type: ignore[list-item]
                    side.dense = torch.cat([side.dense, dense], 2)  # type: ignore[list-item]
                new = c.restore_keys(dense, positions, p) if name == "k" else c.restore_values(dense, p)
            side.coded = torch.cat([side.coded, new], 2)
        if c.ring:
            for slot in range(max(first, first + s - c.ring), first + s):
                self.ring[slot % c.ring] = (slot, k[:, :, slot - first], v[:, :, slot - first])

    def _choose(self, candidates: list[Tensor], first: int) -> None:
        for i, capacity in enumerate(self.codec.segments):
            score, index = candidates[2 * i], candidates[2 * i + 1]
            for row, kept in enumerate(self.held[i]):
                for value, at in zip(score[row].tolist(), index[row].tolist(), strict=True):
                    if value > float("-inf"):
                        kept[first + at] = value
                best = sorted(kept, key=lambda slot: -kept[slot])[:capacity]
                self.held[i][row] = {slot: kept[slot] for slot in best}

    def _block(
        self, name: str, spec: Any, side: _Side, new: Tensor, ring: dict[int, Any], turn: Callable[[Tensor], Tensor], real: Tensor
    ) -> Tensor:
        """The coded rows after every block that the new rows touch has been coded anew."""
        c, total = self.codec, side.rows.shape[2]
        first = total - new.shape[2]
        start, end = first // spec.flush * spec.flush, -(-total // spec.flush) * spec.flush
        rows = []
        for slot in range(start, end):
            if slot < first:
                held = ring[slot % c.ring]
                assert held[0] == slot, f"slot {slot} of an open block has left the ring"
                rows.append(held[1 if name == "k" else 2])
            else:
                rows.append(new[:, :, min(slot, total - 1) - first])
        x = turn(torch.stack(rows, 2))[:, :, : total - start]
        out = torch.zeros_like(x, dtype=torch.float32)
        for row in range(x.shape[0]):
            exact = self.exact(row)
            for at in range(0, x.shape[2], spec.group_tokens):
                here = [i for i in range(at, min(at + spec.group_tokens, x.shape[2])) if bool(real[row, start + i])]
                if here:
                    kept = [start + i in exact for i in here]
                    out[row : row + 1, :, here] = self._group(name, spec, x[row : row + 1, :, here], kept)
        positions = torch.arange(start, total).expand(x.shape[0], -1)
        out = c.restore_keys(out, positions, {}) if name == "k" else c.restore_values(out, {})
        return torch.cat([side.coded[:, :, :start], out], 2)

    def _group(self, name: str, spec: Any, x: Tensor, exact: list[bool]) -> Tensor:
        """Real rows [1, H, n, D] of one group of tokens as their codes say; those kept exact are left out of its ranges."""
        n = x.shape[2]
        valid = F.pad(~torch.tensor(exact), (0, spec.group_tokens - n))[None]
        codes, scale, norm = self.codec.encode_block(F.pad(x, (0, 0, 0, spec.group_tokens - n)), spec, valid)
        out = self.codec.dequantize(name, codes, scale, {}, 0)
        return (out if norm is None else out * norm.float())[:, :, :n]

    def crop(self, keep: int) -> None:
        """Forget the rows from `keep` on; rows of the block that is open again come back as far as the ring holds them."""
        c = self.codec
        flush = [s.flush for s in (c.key, c.value) if s.by_token_block]
        start = min((keep // n * n for n in flush), default=keep)
        ringed = {slot for slot, _, _ in self.ring.values()}
        for slot in range(start, keep):
            if slot not in ringed:
                self.ring[slot % c.ring] = (slot, self.k.coded[:, :, slot], self.v.coded[:, :, slot])
        for side in (self.k, self.v):
            for name in ("rows", "coded", "half", "dense"):
                setattr(side, name, getattr(side, name)[:, :, :keep])
        self.held = [[{s: x for s, x in row.items() if s < keep} for row in segment] for segment in self.held]

    def reset(self) -> None:
        """Forget everything."""
        self.crop(0)
        self.ring.clear()

    def pick(self, rows: list[int]) -> None:
        """Row i becomes what row rows[i] was."""
        at = torch.tensor(rows)
        for side in (self.k, self.v):
            for name in ("rows", "coded", "half", "dense"):
                setattr(side, name, getattr(side, name)[at])
        self.held = [[dict(segment[i]) for i in rows] for segment in self.held]
        self.ring = {place: (slot, k[at], v[at]) for place, (slot, k, v) in self.ring.items()}

    def join(self, other: DenseLayer, pads: tuple[int, int]) -> None:
        """The rows of `other` behind these, all moved so that they end together."""
        for name in ("k", "v"):
            one, two = getattr(self, name), getattr(other, name)
            for what in ("rows", "coded", "half", "dense"):
                both = [F.pad(getattr(s, what), (0, 0, pad, 0)) for s, pad in zip((one, two), pads, strict=True)]
                if both[0].shape[2] == both[1].shape[2]:  # without outliers the last two stay empty
                    setattr(one, what, torch.cat(both))
        moved = [
            [[{slot + pad: score for slot, score in row.items()} for row in segment] for segment in layer.held]
            for layer, pad in zip((self, other), pads, strict=True)
        ]
        self.held = [a + b for a, b in zip(*moved, strict=True)]
        self.anchors = self.anchors + other.anchors
        rings = [
            {slot + pad: (k, v) for slot, k, v in layer.ring.values() if slot + pad < self.length}
            for layer, pad in zip((self, other), pads, strict=True)
        ]
        batches = [layer.k.rows.shape[0] for layer in (self, other)]
        batches[0] -= batches[1]
        none = [torch.zeros(n, *self.k.rows.shape[1::2]) for n in batches]
        self.ring = {}
        for slot in {**rings[0], **rings[1]}:
            k, v = (torch.cat([r[slot][i] if slot in r else no for r, no in zip(rings, none, strict=True)]) for i in (0, 1))
            self.ring[slot % self.codec.ring] = (slot, k, v)

    # -- what is seen --------------------------------------------------------------------------------------------------

    def exact(self, row: int) -> set[int]:
        """Slots of one row that protection keeps as they came."""
        return {slot for segment in self.held for slot in segment[row]} | (self.anchors[row] if self.anchors else set())

    def seen(self, fresh: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values as attention sees them when the last `fresh` rows were just appended."""
        out = []
        c, total = self.codec, self.length
        for name, side, spec in (("k", self.k, c.key), ("v", self.v, c.value)):
            x = side.coded.clone()
            newest = max(c.window, spec.newest)
            for slot, k, v in self.ring.values():
                if slot < total and (slot >= total - newest or (spec.flush and slot >= total // spec.flush * spec.flush)):
                    x[:, :, slot] = k if name == "k" else v
            for row in range(x.shape[0]):
                for slot in self.exact(row):
                    x[row, :, slot] = side.rows[row, :, slot]
            if fresh and not c.strict:
                x[:, :, total - fresh :] = side.rows[:, :, total - fresh :]
            out.append(x)
        return out[0], out[1]
