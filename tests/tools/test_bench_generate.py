"""kvsink-bench generate without a GPU: whose cache a side runs on, what its rows count, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kvsink.cache.cache import KVSinkCache
from kvsink.tools import bench, bench_generate, bench_model, timing
from kvsink.tools.bench import main
from kvsink.tools.bench_generate import generate_rows, generate_table, ratios
from kvsink.tools.bench_model import Shape, declared, llama

SMALL = Shape(vocabulary=97, inner=96, kv_heads=2, theta=1e4, hidden=64, heads=4, head_dim=32)


def small(layers: int = 2) -> Any:
    return llama(layers, torch.float32, positions=2048, shape=SMALL, device="cpu")


def test_every_side_runs_on_its_own_cache_whatever_ran_before() -> None:
    model, seen = small(), []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(type(kwargs.get("cache", kwargs.get("past_key_values"))))

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    found = []
    for side in ("dynamic", "klt:even-2", "static", "default"):
        for _ in generate_rows(model, [side], [(2, 20)], 2, 1, lambda text: None):
            found.append(seen[-1])
    assert found == [DynamicCache, KVSinkCache, StaticCache, KVSinkCache]


def test_prefill_and_decoding_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(1)
    monkeypatch.setattr(bench_generate, "seconds", lambda run, tokens: 0.5 + 0.02 * (tokens - 1))
    row = next(generate_rows(model, ["dynamic"], [(3, 20)], 7, 2, lambda text: None))
    assert (row["prefill_s"], row["decode_ms"], row["tokens_per_s"], row["first_call_s"]) == (0.5, 20.0, 150.0, 0.64)


def test_a_row_is_held_against_the_fastest_in_16_bit_of_each_count() -> None:
    stock = [{"decode_ms": 3.0, "prefill_s": 0.2}, {"decode_ms": 2.0, "prefill_s": 0.4}]
    assert ratios({"decode_ms": 1.0, "prefill_s": 0.3}, stock) == {"decode_speedup": 2.0, "prefill_ratio": 1.5}
    assert ratios({"decode_ms": 1.0, "prefill_s": 0.3}, []) == ratios({"note": "out of memory"}, stock) == {}
    named = {"B": 1, "T": 9, "side": "s", "first_call_s": 1.0, "peak_gib": 0.0}
    text = generate_table(
        [
            {**named, "decode_ms": 1.0, "prefill_s": 0.3, **ratios({"decode_ms": 1.0, "prefill_s": 0.3}, stock)},
            {**named, "note": "out of memory"},
        ]
    ).splitlines()
    assert "| 0.3000 | 1.50x | 1.000 | 2.00x |" in text[2] and "out of memory" in text[3]
    assert {line.count("|") for line in text} == {9}


def test_the_default_is_what_rewrite_does() -> None:
    method, key, value = declared("default")
    assert (method.name, key, value) == ("klt", 2, 4)


def test_rows_and_profiles_are_written_as_they_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "_gpu", lambda: None)
    monkeypatch.setattr(bench_model, "llama", small)
    monkeypatch.setattr(timing, "device_facts", lambda: {"device": "cpu"})
    out, profile = tmp_path / "rows.jsonl", tmp_path / "profile.txt"
    flags = ["--sides", "dynamic,default", "--prompts", "1x30", "--steps", "2", "--layers", "1", "--repeats", "1"]
    assert main(["generate", *flags, "--out", str(out), "--profile", str(profile)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["side"], r["layers"], r["B"], r["T"], r["decoded"], r["device"]) for r in rows] == [
        ("dynamic", 1, 1, 30, 2, "cpu"),
        ("default", 1, 1, 30, 2, "cpu"),
    ]
    assert rows[0]["decode_speedup"] == rows[0]["prefill_ratio"] == 1.0 and rows[1]["prefill_ratio"] > 0
    stock, ours = profile.read_text().split("default, B1 T30, 1 layers")
    assert stock.startswith("dynamic, B1 T30") and all("aten::mm" in part for part in (stock, ours))
    assert "append.py" in ours and "append.py" not in stock


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sides", "dynamic,klu"], "klt"),
        (["--prompts", "x1000"], "at least 1"),
        (["--prompts", "1"], "BATCHxLENGTH"),
        (["--steps", "0"], "at least 1"),
        (["--sides", "stock"], "unknown method"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
