"""Which rows stay exact: protection policies, their text form, and where each finds its candidates.

    none                nothing
    first:N             the first N tokens of a sequence, padding not counted (Preserve-First-N); documents packed in one
                        sequence share them, and the first document comes first
    random:N            N rows drawn by a fixed hash of a token's number, the same in every layer and run: a control
    kvsink:K            K attention sinks per emergence stage, by the stable outlier channel of the hidden states
    kvsink:auto         the same, of every stage as many as a window of calibration shows behind it, 5 to 12
    sinks:T[:N]         per emergence stage, rows into whose outlier channel the feed-forward layer of its block writes more than T
                        times the largest activation of calibration; the first N (8) of a sequence, and of a serving engine's page
                        the first that find a place. A row decides for itself, whatever comes behind it
    massive:N           per layer, the rows of the N largest entries of the hidden states that enter it
    pivots:N[:A[:R]]    at most N rows of the prompt whose largest |h| behind the probe block exceeds A (100) and R (1000)
                        times the median |h|; all layers behind that block share them, those before keep the first row
    anchors:P%[:S][:count], anchors:N[:S][:count]
                        per layer, the rows with the most attention: ceil(P·t) of t tokens, or N. S is the score: `mass`
                        (attention received, the default), `qnorm` (each query weighted by its norm) or `exact` (the bound
                        on the error of the output); `count` divides by the number of queries that could see the row

A union joins policies with `+`, as in `kvsink:5+first:1` or `kvsink:5+anchors:1%`. Per layer the fixed counts become segments
of the exact side store, each with a capacity and a source of candidates; anchors take the places behind them.

Anchors    a new row lives in the recent window while its score grows; leaving it, the row competes with the anchors held (whose
           scores go on growing) for the present budget. A row that lost is read from its codes for good. Rows of a
           chunk that do not fit the window compete right after their own chunk's attention. Scores are summed over all
           query heads: one list of anchors per layer and batch row. Slots of padding count in t, padding is never chosen
Source     first:N is Preserve-First-N (KVQuant, arXiv 2401.18079); kvsink:K is KVSink, arXiv 2508.04257 section 4, with one
           set of rows per emergence stage; kvsink:auto and sinks:T are ours; massive:N is the rule of RotateKV, arXiv 2501.16383;
           anchors is the online rule of AnTKV, arXiv 2506.19505; pivots is AKVQ-VL, arXiv 2501.15021
Differs    a model may have several emergence stages: a layer uses the latest one before it (pivots: the first that passes
           the thresholds). Rows are chosen over chunks and decoding too, up to the capacity; pivots in steps of several
           tokens only. A crop takes rows away, not what their queries gave to other rows' scores. Statistics of a
           calibration leave out every protected row but anchors, which are chosen while the text is read
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

from kvsink.codecs.anchors import MILLION, SCORES, Anchors
from kvsink.errors import KvsinkError, UnknownName

__all__ = [
    "MOST",
    "SCORES",
    "Anchors",
    "Policy",
    "Segment",
    "SinkStage",
    "anchors_for_layer",
    "parse_policies",
    "probe_stage",
    "segments_for_layer",
]

FEWEST, MOST = 5, 12  # rows of `kvsink:auto`; 12 of 4,096 tokens take 2 % of what codes of 2 bits take
SINKS = 8  # rows of a sequence that `sinks` keeps where no number is given
_KINDS = ("none", "first", "random", "kvsink", "sinks", "massive", "pivots", "anchors")


@dataclass(frozen=True)
class Policy:
    """One policy and its count of rows (of entries, for `massive`; 0 for `kvsink:auto`).

    anchors: how anchors are counted and scored; least, ratio: the thresholds of pivots; share: that of sinks.
    """

    kind: str
    count: int
    anchors: Anchors | None = None
    least: float = 100.0
    ratio: float = 1000.0
    share: float = 0.0

    def __str__(self) -> str:
        if self.anchors is not None:
            return str(self.anchors)
        if self.kind == "sinks":
            return f"sinks:{self.share:g}:{self.count}"
        if self.kind == "kvsink" and not self.count:
            return "kvsink:auto"
        tail = f":{self.least:g}:{self.ratio:g}" if (self.least, self.ratio) != (100.0, 1000.0) else ""
        return self.kind if self.kind == "none" else f"{self.kind}:{self.count}{tail}"


@dataclass(frozen=True)
class SinkStage:
    """One emergence of massive activations: the block that writes them and the channels that carry them.

    channels are sorted by size; size is the largest |H| of the first channel at the output of `block`; crowd: the most rows of a
    window of calibration that are massive there, 0 where none were counted.
    """

    block: int
    channels: tuple[int, ...]
    size: float
    median: float
    crowd: int = field(default=0, compare=False)

    @property
    def kept(self) -> int:
        """Rows that `kvsink:auto` keeps."""
        return min(MOST, max(FEWEST, self.crowd))


@dataclass(frozen=True)
class Segment:
    """A part of one layer's exact store: `count` places filled from `source`.

    source is "first", "random", "massive", "stage:B" for the sinks that block B marks, "sinks:B:T" for rows above a share T of what
    it was seen to write, or "pivots:B:A:R" for the pivots behind block B with their thresholds.
    """

    source: str
    count: int
    key: str = field(init=False, compare=False)  # under which a forward pass shares the candidates between layers

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.source}:{self.count}")


def parse_policies(text: str) -> tuple[Policy, ...]:
    """Read `--protect`: policies joined by `+`. Raises KvsinkError naming the part that cannot be read."""
    policies: list[Policy] = []
    for part in text.replace(" ", "").split("+"):
        kind, _, count = part.partition(":")
        if kind not in _KINDS:
            raise UnknownName("protection", kind, _KINDS, "Write for example --protect kvsink:5+first:1.")
        if kind == "none":
            continue
        if kind == "anchors":
            if any(p.kind == "anchors" for p in policies):
                raise KvsinkError(f"protection {text!r} names anchors twice; a layer has one list of them, write one share")
            policies.append(_anchors(part, count))
        elif kind == "pivots":
            policies.append(_pivots(part, count))
        elif kind == "sinks":
            policies.append(_sinks(part, count))
        else:
            policies.append(Policy(kind, 0 if part == "kvsink:auto" else _count(part, kind, count)))
    return tuple(policies)


def _count(part: str, kind: str, count: str) -> int:
    if not count.isdigit() or int(count) < 1:
        auto = f" or {kind}:auto" if kind == "kvsink" else ""
        raise KvsinkError(f"protection {part!r} needs a positive number of rows; write {kind}:5{auto}, or none to protect nothing")
    return int(count)


def _pivots(part: str, text: str) -> Policy:
    count, *limits = text.split(":")
    try:
        numbers = [float(x) for x in limits]
    except ValueError:
        numbers = [-1.0]
    if len(numbers) > 2 or any(not 0 <= x < float("inf") for x in numbers):
        raise KvsinkError(f"protection {part!r}: thresholds of pivots are two numbers; write pivots:15:100:1000")
    least, ratio = (*numbers, *(100.0, 1000.0)[len(numbers) :])
    return Policy("pivots", _count(part, "pivots", count), least=least, ratio=ratio)


def _sinks(part: str, text: str) -> Policy:
    share, _, count = text.partition(":")
    try:
        number = float(share)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise KvsinkError(f"protection {part!r} needs a share above 0 and up to 1 of the largest activation; write sinks:0.25")
    return Policy("sinks", _count(part, "sinks:0.25", count or str(SINKS)), share=number)


def _anchors(part: str, text: str) -> Policy:
    amount, *words = text.split(":")
    normalize = bool(words) and words[-1] == "count"
    words = words[:-1] if normalize else words
    if len(words) > 1:
        raise KvsinkError(f"protection {part!r} has too many parts; write anchors:1%, anchors:1%:exact or anchors:1%:mass:count")
    score = words[0] if words else "mass"
    if score not in SCORES:
        raise UnknownName("anchor score", score, (*SCORES, "count"), "Write for example anchors:1%:mass.")
    if amount.endswith("%"):
        if not re.fullmatch(r"\d+(\.\d+)?|\.\d+", amount[:-1]):
            raise KvsinkError(f"protection {part!r}: {amount!r} is not a percentage; write for example anchors:1%")
        ppm = round(Fraction(amount[:-1]) * 10_000)
        if not 0 < ppm <= MILLION:
            raise KvsinkError(
                f"protection {part!r}: a share of {amount} is not above 0 and up to 100 percent; write for example anchors:1%"
            )
        return Policy("anchors", 0, Anchors(ppm=ppm, score=score, normalize=normalize))
    if not amount.isdigit() or int(amount) < 1:
        raise KvsinkError(f"protection {part!r} needs a percentage or a positive number of rows; write anchors:1% or anchors:40")
    return Policy("anchors", 0, Anchors(rows=int(amount), score=score, normalize=normalize))


def probe_stage(policy: Policy, stages: tuple[SinkStage, ...]) -> SinkStage | None:
    """The stage behind which pivots are looked for: the first whose activations pass the thresholds."""
    return next((s for s in stages if s.size > policy.least and s.size > policy.ratio * s.median), None)


def segments_for_layer(policies: tuple[Policy, ...], layer: int, stages: tuple[SinkStage, ...]) -> tuple[Segment, ...]:
    """The segments of one layer: `kvsink` and `sinks` count only behind an emergence block, with the latest stage."""
    out = []
    for policy in policies:
        if policy.kind in ("first", "massive", "random"):
            out.append(Segment(policy.kind, policy.count))
        elif policy.kind == "pivots":
            probe = probe_stage(policy, stages)
            if probe is not None and probe.block < layer:
                out.append(Segment(f"pivots:{probe.block}:{policy.least:g}:{policy.ratio:g}", policy.count))
            else:
                out.append(Segment("first", 1))
        elif policy.kind in ("kvsink", "sinks") and (behind := [s for s in stages if s.block < layer]):
            stage = max(behind, key=lambda s: s.block)
            source = f"stage:{stage.block}" if policy.kind == "kvsink" else f"sinks:{stage.block}:{policy.share:g}"
            out.append(Segment(source, policy.count or stage.kept))
    return tuple(out)


def anchors_for_layer(policies: tuple[Policy, ...]) -> Anchors | None:
    """The anchors among the policies of a layer, if any."""
    return next((p.anchors for p in policies if p.anchors is not None), None)
