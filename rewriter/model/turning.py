"""How a layer turns its keys by position (RoPE), and the one order of channels and angles that codecs work in.

Formula    canonical: channels [a | b | rest], a and b the two halves of the R rotary channels, channel i of a turned with channel i
           of b by the angle i of R / 2; tables cos, sin [.., R] that hold these angles twice. A model may pair its channels
           otherwise: "pairs" turns channel 2 i with 2 i + 1; its rotary channels may begin at `start`; and its tables may hold
           each angle once ("once"), in neighbours ("pairs") or in halves ("halves"). x[..., order] is in canonical order
Source     RoFormer, arXiv 2104.09864 section 3.4 (pairs); GPT-NeoX and LLaMA in transformers (halves)
Shapes     x [.., D]; tables of the model [.., R] or [.., R / 2], complex [.., R / 2], or [3, B, S, R] of equal axes
Exact      a permutation of channels, the same for queries and keys, leaves every product of theirs as it is
Declines   nothing: a layer that is turned in no way known here is "none", its keys are coded as they were turned
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvsink.codecs import Codec
from kvsink.errors import UnsupportedError
from kvsink.kernels.rope import rope

__all__ = ["NONE", "Turning", "find_turning", "rotary_tables", "tables_of", "turned_by", "turns_back"]

SPELLINGS = ("halves", "pairs")
TABLES = ("halves", "pairs", "once")


@dataclass(frozen=True)
class Turning:
    """The spelling of RoPE in one layer. channels: R, those that are turned; start: the first of them; table: where the model's
    cosines and sines hold their angles. No channels: keys are taken as they are."""

    channels: int = 0
    spelling: str = "halves"
    table: str = "halves"
    start: int = 0

    def order(self, dim: int) -> tuple[int, ...] | None:
        """The channels of a head of `dim` in canonical order; None where that is the model's own."""
        end = self.start + self.channels
        turned = list(range(self.start, end))
        if self.spelling == "pairs":
            turned = turned[::2] + turned[1::2]
        order = (*turned, *range(self.start), *range(end, dim))
        return None if order == tuple(range(dim)) else order

    def canonical(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of the model as canonical ones [.., R]."""
        if not self.channels:
            return cos[..., :0], sin[..., :0]
        if self.table == "halves":
            return cos, sin
        if self.table == "pairs":
            cos, sin = cos[..., ::2], sin[..., ::2]
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def as_list(self) -> list[Any]:
        """JSON-ready."""
        return [self.channels, self.spelling, self.table, self.start]


NONE = Turning()


def tables_of(angles: Any) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines out of what a rotary module gives or attention is given: a pair, or one complex tensor. Of tables with an
    axis of positions in front ([3, B, S, R], text alone: all equal) the first. None for anything else."""
    if isinstance(angles, Tensor) and angles.is_complex():
        angles = angles.real, angles.imag
    if not (isinstance(angles, tuple | list) and len(angles) == 2 and all(isinstance(t, Tensor) for t in angles)):
        return None
    cos, sin = angles
    return (cos[0], sin[0]) if cos.dim() == 4 else (cos, sin)


def find_turning(
    plain: Tensor, turned: Sequence[Tensor], tables: Sequence[tuple[Tensor, Tensor]], tolerance: float
) -> Turning | None:
    """The turning that takes keys at position 0, plain [N, H, D], nearest to the same keys at other positions, turned [N, H, D]
    each, by the model's tables [.., R] of these positions; NONE where position changes nothing; None where no known turning does.

    No tables: a model without angles for such layers. tolerance: largest |difference| / |keys| in the Euclidean norm that is
    rounding. A large bias on channels that hardly turn brings several below it, NONE too, so the nearest is taken and not the
    first. Attention scaling inside the tables is taken out: keys at position 0 carry it too.
    """
    found = [(max(_apart(x, plain) for x in turned), NONE)]
    dim, width = plain.shape[-1], tables[0][0].shape[-1] if tables else 0
    for table in TABLES if width else ():
        channels = 2 * width if table == "once" else width
        if channels > dim or channels % 2:
            continue
        for spelling in SPELLINGS:
            for start in dict.fromkeys((0, dim - channels)):
                t = Turning(channels, spelling, table, start)
                found.append((max(_apart(x, _turn(plain, t, *angles)) for x, angles in zip(turned, tables, strict=True)), t))
    error, nearest = min(found, key=lambda one: one[0])
    return nearest if error <= tolerance else None


def _turn(plain: Tensor, t: Turning, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys at position 0, turned to the position of the tables [R]."""
    cos, sin = t.canonical(cos.double(), sin.double())
    norm = (cos * cos + sin * sin).sqrt().clamp_min(1e-12)
    order = t.order(plain.shape[-1])
    if order is None:
        return rope(plain, cos / norm, sin / norm)
    index = torch.tensor(order, device=plain.device)
    return rope(plain[..., index], cos / norm, sin / norm)[..., index.argsort()]


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def turns_back(codec: Codec) -> bool:
    """Whether a codec takes the rotation of keys by their positions back."""
    return codec.key.packed and (codec.key.domain == "block" or codec.key.center)


def turned_by(rotary: nn.Module, like: Tensor, positions: Tensor, kind: str = "") -> tuple[Tensor, Tensor] | None:
    """What a rotary module gives for positions [N, P], in the dtype of `like`; None where it gives no cosines and sines."""
    more = (kind,) if "layer_type" in inspect.signature(rotary.forward).parameters else ()
    with torch.no_grad():
        try:
            return tables_of(rotary(like, positions, *more))
        except IndexError:  # one that asks for an axis of positions in front
            return tables_of(rotary(like, positions[None].expand(3, -1, -1), *more))


def rotary_tables(rotary: nn.Module, positions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """cos and sin [N, P, ..] of a rotary module at positions [N, P] in a layer of one kind."""
    found = turned_by(rotary, torch.empty(1, 1, device=positions.device), positions, kind)
    if found is None:
        raise UnsupportedError(
            f"{type(rotary).__name__} gives no cosines and sines; use a method that leaves keys as they are turned, such as rtn"
        )
    return found
