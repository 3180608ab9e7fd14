"""vLLM's own engine over packed pages, against transformers with the packed cache of the same folder under the same rule.

A tiny model, whose sinks are planted: in it, sums in another order change no code. In larger ones a narrow code rounds the other
way, and what that changes grows from layer to layer, within transformers (in other chunks) as between the two. Each engine is a
process of its own (`serve.py`), which takes up to a minute to start; all are slow tests, `.ci/serving` runs them.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/serving installs it")

from kvsink.evaluate.evaluation import evaluate, packed_cache
from kvsink.export.vllm.refusals import read_plan
from kvsink.folder.loading import load_model
from kvsink.kernels.pages import PAGE, PageFormat
from tests.export.vllm.plans import text
from tests.export.vllm.serve import serve

pytestmark = pytest.mark.slow

TOGETHER = 1e-3  # of log-probabilities and perplexities: sums of four layers in another order are two orders below


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Tokens of transformers' generate() over the packed cache, every row read from its codes."""
    cache = packed_cache(model, 1, len(prompt) + count, strict=True)
    given = torch.tensor([prompt])
    done = model.generate(given, past_key_values=cache, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return done[0, len(prompt) :].tolist()


@pytest.fixture(scope="session")
def answers(out: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One engine with prefix caching and chunks, all questions that it can answer."""
    windows = [text(7, 8, 140, 300 + i, length=512, seed=i) for i in range(4)]
    prompts = [text(3 + i, 20, length=40 + 30 * i, seed=10 + i) for i in range(8)]
    start = text(9, 130, 200, length=300, seed=20)
    one, two = (start + text(5, length=n, seed=n) for n in (40, 50))
    runs = [
        {"prompts": windows, "max_tokens": 1, "scored": True, "fresh": True},
        {"prompts": prompts, "max_tokens": 24, "fresh": True},
        {"prompts": [one], "max_tokens": 24, "fresh": True},
        {"prompts": [two], "max_tokens": 24},
        {"prompts": [two], "max_tokens": 24, "fresh": True},
    ]
    return {"windows": windows, "prompts": prompts, "beginning": two} | serve(out, tmp_path_factory.mktemp("engine"), runs)


def test_the_number_of_blocks_is_what_the_pages_make(out: Path, answers: dict[str, Any]) -> None:
    """A GiB, by the bytes of all layers' pages; and how many times more tokens than in float32 that is."""
    plan, pair = read_plan(out), (16, 16)
    assert plan.places == 3
    sides = zip(plan.codecs, plan.segments, strict=True)
    forms = [PageFormat.of(codec, pair, plan.places if segments else 0, torch.float32) for codec, segments in sides]
    page = sum(PAGE * form.slot_bytes * heads for form, heads in zip(forms, plan.kv_heads, strict=True))
    assert answers["block_size"] == PAGE and answers["blocks"] == 2**30 // page


def test_perplexity_is_that_of_transformers(out: Path, answers: dict[str, Any]) -> None:
    """And the log-probability of every token; those without codes are far from them."""
    model, ids = load_model(out, "cpu", "float32"), torch.tensor(answers["windows"])
    found = torch.tensor(answers["runs"][0]["logprobs"])
    wanted = evaluate(model, None, ids, chunk=64, cache_factory=partial(packed_cache, strict=True)).perplexity
    assert math.exp(-float(found.mean())) == pytest.approx(wanted, abs=TOGETHER)
    with torch.no_grad():
        cache = packed_cache(model, len(ids), ids.shape[1], strict=True)
        packed, plain = (model(ids, **options).logits for options in ({"past_key_values": cache}, {"use_cache": False}))
    each = [x[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] for x in (packed, plain)]
    assert (found - each[0]).abs().max() <= TOGETHER < 0.1 * (found - each[1]).abs().max()


def test_greedy_tokens_are_those_of_transformers(out: Path, answers: dict[str, Any]) -> None:
    model = load_model(out, "cpu", "float32")
    wanted = [greedy(model, prompt, 24) for prompt in answers["prompts"]]
    assert answers["runs"][1]["tokens"] == wanted and len({tuple(tokens) for tokens in wanted}) > 1


def test_a_prompt_whose_beginning_is_cached_gives_what_it_gives_cold(answers: dict[str, Any]) -> None:
    _, warm, cold = answers["runs"][2:5]
    assert warm["cached"] == [256] and cold["cached"] == [0]
    assert warm["tokens"] == cold["tokens"]


def test_pages_that_a_connector_brings_give_what_a_cold_prompt_gives(answers: dict[str, Any], out: Path, tmp_path: Path) -> None:
    """vLLM's example connector saves whole pages as files, here in one chunk; pages of zeros give something else."""
    place = {"shared_storage_path": str(tmp_path / "pages")}
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": place}
    runs = [{"prompts": [answers["beginning"]], "max_tokens": 24}]
    saved, brought = (serve(out, tmp_path, runs, kv_transfer_config=connector, max_num_batched_tokens=512) for _ in range(2))
    files = [*(tmp_path / "pages").rglob("*.safetensors")]
    assert len(files) == 4 and (saved["runs"][0]["cached"], brought["runs"][0]["cached"]) == ([0], [256])
    for path in files:
        save_file({name: torch.zeros_like(rows) for name, rows in load_file(path).items()}, path)
    blank = serve(out, tmp_path, runs, kv_transfer_config=connector, max_num_batched_tokens=512)
    cold, *others = (
        torch.tensor(of["chosen"]) for of in (answers["runs"][4], saved["runs"][0], brought["runs"][0], blank["runs"][0])
    )
    off = [float((rows - cold).abs().max()) for rows in others]
    assert max(off[:2]) <= TOGETHER < off[2]
    assert brought["runs"][0]["tokens"] == answers["runs"][4]["tokens"]


def test_sequences_that_had_to_wait_are_what_they_are_alone(out: Path, tmp_path: Path) -> None:
    prompts = [text(5, 50 + i, length=100, seed=30 + i) for i in range(6)]
    runs = [{"prompts": prompts, "max_tokens": 60}, {"prompts": prompts, "max_tokens": 60, "each": True}]
    options = {"num_gpu_blocks_override": 10, "enable_prefix_caching": False, "disable_log_stats": False}
    found = serve(out, tmp_path, runs, **options)
    assert found["preemptions"] > 0 and found["runs"][0]["tokens"] == found["runs"][1]["tokens"]


def test_a_compiled_model_gives_what_it_gives_eagerly(out: Path, answers: dict[str, Any], tmp_path: Path) -> None:
    found = serve(out, tmp_path, [{"prompts": answers["prompts"], "max_tokens": 24}], enforce_eager=False)
    assert found["runs"][0]["tokens"] == answers["runs"][1]["tokens"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_what_one_gives(ranks: int, answers: dict[str, Any], out: Path, tmp_path: Path) -> None:
    """Each codes and holds one of the two key-value heads, of four ranks two hold the same."""
    runs = [{"prompts": answers[name], "max_tokens": n, "scored": n == 1} for name, n in (("windows", 1), ("prompts", 24))]
    found = serve(out, tmp_path, runs, tensor_parallel_size=ranks)
    scores = (torch.tensor(of["runs"][0]["logprobs"]) for of in (found, answers))
    assert torch.stack([*scores]).diff(dim=0).abs().max() <= TOGETHER
    assert found["runs"][1]["tokens"] == answers["runs"][1]["tokens"] and found["blocks"] // 2 == answers["blocks"]


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
