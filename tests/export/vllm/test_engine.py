"""vLLM's own engine over packed pages, against transformers with the packed cache of the same folder under the same rule.

Codes are of 8 bits a side here. Some narrow ones round the other way where sums are taken in another order, and what that changes
grows from layer to layer, within transformers as between the two; that codes are the same, bit by bit, is tested beside the layers.
Each engine is a process of its own (`serve.py`), which takes about a minute to start; all are slow tests, `.ci/serving` runs them.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/serving installs it")

import kvsink
from kvsink.evaluate.evaluation import evaluate, packed_cache
from kvsink.export.vllm.refusals import read_plan
from kvsink.folder.demo import resolve_model_dir
from kvsink.folder.loading import load_model, load_tokenizer
from kvsink.kernels.pages import PAGE, PageFormat

pytestmark = pytest.mark.slow

PROTECT = "sinks:0.25:16+first:1"
ENGINE = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "max_num_batched_tokens": 512, "max_num_seqs": 8}
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, rewritten; $KVSINK_SERVED_FOLDER names one that is there already."""
    if given := os.environ.get("KVSINK_SERVED_FOLDER"):
        return Path(given)
    target = tmp_path_factory.mktemp("served") / "out"
    options = kvsink.RewriteOptions(protect=PROTECT, key_bits=8, value_bits=8, calibration_tokens=8192, check=False)
    kvsink.rewrite_dir(resolve_model_dir("demo:smollm2"), target, options, device="cpu")
    return target


@pytest.fixture(scope="session")
def ids(out: Path) -> list[int]:
    text = (Path(kvsink.evaluate.texts.__file__).parent / "wikitext2_test.txt").read_text(encoding="utf-8")
    return load_tokenizer(out)(text[:40_000], add_special_tokens=False)["input_ids"]


def serve(folder: Path, place: Path, runs: list[dict[str, Any]], **engine: Any) -> dict[str, Any]:
    """What an engine of those options answers."""
    files = [place / f"{name}.json" for name in ("engine", "runs", "out")]
    files[0].write_text(json.dumps(ENGINE | engine))
    files[1].write_text(json.dumps(runs))
    command = [sys.executable, str(Path(__file__).with_name("serve.py")), str(folder), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=place)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return dict(json.loads(files[2].read_text()))


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Tokens of transformers' generate() over the packed cache, every row read from its codes."""
    cache = packed_cache(model, 1, len(prompt) + count, strict=True)
    given = torch.tensor([prompt])
    done = model.generate(given, past_key_values=cache, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return done[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def answers(out: Path, ids: list[int], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One engine with prefix caching and chunks, all questions that it can answer."""
    windows = token_windows_of(ids)
    prompts = [ids[i * 300 : i * 300 + 40 + 30 * i] for i in range(8)]
    one, two = ids[5000:5300] + ids[:40], ids[5000:5300] + ids[200:250]
    runs = [
        {"prompts": windows.tolist(), "max_tokens": 1, "scored": True, "fresh": True},
        {"prompts": prompts, "max_tokens": 24, "fresh": True},
        {"prompts": [one], "max_tokens": 24, "fresh": True},
        {"prompts": [two], "max_tokens": 24},
        {"prompts": [two], "max_tokens": 24, "fresh": True},
    ]
    return {"windows": windows, "prompts": prompts} | serve(out, tmp_path_factory.mktemp("engine"), runs)


def token_windows_of(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids[: 4 * 512]).reshape(4, 512)


def test_the_number_of_blocks_is_what_the_pages_make(out: Path, answers: dict[str, Any]) -> None:
    """A GiB, by the bytes of all layers' pages; and how many times more tokens than in float32 that is."""
    plan = read_plan(out)
    config = json.loads((out / "config.json").read_text())
    dim = config["head_dim"] if "head_dim" in config else config["hidden_size"] // config["num_attention_heads"]
    forms = [
        PageFormat.of(codec, (dim, dim), (plan.places or 2) if segments else 0, torch.float32)
        for codec, segments in zip(plan.codecs, plan.segments, strict=True)
    ]
    page = sum(PAGE * form.slot_bytes * heads for form, heads in zip(forms, plan.kv_heads, strict=True))
    assert answers["block_size"] == PAGE and answers["blocks"] == 2**30 // page


def test_perplexity_is_that_of_transformers(out: Path, answers: dict[str, Any]) -> None:
    model = load_model(out, "cpu", "float32")
    wanted = evaluate(model, None, answers["windows"], chunk=512, cache_factory=partial(packed_cache, strict=True)).perplexity
    found = [x for row in answers["runs"][0]["logprobs"] for x in row]
    assert len(found) == 4 * 511
    assert math.exp(-sum(found) / len(found)) == pytest.approx(wanted, abs=1e-3)


def test_greedy_tokens_are_those_of_transformers(out: Path, answers: dict[str, Any]) -> None:
    model = load_model(out, "cpu", "float32")
    wanted = [greedy(model, prompt, 24) for prompt in answers["prompts"]]
    assert answers["runs"][1]["tokens"] == wanted


def test_a_prompt_whose_beginning_is_cached_gives_what_it_gives_cold(answers: dict[str, Any]) -> None:
    _, warm, cold = answers["runs"][2:5]
    assert warm["cached"] == [256] and cold["cached"] == [0]
    assert warm["tokens"] == cold["tokens"]


def test_sequences_that_had_to_wait_are_what_they_are_alone(out: Path, ids: list[int], tmp_path: Path) -> None:
    prompts = [ids[i * 90 : i * 90 + 100] for i in range(6)]
    runs = [{"prompts": prompts, "max_tokens": 60}, {"prompts": prompts, "max_tokens": 60, "each": True}]
    options = {"num_gpu_blocks_override": 9, "enable_prefix_caching": False, "disable_log_stats": False}
    found = serve(out, tmp_path, runs, **options)
    assert found["preemptions"] > 0 and found["runs"][0]["tokens"] == found["runs"][1]["tokens"]


def test_a_compiled_model_gives_what_it_gives_eagerly(out: Path, answers: dict[str, Any], tmp_path: Path) -> None:
    found = serve(out, tmp_path, [{"prompts": answers["prompts"], "max_tokens": 24}], enforce_eager=False)
    assert found["runs"][0]["tokens"] == answers["runs"][1]["tokens"]


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"block_size": 64}, "--block-size 64 is not the page of 128 tokens"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 codes a cache that is coded already"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}}, "speculative decoding"),
    ],
)
def test_options_that_are_not_served_end_in_one_line(out: Path, engine: dict[str, Any], words: str, tmp_path: Path) -> None:
    found = serve(out, tmp_path, [], **engine)
    assert any(words in line and line.startswith("UnsupportedError: kvsink in vLLM: ") for line in found["error"]), found["error"]


def test_a_folder_that_is_not_served_ends_in_one_line(out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for path in out.iterdir():
        (folder / path.name).symlink_to(path)
    plan = json.loads((out / "kvsink.json").read_text())
    plan["format"] = 99
    (folder / "kvsink.json").unlink()
    (folder / "kvsink.json").write_text(json.dumps(plan))
    found = serve(folder, tmp_path, [])
    assert any("kvsink.json has format 99, this version reads 1" in line for line in found["error"]), found["error"]
