"""Run passes over a graph, in order, checked between them, with one record per pass and site.

Order      `DEFAULT`; every pass names what it must precede or follow, and a list that breaks this is refused
Checks     graph lint after each pass; the graph stays executable after each pass
Never      dead-code removal: in dynamo graphs it deletes in-place cache writes; passes erase what they orphaned
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from kvsink.errors import KvsinkError, UnknownName
from kvsink.graph.render import render_site
from kvsink.graph.sites import AttentionSite, Declined, find_sites
from kvsink.passes.base import RewritePass, Work, pass_named, registered_passes

__all__ = ["DEFAULT", "PipelineReport", "Record", "Snapshot", "check_order", "explain_graph", "make_passes", "run_passes"]

DEFAULT = ("normalize", "locate", "attach", "center", "rotate", "reorder", "quantize", "preserve", "fuse", "verify")


@dataclass(frozen=True)
class Record:
    """What one pass did at one site; reason is empty when it was rewritten."""

    pass_name: str
    path: str
    layer: int
    done: bool
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.pass_name} {'rewrote' if self.done else 'left alone'} {self.path}" + (
            f": {self.reason}" if self.reason else ""
        )


@dataclass(frozen=True)
class Snapshot:
    """The text of one site after one pass."""

    pass_name: str
    path: str
    text: str


@dataclass
class PipelineReport:
    """Everything a run left: records in order, the texts that were asked for, and the sites as last located."""

    records: list[Record] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    sites: list[AttentionSite] = field(default_factory=list)

    def done(self, pass_name: str) -> list[Record]:
        """Sites that a pass rewrote."""
        return [record for record in self.records if record.pass_name == pass_name and record.done]

    def declined(self, pass_name: str | None = None) -> list[Record]:
        """Sites left alone, each with its reason; of one pass, or of all."""
        return [record for record in self.records if not record.done and pass_name in (None, record.pass_name)]

    def left_alone(self) -> dict[str, str]:
        """Attention modules that keep their own arithmetic to the end: path → the first reason given."""
        fused = {record.path for record in self.records if record.done and record.pass_name in ("quantize", "fuse")}
        reasons: dict[str, str] = {}
        for record in self.declined():
            if record.path not in fused and record.pass_name in ("locate", "attach", "quantize"):
                reasons.setdefault(record.path, record.reason)
        return reasons


def make_passes(names: Sequence[str | RewritePass] = DEFAULT) -> list[RewritePass]:
    """Pass objects from names or objects, in an order that every pass accepts."""
    passes = [pass_named(entry)() if isinstance(entry, str) else entry for entry in names]
    check_order(passes)
    return passes


def check_order(passes: Sequence[RewritePass]) -> None:
    """Raise KvsinkError when a pass stands before one it must follow, or behind one it must precede, or names one that is none."""
    place, known = {rewrite.name: index for index, rewrite in enumerate(passes)}, registered_passes()
    for rewrite in passes:
        for other in (*rewrite.after, *rewrite.before):
            if other not in place and other not in known:
                raise UnknownName("pass", other, known, f"Pass {rewrite.name!r} names it in `after` or `before`.")
        for other in rewrite.after:
            if place.get(other, -1) > place[rewrite.name]:
                raise KvsinkError(f"pass {rewrite.name!r} must come after {other!r}; move it behind position {place[other]}")
        for other in rewrite.before:
            if other in place and place[other] < place[rewrite.name]:
                raise KvsinkError(f"pass {rewrite.name!r} must come before {other!r}; move it ahead of position {place[other]}")


def run_passes(
    gm: fx.GraphModule,
    passes: Sequence[str | RewritePass] = DEFAULT,
    plan: Callable[[AttentionSite], Any] | None = None,
    trace: bool | str = False,
    watch: Callable[[str, fx.GraphModule], None] | None = None,
) -> PipelineReport:
    """Rewrite `gm` in place. plan: the codec of a site with a stock cache (see `kvsink.passes.chain.SitePlan`).

    trace: keep the text of each site (or of the one whose path is given) before the first and after each pass.
    watch: called with the pass name and the recompiled graph after each pass, for tests.
    """
    work = Work(gm) if plan is None else Work(gm, plan)
    report = PipelineReport()
    work.sites, work.refused = _locate(gm)
    _snapshot(report, "before", work, trace)
    for rewrite in make_passes(passes):
        report.records += [Record(rewrite.name, each.path, -1, False, each.reason) for each in rewrite.refused(work)]
        for site in work.sites:
            verdict = rewrite.check(site, work)
            if verdict is None:
                rewrite.rewrite(site, work)
            report.records.append(Record(rewrite.name, site.path, site.layer, verdict is None, verdict.reason if verdict else ""))
        gm.graph.lint()
        if rewrite.moves_sites:
            work.sites, work.refused = _locate(gm)
        if trace:
            _snapshot(report, rewrite.name, work, trace)
        if watch is not None:
            gm.recompile()
            watch(rewrite.name, gm)
    gm.recompile()
    report.sites = work.sites
    return report


def explain_graph(gm: fx.GraphModule, passes: Sequence[str | RewritePass] = DEFAULT, plan: Any = None) -> str:
    """Before and after of the first rewritten site as text, then what was left alone and why. Rewrites `gm`."""
    report = run_passes(gm, passes, plan, trace=True)
    rewritten = [record.path for record in report.records if record.done and record.pass_name in ("quantize", "fuse")]
    lines: list[str] = []
    if rewritten:
        texts = [shot for shot in report.snapshots if shot.path == rewritten[0]]
        shown = {shot.pass_name: shot.text for shot in texts}
        for title, name in (("before", "before"), ("after, as plain operators", "preserve"), ("after, fused", "fuse")):
            if name in shown and (name != "fuse" or report.done("fuse")):
                lines += [f"{rewritten[0]}, {title}", shown[name], ""]
    lines += [f"left alone: {path}: {reason}" for path, reason in report.left_alone().items()]
    return "\n".join(lines)


def _locate(gm: fx.GraphModule) -> tuple[list[AttentionSite], list[Declined]]:
    found = find_sites(gm)
    return [each for each in found if isinstance(each, AttentionSite)], [each for each in found if isinstance(each, Declined)]


def _snapshot(report: PipelineReport, name: str, work: Work, trace: bool | str) -> None:
    if not trace:
        return
    for site in work.sites:
        if trace is True or trace == site.path:
            report.snapshots.append(Snapshot(name, site.path, render_site(site, work.gm, work.chain(site))))
