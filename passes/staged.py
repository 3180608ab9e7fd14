"""Passes that put stages of a codec into the graph, behind each other: those that `kvsink.codecs.steps` gives their name.

A stage on the way in becomes nodes here; `quantize` puts its inverse on the way back, at the place where the codec takes it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsink.graph.sites import AttentionSite
from kvsink.passes.base import Declined, RewritePass, Work

__all__ = ["StagedPass"]


@dataclass(frozen=True)
class StagedPass(RewritePass):
    """without: the reason at a site whose codec has no stage of this pass."""

    exact: ClassVar[bool] = True
    without: ClassVar[str]

    def check(self, site: AttentionSite, work: Work) -> Declined | None:
        chain = work.chain(site)
        if chain is None:
            return site.declined("no codec is attached")
        if chain.opaque:
            return site.declined("its codec works on blocks of tokens, inside the cache ops")
        if not any(self.name in chain.passes_of(side) for side in chain.sides):
            return site.declined(self.without)
        return None

    def rewrite(self, site: AttentionSite, work: Work) -> None:
        chain = work.chain(site)
        assert chain is not None
        chain.enter(self.name)
