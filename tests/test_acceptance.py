"""The promises of the main job on a real model: SmolLM2-135M, greedy, eight prompts, 64 tokens each.

Two ways to the same numbers add floats in another order (a padded batch, a compiled graph). A code whose value lies on the
edge between two levels then falls to either side, and greedy decoding never comes back from that. So equality is tested
twice: in float64, where sums agree far below the edge, everything must be equal, to the last code; in float32 whatever
differs must begin with such a tie. The small sample at the top runs with everything else; the rest is marked slow.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.codecs import SideSpec
from kvsink.kernels.packing import unpack_bits
from kvsink.kernels.quantize import segments
from kvsink.model.runtime import runtime_of
from kvsink.outdir import rewrite_dir
from kvsink.rewrite import RewriteOptions
from tests.close import HALF_SCALE

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
COUNT, FEWER = 64, 12
TOKENS = 2048  # for calibration: what is compared are two ways to the same numbers, not quality
BEFORE_A_TIE = 1e-5
"""Logits of 30 layers of float32 sums in another order, relative to the largest: some 2**-24 for each sum."""


@dataclass
class Run:
    """One greedy run over rows of the same or, left padded, of different length."""

    tokens: Tensor  # [B, count]
    logits: Tensor  # [count, B, vocabulary]
    cache: Any
    padding: list[int]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def padded(tokenizer: Any) -> dict[str, Tensor]:
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    assert len(set(batch.attention_mask.sum(1).tolist())) > 4
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


@pytest.fixture(scope="module")
def rewritten(smollm2_dir: Path, tokenizer: Any) -> Any:
    """A function from method to a model rewritten as kvsink-rewrite does it; the latest one is kept."""
    config = json.loads((smollm2_dir / "config.json").read_text())
    storage = getattr(torch, config.get("dtype") or config["torch_dtype"])
    kept: dict[str, Any] = {}

    def make(method: str) -> Any:
        if method not in kept:
            kept.clear()
            model = load(smollm2_dir)
            kvsink.rewrite(model, method, calibration_tokens=TOKENS, tokenizer=tokenizer, storage_dtype=storage)
            kept[method] = model
        return kept[method].float()

    return make


def generate(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, count: int = COUNT, cache: Any = None) -> Run:
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    out = model.generate(
        input_ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    padding = (mask == 0).sum(1).tolist()
    return Run(out.sequences[:, input_ids.shape[1] :], torch.stack(out.logits), out.past_key_values, padding)


def loop(model: Any, step: Any, ids: Tensor, count: int = COUNT) -> Run:
    """The same over a static cache, with `step` for the model: what a compiled model is called like."""
    cache, tokens, logits = KVSinkCache.for_model(model, len(ids), max_length=128), [], []
    end = model.generation_config.eos_token_id
    with torch.no_grad():
        for _ in range(count):
            logits.append(step(ids, past_key_values=cache).logits[:, -1].clone())
            allowed = logits[-1].clone()
            allowed[:, end] = float("-inf")  # as min_new_tokens does
            ids = allowed.argmax(-1, keepdim=True)
            tokens.append(ids)
    return Run(torch.cat(tokens, dim=1), torch.stack(logits), cache, [0] * len(ids))


def alone(model: Any, padded: dict[str, Tensor], count: int = COUNT) -> list[Run]:
    ids, padding = padded["input_ids"], (padded["attention_mask"] == 0).sum(1).tolist()
    return [generate(model, row[None, pad:], count=count) for row, pad in zip(ids, padding, strict=True)]


def of_one_length(padded: dict[str, Tensor]) -> Tensor:
    """The last five tokens of every prompt."""
    return padded["input_ids"][:, -5:]


def stored(run: Run, row: int) -> list[tuple[Any, list[Tensor]]]:
    """Codec, codes and scales of every layer for the slots that a row has really filled."""
    end = int(run.cache.get_seq_length())
    return [
        (layer.codec, [t[row, :, run.padding[row] : end] for t in (layer.k_codes, layer.k_scale, layer.v_codes, layer.v_scale)])
        for layer in run.cache.packed_layers()
    ]


def same_to_the_last_code(one: Run, row: int, two: Run, other: int) -> bool:
    assert one.tokens[row].tolist() == two.tokens[other].tolist()
    return all(
        torch.equal(x, y)
        for (_, a), (_, b) in zip(stored(one, row), stored(two, other), strict=True)
        for x, y in zip(a, b, strict=True)
    )


def levels(side: SideSpec, codes: Tensor) -> Tensor:
    if not side.packed:
        return codes
    parts = [unpack_bits(codes[..., at : at + (b - a) * w // 8], w, b - a) for a, b, at, w in segments(side.widths)]
    return torch.cat(parts, dim=-1).int()


def check_tie(one: Run, row: int, two: Run, other: int) -> None:
    """What differs begins with a tie: before it logits agree, at it one code moves by one level or one scale rounds over."""
    left, right = stored(one, row), stored(two, other)
    slots = [
        torch.stack([(x != y).any(-1).any(0) for x, y in zip(a, b, strict=True)]).any(0)
        for (_, a), (_, b) in zip(left, right, strict=True)
    ]
    differing = torch.stack(slots)  # [layers, slots]
    prompt = differing.shape[1] - one.tokens.shape[1] + 1
    first = int(differing.any(0).float().argmax()) if differing.any() else differing.shape[1]
    steps = max(0, first - prompt + 1)  # steps whose logits no differing row has touched
    largest = float(one.logits[:, row].abs().max())
    if steps:
        gap = (one.logits[:steps, row] - two.logits[:steps, other]).abs().max()
        assert gap <= BEFORE_A_TIE * largest
        assert one.tokens[row, : steps - 1].tolist() == two.tokens[other, : steps - 1].tolist()
    if not differing.any():
        assert one.tokens[row].tolist() == two.tokens[other].tolist()
        return
    layer = int(differing[:, first].float().argmax())
    (codec, a), (_, b) = left[layer], right[layer]
    moved = 0
    for side, (codes, scale), (codes_, scale_) in ((codec.key, a[:2], b[:2]), (codec.value, a[2:], b[2:])):
        gap = (levels(side, codes[:, first]) - levels(side, codes_[:, first])).abs()
        assert gap.max() <= 1
        if torch.equal(scale[:, first], scale_[:, first]):
            moved += int(gap.sum())
        else:  # the whole row is coded by another scale
            half = scale[:, first].float()
            assert (half - scale_[:, first].float()).abs().max() <= 2 * HALF_SCALE * half.abs().max()
    assert moved <= 2


# -- the small sample --------------------------------------------------------------------------------------------------


def test_a_small_sample(smollm2_dir: Path, tokenizer: Any, rewritten: Any) -> None:
    """16 bit equals the original; the default method finds both emergence stages and keeps what they mark exact."""
    plain, passthrough, packed = load(smollm2_dir), load(smollm2_dir), rewritten("klt")
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    kvsink.rewrite(passthrough, "klt", key_bits=16, value_bits=16)
    assert torch.equal(generate(passthrough, ids, count=6).tokens, generate(plain, ids, count=6).tokens)
    runtime, out = runtime_of(packed), generate(packed, ids, count=6)
    assert [s.block for s in runtime.stages] == [2, 11]
    assert [s.source for s in runtime.plans[3].segments] == ["stage:2", "first"]
    assert [s.source for s in runtime.plans[12].segments] == ["stage:11", "first"]
    assert isinstance(out.cache, KVSinkCache) and len(out.cache.packed_layers()) == 30
    assert all(0 in layer.exact_slot[0].tolist() for layer in out.cache.packed_layers())
    assert out.cache.nbytes() == sum(t.numel() * t.element_size() for t in out.cache.tensors().values())


# -- all of it ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_16_bit_is_the_original_token_for_token(smollm2_dir: Path, padded: dict[str, Tensor]) -> None:
    plain, model = load(smollm2_dir), load(smollm2_dir)
    kvsink.rewrite(model, "klt", key_bits=16, value_bits=16)
    for count, given in ((COUNT, padded), (FEWER, {"input_ids": padded["input_ids"][-1:]})):
        one, two = (generate(m, **given, count=count) for m in (model, plain))
        assert isinstance(one.cache, KVSinkCache) and not isinstance(two.cache, KVSinkCache)
        assert one.tokens.tolist() == two.tokens.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "count"), [("klt", COUNT), ("rotatekv", FEWER), ("rtn", FEWER), ("centred", FEWER)])
def test_in_float64_every_way_is_the_same(rewritten: Any, padded: dict[str, Tensor], method: str, count: int) -> None:
    """A left-padded batch and its prompts alone; a growing and a static cache; a compiled graph and the model itself."""
    model = rewritten(method).double()
    together = generate(model, **padded, count=count)
    for row, run in enumerate(alone(model, padded, count)):
        assert same_to_the_last_code(together, row, run, 0)
    ids = of_one_length(padded)
    static = loop(model, model, ids, count)
    torch._dynamo.reset()
    fused = loop(model, torch.compile(model, backend="kvsink", options={"kvsink.inner": "eager"}), ids, count)
    torch._dynamo.reset()
    growing = generate(model, ids, count=count)
    for row in range(len(PROMPTS)):
        assert same_to_the_last_code(fused, row, static, row)
        assert same_to_the_last_code(growing, row, static, row)


@pytest.mark.slow
def test_in_float32_a_padded_batch_differs_by_ties_alone(rewritten: Any, padded: dict[str, Tensor]) -> None:
    model = rewritten("klt")
    together = generate(model, **padded)
    for row, run in enumerate(alone(model, padded)):
        check_tie(together, row, run, 0)


@pytest.mark.slow
def test_in_float32_inductor_differs_by_ties_alone(rewritten: Any, padded: dict[str, Tensor]) -> None:
    model, ids = rewritten("klt"), of_one_length(padded)
    torch._dynamo.reset()
    compiled, plain = loop(model, torch.compile(model, backend="kvsink"), ids), loop(model, model, ids)
    torch._dynamo.reset()
    for row in range(len(PROMPTS)):
        check_tie(compiled, row, plain, row)


@pytest.mark.slow
def test_a_folder_equals_the_rewrite_in_memory(
    rewritten: Any, smollm2_dir: Path, padded: dict[str, Tensor], tmp_path: Path
) -> None:
    rewrite_dir(smollm2_dir, tmp_path / "out", RewriteOptions(method="klt", calibration_tokens=TOKENS), device="cpu")
    model, loaded = rewritten("klt"), load(tmp_path / "out")
    one, two = runtime_of(loaded), runtime_of(model)
    assert one.plans == two.plans and all(torch.equal(one.tables[n], two.tables[n]) for n in two.tables)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    left, right = generate(loaded, **padded), generate(model, **padded)
    assert torch.equal(left.logits, right.logits)
    assert all(same_to_the_last_code(left, row, right, row) for row in range(len(PROMPTS)))
