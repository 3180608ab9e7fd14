"""Find every attention site and say what it is made of; nothing is rewritten.

Formula    none
Source     ours
Differs    no
Shapes     see `kvsink.graph.sites`
Exact      yes, the graph is not touched
Declines   whatever `kvsink.graph.sites` declines: cross, vision and softcapped attention, unknown RoPE
Cost       none
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsink.graph.sites import AttentionSite
from kvsink.passes.base import Declined, RewritePass, Work, register_pass


@register_pass
@dataclass(frozen=True)
class Locate(RewritePass):
    name: ClassVar[str] = "locate"
    exact: ClassVar[bool] = True
    after: ClassVar[tuple[str, ...]] = ("normalize",)

    def refused(self, work: Work) -> list[Declined]:
        return work.refused

    def check(self, site: AttentionSite, work: Work) -> Declined | None:
        return None if site.core == "sdpa" else site.declined(f"core {site.core!r} was not normalised")
