"""kvsink-bench onnx on this processor: rows of numbers, then of times; a case that stops or dies is one line among the others."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import click
import pytest

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

from kvsink.errors import KvsinkError
from kvsink.tools.bench import main
from kvsink.tools.bench_onnx import _Apart, _told, parse_cases, table


def dies() -> dict[str, Any]:
    os._exit(7)


def sleeps() -> dict[str, Any]:
    time.sleep(60)
    return {}


def fails() -> dict[str, Any]:
    raise ValueError("first line\nsecond line")


def lives() -> dict[str, Any]:
    return {"pid": os.getpid()}


@pytest.mark.slow
def test_a_process_that_goes_wrong_is_told_in_one_line_and_replaced() -> None:
    apart = _Apart()
    try:
        first = apart(60, lives)
        assert apart(60, lives) == first != {"pid": os.getpid()}
        assert apart(60, dies) == {"verdict": "its process died"}
        second = apart(60, lives)
        assert second != first
        assert apart(60, fails) == {"verdict": "ValueError: first line"}
        assert apart(60, lives) != second
        assert apart(1, sleeps) == {"verdict": "stopped after 1 s"}
        assert "pid" in apart(60, lives)
    finally:
        apart.close()
    assert _told(KvsinkError("why\nmore")) == "why"


def test_cases() -> None:
    assert parse_cases("gqa:4,custom:klt:2,gqa:static:plain:8") == [
        ("gqa", "static:rotated", 4),
        ("custom", "klt", 2),
        ("gqa", "static:plain", 8),
    ]
    for wrong in ("gqa", "onnx:klt:2", "functions:klt:two", "functions:a:b:c:2"):
        with pytest.raises(click.BadParameter, match="is not FLAVOUR:BITS"):
            parse_cases(wrong)


def test_what_cannot_start_is_one_line(capsys) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has CUDA here")
    assert main(["onnx", "--cases", "custom:klt:2"]) == 2
    assert "CUDAExecutionProvider does not start" in capsys.readouterr().err


def test_rows_of_numbers_then_of_times(tmp_path: Path, capsys) -> None:
    flags = "--provider cpu --layers 1 --hidden 128 --tokens 110 --steps 4 --cases functions:kivi:2,gqa:8,functions:klt:2"
    assert main(["onnx", *flags.split(), "--out", str(tmp_path / "rows.jsonl")]) == 2  # one case has no graph
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["method"]) for r in rows] == [
        ("onnx-numbers", "kivi"),
        ("onnx-numbers", "static:rotated"),
        ("onnx-numbers", "klt"),
        ("onnx", "static:rotated"),
        ("onnx", "klt"),
    ]
    assert "blocks of" in rows[0]["verdict"] and "off_cpu" not in rows[0]
    for r in rows[1:3]:
        assert r["verdict"] == "ok" and r["off_cpu"] == 0 and r["bytes_off_cpu"].startswith("0 of ")
        assert 0 < r["off_torch"] < (1e-3 if r["bits"] == 8 else 1e-5)  # each has a cache of its own: a tie moves a code of 8 bits
        shares = [int(re.fullmatch(r"\w+@CPUE (\d+)%", s)[1]) for s in r["slowest"]]
        assert r["cpu_share"] == 1 and len(shares) == 6 and shares == sorted(shares, reverse=True) and 6 <= sum(shares) <= 103
    for r in rows[3:]:
        assert 0 < r["fastest_ms"] <= r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"] and r["in_turn"] and r["verdict"] == "ok"
    assert rows[3]["cache_bits"] == 8 and rows[4]["cache_bits"] < 4
    said = capsys.readouterr().out
    assert table(rows) in said and said.count("\n| functions | klt | 2 |") == 2


@pytest.mark.slow
def test_a_large_shape_is_timed_and_a_small_one_compared(tmp_path: Path, capsys) -> None:
    flags = "--provider cpu --layers 1 --hidden 1024 --tokens 64 --steps 4 --cases functions:16,custom:klt:2"
    assert main(["onnx", *flags.split(), "--out", str(tmp_path / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in rows] == ["onnx-numbers"] * 2 + ["onnx"] * 2 and rows[3]["cache_bits"] < 6
    assert capsys.readouterr().out.count("\nexported ") == 2
    assert main(["onnx", *flags.split(), "--seconds", "1"]) == 2  # too few seconds: numbers, and no times
    assert capsys.readouterr().out.count("of 1 seconds were over") == 4  # each in its row and in the table
