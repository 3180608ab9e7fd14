"""Keep protected rows exact: sinks, first rows, the recent window, and the rows of the running chunk.

Formula    packed: per segment the best `capacity` of (stored ∪ new candidates) by score move to the side store;
           x^[recent] = recent rows, x^[protected] = exact rows, x^[new] = new rows unless the codec is strict
           stock cache: x^ = where(protected, x, x^) for the new rows
Source     KVSink, arXiv 2508.04257 section 4; Preserve-First-N, KVQuant (arXiv 2401.18079); RotateKV, arXiv 2501.16383
Differs    a stock cache has no side store: first rows are known by position, sinks only within the chunk of a prefill,
           and a decode step protects none (RotateKV's rule)
Shapes     full [B, Hkv, L, D], exact rows [B, Hkv, E, D] at slots [B, E]
Exact      yes for protected rows
Declines   sites that were not quantized
Cost       E rows copied per read
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from kvsink.graph.sites import AttentionSite
from kvsink.graph.targets import shape, value
from kvsink.kernels import stages
from kvsink.kernels.read import put_rows
from kvsink.kernels.selection import merge_exact
from kvsink.passes.base import Declined, RewritePass, Work, insert_tensor, register_pass
from kvsink.passes.chain import Chain


@register_pass
@dataclass(frozen=True)
class Preserve(RewritePass):
    name: ClassVar[str] = "preserve"
    exact: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("quantize",)
    before: ClassVar[tuple[str, ...]] = ("fuse",)

    def check(self, site: AttentionSite, work: Work) -> Declined | None:
        chain = work.chain(site)
        if chain is None or chain.keys.full is None:
            return site.declined("it was not quantized")
        return None

    def rewrite(self, site: AttentionSite, work: Work) -> None:
        chain = work.chain(site)
        assert chain is not None
        if chain.packed and not chain.opaque:
            _store_exact(chain, site)
            _lay_over(chain)
            _drop_markers(chain, work)
        elif not chain.packed:
            _keep_in_stock(chain, site, work)
        chain.preserved = True


# ---------------------------------------------------------------- kvsink's own cache


def _store_exact(chain: Chain, site: AttentionSite) -> None:
    """New rows into the side store and the recent window."""
    at, state, codec = chain.keys.write_at, chain.state, chain.codec
    k, v = chain.keys.new, chain.values.new
    if chain.k_pre is not None:  # the fused op sees the key before RoPE and applies it itself
        k = chain.put(at, stages.rope_rows, chain.k_pre, chain.cos, chain.sin)
    if codec.exact_rows:
        merged = chain.put(
            at,
            merge_exact,
            state["exact_slot"],
            state["exact_score"],
            (state["exact_k"], state["exact_v"]),
            (k, v),
            chain.markers[0],
            codec.segments,
            state["length"],
        )
        for i, name in enumerate(("exact_slot", "exact_score", "exact_k", "exact_v")):
            chain.put(at, "copy_", state[name], chain.put(at, operator.getitem, merged, i))
    if codec.window:
        rows = chain.put(at, _last_rows, chain.slots, k, v, codec.window)
        ring, slots, last_k, last_v = (chain.put(at, operator.getitem, rows, i) for i in range(4))
        for name, last in (("recent_k", last_k), ("recent_v", last_v)):
            chain.put(at, "index_copy_", state[name], 2, ring, chain.put(at, "to", last, value(state[name]).dtype))
        chain.put(at, "index_copy_", state["recent_slot"], 0, ring, chain.put(at, "to", slots, value(state["recent_slot"]).dtype))


def _last_rows(slots: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last min(S, window) new rows, their slots and their places in the ring."""
    last = slots[-window:]
    return last % window, last, k[:, :, -window:], v[:, :, -window:]


