"""The whole chain of a packed site becomes two ops: one that stores, one that attends over the packed rows.

Formula    center, rotate, reorder, quantize, store, preserve  →  kvsink.append_(k_pre or k_rope, …)
           dequantize, undo, lay over, repeat_kv, attention     →  kvsink.attend(q, …); one op, append_attend_, see `as_one`
Source     ours
Differs    no
Shapes     q [B, Hq, S, D], k_rope, v_new [B, Hkv, S, D], state as in kvsink.codecs.STATE_NAMES → [B, Hq, S, D]
Exact      stored bytes equal; outputs up to float32 rounding of the softmax
Declines   sites without a packed chain; a stock cache, which has no packed rows to attend over
Cost       see `kvsink.kernels.append` and `kvsink.kernels.attend`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from kvsink.codecs import Codec
from kvsink.errors import KvsinkError
from kvsink.graph.sites import AttentionSite
from kvsink.graph.targets import kind, value
from kvsink.passes.base import Declined, RewritePass, Work, erase_orphans, insert_op, register_pass
from kvsink.passes.visibility import only_causal


def as_one(site: AttentionSite, codec: Codec) -> bool:
    """Whether one op stores and attends: for codes in tiles, and in a step on a GPU, where both run side by side."""
    q = value(site.q)
    return codec.tiles or (q.device.type == "cuda" and q.shape[2] == 1 and not codec.strict)


@register_pass
@dataclass(frozen=True)
class Fuse(RewritePass):
    name: ClassVar[str] = "fuse"
    exact: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("quantize", "preserve")

    def check(self, site: AttentionSite, work: Work) -> Declined | None:
        chain = work.chain(site)
        if chain is not None and chain.fault:
            return site.declined(chain.fault)
        if chain is None or not chain.preserved:
            return site.declined("it was not quantized")
        if not chain.packed:
            return site.declined(
                f"a stock {site.cache} cache holds no packed rows" if site.cache != "none" else "there is no cache to attend over"
            )
        return None

    def rewrite(self, site: AttentionSite, work: Work) -> None:
        chain, old = work.chain(site), site.attn
        assert chain is not None
        candidates, state, params = chain.markers
        k = site.k_rope if chain.k_pre is None else chain.k_pre
        q = site.q if site.order is None else insert_op(old, torch.index_select, site.q, -1, site.order)
        if as_one(site, chain.codec):
            lengths = [c.state["length"] for c in work.chains.values() if "length" in c.state]
            slots = value(chain.state["k_codes"]).shape[2]
            plain = value(site.q).shape[2] == 1 and only_causal(site.mask, slots, lengths)
            new = insert_op(
                old,
                torch.ops.kvsink.append_attend_.default,
                q,
                site.k_rope,
                site.v_new,
                chain.positions,
                candidates,
                state,
                params,
                None if plain else site.mask,
                site.scale,
                site.is_causal,
                chain.codec_text,
                [] if chain.k_pre is None else [k, chain.cos, chain.sin],
            )
            self._finish(site, work, new)
            return
        insert_op(
            old,
            torch.ops.kvsink.append_.default,
            k,
            site.v_new,
            chain.positions,
            chain.cos,
            chain.sin,
            candidates,
            state,
            params,
            chain.codec_text,
            chain.k_pre is None,
        )
        new = insert_op(
            old,
            torch.ops.kvsink.attend.default,
            q,
            site.k_rope,
            site.v_new,
            state,
            params,
            site.mask,
            site.scale,
            site.is_causal,
            chain.codec_text,
        )
        self._finish(site, work, new)

    def _finish(self, site: AttentionSite, work: Work, new: Node) -> None:
        """Put `new` in the place of the old attention and take the chain away."""
        chain, old = work.chain(site), site.attn
        assert chain is not None
        for advance in [u for u in chain.state["length"].users if kind(u) == "add_" and chain.keys.new < u < new]:
            new.append(advance)  # the cache moves its length on behind its read; attention has taken the place of that
        if tuple(value(new).shape) != tuple(value(old).shape):
            raise KvsinkError(f"{site.path}: fused attention of shape {tuple(value(new).shape)} for {tuple(value(old).shape)}")
        old.replace_all_uses_with(new)
        erase_orphans(work.graph, [old])
        for marker in (chain.read, chain.append):  # those of an opaque codec; `preserve` took the others
            if marker is not None and not marker._erased:
                work.graph.erase_node(marker)
        chain.read = chain.append = None
        for node in reversed(chain.inserted):
            if not node._erased:
                work.graph.erase_node(node)  # every node of the chain, stores included; fails loudly if one is still used
        chain.inserted.clear()
        chain.fused = new
