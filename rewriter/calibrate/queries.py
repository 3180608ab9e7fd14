"""What calibration sees of queries, and of the weights behind attention: the moments by which errors of keys and values count.

Formula    second = sum w q^T q over the query heads that share a KV head, before RoPE and not centred; w the share of the query's
           attention that falls on rows which are coded, by a plain causal softmax
           roped = sum q^T q after RoPE, all queries alike;  causal_c = sum over all keys at or before q of (R_p^T q)_c^2, R_p the
           rotation of the key;  reads = sum W^T W over the columns W of the output projection that read the values of a head
           scored = sum s_t v_t^T v_t over rows that are coded, s_t the sum of squared scores of their key with all queries of its
           window, before or after it, 1 on average
Source     ours (`klt`); WUSH-KV, arXiv 2609.38121 section 2 (roped, reads); TaSQ, arXiv 2610.03027 (causal); OSCAR,
           arXiv 2605.17757, released code (scored)
Differs    windows, softcaps and sink logits of a model are left out of w
Shapes     queries [B, Hq, S, D]; second, roped [H, D, D]; causal [H, D]; scored, reads [H, Dv, Dv], reads None where no plain
           projection is found
Exact      sums in float64; products in float32
Cost       every eighth query, `_MOST` of a window at the most
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvsink.kernels.rope import unrope
from kvsink.model.fold import is_plain

__all__ = ["QueryStats", "see_queries"]

_EVERY, _MOST = 8, 128  # queries of a window that are looked at


@dataclass
class QueryStats:
    """Sums over the queries of one layer, those of all query heads that share a KV head together."""

    count: Tensor  # []
    second: Tensor  # [H, D, D]
    roped: Tensor | None = None  # [H, D, D]; these four are missing in older records
    causal: Tensor | None = None  # [H, D]
    scored: Tensor | None = None  # [H, Dv, Dv]
    reads: Tensor | None = None  # [H, Dv, Dv]

    @classmethod
    def empty(cls, heads: int, dim: int) -> QueryStats:
        square = torch.zeros(heads, dim, dim, dtype=torch.float64)
        return cls(torch.zeros((), dtype=torch.float64), square, square.clone(), square[..., 0].clone())

    def add(self, queries: Tensor, weights: Tensor) -> None:
        """Add queries before RoPE [B, Hq, S, D] with weights [B, Hq, S]."""
        rows = self._by_head(queries, weights)
        self.count += rows.shape[1]
        self.second += (rows.mT @ rows).double().cpu()

    def add_roped(self, queries: Tensor, seen: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Add queries after RoPE [B, Hq, n, D]; of the keys that each of them sees, the number [B, n] (0 for padding), and the sums
        of cos^2 and cos·sin of their angles [B, n, R / 2]."""
        assert self.roped is not None and self.causal is not None
        rows = self._by_head(queries, (seen > 0).double()[:, None].expand(queries.shape[:3]))
        self.roped += (rows.mT @ rows).double().cpu()
        half = cos.shape[-1]
        q, seen = queries.double(), seen.double()[:, None, :, None]
        one, two, rest = q.split([half, half, q.shape[-1] - 2 * half], -1)
        cos, cross = cos[:, None], 2 * one * two * sin[:, None]
        square = one.square() * cos + two.square() * (seen - cos) + cross, two.square() * cos + one.square() * (seen - cos) - cross
        sums = torch.cat([*square, rest.square() * seen], -1).sum((0, 2))  # [Hq, D]
        self.causal += sums.unflatten(0, (self.causal.shape[0], -1)).sum(1).cpu()

    def add_scored(self, queries: Tensor, k: Tensor, v: Tensor, coded: Tensor) -> None:
        """Add values [B, H, S, Dv] of rows coded [B, S], by scores of queries [B, Hq, n, D] and keys [B, H, S, D] after RoPE."""
        for at, mine in enumerate(coded.bool()):
            moment = queries[at].float().unflatten(0, (k.shape[1], -1)).flatten(1, 2)  # [H, G·n, D]
            rows, values = (t[at][:, mine].float() for t in (k, v))
            score = (rows @ (moment.mT @ moment) * rows).sum(-1, keepdim=True)
            values = values * (score / score.mean(1, keepdim=True).clamp_min(1e-30)).clamp_min(0.0).sqrt()
            found = (values.mT @ values).double().cpu()
            self.scored = found if self.scored is None else self.scored + found

    def _by_head(self, queries: Tensor, weights: Tensor) -> Tensor:
        """[H, N, D], each row times the root of its weight."""
        rows = (queries.float() * weights.float().sqrt()[..., None]).unflatten(1, (self.second.shape[0], -1))  # [B, H, G, S, D]
        return rows.transpose(0, 1).flatten(1, 3)

    def merge(self, other: QueryStats) -> None:
        """Add the sums of another shard."""
        self.count += other.count
        self.second += other.second
        for name in ("roped", "causal", "scored"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, None if mine is None or theirs is None else mine + theirs)

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
    half = cos.shape[-1] // 2
    one, two = (t[:, 0, :, :half].double() for t in (cos, sin))
    size = (one.square() + two.square()).clamp_min(1e-30)
    real = torch.ones(k.shape[0], k.shape[2], device=q.device) if valid is None else valid.float()
    sums = [(t * real[..., None]).cumsum(1).index_select(1, at) for t in (one.square() / size, one * two / size)]
    into.add_roped(rows, (real.cumsum(1) * real).index_select(1, at), *sums)
    if v.shape[2] == k.shape[2]:
        into.add_scored(rows * (real[:, at] > 0)[:, None, :, None], k, v, coded)
    if into.reads is None:
        into.reads = _reads(module, q.shape[1], k.shape[1], v.shape[-1])


def _reads(module: nn.Module, heads: int, kv_heads: int, dim: int) -> Tensor | None:
    """`reads` of an attention module with a plain output projection [E, Hq·Dv] that is held in memory; None without."""
    projection = getattr(module, "o_proj", None)
    if type(projection) is not nn.Linear or projection.weight.is_meta or not is_plain(projection.weight):
        return None
    if projection.weight.shape[1] != heads * dim:
        return None
    w = projection.weight.detach().double().unflatten(1, (kv_heads, -1, dim))  # [E, H, G, Dv]
    return torch.einsum("ehgc,ehgd->hcd", w, w).cpu()
