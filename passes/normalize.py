"""The eager spelling of attention becomes one `scaled_dot_product_attention`; later passes know only that.

Formula    softmax(q k^T · scale + mask) v  →  scaled_dot_product_attention(q, k, v, mask, scale=scale)
Source     ours
Differs    no
Shapes     unchanged: [B, Hq, S, D]
Exact      yes in real arithmetic; eager models that take the softmax in float32 keep float32 rounding
Declines   softcap, dropout, returned attention weights, operators between scores and softmax (see `kvsink.graph.sites`)
Cost       none: fewer operators, the same sums
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from kvsink.graph.sites import AttentionSite
from kvsink.graph.targets import value
from kvsink.passes.base import Declined, RewritePass, Work, erase_orphans, insert_op, register_pass


@register_pass
@dataclass(frozen=True)
class Normalize(RewritePass):
    name: ClassVar[str] = "normalize"
    exact: ClassVar[bool] = True
    moves_sites: ClassVar[bool] = True

    def check(self, site: AttentionSite, work: Work) -> Declined | None:
        if site.core != "eager_softmax":
            return site.declined("already scaled_dot_product_attention")
        if site.mask is not None and not value(site.mask).is_floating_point():
            return site.declined(
                f"a {value(site.mask).dtype} mask is added to the scores; expected a floating-point one", site.mask
            )
        return None

    def rewrite(self, site: AttentionSite, work: Work) -> None:
        old, mask, dtype = site.attn, site.mask, value(site.q).dtype
        if mask is not None and value(mask).dtype != dtype:
            mask = insert_op(old, "to", mask, dtype)
        new = insert_op(
            old,
            F.scaled_dot_product_attention,
            site.q,
            site.k,
            site.v,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            scale=site.scale,
        )
        assert torch.Size(value(new).shape) == value(old).shape
        old.replace_all_uses_with(new)
        erase_orphans(work.graph, [old])
