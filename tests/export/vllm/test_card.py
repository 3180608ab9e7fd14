"""vLLM's engine on a GPU, over pages that the CUDA kernels read, against transformers with the packed cache of the same folder.

A tiny model of 64 channels with planted sinks, in float16: where another order of a sum puts a row beyond a threshold,
its codes differ, so a log-probability is held against how far the codes move it at all.
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from kvsink.evaluate.evaluation import packed_cache
from kvsink.export.vllm.refusals import read_plan
from kvsink.folder.loading import load_model
from kvsink.kernels.pages import PAGE, PageFormat
from tests.export.vllm.plans import folder, planted, text
from tests.export.vllm.serve import serve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

CACHE, PLACES = 256 << 20, 3
ENGINE = {"dtype": "float16", "max_model_len": 1024, "kv_cache_memory_bytes": CACHE}
GRAPHS = {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]}}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A folder, texts, and what transformers makes of them on the GPU with and without codes."""
    model = planted(head_dim=64)
    model.config.max_position_embeddings = 1024
    out = folder(model, tmp_path_factory.mktemp("card") / "out", places=PLACES)
    texts = torch.tensor([text(7, 8, 140, 300 + i, length=512, seed=i) for i in range(4)])
    model, ids = load_model(out, "cuda", "float16"), texts.cuda()
    with torch.no_grad():
        cache = packed_cache(model, *ids.shape, strict=True)
        logits = [model(ids, **given).logits for given in ({"past_key_values": cache, "use_cache": True}, {"use_cache": False})]
    packed, plain = (x[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].cpu() for x in logits)
    prompts = [text(3 + i, 20, length=40 + 30 * i, seed=10 + i) for i in range(8)]
    runs = [{"prompts": texts.tolist(), "max_tokens": 1, "scored": True}, {"prompts": prompts, "max_tokens": 24}]
    return {"out": out, "packed": packed, "plain": plain, "codes": (packed - plain).abs().mean(), "runs": runs}


def scores(found: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(found["runs"][0]["logprobs"])


def test_log_probabilities_are_those_of_transformers(asked: dict[str, Any], tmp_path: Path) -> None:
    """Prompts come in chunks of 256 tokens; a page is as large as its format says."""
    found = serve(asked["out"], tmp_path, asked["runs"][:1], **ENGINE)
    assert (scores(found) - asked["packed"]).abs().mean() <= 0.4 * asked["codes"]
    assert (scores(found) - asked["plain"]).abs().mean() >= 0.7 * asked["codes"]
    assert abs(scores(found).mean() - asked["packed"].mean()) <= 2e-3
    plan = read_plan(asked["out"])
    sides = zip(plan.codecs, plan.segments, strict=True)
    forms = [PageFormat.of(codec, (64, 64), PLACES if segments else 0, torch.float16) for codec, segments in sides]
    assert found["block_size"] == PAGE and found["blocks"] == CACHE // sum(2 * PAGE * form.slot_bytes for form in forms)


def test_captured_steps_give_what_eager_ones_give(asked: dict[str, Any], tmp_path: Path) -> None:
    """The log-probability of every chosen token, for as long as both choose the same."""
    eager, graphs = (serve(asked["out"], tmp_path, asked["runs"][1:], **ENGINE, **more)["runs"][0] for more in ({}, GRAPHS))
    pairs: list[tuple[float, float]] = []
    for ids, others, one, two in zip(eager["tokens"], graphs["tokens"], eager["chosen"], graphs["chosen"], strict=True):
        same = len([*takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=True))])
        pairs += [*zip(one, two, strict=True)][:same]
    apart = torch.tensor(pairs).diff(dim=1).abs()
    assert len(pairs) >= 48 and apart.mean() <= 0.4 * asked["codes"]  # of 192


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_give_what_one_gives(asked: dict[str, Any], tmp_path: Path) -> None:
    """Each codes and holds one of the two key-value heads, so that twice the tokens fit."""
    one, two = (serve(asked["out"], tmp_path, asked["runs"], **ENGINE, **more) for more in ({}, {"tensor_parallel_size": 2}))
    assert (scores(one) - scores(two)).abs().mean() <= 0.4 * asked["codes"]
    assert abs(scores(one).mean() - scores(two).mean()) <= 2e-3 and two["blocks"] // 2 == one["blocks"]
