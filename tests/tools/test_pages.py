"""README and docs/performance.md show what the rows say, and no other figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvsink.errors import KvsinkError
from kvsink.tools import page_blocks
from kvsink.tools.compare import RECORDS
from kvsink.tools.compare_page import markdown
from kvsink.tools.compare_records import read_records
from kvsink.tools.page_blocks import BLOCKS, RESULTS
from kvsink.tools.pages import COMPARED, PAGES, prose, written


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_figure_of_a_page_is_that_of_its_rows(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert written(text, page.parent) == text, "run python -m kvsink.tools.pages"
    wrong = re.sub(r"(?<=\d)\.(\d)(?=\d*x\b)", lambda m: f".{(int(m[1]) + 1) % 10}", text)
    assert wrong != text and written(wrong, page.parent) == text


@pytest.mark.parametrize("folder", COMPARED, ids=lambda p: p.name)
def test_the_comparison_is_that_of_its_rows(folder: Path) -> None:
    page = (folder / "compare.md").read_text(encoding="utf-8")
    records = read_records(folder / RECORDS)
    assert markdown(records) == page, "run python -m kvsink.tools.pages"
    assert markdown([{**records[0], "kl": 0.98765}, *records[1:]]) != page


def test_every_block_stands_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {name for name in BLOCKS if text.count(f"<!-- rows: {name} -->\n") == 1} == set(BLOCKS)
    assert text.count("<!-- rows: ") == text.count("<!-- end of rows -->") == len(BLOCKS)


@pytest.mark.parametrize(
    ("page", "figure"),
    [
        (PAGES[0], r"\d[\d.]*x\b|tokens per second|times faster"),
        (PAGES[1], r"\d[\d.,]*\s?(?:x|us|µs|ms|s|GiB|TB/s|tokens/s)\b|\d\s?%"),
    ],
    ids=["README.md", "performance.md"],
)
def test_no_speed_is_typed(page: Path, figure: str) -> None:
    assert re.findall(figure, prose(page.read_text(encoding="utf-8"))) == []


def test_the_rows_of_a_page_are_there() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)]*\.(?:jsonl|png))\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).is_file(), link


def test_a_block_that_nobody_writes_is_named(tmp_path: Path) -> None:
    with pytest.raises(KvsinkError, match="no rows are known as 'sped'; known: quality, speed"):
        written("<!-- rows: sped -->\n<!-- end of rows -->\n", tmp_path)
    assert written("a <!-- rows: one -->\nold\n<!-- end of rows --> b", tmp_path, {"one": lambda folder: "new\n"}) == (
        "a <!-- rows: one -->\nnew\n<!-- end of rows --> b"
    )


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of results beside the pages' own rows, which are all that there is but `shapes_*` and `generate_*`."""
    for file in RESULTS.glob("*.jsonl"):
        if not file.name.startswith(("shapes_", "generate_")):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(page_blocks, "RESULTS", tmp_path)
    return tmp_path


ABOUT = {"device": "GPU", "torch": "2", "transformers": "5"}


def shape(model: str, t: int, speedup: float | None, **more: Any) -> dict[str, Any]:
    return {
        **ABOUT,
        "kind": "kernel",
        "model": model,
        "method": "centred:even",
        "bits": 2,
        "exact": 1,
        "window": 0,
        "kernel": "cuda",
        "why": "",
        "B": 16,
        "T": t,
        "Hq": 8,
        "Hkv": 2,
        "D": 64,
        "error": "1e-4",
        "sdpa": "flash",
        "flashinfer": "not installed",
        "speedup": speedup,
        "speedup_with_both_writes": speedup,
        "p50_ms": speedup and 1.0,
        **more,
    }


def test_shapes_are_told_apart_by_gpu_build_and_rows_kept(results: Path) -> None:
    assert "Not measured" in BLOCKS["shapes"](results) and "one layer" not in BLOCKS["speed"](results)
    rows = [
        shape("a", 8192, 1.0),
        shape("a", 8192, 2.0, speedup_with_both_writes=1.5),
        shape("a", 1024, 3.0),
        shape("b", 8192, None, why="too wide", kernel="triton", error="1e-2"),
        shape("gpt-oss-20b", 8192, 4.0),
        shape("a", 8192, 1.0, exact=64, window=256, of_plain=1.125),
        shape("b", 8192, None, exact=64, window=256, of_plain=None),
        shape("a", 8192, 9.0, target="compute_80"),
    ]
    (results / "shapes_gpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = BLOCKS["shapes"](results)
    plain, kept, other = text.split("GPU, torch 2, transformers 5")[1:]
    assert "| a | 8/2/64 | cuda | 3.00, 2.00x |" in plain and "| a | 3.00, 1.50x |" in plain
    assert "| b | 8/2/64 | triton | –, –x |" in plain and "- too wide: b `centred:even` 2" in plain
    assert "- B16 T8192 b `centred:even` 2: error 1e-2" in plain
    assert "flash 4; FlashInfer: not installed" in plain and "64 rows exact and a window of 256" in plain
    assert "| a | 8/2/64 | cuda | 1.12x |" in kept and "built for compute_80" in other and "| 9.00x |" in other
    speed = BLOCKS["speed"](results)
    assert "| one layer, 16 x 8,192 tokens, GPU: of fp16's speed | llama-3-8b | llama-3-70b | gpt-oss-20b |" in speed
    assert "| `centred:even-2` | – | – | 4.0x | – |" in speed


def test_generate_is_held_against_the_faster_side_of_16_bit(results: Path) -> None:
    row = {**ABOUT, "kind": "generate", "layers": 8, "B": 1, "T": 1000, "first_call_s": 1.0, "peak_gib": 2.0}
    rows = [
        {**row, "side": "dynamic", "prefill_s": 0.5, "decode_ms": 4.0, "decode_speedup": 1.0, "prefill_ratio": 1.0},
        {**row, "side": "default", "prefill_s": 0.75, "decode_ms": 2.0, "decode_speedup": 2.0, "prefill_ratio": 1.5},
    ]
    (results / "generate_gpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert "| B1 T1000 | `default` | 1.0 | 0.7500 | 1.50x | 2.000 | 2.00x | 2.0 |" in BLOCKS["generate"](results)
    said = "1 x 1,000 tokens: decoding 2.00x the speed of 16 bit, prefill 1.50x its time"
    assert said not in " ".join(BLOCKS["speed"](results).split())  # 16 bit is not known without its compiled side
    rows.append({**rows[0], "side": "static", "decode_ms": 5.0, "decode_speedup": 0.8})
    (results / "generate_gpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert said in " ".join(BLOCKS["speed"](results).split())


def test_rows_that_are_missing_are_named(results: Path) -> None:
    (results / "prefill_h100.jsonl").unlink()
    with pytest.raises(KvsinkError, match="prefill_h100.jsonl is missing"):
        BLOCKS["prefill"](results)


def test_a_run_of_an_engine_says_under_which_options(results: Path) -> None:
    """Those that were given; a run under others stands in a table of its own."""
    first, *_ = (json.loads(line) for line in (results / "serve_h200.jsonl").read_text().splitlines())
    rows = [first | {"engine": {"max_num_seqs": n, "dtype": "bfloat16"}} for n in (4, 1)]
    (results / "serve_new.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    heads = [line for line in page_blocks.serve(results).splitlines() if "serve_new" in line]
    assert [re.findall(r"vLLM [\d.]+(.*?);", line) for line in heads] == [[", max_num_seqs 4"], [", max_num_seqs 1"]]