def _lay_over(chain: Chain) -> None:
    at, state, codec = chain.keys.read_at, chain.state, chain.codec
    batch = chain.size(at, chain.keys.new, 0)
    if codec.window:
        end = chain.put(at, torch.add, state["length"], chain.size(at, chain.keys.new, 2))
        live = chain.put(at, torch.where, chain.put(at, torch.lt, state["recent_slot"], end), state["recent_slot"], -1)
        live = chain.put(at, "expand", chain.put(at, "unsqueeze", live, 0), batch, -1)
    for prefix, side in (("k", chain.keys), ("v", chain.values)):
        assert side.full is not None
        if codec.window:
            side.full = chain.put(at, put_rows, side.full, state[f"recent_{prefix}"], live)
        if codec.exact_rows:
            side.full = chain.put(at, put_rows, side.full, state[f"exact_{prefix}"], state["exact_slot"])
        if not codec.strict:
            side.full = chain.put(at, torch.index_copy, side.full, 2, chain.slots, side.new)


def _drop_markers(chain: Chain, work: Work) -> None:
    """The chain reads and writes the state itself now."""
    assert chain.read is not None and chain.append is not None
    for user in list(chain.read.users):
        full = chain.keys.full if user.args[1] == 0 else chain.values.full
        assert full is not None
        user.replace_all_uses_with(full)
        work.graph.erase_node(user)
    work.graph.erase_node(chain.read)
    work.graph.erase_node(chain.append)
    chain.read = chain.append = None


# ---------------------------------------------------------------- stock caches


def _keep_in_stock(chain: Chain, site: AttentionSite, work: Work) -> None:
    kept = _protected(chain, site, work)
    own = set(chain.inserted)
    for side in (chain.keys, chain.values):
        if not side.spec.packed:
            continue
        full = side.full
        assert full is not None
        if kept is not None:
            full = chain.put(side.read_at, torch.where, kept, side.new, full)
            own.add(full)
        side.new.replace_all_uses_with(full, delete_user_cb=lambda user: user not in own)


def _protected(chain: Chain, site: AttentionSite, work: Work) -> Node | None:
    """bool [B or 1, 1, S, 1]: new rows that stay exact."""
    assert chain.plan is not None
    at, kept = min(chain.keys.read_at, chain.values.read_at), None
    for segment in chain.plan.segments:
        found = None
        if segment.source == "first" and site.positions is not None:
            near = chain.put(at, torch.lt, chain.positions, segment.count)
            found = chain.put(at, torch.logical_and, near, chain.put(at, torch.ge, chain.positions, 0))
        elif segment.source != "first":
            found = _sinks_of_chunk(chain, site, work, segment.source, segment.count, at)
        if found is not None:
            kept = found if kept is None else chain.put(at, torch.logical_or, kept, found)
    return None if kept is None else chain.put(at, "unsqueeze", chain.put(at, "unsqueeze", kept, 1), 3)


def _sinks_of_chunk(chain: Chain, site: AttentionSite, work: Work, source: str, count: int, at: Node) -> Node | None:
    assert chain.plan is not None
    massive = source == "massive"
    block = -1 if massive else int(source.rpartition(":")[2])
    hidden = site.hidden_in if massive else next((other.hidden for other in work.sites if other.layer == block), None)
    rows = (shape(hidden) or (0, 0))[1] if hidden is not None else 0
    if hidden is None or not hidden < at or (isinstance(rows, int) and rows <= count):
        return None
    channels, device = chain.plan.channels.get(block, (0,))[:1], value(hidden).device
    ones = torch.ones(len(channels), device=device)
    constants = (
        insert_tensor(at, work.gm, f"kvsink_channels_{block}", torch.tensor(channels, device=device)),
        insert_tensor(at, work.gm, f"kvsink_weights_{len(channels)}", ones),
    )
    valid = chain.put(at, _all_valid, hidden)
    pair = chain.put(at, torch.ops.kvsink.select_sinks.default, hidden, valid, *constants, count, massive)
    return chain.put(at, "scatter", chain.put(at, torch.zeros_like, valid), 1, chain.put(at, operator.getitem, pair, 1), True)


def _all_valid(hidden: Tensor) -> Tensor:
    """bool [B, S], all True."""
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
