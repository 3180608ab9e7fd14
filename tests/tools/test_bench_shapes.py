"""kvsink-bench shapes without a GPU: which layers it builds, what its rows say, and what it refuses."""

from __future__ import annotations

import gc
import importlib.machinery
import json
import os
import sys
import weakref
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvsink.kernels import layout
from kvsink.model.runtime import runtime_of
from kvsink.tools import bench, bench_model, bench_ops, bench_sdpa, bench_shapes, timing
from kvsink.tools.bench import main
from kvsink.tools.bench_model import Shape, llama, rewritten
from kvsink.tools.bench_ops import Case, Kept, ops_rows
from kvsink.tools.bench_sdpa import sdpa_baseline
from kvsink.tools.bench_shapes import MODELS, shapes_of

HEADS = {  # query heads, key-value heads, channels of the published models
    "llama-3-8b": (32, 8, 128),
    "llama-3-70b": (64, 8, 128),
    "qwen3-30b-a3b": (32, 4, 128),
    "llama-3.2-1b": (32, 8, 64),
    "gpt-oss-20b": (64, 8, 64),
    "gemma-3-4b": (8, 4, 256),
    "phi-3-mini": (32, 32, 96),
    "one-kv-head": (16, 1, 128),
    "qwen3.5": (16, 2, 256),
}
SMALL = {
    "plain": Shape(512, 64, 2, 5e5, hidden=64, heads=4, head_dim=64),
    "part": Shape(512, 64, 1, 5e5, hidden=64, heads=4, head_dim=128, rotary=0.25),
}
ON_CPU = {"device": "cpu", "dtype": torch.float32}


def test_nine_models_are_known() -> None:
    assert {n: (s.heads, s.kv_heads, s.head_dim) for n, s in MODELS.items()} == HEADS
    assert {n: s.rotary for n, s in MODELS.items() if s.rotary != 1} == {"qwen3.5": 0.25}
    assert list(shapes_of("qwen3.5,llama-3-8b")) == ["qwen3.5", "llama-3-8b"]


def test_a_shape_is_read_from_a_config(tmp_path: Path) -> None:
    import transformers

    folder = tmp_path / "mine"
    transformers.LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2).save_pretrained(folder)
    seeing = {
        "text_config": {
            "num_attention_heads": 8,
            "head_dim": 32,
            "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}},
        }
    }
    (tmp_path / "seeing.json").write_text(json.dumps(seeing))
    found = shapes_of(f"{folder},{tmp_path / 'seeing.json'}")
    assert {n: (s.heads, s.kv_heads, s.head_dim, s.rotary) for n, s in found.items()} == {
        "mine": (6, 2, 16, 1.0),
        "seeing": (8, 8, 32, 0.5),
    }


LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}


def test_a_share_of_no_channels_is_read_as_such(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    for entries in ({"partial_rotary_factor": 0.0}, {"rope_parameters": {"partial_rotary_factor": 0.0}}):
        path.write_text(json.dumps(LLAMA | entries))
        assert shapes_of(str(path))["mine"].rotary == 0.0


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"num_attention_heads": 0}, "0 query heads cannot share 2 key-value heads"),
        ({"num_attention_heads": 0, "head_dim": None, "hidden_size": 64}, "0 query heads cannot share 2 key-value heads"),
        ({"num_key_value_heads": 3}, "8 query heads cannot share 3 key-value heads"),
        ({"num_key_value_heads": -2}, "8 query heads cannot share -2 key-value heads"),
        ({"num_key_value_heads": 0}, "8 query heads cannot share 0 key-value heads"),
        ({"head_dim": 0}, "heads of 0 channels"),
        ({"partial_rotary_factor": 3}, "partial_rotary_factor 3 is no share of a head's channels"),
        ({"rope_parameters": {"partial_rotary_factor": -0.5}}, "partial_rotary_factor -0.5 is no share of a head's channels"),
        ({"kv_lora_rank": 512}, "kv_lora_rank: what it keeps of a token is compressed, for all heads at once"),
        ({"num_attention_heads": float("inf")}, "cannot convert float infinity to integer"),
    ],
)
def test_a_config_that_describes_no_such_attention_is_one_line(
    entries: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(LLAMA | entries))
    assert main(["shapes", "--models", f"llama-3-8b,{path}"]) == 2
    error = capsys.readouterr().err
    assert f"{path} gives no attention shape ({said})" in error and error.count("\n") == 1


