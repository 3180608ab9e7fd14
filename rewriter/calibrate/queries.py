"""What calibration sees of queries: their second moment, weighed by what they give to rows that are coded.

Formula    second = sum w q^T q over the query heads that share a KV head, before RoPE and not centred; w the share of the query's
           attention that falls on rows which are coded, by a plain causal softmax
Source     ours (`klt`)
Differs    windows, softcaps and sink logits of a model are left out of w
Shapes     queries [B, Hq, S, D]; second [H, D, D]
Exact      sums in float64; products in float32
Cost       every eighth query, `_MOST` of a window at the most
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvsink.kernels.rope import unrope

__all__ = ["QueryStats", "see_queries"]

_EVERY, _MOST = 8, 128  # queries of a window that are looked at


@dataclass
class QueryStats:
    """Sums over the queries of one layer, those of all query heads that share a KV head together."""

    count: Tensor  # []
    second: Tensor  # [H, D, D]

    @classmethod
    def empty(cls, heads: int, dim: int) -> QueryStats:
        return cls(torch.zeros((), dtype=torch.float64), torch.zeros(heads, dim, dim, dtype=torch.float64))

    def add(self, queries: Tensor, weights: Tensor) -> None:
        """Add queries before RoPE [B, Hq, S, D] with weights [B, Hq, S]."""
        heads = self.second.shape[0]
        rows = (queries.float() * weights.float().sqrt()[..., None]).unflatten(1, (heads, -1))  # [B, H, G, S, D]
        rows = rows.transpose(0, 1).flatten(1, 3)
        self.count += rows.shape[1]
        self.second += (rows.mT @ rows).double().cpu()

    def merge(self, other: QueryStats) -> None:
        """Add the sums of another shard."""
        self.count += other.count
        self.second += other.second

    def moment(self) -> Tensor:
        """E[w q^T q] [H, D, D]."""
        return self.second / self.count


@torch.no_grad()
def see_queries(
    into: QueryStats,
    k: Tensor,
    coded: Tensor,
    valid: Tensor | None,
    module: nn.Module,
    q: Tensor,
    v: Tensor,
    order: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """Attention of a layer is about to run: its queries [B, Hq, S, D] over the keys k just recorded, after RoPE both, of which
    coded [B, S] are not kept exact and valid [B, S] are no padding."""
    if q.shape[2] != k.shape[2]:
        return  # a prompt that is cut in pieces: the keys before these rows are not at hand
    at = torch.arange(0, q.shape[2], max(_EVERY, -(-q.shape[2] // _MOST)), device=q.device)
    rows = (q if order is None else q.index_select(-1, order[0])).index_select(2, at).float()
    hidden = torch.arange(q.shape[2], device=q.device) > at[:, None]
    hidden = hidden if valid is None else hidden | ~valid[:, None, None]
    scale = getattr(module, "scaling", None) or q.shape[-1] ** -0.5
    weights = []
    for head, queries in enumerate(rows.unflatten(1, (k.shape[1], -1)).unbind(1)):  # [B, G, n, D]
        logits = scale * queries @ k[:, head, None].float().mT
        mass = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
        weights.append((mass * coded[:, None, None]).sum(-1))
    turn = [t if t.shape[-2] == 1 else t.index_select(-2, at) for t in (cos, sin)]
    into.add(unrope(rows, *turn), torch.cat(weights, 1))
