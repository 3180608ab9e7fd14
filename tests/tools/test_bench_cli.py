"""kvsink-bench without a GPU: what it refuses, what it draws, what its rows count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvsink.codecs import Codec
from kvsink.tools.bench import main
from kvsink.tools.bench_ops import packed_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
@pytest.mark.parametrize("command", ["kernels", "decode", "prefill", "capacity", "vlm"])
def test_without_a_gpu_it_says_so_in_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no GPU" in said


def test_steps_on_the_processor_are_timed_behind_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    from kvsink.cache import KVSinkCache
    from kvsink.tools.bench_cpu import step_times
    from tests.kernels.test_tiles import model_of

    model = model_of(0)
    cache = KVSinkCache.for_model(model, 1, 64)
    ids = torch.randint(3, 97, (1, 45), generator=torch.Generator().manual_seed(0))
    times = step_times(model, model, cache, ids, 40, 5)
    assert len(times) == 3 and times == sorted(times) and min(times) > 0
    assert cache.get_seq_length() == 45
    assert main(["cpu", "--steps", "2"]) == 2 and "at least 1 and 3" in capsys.readouterr().err


def row(method: str, speedup: float | None) -> str:
    return json.dumps({
        "kind": "kernel", "method": method, "bits": 2, "B": 1, "T": 1024, "speedup": speedup, "byte_limit_speedup": 7.0,
        "device": "x",
    })  # fmt: skip


def test_rows_become_a_picture(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(row("a", 3.0) + "\n" + row("b", None) + "\n")
    assert main(["plot", str(tmp_path / "rows.jsonl"), str(tmp_path / "out.svg")]) == 0
    text = (tmp_path / "out.svg").read_text()
    assert "a, 2 bit" in text and "b, 2 bit" not in text  # an op that was not timed has no bar


@pytest.mark.parametrize(("text", "said"), [("{}\nno json\n", "line 2"), ("{}\n", "no rows")])
def test_rows_that_cannot_be_drawn_are_named(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    assert main(["plot", str(tmp_path / "rows.jsonl"), str(tmp_path / "out.svg")]) == 2
    assert said in capsys.readouterr().err


def test_the_bytes_of_a_row_are_those_of_its_codes_and_scales() -> None:
    from tests.kernels.test_tiles import layer_of

    codec = layer_of(2).codec  # 2 bits: 32 bytes of codes and 4 of scales on either side
    assert isinstance(codec, Codec) and packed_bytes(codec, 3, 128, 8) == 3 * 128 * 8 * 2 * 36
