"""Streaming statistics of keys and values: float64 sums that can be merged.

Formula    keys, block n, position j, d = j mod n:  count[d], first[d] = sum k_j,  second = sum y_j y_j^T with y_j = R_d k_j
           mu = sum first / N,  mu2 = mean(y) - mean(R_d mu),  covariance of y - R_d mu - mu2 from the same sums
Source     ours (`klt`): one pass suffices because R_d mu depends on d alone
Shapes     keys before RoPE [B, H, S, D]; count [n]; first [H, n, D]; second [H, D, D]; values: total [H, D], second [H, D, D]
Units      of the keys and values themselves
Exact      sums in float64; products in float32
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kvsink.kernels.rope import rope

__all__ = ["SAMPLE_ROWS", "KeyStats", "SampleNeed", "Samples", "ValueStats"]

ALIKE = 1e-5  # of the size of rows: no more covariance than that is rounding
SAMPLE_ROWS = 16384  # rows of a layer that are kept at most


@dataclass
class KeyStats:
    """Sums over the keys of one layer for one block length."""

    count: Tensor  # [n]
    first: Tensor  # [H, n, D]
    second: Tensor  # [H, D, D]

    @classmethod
    def empty(cls, block: int, heads: int, dim: int) -> KeyStats:
        return cls(
            torch.zeros(block, dtype=torch.float64),
            torch.zeros(heads, block, dim, dtype=torch.float64),
            torch.zeros(heads, dim, dim, dtype=torch.float64),
        )

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.count.shape[0]

    def add(self, keys: Tensor, positions: Tensor, keep: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Add keys before RoPE [B, H, S, D] at positions [B, S] where keep [B, S]; cos, sin [n, R] are the offset angles."""
        offset = (positions % self.block)[keep]  # [N]
        rows = keys.transpose(1, 2)[keep].float()  # [N, H, D]
        self.count += torch.bincount(offset, minlength=self.block).double().cpu()
        first = torch.zeros(self.block, *rows.shape[1:], dtype=torch.float64, device=rows.device)
        first.index_add_(0, offset, rows.double())
        self.first += first.transpose(0, 1).cpu()
        y = rope(rows.transpose(0, 1), cos[offset], sin[offset])  # [H, N, D]
        self.second += (y.mT @ y).double().cpu()

    def merge(self, other: KeyStats) -> None:
        """Add the sums of another shard."""
        self.count += other.count
        self.first += other.first
        self.second += other.second

    def scaled(self, factor: float) -> KeyStats:
        """The sums of keys times a factor."""
        return KeyStats(self.count, self.first * factor, self.second * factor**2)

    def mean(self) -> Tensor:
        """mu [H, D]: the mean key before RoPE."""
        return self.first.sum(1) / self.count.sum()

    def block_table(self, cos: Tensor, sin: Tensor) -> Tensor:
        """R_d mu for every offset d → [H, n, D]."""
        mean = self.mean()[:, None, :].expand(-1, self.block, -1)
        return rope(mean, cos.double(), sin.double())

    def centred(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """mu2 [H, D] and the covariance [H, D, D] of R_d (k - mu)."""
        n = self.count.sum()
        table = self.block_table(cos, sin)  # [H, n, D]
        turned = rope(self.first, cos.double(), sin.double())  # sum of y per offset
        mu2 = (turned.sum(1) - (self.count[:, None] * table).sum(1)) / n
        cross = turned.mT @ table
        outer = (self.count[:, None] * table).mT @ table
        second = (self.second - cross - cross.mT + outer) / n
        return mu2, second - mu2[:, :, None] * mu2[:, None, :]


@dataclass
class ValueStats:
    """Sums over the values of one layer."""

    count: Tensor  # []
    total: Tensor  # [H, D]
    second: Tensor  # [H, D, D]

    @classmethod
    def empty(cls, heads: int, dim: int) -> ValueStats:
        return cls(
            torch.zeros((), dtype=torch.float64),
            torch.zeros(heads, dim, dtype=torch.float64),
            torch.zeros(heads, dim, dim, dtype=torch.float64),
        )

    def add(self, values: Tensor, keep: Tensor) -> None:
        """Add values [B, H, S, D] where keep [B, S]."""
        rows = values.transpose(1, 2)[keep].float().transpose(0, 1)  # [H, N, D]
        self.count += rows.shape[1]
        self.total += rows.double().sum(1).cpu()
        self.second += (rows.mT @ rows).double().cpu()

    def scaled(self, factor: float) -> ValueStats:
        """The sums of values times a factor."""
        return ValueStats(self.count, self.total * factor, self.second * factor**2)

    def merge(self, other: ValueStats) -> None:
        """Add the sums of another shard."""
        self.count += other.count
        self.total += other.total
        self.second += other.second

    def mean(self) -> Tensor:
        """mu [H, D]."""
        return self.total / self.count

    def covariance(self) -> Tensor:
        """Covariance [H, D, D]."""
        mu = self.mean()
        return self.second / self.count - mu[:, :, None] * mu[:, None, :]

    @property
    def alike(self) -> bool:
        """Whether all rows are one, to the rounding of float32."""
        spread, size = (float(torch.diagonal(t, dim1=-2, dim2=-1).sum()) for t in (self.covariance(), self.second / self.count))
        return size > 0 and spread <= ALIKE * size


@dataclass(frozen=True)
class SampleNeed:
    """What quantizers that learn ask of one layer's samples. rows: the fewest that will do; fisher, error: weights of that kind."""

    rows: int = 1
    fisher: bool = False
    error: bool = False

    def __or__(self, other: SampleNeed) -> SampleNeed:
        return SampleNeed(max(self.rows, other.rows), self.fisher or other.fisher, self.error or other.error)


@dataclass
class Samples:
    """Rows of one layer kept for quantizers that learn their levels: a subset of the calibration tokens, protected rows left out.

    keys before RoPE and values [N, H, D] float32; positions int64 [N]. Weights are None unless a method asked for them:
    key_fisher, value_fisher [N, H, D], the squared gradient of the loss with respect to each entry (KVQuant, CQ);
    key_error, value_error [N, H], how strongly an error of that row reaches the attention output (AnTKV).
    windows int64 [N]: which calibration window a row comes from.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    key_fisher: Tensor | None = None
    value_fisher: Tensor | None = None
    key_error: Tensor | None = None
    value_error: Tensor | None = None
    windows: Tensor | None = None

    def __len__(self) -> int:
        return self.keys.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are held, by name."""
        return {f.name: t for f in fields(self) if (t := getattr(self, f.name)) is not None}

    def take(self, rows: Tensor) -> Samples:
        """The given rows, int64 [n]."""
        return Samples(**{name: t[rows] for name, t in self.tensors().items()})

    @staticmethod
    def join(parts: Sequence[Samples], most: int = SAMPLE_ROWS) -> Samples:
        """One after the other, at most `most` rows, drawn evenly; fields that a part lacks are dropped."""
        names = set.intersection(*(set(p.tensors()) for p in parts))
        whole = Samples(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})
        if len(whole) <= most:
            return whole
        drawn = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:most]
        return whole.take(drawn.sort().values)

    def merge(self, other: Samples, most: int = SAMPLE_ROWS) -> Samples:
        """The rows of both shards; the windows of the other are counted on from ours."""
        if other.windows is not None and self.windows is not None and len(self):
            other = replace(other, windows=other.windows + int(self.windows.max()) + 1)
        return Samples.join([self, other], most)
