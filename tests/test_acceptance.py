"""The promises of the main job on a real model: SmolLM2-135M, greedy, eight prompts, 64 tokens each.

The small sample at the top runs with everything else; the rest is marked slow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvsink
from kvsink.outdir import rewrite_dir
from kvsink.rewrite import RewriteOptions
from kvsink.runtime import runtime_of

PROMPTS = (
    "The capital of France is",
    "In 1969 the first people walked on the Moon. They",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on a mountain because",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "The three laws of thermodynamics say, in short, that",
    "List of ingredients for a simple bread: flour,",
    "Dear Sir or Madam, I am writing to complain about the train that I took last Tuesday from",
)
COUNT = 64
TOKENS = 4096  # for calibration: what is compared here are two ways to the same numbers, not quality
METHODS = ("klt", "rotatekv", "rtn")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(smollm2_dir: Path, tokenizer: Any, method: str) -> Any:
    """Rewritten in memory as kvsink-rewrite does it: float32 to compute in, the checkpoint's precision to store in."""
    model = load(smollm2_dir)
    storage = getattr(torch, str(model.config.dtype).removeprefix("torch."))
    storage = stored_dtype(smollm2_dir) if storage == torch.float32 else storage
    kvsink.rewrite(model, method, calibration_tokens=TOKENS, tokenizer=tokenizer, storage_dtype=storage)
    return model


def stored_dtype(folder: Path) -> torch.dtype:
    import json

    config = json.loads((folder / "config.json").read_text())
    dtype: torch.dtype = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    return dtype


def greedy(model: Any, ids: Tensor, mask: Tensor | None = None, count: int = COUNT, **more: Any) -> list[list[int]]:
    mask = torch.ones_like(ids) if mask is None else mask
    settings = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    return model.generate(ids, attention_mask=mask, **settings, **more)[:, ids.shape[1] :].tolist()


def alone(model: Any, tokenizer: Any, prompts: tuple[str, ...] = PROMPTS, count: int = COUNT) -> list[list[int]]:
    return [greedy(model, tokenizer(p, return_tensors="pt").input_ids, count=count)[0] for p in prompts]


def test_a_small_sample(smollm2_dir: Path, tokenizer: Any) -> None:
    """16 bit equals the original; the default method finds both emergence stages and protects what they mark."""
    plain, passthrough, packed = (load(smollm2_dir) for _ in range(3))
    prompts = PROMPTS[:2]
    wanted = alone(plain, tokenizer, prompts, 8)
    kvsink.rewrite(passthrough, "klt", key_bits=16, value_bits=16)
    assert alone(passthrough, tokenizer, prompts, 8) == wanted
    report = kvsink.rewrite(packed, "klt", calibration_tokens=2048, tokenizer=tokenizer)
    assert report.stages and all(row.packed for row in report.layers)
    behind = max(s["block"] for s in report.stages)
    assert report.layers[behind + 1].protect == f"stage:{behind}:5, first:1" and report.bits < 4
    out = packed.generate(tokenizer(prompts[0], return_tensors="pt").input_ids, max_new_tokens=8, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, kvsink.KVSinkCache)
    assert all(int(layer.exact_slot[0].max()) == 0 for layer in out.past_key_values.packed_layers()[: 1])


@pytest.mark.slow
def test_16_bit_is_the_original_token_for_token(smollm2_dir: Path, tokenizer: Any, method: str) -> None:
    plain, model = load(smollm2_dir), load(smollm2_dir)
    kvsink.rewrite(model, method, key_bits=16, value_bits=16)
    assert alone(model, tokenizer) == alone(plain, tokenizer)


@pytest.mark.slow
def test_a_left_padded_batch_equals_its_prompts_alone(model: Any, tokenizer: Any) -> None:
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    assert len(set(batch.attention_mask.sum(1).tolist())) > 4
    together = greedy(model, batch.input_ids, batch.attention_mask)
    assert together == alone(model, tokenizer)


@pytest.mark.slow
def test_a_folder_equals_the_rewrite_in_memory(
    model: Any, method: str, smollm2_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    rewrite_dir(smollm2_dir, tmp_path / "out", RewriteOptions(method=method, calibration_tokens=TOKENS), device="cpu")
    loaded = load(tmp_path / "out")
    one, two = runtime_of(loaded), runtime_of(model)
    assert one.plans == two.plans and all(torch.equal(one.tables[n], two.tables[n]) for n in two.tables)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert alone(loaded, tokenizer) == alone(model, tokenizer)


@pytest.mark.slow
def test_compiled_equals_uncompiled(model: Any, tokenizer: Any) -> None:
    """One static cache for each prompt, one token a step; Inductor on the decoding step and on the prefill."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="kvsink")

    def run(step: Any) -> list[list[int]]:
        out = []
        for prompt in PROMPTS:
            ids, row = tokenizer(prompt, return_tensors="pt").input_ids, []
            cache = kvsink.KVSinkCache.for_model(model, 1, max_length=128)
            with torch.no_grad():
                for _ in range(COUNT):
                    ids = step(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
                    row.append(int(ids))
            out.append(row)
        return out

    wanted = run(model)
    assert run(compiled) == wanted
    torch._dynamo.reset()


@pytest.mark.slow
def test_growing_and_static_caches_say_the_same(model: Any, tokenizer: Any) -> None:
    growing = alone(model, tokenizer)
    static = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        static.append(greedy(model, ids, past_key_values=kvsink.KVSinkCache.for_model(model, 1, max_length=128))[0])
    assert static == growing
