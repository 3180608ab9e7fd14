"""How much attention every row of a cache receives from a chunk of queries: the score that anchors are chosen by.

Formula    A = softmax over the visible j of (scale · q_i k_j + mask);  score_j = sum over query heads and valid i of
           "mass"   A_ij
           "qnorm"  A_ij · ||q_i||_2
           "exact"  scale · A_ij · ||v_j - o_i||_1 · ||q_i||_2,  with o the output of the attention
           in tiles of keys and queries: a first pass takes each row's log-sum-exp l_i, a second sums exp(s_ij - l_i)
Source     AnTKV, arXiv 2506.19505: theorem 3.1 gives "exact"; the two cheaper forms drop factors from it
Differs    the paper's own simplified score could not be read; three are offered. Scores of all heads are summed
Shapes     q, out [B, Hq, S, D]; k, v [B, H, L, D]; mask bool or additive [B or 1, 1 or Hq, S, >= L] or None (causal by
           slot); first int64 [], the slot of the first query; valid bool [B, S] or None → score float32 [B, L]
Exact      the sums are float32 (float64 for float64 models); tiles change their order only
Cost       4·B·Hq·S·L·D flops, a tile of TILE keys and TILE queries at a time; "exact" 3·B·Hq·S·L·D more
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Cost, OpSpec, nbytes, register_op

__all__ = ["observe", "observe_ref"]

TILE = 512  # keys, and queries, looked at together
_SMALL = 4096  # pairs of a query and a key that one matrix may hold
_NARROW = 32  # queries whose distance to a tile of values is taken at once


def _bias(mask: Tensor | None, first: Tensor, queries: slice, s: int, slots: Tensor) -> Tensor:
    """Additive float mask [.., n, m] of some queries against some slots: -inf where a query does not look."""
    hidden = torch.where(slots < first + s, 0.0, float("-inf"))
    if mask is None:
        rows = first + torch.arange(queries.start, queries.stop, device=slots.device)
        return torch.where(slots[None, :] <= rows[:, None], hidden, float("-inf"))
    part = mask[..., queries, :].index_select(-1, slots)
    return (torch.where(part, 0.0, float("-inf")) if part.dtype == torch.bool else part.float()) + hidden


def _factor(q: Tensor, valid: Tensor | None, score: str) -> Tensor:
    """What each query multiplies its row of A by [B, Hq, S]: 0 for padding."""
    wide = q.double() if q.dtype == torch.float64 else q.float()
    weight = torch.ones_like(wide[..., 0]) if score == "mass" else wide.norm(dim=-1)
    return weight if valid is None else weight * valid[:, None]


def observe_ref(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None, first: Tensor, valid: Tensor | None, scale: float, score: str
) -> Tensor:
    """The definition: the whole matrix A, then its weighted column sums."""
    s, slots, r = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = (x.to(wide).repeat_interleave(r, dim=1) for x in (k, v))
    bias = _bias(mask, first, slice(0, s), s, torch.arange(slots, device=q.device))
    a = (q.to(wide) @ keys.mT * scale + bias).softmax(-1).nan_to_num(0.0)  # a query that sees nothing gives nothing
    if score == "exact":
        a = a * (values[:, :, None] - out.to(wide)[:, :, :, None]).abs().sum(-1) * scale
    return (a * _factor(q, valid, score)[..., None]).sum((1, 2)).float()


def _observe_tiles(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None, first: Tensor, valid: Tensor | None, scale: float, score: str
) -> Tensor:
    """The same without the matrix; on the CPU only as far as the cache is filled."""
    b, hq, s, d = q.shape
    h, slots = k.shape[1], k.shape[2]
    r = hq // h
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    total = min(slots, int(first) + s) if q.device.type == "cpu" else slots
    result = torch.zeros(b, slots, dtype=wide, device=q.device)
    weight = _factor(q, valid, score)  # [B, Hq, S]
    for begin in range(0, s, TILE):
        rows = slice(begin, min(begin + TILE, s))
        n = rows.stop - rows.start
        query = q[:, :, rows].to(wide).reshape(b, h, r * n, d) * scale

        def logits(start: int, end: int, query: Tensor = query, rows: slice = rows, n: int = n) -> Tensor:
            bias = _bias(mask, first, rows, s, torch.arange(start, end, device=q.device))  # [(B, 1 or Hq,) n, m]
            dots = (query @ k[:, :, start:end].to(wide).mT).reshape(b, hq, n, end - start)
            return dots + bias

        spans = [(start, min(start + TILE, total)) for start in range(0, total, TILE)]
        held = logits(*spans[0]) if len(spans) == 1 else None
        parts = [(logits(*span) if held is None else held).logsumexp(-1) for span in spans]
        lse = torch.stack(parts).logsumexp(0)  # [B, Hq, n]
        seen = lse > float("-inf")
        lse = torch.where(seen, lse, 0.0)
        scaled = torch.where(seen, weight[:, :, rows], 0.0)
        for start, end in spans:
            a = ((logits(start, end) if held is None else held) - lse[..., None]).exp()
            if score == "exact":
                a = a * (_distances(v[:, :, start:end].to(wide), out[:, :, rows].to(wide)) * scale)
            result[:, start:end] += (a * scaled[..., None]).sum((1, 2))
    return result.float()


def _distances(v: Tensor, out: Tensor) -> Tensor:
    """||v_j - o_i||_1 [B, Hq, n, m], a few queries at a time."""
    r = out.shape[1] // v.shape[1]
    values = v.repeat_interleave(r, dim=1)[:, :, None]
    return torch.cat([(values - o[:, :, :, None]).abs().sum(-1) for o in out.split(_NARROW, dim=2)], dim=2)


@torch.library.custom_op("kvsink::observe", mutates_args=())
def observe(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None, first: Tensor, valid: Tensor | None, scale: float, score: str
) -> Tensor:
    q, k, v, out = (x.contiguous() for x in (q, k, v, out))  # sums in the same order whatever the strides
    small = q.shape[2] * k.shape[2] <= _SMALL
    return (observe_ref if small else _observe_tiles)(q, k, v, out, mask, first, valid, scale, score)


@observe.register_fake
def _outputs(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, mask: Tensor | None, first: Tensor, valid: Tensor | None, scale: float, score: str
) -> Tensor:
    return q.new_empty((q.shape[0], k.shape[2]), dtype=torch.float32)


def _cost(**a: Any) -> Cost:
    q, k, pairs = a["q"], a["k"], a["q"].shape[0] * a["q"].shape[1] * a["q"].shape[2] * a["k"].shape[2]
    d, exact = q.shape[3], a["score"] == "exact"
    read = nbytes(q, k, *(t for t in (a["mask"], a["valid"]) if t is not None), *((a["v"], a["out"]) if exact else ()))
    return Cost(flops=(7 if exact else 4) * d * pairs, read=read, written=4 * q.shape[0] * k.shape[2])


def _example(score: str, s: int, slots: int, first: int, masked: str):
    def make(g: torch.Generator) -> dict[str, object]:
        q, out = torch.randn(2, 4, s, 16, generator=g), torch.randn(2, 4, s, 16, generator=g)
        k, v = torch.randn(2, 2, slots, 16, generator=g), torch.randn(2, 2, slots, 16, generator=g)
        visible = torch.ones(2, 1, s, slots, dtype=torch.bool).tril(first)
        visible[1, :, :, :3] = False  # padding on the left
        valid = torch.ones(2, s, dtype=torch.bool)
        valid[1, : max(0, 3 - first)] = False
        mask = {"none": None, "bool": visible, "additive": torch.where(visible, 0.0, -1e4)}[masked]
        return dict(
            q=q,
            k=k,
            v=v,
            out=out,
            mask=mask,
            first=torch.tensor(first),
            valid=None if mask is None else valid,
            scale=0.25,
            score=score,
        )

    return make


SPEC = register_op(
    OpSpec(
        name="observe",
        op=observe,
        ref=observe_ref,
        cost=_cost,
        examples=(
            _example("mass", 9, 9, 0, "bool"),
            _example("qnorm", 1, 17, 11, "additive"),
            _example("exact", 5, 20, 8, "bool"),
            _example("mass", 6, 14, 8, "none"),
        ),
    )
)
