"""kvsink-bench without a GPU: what it refuses, what it draws, what its rows count."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvsink.codecs import Codec
from kvsink.tools.bench import main
from kvsink.tools.bench_ops import ops_table, packed_bytes, timed
from kvsink.tools.bench_sdpa import Baseline, index_copies, updated


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
@pytest.mark.parametrize("command", ["kernels", "shapes", "decode", "generate", "prefill", "capacity", "vlm"])
def test_without_a_gpu_it_says_so_in_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no GPU" in said


def test_steps_on_the_processor_are_timed_behind_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    from kvsink.cache.cache import KVSinkCache
    from kvsink.tools.bench_cpu import step_times
    from tests.kernels.cuda.test_tiles import model_of

    model = model_of(0)
    cache = KVSinkCache.for_model(model, 1, 64)
    ids = torch.randint(3, 97, (1, 45), generator=torch.Generator().manual_seed(0))
    times = step_times(model, model, cache, ids, 40, 5)
    assert len(times) == 3 and times == sorted(times) and min(times) > 0
    assert cache.get_seq_length() == 45
    assert main(["cpu", "--steps", "2"]) == 2 and "at least 1 and 3" in capsys.readouterr().err


def row(method: str, speedup: float | None, **more: object) -> str:
    return json.dumps(
        {
            "kind": "kernel",
            "method": method,
            "bits": 2,
            "B": 1,
            "T": 1024,
            "speedup": speedup,
            "byte_limit_speedup": 7.0,
            "device": "x",
            **more,
        }
    )


def test_rows_become_a_picture(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(row("a", 3.0) + "\n" + row("b", None) + "\n")
    assert main(["plot", str(tmp_path / "rows.jsonl"), str(tmp_path / "out.svg")]) == 0
    text = (tmp_path / "out.svg").read_text()
    assert "a, 2 bit" in text and "b, 2 bit" not in text  # an op that was not timed has no bar


def test_rows_of_several_models_are_drawn_by_model(tmp_path: Path) -> None:
    first, second = {"model": "first"}, {"model": "second"}
    lines = [row("a", 3.0, **first), row("a", 2.0, **second), row("a", 9.0, **first, T=8), row("b", 1.0, **first)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert main(["plot", str(tmp_path / "rows.jsonl"), str(tmp_path / "out.svg")]) == 0
    text = (tmp_path / "out.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("first", "second", "3.0", "2.0")) and "<!-- 9.0 -->" not in text


@pytest.mark.parametrize(("text", "said"), [("{}\nno json\n", "line 2"), ("{}\n", "no rows")])
def test_rows_that_cannot_be_drawn_are_named(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    assert main(["plot", str(tmp_path / "rows.jsonl"), str(tmp_path / "out.svg")]) == 2
    assert said in capsys.readouterr().err


def test_the_bytes_of_a_row_are_those_of_its_codes_and_scales() -> None:
    from tests.kernels.cuda.test_tiles import layer_of

    codec = layer_of(2).codec  # 2 bits: 32 bytes of codes and 4 of scales on either side
    assert isinstance(codec, Codec) and packed_bytes(codec, 3, 128, 8) == 3 * 128 * 8 * 2 * 36


def test_a_row_counts_the_write_of_either_side() -> None:
    base = Baseline("cudnn", (7.0, 8.0, 9.0), "flash", "fused", (9.0, 10.0, 11.0))
    row = timed(base, (3.0, 4.0, 5.0), (4.0, 5.0, 6.0), (7.0, 8.0, 9.0), 6000, 1e6)
    assert (row["p20_ms"], row["p50_ms"], row["p80_ms"], row["in_turn_ms"]) == (3.0, 4.0, 5.0, 8.0)
    assert (row["speedup"], row["with_append_ms"]) == (2.0, 5.0)
    assert (row["speedup_with_append"], row["speedup_with_both_writes"]) == (1.6, 2.0)
    assert (row["limit_ms"], row["of_limit"], row["byte_limit_speedup"]) == (6.0, 1.5, 1.33)
    named = {
        "model": "a",
        "B": 1,
        "T": 1024,
        "method": "m",
        "bits": 2,
        "exact": 1,
        "window": 0,
        "kernel": "k",
        "sdpa_ms": 0.008,
        "fp16_with_update_ms": 0.010,
    }
    text = ops_table([{**named, **row}, {**named, "p50_ms": None, "note": "wrong, not timed"}]).splitlines()
    assert "| 8.00 | 10.00 | 4000.00 | 2.00x | 5000.00 | 1.60x | 2.00x |" in text[2] and "wrong, not timed" in text[3]
    assert {line.count("|") for line in text} == {11}


def written(t: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """q, caches, new rows and position, and the caches as they should be after the write."""
    g = torch.Generator().manual_seed(t)
    q, k, v, a, b = (torch.randn(3, h, n, 16, generator=g) for h, n in ((4, 1), (2, t), (2, t), (2, 1), (2, 1)))
    wanted = [torch.cat([x[:, :, : t - 1], y], 2) for x, y in ((k, a), (v, b))]
    return [q, k, v, a, b, torch.tensor([t - 1])], wanted


def test_the_new_row_is_written_before_it_is_attended_to() -> None:
    given, wanted = written(9)

    def attention(x: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*x[:3], enable_gqa=True)

    out = updated(attention, index_copies)(given)
    assert torch.equal(given[1], wanted[0]) and torch.equal(given[2], wanted[1])
    assert torch.equal(out, attention([given[0], *wanted]))


_FUSED = """
import torch
from kvsink.tools.bench_sdpa import fused_update
from tests.tools.test_bench_cli import written
for t in (1, 9, 700):
    given, wanted = written(t)
    fused_update(*given[1:])
    assert torch.equal(given[1], wanted[0]) and torch.equal(given[2], wanted[1])
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_one_launch_writes_what_two_copies_write() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FUSED],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.parametrize("whole", [True, False])
def test_a_long_sequence_says_how_far_it_is(whole: bool, tmp_path: Path) -> None:
    from kvsink.tools.bench_model import Shape, llama
    from kvsink.tools.bench_sequence import sequence_row

    shape = Shape(vocabulary=97, inner=96, kv_heads=2, theta=1e4, hidden=64, heads=4, head_dim=32)
    model = llama(2, torch.float32, positions=2048, shape=shape, device="cpu")
    said: list[str] = []
    row = sequence_row(
        model, "centred:even-2", 1000, 64, said.append, whole, steps=5, progress=tmp_path / "a" / "p.jsonl", compiled=False
    )
    assert row["T"] == 1000 and row["chunks"] == 16 and row["chunks_run"] == (16 if whole else 9)
    assert row["finite"] and row["verdict"] == "ok" and row["step_error"] <= 1e-3
    assert len(row["decode_ms"]) == len(row["tokens"]) == 5 and min(row["decode_ms"]) > 0
    notes = [json.loads(line) for line in (tmp_path / "a" / "p.jsonl").read_text().splitlines()]
    chunks = [n for n in notes if n["event"] == "chunk"]
    assert [n["start"] for n in chunks] == list(map(int, row["chunk_s"])) and len(said) == len(notes)
    assert sum(n["tokens"] for n in chunks) == 1000 if whole else chunks[-1]["start"] == 960
    assert [n["event"] for n in notes if n["event"] != "chunk"] == [
        "prefilled",
        "attention checked",
        "first step",
        *["step"] * 5,
        "done",
    ]
    elapsed = [n["elapsed_s"] for n in notes]
    assert elapsed == sorted(elapsed)


