"""Sort the key channels of all heads by their calibrated mean, so that channels of like value share a scale.

Formula    z = x[perm], undone by z[perm^-1]; x the H·D channels of all heads side by side
Source     RotateKV, arXiv 2501.16383 (channel reordering)
Differs    no
Shapes     x [B, Hkv, S, D] float32, perm int64 [Hkv·D]
Exact      yes, a permutation
Declines   sites without a codec; codecs that do not reorder
Cost       no flops; one gather per row
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from kvsink.graph.sites import AttentionSite
from kvsink.passes.base import Declined, RewritePass, Work, register_pass
from kvsink.passes.chain import Chain


@register_pass
@dataclass(frozen=True)
class Reorder(RewritePass):
    name: ClassVar[str] = "reorder"
    exact: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("attach", "center", "rotate")
    before: ClassVar[tuple[str, ...]] = ("quantize",)

    def check(self, site: AttentionSite, work: Work) -> Declined | None:
        chain = work.chain(site)
        if chain is None:
            return site.declined("no codec is attached")
        if chain.opaque:
            return site.declined("its codec works on blocks of tokens, inside the cache ops")
        if not (chain.keys.spec.packed and chain.keys.spec.reorder):
            return site.declined("its codec does not reorder")
        return None

    def rewrite(self, site: AttentionSite, work: Work) -> None:
        chain = work.chain(site)
        assert chain is not None
        side = chain.keys
        side.x = _permute(chain, side.x, "k_perm", side.write_at)
        side.undo.append(lambda x, _: _permute(chain, x, "k_unperm", side.read_at))


def _permute(chain: Chain, x: Node, name: str, anchor: Node) -> Node:
    return chain.across_heads(
        anchor, x, lambda flat: chain.put(anchor, torch.index_select, flat, -1, chain.params[name])
    )
