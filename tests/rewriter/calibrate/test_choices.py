"""What layers are coded with: options are read, and reach the plan."""

from __future__ import annotations

import re

import pytest

import kvsink
from kvsink.calibrate.choices import LayerChoice, parse_layers
from kvsink.errors import KvsinkError, UnsupportedError
from kvsink.model.runtime import runtime_of
from tests.models import build

BASE = LayerChoice(2, 4, "kvsink:5", 0)


def test_layers_are_read() -> None:
    text = "0-1:key_bits=4,protect=none; 3:value_bits=2.5,window=8"
    assert parse_layers(text, 5, BASE) == [
        LayerChoice(4, 4, "none", 0),
        LayerChoice(4, 4, "none", 0),
        BASE,
        LayerChoice(2, 2.5, "kvsink:5", 8),
        BASE,
    ]
    assert parse_layers("", 3, BASE) == [BASE] * 3
    assert parse_layers("0-2:key_bits=4;1:key_bits=8", 3, BASE)[1].key_bits == 8  # the later one wins


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0-9:key_bits=4", "names layers outside 0 to 4"),
        ("3-1:key_bits=4", "names layers outside"),
        ("5:key_bits=4", "names layers outside"),
        ("x:key_bits=4", "'x:key_bits=4' cannot be read; write for example"),
        ("-1:key_bits=4", "cannot be read"),
        ("0", "cannot be read"),
        ("0:", "cannot be read"),
        ("0:bits=4", "'bits=4' is not one of key_bits="),
        ("0:key_bits=many", "'key_bits=many' is not one of"),
        ("0:window=2.5", "'window=2.5' is not one of"),
    ],
)
def test_layers_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(KvsinkError, match=re.escape(words) if "'" not in words else words):
        parse_layers(text, 5, BASE)


def test_layers_reach_the_plan() -> None:
    model = build("llama")
    kvsink.rewrite(model, "rtn", protect="first:2", layers="1:key_bits=8,protect=none,window=3")
    first, second = (plan.codec for plan in runtime_of(model).plans)
    assert (first.key.bits, first.exact_rows, first.window) == (4, 2, 0)
    assert (second.key.bits, second.exact_rows, second.window) == (8, 0, 3)


def test_sliding_layers_are_packed_where_there_are_no_others_or_when_asked() -> None:
    alone, mixed = build("mistral-sliding"), build("gemma3")
    assert all(row.packed for row in kvsink.rewrite(alone, "rtn").layers)
    assert [row.packed for row in kvsink.rewrite(mixed, "rtn").layers] == [False, True]
    assert [row.packed for row in kvsink.rewrite(mixed, "rtn", sliding=True).layers] == [True, True]
    with pytest.raises(UnsupportedError, match="every layer is left alone .sliding attention"):
        kvsink.rewrite(build("mistral-sliding"), "rtn", sliding=False)
    with pytest.raises(UnsupportedError, match="layer 0 .*sliding window of 8: keys are coded by blocks of tokens"):
        kvsink.rewrite(build("gemma3"), "kivi", sliding=True)