def test_a_sequence_that_is_no_longer_a_number_is_not_timed() -> None:
    from kvsink.tools.bench_model import Shape, llama
    from kvsink.tools.bench_sequence import NotFinite, sequence_row

    shape = Shape(vocabulary=97, inner=96, kv_heads=2, theta=1e4, hidden=64, heads=4, head_dim=32)
    model = llama(2, torch.float32, positions=2048, shape=shape, device="cpu")
    hook = model.lm_head.register_forward_hook(lambda module, given, out: out * float("nan"))
    with pytest.raises(NotFinite, match="behind token 63"):
        sequence_row(model, "rtn-2", 128, 64, lambda text: None, True, compiled=False)
    hook.remove()


def test_the_check_behind_a_long_past_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from kvsink.cache.cache import KVSinkCache
    from kvsink.tools import bench_sequence
    from tests.kernels.cuda.emulated import act_as_on_a_gpu
    from tests.kernels.cuda.test_tiles import HEADS, append, library, model_of, rows

    model = model_of(0)
    cache = KVSinkCache.for_model(model, 1, max_length=500, tiles=True)
    for layer in cache.packed_layers():
        append(layer, rows(1, 200, 1), rows(1, 200, 2), torch.arange(200)[None])
        layer.exact_k, layer.exact_v = layer.exact_k.half(), layer.exact_v.half()
        layer.length.fill_(200)
    half = SimpleNamespace(config=model.config, device=model.device, dtype=torch.float16)
    assert bench_sequence.attention_error(cache, half, 200) is None  # no kernel on this device
    act_as_on_a_gpu(monkeypatch, lambda *_: library(cache.packed_layers()[0]), lambda call: None)
    error = bench_sequence.attention_error(cache, half, 200)
    assert error is not None and error <= bench_sequence.ATTENTION_BOUND
    monkeypatch.setattr(bench_sequence, "attention", lambda *_: torch.zeros(1, HEADS, 1, 128))
    error = bench_sequence.attention_error(cache, half, 200)
    assert error is not None and error > bench_sequence.ATTENTION_BOUND


@pytest.mark.parametrize("text", ["stock", "stock=0", "klt:even-2=8", "stock=x"])
def test_a_batch_that_belongs_to_no_side_is_named(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", "--sides", "stock,centred:even-2", "--batches", text]) == 2
    assert f"{text!r} is not SIDE=BATCH with one of stock, centred:even-2" in capsys.readouterr().err


def test_sides_have_batches_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kvsink.tools import bench, bench_decode, bench_model, bench_sdpa, timing

    asked = []

    def rows(model: object, sides: list[str], pairs: list[tuple[int, int]], backends: dict, say: object) -> list[dict]:
        asked.append((sides[0], pairs[0], backends[pairs[0]]))
        return [{"side": sides[0]}]

    monkeypatch.setattr(bench, "_gpu", lambda: None)
    monkeypatch.setattr(bench_model, "llama", lambda layers: None)
    monkeypatch.setattr(bench_decode, "decode_rows", rows)
    monkeypatch.setattr(bench_sdpa, "sdpa_best", lambda b, t, *rest: (f"{b}x{t}", (0.0, 0.0, 0.0)))
    monkeypatch.setattr(timing, "device_facts", dict)
    out = tmp_path / "rows.jsonl"
    flags = ["--sides", "stock,klt:even-2", "--shapes", "1x1024,x4096", "--batches", "stock=120,klt:even-2=824"]
    assert main(["decode", *flags, "--out", str(out)]) == 0
    assert asked == [
        ("stock", (1, 1024), "1x1024"),
        ("klt:even-2", (1, 1024), "1x1024"),
        ("stock", (120, 4096), "64x4096"),
        ("klt:even-2", (824, 4096), "64x4096"),
    ]
    assert len(out.read_text().splitlines()) == 4
