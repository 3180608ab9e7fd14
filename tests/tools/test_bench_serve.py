"""kvsink-bench serve without vLLM: what it refuses, what it asks for, how rows become a table."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from kvsink.errors import KvsinkError
from kvsink.tools import bench_serve
from kvsink.tools.bench import main
from kvsink.tools.bench_serve import lengths_of, serve_rows, serve_table, side_of

CODEC = {"key": {"bits": 2.0}, "value": {"bits": 4.0}}


def folder(path: Path, *codecs: Any) -> Path:
    """A folder with such a plan, or with none."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    if codecs:
        (path / "kvsink.json").write_text(json.dumps({"method": "klt", "layers": [{"codec": codec} for codec in codecs]}))
    return path


def measured(**changes: Any) -> dict[str, Any]:
    """What an engine's process writes."""
    spread = {f"p{i}_{name}": float(i) for i in (20, 50, 80) for name in ("first_token_s", "token_ms")}
    return {"cache_tokens": 2816, "tokens_per_s": 100.0, "most_at_once": 7, "preemptions": 3, **spread, **changes}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "Missing argument"),
        (["out", "--prompts", "64"], "'64' is not LEAST-MOST of at least 1"),
        (["out", "--prompts", "512-64"], "'512-64' is not LEAST-MOST"),
        (["out", "--answers", "1-8"], "'1-8' is not LEAST-MOST of at least 2"),
        (["out", "--requests", "1"], "1 requests and 1024 MiB; at least 2 and 1 are needed"),
        (["out", "--engine", "max_num_seqs=4"], "is not JSON"),
        (["out", "--engine", "[1]"], "is not JSON"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_without_vllm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["serve", str(folder(tmp_path / "stock"))]) == 2
    error = capsys.readouterr().err
    assert "vLLM is not installed" in error and "docs/serving.md" in error and error.count("\n") == 1


def test_lengths_are_the_same_for_every_folder_and_within_bounds() -> None:
    made = lengths_of(500, (64, 512), (16, 128), 7)
    assert made == lengths_of(500, (64, 512), (16, 128), 7) != lengths_of(500, (64, 512), (16, 128), 8)
    for column, bounds in zip(zip(*made, strict=True), ((64, 512), (16, 128)), strict=True):
        assert bounds[0] <= min(column) < max(column) <= bounds[1] and len(set(column)) > 90


def test_a_folder_is_called_by_its_method_and_bits(tmp_path: Path) -> None:
    assert side_of(folder(tmp_path / "stock")) == "16 bit"
    assert side_of(folder(tmp_path / "out", CODEC, None)) == "klt 2/4"
    assert side_of(folder(tmp_path / "mixed", CODEC, {"key": {"bits": 3}, "value": {"bits": 4}})) == "klt 2.5/4"


def test_every_folder_runs_under_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[dict[str, Any]] = []

    def asked(job: dict[str, Any]) -> dict[str, Any]:
        jobs.append(job)
        return measured(tokens_per_s=100.0 * len(jobs))

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(bench_serve, "_asked", asked)
    names = [str(folder(tmp_path / "stock")), str(folder(tmp_path / "out", CODEC))]
    rows = list(serve_rows(names, [(10, 5), (30, 2)], 64, {"max_num_seqs": 4, "dtype": "float32"}, lambda text: None))
    alike = [{name: value for name, value in job["engine"].items() if name != "tokenizer"} for job in jobs]
    assert alike == [{"dtype": "float32", "max_model_len": 32, "kv_cache_memory_bytes": 64 * 2**20, "max_num_seqs": 4}] * 2
    assert [(job["folder"], job["lengths"]) for job in jobs] == [(name, [(10, 5), (30, 2)]) for name in names]
    assert [(r["side"], r["model"], r["dtype"], r["of_first"]) for r in rows] == [
        ("16 bit", "stock", "float32", 1.0),
        ("klt 2/4", "out", "float32", 2.0),
    ]
    assert [r["engine"] for r in rows] == [{"max_num_seqs": 4, "dtype": "float32"}] * 2
    lines = serve_table(rows).splitlines()
    assert lines[3] == "| `out`, klt 2/4 | 2,816 | 7 | 3 | 200.0 | 2.00x | 50.0 (20.0 to 80.0) | 50.0 (20.0 to 80.0) |"
    assert {line.count("|") for line in lines} == {9}


def test_what_an_engine_says_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "vllm.py").write_text("raise ValueError('no such model')\n")
    with pytest.raises(KvsinkError, match=r"vLLM's engine did not run .*stock: ValueError: no such model"):
        next(serve_rows([str(folder(tmp_path / "stock"))], [(4, 2)], 64, {}, lambda text: None))
