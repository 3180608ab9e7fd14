"""Give each site its codec: from the cache's own markers, or from a plan when the cache is a stock one.

Formula    none: the rows that enter storage are picked out, in float32, and nothing is changed yet
Source     ours
Differs    no
Shapes     k_pre or k_rope, v_new [B, Hkv, S, D] → the same, float32
Exact      yes
Declines   no cache and no plan; a stock cache without a plan; positions that cannot be found for a codec before RoPE;
           a codec over blocks of tokens or with outliers on a stock cache, which has no place for blocks and records; layers
           that keep anchors: their ops stay as they are
Cost       none
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from kvsink.codecs import STATE_NAMES, Codec
from kvsink.codecs.steps import asks_positions
from kvsink.graph.sites import AttentionSite
from kvsink.graph.targets import argument, kind, value
from kvsink.kernels import stages
from kvsink.passes.base import Declined, RewritePass, Work, insert_op, insert_tensor, register_pass, size_of
from kvsink.passes.chain import Chain, Side, SitePlan


@register_pass
@dataclass(frozen=True)
class Attach(RewritePass):
    name: ClassVar[str] = "attach"
    exact: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("normalize", "locate")

    def check(self, site: AttentionSite, work: Work) -> Declined | None:
        if site.core != "sdpa":
            return site.declined(f"core {site.core!r} was not normalised")
        if site.cache == "kvsink":
            codec = Codec.parse(argument(site.writes[0], 8, "codec")) if site.writes else None
            if codec is not None and codec.anchors is not None:
                return site.declined(
                    "anchors are chosen by its queries and keys, which packed attention never holds", site.writes[0]
                )
            if len(site.writes) != 1:
                return site.declined(f"{len(site.writes)} writes for one read of the packed cache; expected one")
            if value(site.k_rope).shape[3] != value(site.v_new).shape[3]:
                return site.declined("values are not as wide as keys, which packed attention does not read", site.v_new)
            if any(other.attn is not site.attn and set(other.writes) & set(site.writes) for other in work.sites):
                return site.declined("its keys are attended to more than once in a pass", site.writes[0])
            if not _read_once(site):
                return site.declined("the model computes more from its keys and values than attention", site.reads[0])
            if argument(site.writes[0], 0, "k") is not site.k_rope or not argument(site.writes[0], 9, "roped"):
                return site.declined("the packed cache stores other keys than it reads", site.writes[0])
            if codec is not None and _needs_positions(codec) and not codec.tiles and _several_axes(site):
                return site.declined(
                    "positions of several new rows in more than one axis; the cache op turns them by one", site.cos
                )
            return None
        plan = work.plan(site)
        if plan is None:
            return site.declined(
                "no cache, so nothing is stored" if site.cache == "none" else f"a stock {site.cache} cache and no codec for it"
            )
        if plan.codec.opaque:
            return site.declined("its codec works on blocks of tokens, which only kvsink's own cache holds")
        if site.rope != "none" and site.positions is None and _needs_positions(plan.codec):
            return site.declined("the positions behind its rotary table were not found", site.cos)
        return None

    def rewrite(self, site: AttentionSite, work: Work) -> None:
        chain = _from_markers(site) if site.cache == "kvsink" else _from_plan(site, work, work.plan(site))
        for side in (chain.keys, chain.values) if not chain.opaque else ():
            if side.spec.packed and value(side.x).dtype != torch.float64:
                side.x = chain.put(side.write_at, "to", side.x, torch.float32)
        work.chains[site.attn] = chain


def _needs_positions(codec: Codec) -> bool:
    before_rope = codec.key.packed and (codec.key.domain == "block" or codec.key.center)
    return before_rope or any(s.packed and asks_positions(s, prefix) for s, prefix in ((codec.key, "k"), (codec.value, "v")))


def _read_once(site: AttentionSite) -> bool:
    """Whether what the cache hands out goes nowhere but into this attention."""
    for node in (site.k, site.v):
        while True:
            if sum(kind(user) not in ("size", "sym_size") for user in node.users) != 1:
                return False
            source = node.args[0]
            if kind(source) == "kvsink.read" or not isinstance(source, Node):
                break
            node = source
    return True


def _several_axes(site: AttentionSite) -> bool:
    """Whether several new rows are stored under other angles than the model turns them by; one row has one position."""
    return site.cos is not None and argument(site.writes[0], 3, "cos") is not site.cos and value(site.q).shape[2] != 1


def _from_markers(site: AttentionSite) -> Chain:
    append, read = site.writes[0], site.reads[0]
    names = ("k", "v", "positions", "cos", "sin", "candidates", "state", "params", "codec", "roped")
    k, v, positions, cos, sin, candidates, state, params, text, _ = (argument(append, i, name) for i, name in enumerate(names))
    codec = Codec.parse(text)
    chain = Chain(
        codec=codec,
        codec_text=text,
        params=dict(zip(codec.param_names(), params, strict=True)),
        state=dict(zip(STATE_NAMES, state, strict=True)),
        positions=positions,
        cos=cos,
        sin=sin,
        keys=Side("k", codec.key, k, k, append, read),
        values=Side("v", codec.value, v, v, append, read),
        append=append,
        read=read,
        markers=(list(candidates), list(state), list(params)),
    )
    chain.k_pre = None if chain.roped_input else _before_rope(site, cos, sin)
    chain.keys.x = k if chain.k_pre is None else chain.k_pre
    return chain


def _before_rope(site: AttentionSite, cos: Node, sin: Node) -> Node:
    """The new keys before RoPE: the model's own, or, where the graph does not show them, turned back by the cache's angles."""
    if value(cos).shape[-1] == 0:
        return site.k_rope  # the cache takes keys as they are turned
    if site.rope not in ("none", "hidden"):
        return site.k_pre
    at = site.writes[0]
    wide = value(site.k_rope).dtype if value(site.k_rope).dtype == torch.float64 else torch.float32
    return insert_op(at, stages.unrope_rows, insert_op(at, "to", site.k_rope, wide), cos, sin)


def _from_plan(site: AttentionSite, work: Work, plan: SitePlan | None) -> Chain:
    assert plan is not None
    k_at, v_at = _first_user(site.k_rope), _first_user(site.v_new)
    at = min(k_at, v_at)
    layer = site.path.replace(".", "_")
    tables = {name: insert_tensor(at, work.gm, f"kvsink_{layer}_{name}", tensor) for name, tensor in plan.tables.items()}
    cos, sin, positions = site.cos, site.sin, site.positions
    created: list[Node] = []
    if cos is None or sin is None:
        created += [insert_op(at, "new_empty", site.k_rope, (1, 1, 0))]
        cos = sin = created[-1]
    if positions is None:  # without RoPE a key's place does not change how it is coded
        device = value(site.k_rope).device
        rows = size_of(at, site.k_rope, 2)
        created += [rows] if isinstance(rows, Node) else []
        created += [insert_op(at, torch.zeros, (1, rows), dtype=torch.int64, device=device)]
        positions = created[-1]
    codec = plan.codec
    chain = Chain(
        codec=codec,
        codec_text=codec.text(),
        params=tables,
        state={},
        positions=positions,
        cos=cos,
        sin=sin,
        keys=Side("k", codec.key, site.k_rope, site.k_rope, k_at, k_at),
        values=Side("v", codec.value, site.v_new, site.v_new, v_at, v_at),
        plan=plan,
    )
    chain.inserted += created
    chain.k_pre = None if chain.roped_input else site.k_pre
    chain.keys.x = site.k_rope if chain.k_pre is None else chain.k_pre
    return chain


def _first_user(node: Node) -> Node:
    return min(user for user in node.users if kind(user) not in ("size", "sym_size"))
