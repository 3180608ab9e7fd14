"""Check what the passes left: one store and one read per site, nothing of the unfused path, shapes kept.

Formula    none
Source     ours
Differs    no
Shapes     unchanged
Exact      yes, the graph is not touched
Declines   sites without a codec
Raises     KvsinkError naming the site and what was found
Cost       none at run time
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from kvsink.errors import KvsinkError
from kvsink.graph.sites import AttentionSite
from kvsink.graph.targets import argument, kind
from kvsink.passes.base import Declined, RewritePass, Work, register_pass
from kvsink.passes.chain import Chain


@register_pass
@dataclass(frozen=True)
class Verify(RewritePass):
    name: ClassVar[str] = "verify"
    exact: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("quantize", "preserve", "fuse")

    def check(self, site: AttentionSite, work: Work) -> Declined | None:
        return site.declined("no codec is attached") if work.chain(site) is None else None

    def rewrite(self, site: AttentionSite, work: Work) -> None:
        chain = work.chain(site)
        assert chain is not None
        if chain.packed:
            _verify_packed(site, work, chain)
        else:
            _verify_stock(site, chain)


def _verify_packed(site: AttentionSite, work: Work, chain: Chain) -> None:
    codes = chain.state["k_codes"]
    users = [user for user in codes.users if not _makes_storage(user, codes)]
    names = [kind(user) for user in users]
    wanted = ["kvsink.append_", "kvsink.attend"] if chain.fused is not None else ["index_copy_"]
    if chain.fused is not None and kind(chain.fused) == "kvsink.append_attend_":
        wanted = ["kvsink.append_attend_"]
    if chain.fused is not None and sorted(names) != wanted:
        raise KvsinkError(
            f"{site.path}: packed keys are used by {', '.join(names) or 'nothing'}; expected one store, one attention"
        )
    if chain.opaque and chain.fused is None and sorted(names) != ["kvsink.append_", "kvsink.read"]:
        raise KvsinkError(f"{site.path}: packed keys are used by {', '.join(names)}; expected one store, one read")
    if chain.fused is None and chain.preserved and not chain.opaque and names.count("index_copy_") != 1:
        raise KvsinkError(f"{site.path}: packed keys are stored {names.count('index_copy_')} times; expected once")
    if chain.fused is not None and kind(chain.fused) == "kvsink.attend":
        store = next(user for user in users if kind(user) == "kvsink.append_")
        if not store < chain.fused:
            raise KvsinkError(f"{site.path}: attention runs before the new rows are stored")


def _makes_storage(user: Node, codes: Node) -> bool:
    """Whether a growing cache does this in the graph: what it holds is copied into longer storage, which goes to the cache."""
    if user.op == "output":
        return True
    first = all(user < other for other in codes.users if other is not user)
    return kind(user) == "setitem" and argument(user, 0, "a") is codes and first


def _verify_stock(site: AttentionSite, chain: Chain) -> None:
    for side in (chain.keys, chain.values):
        stored = [argument(write, 3, "source") for write in site.writes if kind(write) == "index_copy_"]
        stored += [tensor for write in site.writes if kind(write) == "cat" for tensor in argument(write, 0, "tensors")]
        if side.spec.packed and side.new in stored:
            raise KvsinkError(f"{site.path}: a new row reaches the cache without being coded")
