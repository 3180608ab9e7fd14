"""Which rows stay exact: protection policies, their text form, and where each finds its candidates.

A policy is written `none`, `first:N`, `kvsink:K` or `massive:N`; a union joins them with `+`, as in `kvsink:5+first:1`.
Per layer a policy becomes segments of the exact side store, each with a capacity and a source of candidates.

Source     first:N is Preserve-First-N (KVQuant, arXiv 2401.18079); kvsink:K is KVSink, arXiv 2508.04257 section 4, with one
           set of rows per emergence stage; massive:N is the rule of RotateKV, arXiv 2501.16383
Differs    a model may have several emergence stages: a layer uses the latest one before it. Rows are chosen over chunks
           and decoding too, up to the capacity
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvsink.errors import KvsinkError, UnknownName

__all__ = ["Policy", "Segment", "SinkStage", "parse_policies", "segments_for_layer"]

_KINDS = ("none", "first", "kvsink", "massive")


@dataclass(frozen=True)
class Policy:
    """One policy and its count of rows (of entries, for `massive`)."""

    kind: str
    count: int

    def __str__(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind}:{self.count}"


@dataclass(frozen=True)
class SinkStage:
    """One emergence of massive activations: the block that writes them and the channels that carry them.

    channels are sorted by size; size is the largest |H| of the first channel at the output of `block`.
    """

    block: int
    channels: tuple[int, ...]
    size: float
    median: float


@dataclass(frozen=True)
class Segment:
    """A part of one layer's exact store: `count` places filled from `source`.

    source is "first", "massive" or "stage:B" for the sinks that block B marks.
    """

    source: str
    count: int
    key: str = field(init=False, compare=False)  # under which a forward pass shares the candidates between layers

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.source}:{self.count}")


def parse_policies(text: str) -> tuple[Policy, ...]:
    """Read `--protect`: policies joined by `+`. Raises KvsinkError naming the part that cannot be read."""
    policies = []
    for part in text.replace(" ", "").split("+"):
        kind, _, count = part.partition(":")
        if kind not in _KINDS:
            raise UnknownName("protection", kind, _KINDS, "Write for example --protect kvsink:5+first:1.")
        if kind == "none":
            continue
        if not count.isdigit() or int(count) < 1:
            raise KvsinkError(
                f"protection {part!r} needs a positive number of rows; write {kind}:5, or none to protect nothing"
            )
        policies.append(Policy(kind, int(count)))
    return tuple(policies)


def segments_for_layer(policies: tuple[Policy, ...], layer: int, stages: tuple[SinkStage, ...]) -> tuple[Segment, ...]:
    """The segments of one layer: `kvsink` counts only behind an emergence block, with the latest stage."""
    out = []
    for policy in policies:
        if policy.kind == "first":
            out.append(Segment("first", policy.count))
        elif policy.kind == "massive":
            out.append(Segment("massive", policy.count))
        elif behind := [s for s in stages if s.block < layer]:
            out.append(Segment(f"stage:{max(s.block for s in behind)}", policy.count))
    return tuple(out)
