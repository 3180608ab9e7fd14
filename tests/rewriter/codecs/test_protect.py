"""Protection policies: how they are written, and which segments a layer gets from them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvsink.codecs import Anchors
from kvsink.codecs.protect import Policy, Segment, SinkStage, anchors_for_layer, parse_policies, segments_for_layer
from kvsink.errors import KvsinkError, UnknownName

EARLY, LATE = SinkStage(2, (10,), 300.0, 0.5), SinkStage(7, (11,), 9000.0, 0.6)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("none", []),
        ("first:4", [("first", 4)]),
        ("kvsink:5+first:1", [("kvsink", 5), ("first", 1)]),
        ("kvsink:auto", [("kvsink", 0)]),
        (" massive:20 + first:2 ", [("massive", 20), ("first", 2)]),
        ("none+first:1", [("first", 1)]),
    ],
)
def test_policies_are_read(text: str, wanted: list[tuple[str, int]]) -> None:
    assert parse_policies(text) == tuple(Policy(*pair) for pair in wanted)


def test_policies_are_printed_as_they_are_written() -> None:
    for text in ("kvsink:5+first:1", "kvsink:auto+first:1"):
        assert "+".join(map(str, parse_policies(text))) == text
    assert str(Policy("none", 0)) == "none"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kvsinks:5", "unknown protection 'kvsinks'; nearest known: kvsink"),
        ("", "unknown protection ''"),
        ("first:1+", "unknown protection ''"),
        ("first", "'first' needs a positive number of rows; write first:5"),
        ("kvsink:autos", "'kvsink:autos' needs a positive number of rows; write kvsink:5 or kvsink:auto, or none"),
        ("first:auto", "'first:auto' needs a positive number of rows; write first:5"),
        ("first:0", "'first:0' needs a positive number"),
        ("first:-1", "'first:-1' needs a positive number"),
        ("massive:2.5", "'massive:2.5' needs a positive number"),
        ("anchor:1%", "unknown protection 'anchor'; nearest known: anchors"),
        ("anchors:0%", "a share of 0% is not above 0 and up to 100 percent; write for example anchors:1%"),
        ("anchors:101%", "a share of 101% is not above 0"),
        ("anchors:0.00001%", "a share of 0.00001% is not above 0"),
        ("anchors:-1%", "'-1%' is not a percentage; write for example anchors:1%"),
        ("anchors:1e1%", "'1e1%' is not a percentage"),
        ("anchors:0.5", "'anchors:0.5' needs a percentage or a positive number of rows; write anchors:1% or anchors:40"),
        ("anchors", "needs a percentage or a positive number of rows"),
        ("anchors:1%:mas", "unknown anchor score 'mas'; nearest known: mass"),
        ("anchors:1%:mass:exact", "has too many parts"),
        ("anchors:1%+anchors:2%", "names anchors twice"),
        ("pivots:0", "'pivots:0' needs a positive number of rows; write pivots:5"),
        ("pivots:5:x", "thresholds of pivots are two numbers; write pivots:15:100:1000"),
        ("pivots:5:1:2:3", "thresholds of pivots are two numbers"),
        ("random:x", "'random:x' needs a positive number"),
        ("sinks", "'sinks' needs a share above 0 and up to 1 of the largest activation; write sinks:0.25"),
        ("sinks:5", "'sinks:5' needs a share above 0"),
        ("sinks:nan", "'sinks:nan' needs a share"),
        ("sinks:0.25:0", "'sinks:0.25:0' needs a positive number of rows; write sinks:0.25:5"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, words: str) -> None:
    with pytest.raises(KvsinkError) as caught:
        parse_policies(text)
    assert words in str(caught.value)
    assert isinstance(caught.value, UnknownName) == words.startswith("unknown")


@pytest.mark.parametrize(
    ("layer", "source"), [(0, None), (2, None), (3, "stage:2"), (7, "stage:2"), (8, "stage:7"), (20, "stage:7")]
)
def test_a_layer_uses_the_latest_stage_before_it(layer: int, source: str | None) -> None:
    segments = segments_for_layer(parse_policies("kvsink:5+first:1"), layer, (EARLY, LATE))
    assert segments == ((Segment(source, 5),) if source else ()) + (Segment("first", 1),)


@pytest.mark.parametrize(("crowd", "kept"), [(0, 5), (1, 5), (5, 5), (9, 9), (12, 12), (104, 12)])
def test_as_many_sinks_are_kept_as_calibration_counted_within_bounds(crowd: int, kept: int) -> None:
    stages = EARLY, replace(LATE, crowd=crowd)
    found = [segments_for_layer(parse_policies("kvsink:auto+first:1"), layer, stages) for layer in (2, 3, 8)]
    first = Segment("first", 1)
    assert found == [(first,), (Segment("stage:2", 5), first), (Segment("stage:7", kept), first)]


def test_without_stages_kvsink_keeps_nothing() -> None:
    assert segments_for_layer(parse_policies("kvsink:5"), 9, ()) == ()
    assert segments_for_layer(parse_policies("massive:3"), 0, ()) == (Segment("massive", 3),)


def test_segments_share_candidates_by_key() -> None:
    assert Segment("stage:2", 5).key == "stage:2:5" != Segment("stage:2", 4).key


@pytest.mark.parametrize(
    ("text", "anchors"),
    [
        ("anchors:1%", Anchors(ppm=10_000)),
        ("anchors:.5%:exact", Anchors(ppm=5_000, score="exact")),
        ("anchors:40:count", Anchors(rows=40, normalize=True)),
        ("anchors:100%:qnorm:count", Anchors(ppm=1_000_000, score="qnorm", normalize=True)),
    ],
)
def test_anchors_are_read_and_printed(text: str, anchors: Anchors) -> None:
    policies = parse_policies(f"kvsink:5+{text}")
    assert anchors_for_layer(policies) == anchors and anchors_for_layer(policies[:1]) is None
    assert parse_policies(str(policies[1])) == policies[1:]
    assert segments_for_layer(policies, 3, (EARLY,)) == (Segment("stage:2", 5),)  # anchors take places of their own


@pytest.mark.parametrize(("percent", "tokens", "rows"), [("1%", 100, 1), ("1%", 101, 2), ("7%", 100, 7), ("0.1%", 1, 1)])
def test_the_budget_is_rounded_up_from_the_exact_share(percent: str, tokens: int, rows: int) -> None:
    anchors = anchors_for_layer(parse_policies(f"anchors:{percent}"))
    assert anchors is not None and anchors.capacity(tokens) == rows


def test_sinks_are_rows_above_a_share_of_the_latest_stage() -> None:
    assert parse_policies("sinks:0.25") == (Policy("sinks", 8, share=0.25),)
    assert "+".join(map(str, parse_policies("sinks:.5:3+first:1"))) == "sinks:0.5:3+first:1"
    found = [segments_for_layer(parse_policies("sinks:0.25:3"), layer, (EARLY, LATE)) for layer in (2, 3, 8)]
    assert found == [(), (Segment("sinks:2:0.25", 3),), (Segment("sinks:7:0.25", 3),)]


def test_pivots_stand_behind_the_first_stage_that_passes() -> None:
    assert parse_policies("pivots:15") == (Policy("pivots", 15, least=100.0, ratio=1000.0),)
    assert str(parse_policies("pivots:3:50:20")[0]) == "pivots:3:50:20" and str(parse_policies("pivots:3")[0]) == "pivots:3"
    weak = SinkStage(2, (10,), 300.0, 0.5)  # 600 times its median
    pick = [segments_for_layer(parse_policies("pivots:15"), layer, (weak, LATE)) for layer in (0, 7, 8)]
    assert pick == [(Segment("first", 1),), (Segment("first", 1),), (Segment("pivots:7:100:1000", 15),)]
    assert segments_for_layer(parse_policies("pivots:15:100:500"), 3, (weak, LATE)) == (Segment("pivots:2:100:500", 15),)
    assert segments_for_layer(parse_policies("pivots:15"), 9, ()) == (Segment("first", 1),)