def test_two_models_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / folder / "mine.json" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps(LLAMA))
    assert list(shapes_of(f"{paths[0]},{paths[0]},llama-3-8b,llama-3-8b")) == ["mine", "llama-3-8b"]
    (tmp_path / "llama-3-8b.json").write_text(json.dumps(LLAMA))
    for models, name in ((",".join(map(str, paths)), "mine"), (f"llama-3-8b,{tmp_path / 'llama-3-8b.json'}", "llama-3-8b")):
        assert main(["shapes", "--models", models]) == 2
        error = capsys.readouterr().err
        assert f"would both be called '{name}'; rename one" in error and error.count("\n") == 1


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_layer_turns_as_many_channels_as_its_model(share: float) -> None:
    shape = Shape(512, 64, 2, 5e5, hidden=64, heads=4, head_dim=64, rotary=share)
    model = rewritten(llama(1, torch.float32, 97, 4096, shape, "cpu"), "klt:even-2", "first:9", 32)()
    codec = runtime_of(model).plans[0].codec
    assert runtime_of(model).rotary_channels(0) == 64 * share
    assert codec is not None and (codec.exact_rows, codec.window) == (9, 32)


def test_rows_come_by_shape_then_model_then_method_then_rows_kept() -> None:
    kept = [Kept(), Kept("first:16", 64)]
    rows = list(ops_rows(SMALL, ["centred:even-2", "default"], [(2, 200), (1, 130)], 1e9, lambda text: None, kept, False, **ON_CPU))
    seen = [(r["B"], r["T"], r["model"], r["method"], r["exact"], r["window"]) for r in rows]
    assert seen == [
        (b, t, name, method, *exact)
        for b, t in ((2, 200), (1, 130))
        for name in SMALL
        for method in ("centred:even", "klt")
        for exact in ((1, 0), (16, 64))
    ]
    assert all(float(r["error"]) < 1e-5 and r["p50_ms"] > 0 and r["kernel"] and "in_turn_ms" not in r for r in rows)
    assert rows[0]["why"] == "the device is cpu" and (rows[0]["Hq"], rows[0]["Hkv"], rows[0]["D"]) == (4, 2, 64)
    for plain, more in zip(rows[::2], rows[1::2], strict=True):
        assert "of_plain" not in plain and more["of_plain"] == pytest.approx(more["p50_ms"] / plain["p50_ms"], rel=0.1)


def test_a_window_is_held_as_after_the_write_of_the_new_row() -> None:
    model = rewritten(llama(1, torch.float32, 97, 4096, SMALL["plain"], "cpu"), "klt:even-2", "first:9", 32)()
    case = Case(model, 2, 100)
    assert sorted(case.first.recent_slot.tolist()) == list(range(68, 100)) and int(case.first.length) == 99
    assert torch.equal(case.first.recent_k[:, :, 99 % 32], case.k[:, :, 0])


def test_a_record_goes_with_its_model() -> None:
    """Another model may have the id of one that is gone, and other heads."""
    model = llama(1, torch.float32, 97, 4096, SMALL["plain"], "cpu")
    rewritten(model, "klt:even-2", "first:9")
    assert bench_model._records[model]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and all(known() is not None for known in bench_model._records.data)


@pytest.mark.parametrize("tiles", [False, True])
def test_gains_are_where_readers_look_for_them(tiles: bool) -> None:
    widths, wanted = (2,) * 8, torch.arange(256, dtype=torch.uint8).view(1, 1, 256)
    codes = torch.zeros(1, 1, 256, 17, dtype=torch.uint8)
    gains = bench_model.gains_of(codes, tiles)
    gains.copy_(wanted.view(gains.shape))
    read = layout.fetch(codes, widths, "k", "trellis") if tiles else codes
    assert torch.equal(read[..., -1], wanted) and (read[..., :-1] == 0).all()


