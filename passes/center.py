"""Take the calibrated mean out of keys and values before they are coded, and put it back after they are read.

Formula    keys    x = k_pre - mu; in domain "post" RoPE follows, x = R_j (k_pre - mu)
                   undone by the table M[d] = R_d mu (+ the mean of the next stage), turned to the start of the block
           values  x = v - mu, undone by + mu
Source     ours
Differs    no
Shapes     x [B, Hkv, S, D] float32, mean [Hkv, D], table [Hkv, n, D]
Exact      yes
Declines   sites without a codec; codecs without centring
Cost       1 flop per element written; on the fused path the table acts on the query, once per block
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from kvsink.graph.sites import AttentionSite
from kvsink.kernels import stages
from kvsink.passes.base import Declined, RewritePass, Work, register_pass
from kvsink.passes.chain import Chain


@register_pass
@dataclass(frozen=True)
class Center(RewritePass):
    name: ClassVar[str] = "center"
    exact: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("attach",)
    before: ClassVar[tuple[str, ...]] = ("rotate", "reorder", "quantize")

    def check(self, site: AttentionSite, work: Work) -> Declined | None:
        chain = work.chain(site)
        if chain is None:
            return site.declined("no codec is attached")
        if chain.opaque:
            return site.declined("its codec works on blocks of tokens, inside the cache ops")
        if not any(side.spec.packed and side.spec.center for side in (chain.keys, chain.values)):
            return site.declined("its codec does not centre")
        return None

    def rewrite(self, site: AttentionSite, work: Work) -> None:
        chain = work.chain(site)
        assert chain is not None
        if chain.keys.spec.packed and chain.keys.spec.center:
            _center_keys(chain)
        if chain.values.spec.packed and chain.values.spec.center:
            side, mean = chain.values, chain.params["v_mean"]
            side.x = chain.put(side.write_at, stages.center, side.x, mean)
            side.undo.append(
                lambda x, _: chain.put(side.read_at, torch.add, x, chain.put(side.read_at, "unsqueeze", mean, 1))
            )


def _center_keys(chain: Chain) -> None:
    side, p = chain.keys, chain.params
    side.x = chain.put(side.write_at, stages.center, side.x, p["k_mean"])
    if side.spec.domain == "post":
        side.x = chain.put(side.write_at, stages.rope_rows, side.x, chain.cos, chain.sin)

    def undo(x: Node, positions: Node) -> Node:
        at = side.read_at
        if side.spec.domain == "post" and not chain.packed:  # new rows only: the model's own angles
            mean = chain.put(at, stages.rope_rows, chain.put(at, "unsqueeze", p["k_mean"], 1), chain.cos, chain.sin)
            return chain.put(at, torch.add, x, mean)
        mean = chain.put(at, stages.table_rows, p["k_table"], positions)
        if side.spec.domain == "post":
            start = p["start_cos"], p["start_sin"]
            mean = chain.put(at, stages.rope_start, mean, *start, positions, chain.codec.table_tokens)
        return chain.put(at, torch.add, x, mean)

    side.undo.append(undo)
