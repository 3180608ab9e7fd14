"""Many requests of random lengths through one engine of vLLM: shared beginnings, too few pages, some taken back on the way.

Every answer against the same request alone in an engine without prefix caching, a few against transformers too. REQUESTS may be
2,000: a minute more.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/serving installs it")

from kvsink.folder.loading import load_model
from tests.export.vllm.plans import text
from tests.export.vllm.serve import serve
from tests.export.vllm.test_engine import TOGETHER, greedy

pytestmark = pytest.mark.slow

REQUESTS, SEED = 240, 21
AT_ONCE, PAGES = 12, 12  # 8 of them run at most, and find no room for all
FLAT = 0.01  # of resident memory, between the half and the end


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """A third has a beginning of its own; a twentieth is an earlier request again; an eighth is taken back."""
    rng = random.Random(seed)
    starts = [text(9, 130, 200, length=400, seed=seed + i) for i in range(3)]
    made: list[dict[str, Any]] = []
    for i in range(count):
        start = rng.choice(starts)[: rng.choice((0, 150, 256, 300, 400))] if rng.random() < 2 / 3 else []
        length = rng.randint(16, 200)
        ids = start + text(rng.randrange(length - 1), length=length, seed=1000 * seed + i)
        again = rng.choice(made)["prompt"] if made and rng.random() < 0.05 else ids
        abort = rng.randint(1, 30) if rng.random() < 1 / 8 else None
        made.append({"prompt": again, "max_tokens": rng.randint(1, 40), "abort": abort})
    return made


def alone(out: Path, place: Path, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an engine says to requests that have it to themselves, one after the other."""
    runs = [{"prompts": [r["prompt"]], "max_tokens": r["max_tokens"]} for r in asked]
    found = serve(out, place, runs, 600 + len(runs), enable_prefix_caching=False)
    return [{name: run[name][0] for name in ("tokens", "chosen")} for run in found["runs"]]


def parted(out: Path, place: Path, answers: list[tuple[list[int], list[int], list[int]]]) -> list[float]:
    """By how much, in an engine alone, log-probabilities of the first tokens differ in which two answers to a prompt part."""
    if not answers:
        return []
    at = [next(i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b) for _, one, two in answers]
    scored = [prompt + answer[: i + 1] for i, (prompt, *both) in zip(at, answers, strict=True) for answer in both]
    found = serve(out, place, [{"prompts": scored, "max_tokens": 1, "scored": True}], enable_prefix_caching=False)
    last = [of[-1] for of in found["runs"][0]["logprobs"]]
    return [abs(a - b) for a, b in zip(last[::2], last[1::2], strict=True)]


def test_a_soak_ends_with_the_answers_of_each_request_alone(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")  # torch keeps 1,024 shapes of products, of 16-bit models too
    asked = requests(REQUESTS, SEED)
    options = {"num_gpu_blocks_override": PAGES, "disable_log_stats": False}
    found = serve(out, tmp_path, [{"soak": asked, "at_once": AT_ONCE}], 600 + REQUESTS, **options)
    run = found["runs"][0]
    finished = [i for i, tokens in enumerate(run["tokens"]) if tokens is not None]
    wanted = dict(zip(finished, alone(out, tmp_path, [asked[i] for i in finished]), strict=True))
    equal = [i for i in finished if run["tokens"][i] == wanted[i]["tokens"]]
    others = [(asked[i]["prompt"], run["tokens"][i], wanted[i]["tokens"]) for i in finished if i not in set(equal)]
    gaps = parted(out, tmp_path, others)
    off = [abs(a - b) for i in equal for a, b in zip(run["chosen"][i], wanted[i]["chosen"], strict=True)]
    memory = [run["memory"][REQUESTS * part // 100 - 1] for part in (10, 50, 100)]
    print(
        f"{run['seconds']:.0f} s, {len(finished)} finished, {REQUESTS - len(finished)} taken back, {len(equal)} equal, "
        f"gaps of the others {gaps}, log-probabilities within {max(off):.1e}, {found['preemptions']} preemptions, "
        f"{run['cached']} tokens of shared pages, resident MiB {memory}"
    )
    assert REQUESTS // 20 < REQUESTS - len(finished) < REQUESTS // 5 and found["preemptions"] > 0 and run["cached"] > 0
    assert all(len(run["tokens"][i]) == asked[i]["max_tokens"] for i in finished)
    assert max(off) <= TOGETHER and max(gaps, default=0.0) <= 2 * TOGETHER
    assert run["free"] and memory[2] <= (1 + FLAT) * memory[1]
    model = load_model(out, "cpu", "float32")
    for i in finished[:4]:
        assert run["tokens"][i] == greedy(model, asked[i]["prompt"], asked[i]["max_tokens"])
