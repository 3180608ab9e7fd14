"""Turn keys and values into the basis they are coded in: block RoPE, then a Hadamard rotation or a KLT basis.

Formula    keys    domain "block": x = R_d x with d = position mod n, undone by R_{j-d}, which leaves the key after RoPE
           both    Hadamard: z = x H over one or several heads;  KLT: z = (x - mu2) U
Source     Hadamard per head QuaRot (arXiv 2404.00456), across heads RotateKV (arXiv 2501.16383); block KLT ours
Differs    no
Shapes     x [B, Hkv, S, D] float32, basis [Hkv, D, D], offset tables [n, rotary]
Exact      yes, all maps are orthogonal
Declines   sites without a codec; codecs that code the rows as they are; a Hadamard folded into the weights
Cost       Hadamard D·log2 D, KLT 2·D² flops per row and head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from kvsink.graph.sites import AttentionSite
from kvsink.kernels import stages
from kvsink.passes.base import Declined, RewritePass, Work, register_pass
from kvsink.passes.chain import Chain, Side


@register_pass
@dataclass(frozen=True)
class Rotate(RewritePass):
    name: ClassVar[str] = "rotate"
    exact: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("attach", "center")
    before: ClassVar[tuple[str, ...]] = ("reorder", "quantize")

    def check(self, site: AttentionSite, work: Work) -> Declined | None:
        chain = work.chain(site)
        if chain is None:
            return site.declined("no codec is attached")
        if chain.opaque:
            return site.declined("its codec works on blocks of tokens, inside the cache ops")
        if not any(_turns(side) for side in (chain.keys, chain.values)):
            return site.declined("its codec does not rotate")
        return None

    def rewrite(self, site: AttentionSite, work: Work) -> None:
        chain = work.chain(site)
        assert chain is not None
        if chain.keys.spec.packed and chain.keys.spec.domain == "block":
            _turn_by_offset(chain)
        for prefix, side in (("k", chain.keys), ("v", chain.values)):
            if side.spec.packed and side.spec.transform == "klt":
                _project(chain, side, prefix)
            elif side.spec.packed and side.spec.transform == "hadamard" and not side.spec.folded:
                _hadamard(chain, side)


def _turns(side: Side) -> bool:
    spec = side.spec
    return spec.packed and (
        spec.domain == "block" or spec.transform == "klt" or (spec.transform == "hadamard" and not spec.folded)
    )


def _turn_by_offset(chain: Chain) -> None:
    side, p, n = chain.keys, chain.params, chain.codec.key.block
    if n > 1:
        side.x = chain.put(
            side.write_at, stages.rope_offset, side.x, p["offset_cos"], p["offset_sin"], chain.positions, n
        )

    def undo(x: Node, positions: Node) -> Node:
        at = side.read_at
        if chain.packed:  # old rows: to the start of their block, by a table
            return chain.put(at, stages.rope_start, x, p["start_cos"], p["start_sin"], positions, n)
        if n > 1:  # new rows only: back to before RoPE, then the model's own angles
            back = chain.put(at, torch.neg, p["offset_sin"])
            x = chain.put(at, stages.rope_offset, x, p["offset_cos"], back, positions, n)
        return chain.put(at, stages.rope_rows, x, chain.cos, chain.sin)

    if not chain.packed or "start_cos" in p:
        side.undo.insert(0, undo)  # the last step back, when every mean is in again


def _project(chain: Chain, side: Side, prefix: str) -> None:
    basis, mean = chain.params[f"{prefix}_basis"], chain.params.get(f"{prefix}_mean2")
    if mean is not None:
        side.x = chain.put(side.write_at, stages.center, side.x, mean)
    side.x = chain.put(side.write_at, stages.project, side.x, basis)
    table_holds_mean = side.spec.domain == "block" and side.spec.center

    def undo(x: Node, _: Node) -> Node:
        x = chain.put(side.read_at, stages.unproject, x, basis)
        if mean is None or table_holds_mean:
            return x
        return chain.put(side.read_at, torch.add, x, chain.put(side.read_at, "unsqueeze", mean, 1))

    side.undo.append(undo)


def _hadamard(chain: Chain, side: Side) -> None:
    side.x = chain.hadamard(side, side.x, side.write_at)
    side.undo.append(lambda x, _: chain.hadamard(side, x, side.read_at, inverse=True))