def run(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> int:
    """The command on this processor, with two small models."""
    monkeypatch.setattr(bench, "_gpu", lambda: None)
    monkeypatch.setattr(timing, "device_facts", lambda: {"device": "cpu", "target": os.environ.get("KVSINK_CUDA_TARGET")})
    for name in ("read_bandwidth", "copy_bandwidth"):
        monkeypatch.setattr(timing, name, lambda: 1e9)
    monkeypatch.setattr(bench_shapes, "MODELS", SMALL)
    monkeypatch.setattr(bench_ops, "ops_rows", partial(ops_rows, **ON_CPU))
    return main(["shapes", *flags])


FLAGS = ["--methods", "centred:even-2,default", "--shapes", "1x130"]


def test_rows_are_written_as_they_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("KVSINK_CUDA_TARGET", "KVSINK_CUDA_SHARED"):
        monkeypatch.setenv(name, "kept by this test")
    out = tmp_path / "rows.jsonl"
    flags = ["--models", "part", "--exact", "20", "--arch", "compute_80", "--shared", "101376", "--out", str(out)]
    assert run(monkeypatch, [*FLAGS, *flags]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["model"], r["method"], r["exact"], r["target"]) for r in rows] == [
        ("part", m, e, "compute_80") for m in ("centred:even", "klt") for e in (1, 20)
    ]
    assert os.environ["KVSINK_CUDA_SHARED"] == "101376"
    assert "| part, B1 T130 | `klt` 2, 20 + 0 exact |" in capsys.readouterr().out


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_ops, "attend", lambda q, *rest: torch.zeros_like(q))
    assert run(monkeypatch, ["--models", "plain", "--methods", "centred:even-2", "--shapes", "1x130"]) == 2
    assert "wrong, not timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--models", "lama"],
            "unknown shape 'lama'; known: llama-3-8b, llama-3-70b, qwen3-30b-a3b, llama-3.2-1b, gpt-oss-20b, "
            "gemma-3-4b, phi-3-mini, one-kv-head, qwen3.5",
        ),
        (["--models", ""], "no shape is named"),
        (["--models", "none.json"], "none.json gives no attention shape"),
        (["--methods", "klu-2"], "unknown method"),
        (["--methods", ""], "at least 1"),
        (["--shapes", "x1024"], "at least 1"),
        (["--arch", "ampere"], "'ampere' is no target"),
        (["--window", "-1"], "numbers of rows"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shapes", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


class Pages:
    """What FlashInfer's wrapper computes, from its page table."""

    worse = 1.0

    def __init__(self, room: torch.Tensor, order: str, use_tensor_cores: bool) -> None:
        assert order == "HND" and room.numel()

    def plan(self, first: Any, each: Any, last: Any, heads: int, kv_heads: int, dim: int, page: int, **types: Any) -> None:
        self.first, self.each, self.last, self.repeats, self.page = first, each, last, heads // kv_heads, page

    def run(self, q: torch.Tensor, paged: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        out = []
        for b in range(len(q)):
            held = self.each[self.first[b] : self.first[b + 1]].long()
            k, v = (torch.cat(list(x[held]), 1)[:, : len(held) * self.page - self.page + self.last[b]] for x in paged)
            k, v = (x.repeat_interleave(self.repeats, 0) for x in (k, v))  # [Hq, T, D]
            out.append(((q[b][:, None] @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v)[:, 0] * self.worse)
        return torch.stack(out)


@pytest.mark.parametrize(("worse", "said"), [(1.0, "us"), (1.01, "wrong by 1.0e-02")])
def test_flashinfer_is_among_the_backends_where_it_is_right(worse: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer")
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    module.BatchDecodeWithPagedKVCacheWrapper = Pages  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(Pages, "worse", worse)
    monkeypatch.setattr(bench_sdpa, "_ROOM", 8)
    times = iter(range(100, 0, -1))  # each backend is faster than the one before it
    monkeypatch.setattr(bench_sdpa, "graph_times", lambda calls: (calls[0](), (float(next(times)),) * 3)[1])
    base = sdpa_baseline(2, 64, 4, 2, 16, torch.float32, "cpu")
    assert said in base.facts()["flashinfer"]
    assert (base.backend == "flashinfer-mma") == (worse == 1.0)


def test_what_flashinfer_cannot_build_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer")
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    base = sdpa_baseline(1, 32, 4, 2, 16, torch.float32, "cpu")
    assert base.flashinfer.startswith("AttributeError") and not base.backend.startswith("flashinfer")


def test_channels_that_do_not_turn_have_queries_enough_for_their_moment() -> None:
    """80 channels, 48 of them unturned, one query head per key-value head: every eighth query of 512 tokens was too few."""
    shape = Shape(512, 64, 2, 5e5, hidden=64, heads=2, head_dim=80, rotary=0.4)
    model = rewritten(llama(1, torch.float32, vocabulary=512, shape=shape, device="cpu"), "klt-2")()
    assert runtime_of(model).plans[0].codec.key.metric == "attention"
