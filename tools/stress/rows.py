"""Which slots of a batch hold tokens: padding on either side or anywhere, and documents packed in one sequence.

Formula    position of a token = tokens of its document before it;  number = tokens of its sequence before it;  a query sees the
           tokens of its own document up to itself
Source     ours
Shapes     real bool, document int64 [B, T]: False where a slot holds padding; which document of its sequence a slot belongs to
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FORMS", "Rows"]

FORMS = ("none", "left", "right", "holes", "packed")
"""How new rows come: all tokens, padding before or behind them, padding anywhere, or with the start of a new document."""


@dataclass
class Rows:
    """The slots of a batch so far."""

    real: Tensor
    document: Tensor

    @classmethod
    def empty(cls, batch: int) -> Rows:
        return cls(torch.zeros(batch, 0, dtype=torch.bool), torch.zeros(batch, 0, dtype=torch.int64))

    @property
    def plain(self) -> bool:
        """No padding, and one document per sequence: what needs no mask."""
        return bool(self.real.all()) and bool((self.document == self.document[:, :1]).all())

    def add(self, n: int, form: str, draw: torch.Generator) -> None:
        """n new slots of one of FORMS, at least one of them a token of every sequence."""
        b, at = self.real.shape[0], torch.arange(n)
        valid, cut = torch.ones(b, n, dtype=torch.bool), torch.randint(0, n, (b, 1), generator=draw)
        if form == "left":
            valid = at >= cut
        elif form == "right":
            valid = at < n - cut
        elif form == "holes":
            valid = torch.rand(b, n, generator=draw) < 0.6
            valid[:, -1] |= ~valid.any(1)
        last = self.document[:, -1:] if self.document.shape[1] else torch.zeros(b, 1, dtype=torch.int64)
        self.real = torch.cat([self.real, valid], 1)
        self.document = torch.cat([self.document, last + (at >= cut if form == "packed" else torch.zeros_like(valid))], 1)

    def before(self, n: int, own: bool) -> Tensor:
        """Tokens before each of the last n slots [B, n]; own: of the slot's document alone."""
        slots = torch.arange(self.real.shape[1])
        earlier = self.real[:, None] & (slots < slots[-n:, None])
        if own:
            earlier = earlier & (self.document[:, None] == self.document[:, -n:, None])
        return earlier.sum(2)

    def visible(self, n: int) -> Tensor:
        """What each of the last n slots sees: bool [B, 1, n, T]."""
        slots = torch.arange(self.real.shape[1])
        seen = self.real[:, None] & (slots <= slots[-n:, None])
        return (seen & (self.document[:, None] == self.document[:, -n:, None]))[:, None]

    def crop(self, keep: int) -> None:
        """Forget the slots from `keep` on."""
        self.real, self.document = self.real[:, :keep], self.document[:, :keep]

    def pick(self, rows: list[int]) -> None:
        """Sequence i becomes what sequence rows[i] was."""
        self.real, self.document = self.real[rows], self.document[rows]

    def join(self, other: Rows, pads: tuple[int, int]) -> None:
        """The sequences of `other` behind these, with slots of padding before either."""
        both = list(zip((self, other), pads, strict=True))
        self.real = torch.cat([F.pad(rows.real, (pad, 0)) for rows, pad in both])
        self.document = torch.cat([F.pad(rows.document, (pad, 0), value=-1) for rows, pad in both])
