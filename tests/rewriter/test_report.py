"""The report of a rewrite: what was done to which layer, and the bits it counts."""

from __future__ import annotations

import json
from typing import Any

import kvsink
from kvsink.model.runtime import runtime_of
from kvsink.report import Report, counted_bits
from tests.models import HEAD_DIM, KV_HEADS, build, tokens

IDS = tokens(8, 64, seed=1)


def planted() -> Any:
    model = build("llama")
    model.model.embed_tokens.weight[5, 7] = 800.0
    return model


def test_the_report_says_what_was_done() -> None:
    report = kvsink.rewrite(planted(), "klt", calibration=IDS, protect="kvsink:5+first:1", key_bits=2, value_bits=4)
    assert (report.method, report.protect, report.calibration_tokens) == ("klt", "kvsink:5+first:1", 512)
    assert [row.protect for row in report.layers] == ["first:1", "stage:0:5, first:1"]
    assert [row.path for row in report.layers] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert report.stages[0]["block"] == 0 and report.stages[0]["channels"][0] == 7
    assert all(row.packed and row.key.startswith("centred, block 64, klt, trellis") for row in report.layers)
    assert report.smaller == 16 / report.bits and 2 < report.bits < 16 and report.table_bytes > 0 and report.seconds > 0
    assert set(report.versions) == {"kvsink", "torch", "transformers", "python"}
    record = json.loads(report.to_json())
    assert record["layers"][1]["protect"] == "stage:0:5, first:1" and record["bits_per_element"] == round(report.bits, 4)
    assert record["bits_counted_at_tokens"] == 4096 and record["times_smaller"] == round(report.smaller, 3)
    page = report.to_markdown()
    assert "Sinks emerge at the output of block 0: channel 7, |H| up to 8" in page
    assert f"{report.bits:.2f} bits per cached element" in page and "| 1 `model.layers.1.self_attn` |" in page


def test_the_report_names_what_is_left_alone() -> None:
    report = kvsink.rewrite(build("gemma3"), "klt", calibration=IDS)
    left = report.layers[0]
    assert not left.packed and left.reason.startswith("sliding attention: its window of 8 tokens already bounds its size")
    assert (left.key_bits, left.value_bits) == (16.0, 16.0) and report.layers[1].packed
    assert left.reason in report.to_markdown() and "no massive activation was found" in report.to_markdown()


def test_16_bit_is_reported_as_16_bit() -> None:
    report = kvsink.rewrite(build("llama"), "klt", key_bits=16, value_bits=16)
    assert report.protect == "none" and report.calibration_tokens == 0
    assert all((row.key, row.value, row.protect) == ("16 bit", "16 bit", "") for row in report.layers)
    assert 16 < report.bits < 16.6  # the positions are counted too
    assert Report("m", "rtn", "none").bits == 16.0


def test_counted_bits_follow_the_formula() -> None:
    model = build("llama")
    kvsink.rewrite(model, "rtn", key_bits=2, value_bits=4, protect="first:3", window=5)
    codec, n = runtime_of(model).plans[1].codec, 1000
    shared = 32 * 2 * 3 + 40 * n + 32 * 5 + 64  # slots and scores, positions and real slots, slots of the window, the length
    for bits, counted in zip((2, 4), counted_bits(codec, KV_HEADS, HEAD_DIM, tokens=n), strict=True):
        row = HEAD_DIM * bits + 2 * 16  # codes, step and minimum
        total = KV_HEADS * (n * row + 8 * HEAD_DIM * 16) + shared / 2
        assert abs(counted - total / (KV_HEADS * HEAD_DIM * n)) < 1e-9
