"""Protection policies: how they are written, and which segments a layer gets from them."""

from __future__ import annotations

import pytest

from kvsink.errors import KvsinkError, UnknownName
from kvsink.protect import Policy, Segment, SinkStage, parse_policies, segments_for_layer

EARLY, LATE = SinkStage(2, (10,), 300.0, 0.5), SinkStage(7, (11,), 9000.0, 0.6)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("none", []),
        ("first:4", [("first", 4)]),
        ("kvsink:5+first:1", [("kvsink", 5), ("first", 1)]),
        (" massive:20 + first:2 ", [("massive", 20), ("first", 2)]),
        ("none+first:1", [("first", 1)]),
    ],
)
def test_policies_are_read(text: str, wanted: list[tuple[str, int]]) -> None:
    assert parse_policies(text) == tuple(Policy(*pair) for pair in wanted)


def test_policies_are_printed_as_they_are_written() -> None:
    assert "+".join(map(str, parse_policies("kvsink:5+first:1"))) == "kvsink:5+first:1"
    assert str(Policy("none", 0)) == "none"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kvsinks:5", "unknown protection 'kvsinks'; nearest known: kvsink"),
        ("", "unknown protection ''"),
        ("first:1+", "unknown protection ''"),
        ("first", "'first' needs a positive number of rows; write first:5"),
        ("first:0", "'first:0' needs a positive number"),
        ("first:-1", "'first:-1' needs a positive number"),
        ("massive:2.5", "'massive:2.5' needs a positive number"),
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


def test_without_stages_kvsink_keeps_nothing() -> None:
    assert segments_for_layer(parse_policies("kvsink:5"), 9, ()) == ()
    assert segments_for_layer(parse_policies("massive:3"), 0, ()) == (Segment("massive", 3),)


def test_segments_share_candidates_by_key() -> None:
    assert Segment("stage:2", 5).key == "stage:2:5" != Segment("stage:2", 4).key
