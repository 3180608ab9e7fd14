"""Every way of generating gives the tokens of the same codec run uncompiled on one sequence, in float64 where ties decide."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

import kvsink
from kvsink.errors import KvsinkError
from kvsink.tools.families import ids, rewritten

NEW = 14
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
BITS: dict[str, Any] = {"key_bits": 4, "value_bits": 4}


@pytest.fixture(scope="module", params=["klt", "rtn", "kivi"])
def model(request: pytest.FixtureRequest) -> Any:
    protect = "none" if request.param == "kivi" else "first:1"
    options = {"key_bits": 2, "value_bits": 2} if request.param == "kivi" else BITS
    return rewritten("llama", request.param, protect=protect, **options)[0]


@pytest.fixture(scope="module")
def klt() -> Any:
    return rewritten("llama", "klt")[0]


def alone(model: Any, row: Tensor, new: int = NEW, cache: Any = None) -> Tensor:
    """The reference: one sequence, token by token through the model and its packed cache, uncompiled."""
    cache = kvsink.KVSinkCache.for_model(model) if cache is None else cache
    given, out = row[None], []
    with torch.no_grad():
        for _ in range(new):
            logits = model(input_ids=given, past_key_values=cache, use_cache=True).logits
            given = logits[:, -1:].argmax(-1)
            out.append(given)
    return torch.cat(out, 1)[0]


def test_greedy(model: Any) -> None:
    row = ids(1, 13, 3)
    assert torch.equal(model.generate(row, **GREEDY)[0, 13:], alone(model, row[0]))


def test_left_padding(klt: Any) -> None:
    row = ids(1, 13, 3)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), row], 1)
    both = torch.cat([padded, ids(1, 17, 4)])
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    out = klt.generate(both, attention_mask=mask, **GREEDY)[:, 17:]
    assert torch.equal(out[0], alone(klt, row[0])) and torch.equal(out[1], alone(klt, both[1]))


def test_prompt_lookup_equals_greedy(model: Any) -> None:
    """Drafts are checked in chunks and taken back with `crop`; a greedy draft changes nothing about the tokens kept."""
    row = ids(1, 6, 3).repeat(1, 3)
    cache = kvsink.KVSinkCache.for_model(model, strict=True)  # rows of a chunk see codes, as rows fed one by one do
    out = model.generate(row, past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)
    wanted = alone(model, row[0], cache=kvsink.KVSinkCache.for_model(model, strict=True))
    assert torch.equal(out[0, 18:], wanted)


def test_assisted_by_itself_and_by_another_model(klt: Any) -> None:
    row = ids(1, 13, 3)
    wanted = alone(klt, row[0], cache=kvsink.KVSinkCache.for_model(klt, strict=True))
    for helper in (klt, rewritten("qwen3", "rtn")[0]):
        cache = kvsink.KVSinkCache.for_model(klt, strict=True)
        out = klt.generate(row, past_key_values=cache, assistant_model=helper, **GREEDY)
        assert torch.equal(out[0, 13:], wanted)


def test_assisted_generation_makes_a_packed_cache(klt: Any) -> None:
    out = klt.generate(ids(1, 13, 3), prompt_lookup_num_tokens=3, return_dict_in_generate=True, **GREEDY)
    assert isinstance(out["cache"] if "cache" in out else out["past_key_values"], kvsink.KVSinkCache)


def test_chunked_prefill(klt: Any) -> None:
    row = ids(1, 21, 3)
    cache = kvsink.KVSinkCache.for_model(klt)
    with torch.no_grad():
        for part in row[:, :16].split(8, 1):
            klt(input_ids=part, past_key_values=cache, use_cache=True)
    wanted = alone(klt, row[0, 16:], cache=cache)
    assert torch.equal(klt.generate(row, prefill_chunk_size=8, **GREEDY)[0, 21:], wanted)


def test_sampling_is_the_same_with_the_same_seed(klt: Any) -> None:
    row = ids(1, 13, 3)
    outs = []
    for compile_config in (None, compiled()):
        torch.manual_seed(5)
        outs.append(klt.generate(row, do_sample=True, temperature=1.3, max_new_tokens=NEW, compile_config=compile_config))
    assert torch.equal(*outs)


def compiled() -> CompileConfig:
    config = CompileConfig(backend="kvsink", fullgraph=True, mode=None, options={"kvsink.inner": "eager"})
    config._compile_all_devices = True
    return config


def test_beams_compiled_equal_beams_uncompiled(klt: Any) -> None:
    row = ids(2, 9, 3)
    outs = [klt.generate(row, num_beams=3, compile_config=c, **GREEDY) for c in (None, compiled())]
    assert torch.equal(*outs)


def test_a_saved_prefix_goes_on_in_another_process(klt: Any, tmp_path: Path) -> None:
    row = ids(1, 20, 3)
    cache = kvsink.KVSinkCache.for_model(klt)
    with torch.no_grad():
        klt(input_ids=row[:, :15], past_key_values=cache, use_cache=True)
    cache.save(tmp_path / "prefix.safetensors")
    wanted = alone(klt, row[0, 15:], cache=cache)
    code = (
        "import sys, torch, kvsink\n"
        "from kvsink.tools.families import ids, rewritten\n"
        "model = rewritten('llama', 'klt')[0]\n"
        "cache = kvsink.KVSinkCache.load(sys.argv[1], model)\n"
        f"out = model.generate(ids(1, 20, 3), past_key_values=cache, max_new_tokens={NEW}, do_sample=False)\n"
        "print(out[0, 20:].tolist())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "prefix.safetensors")], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-500:]
    assert ran.stdout.split("\n")[-2] == str(wanted.tolist())


def test_turns_reuse_the_cache(klt: Any) -> None:
    first, second = ids(1, 13, 3), ids(1, 5, 4)
    cache = kvsink.KVSinkCache.for_model(klt)
    said = klt.generate(first, past_key_values=cache, **GREEDY)
    again = klt.generate(torch.cat([said, second], 1), past_key_values=cache, **GREEDY)
    reference = kvsink.KVSinkCache.for_model(klt)
    assert torch.equal(alone(klt, first[0], cache=reference), said[0, 13:])
    assert torch.equal(alone(klt, torch.cat([said[0, -1:], second[0]]), cache=reference), again[0, -NEW:])


def test_rows_leave_a_batch(klt: Any) -> None:
    rows = ids(3, 13, 3)
    cache = kvsink.KVSinkCache.for_model(klt)
    with torch.no_grad():
        klt(input_ids=rows[:, :12], past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.tensor([0, 2]))
        out = klt.generate(rows[[0, 2]], past_key_values=cache, **GREEDY)[:, 13:]
    for at, row in enumerate((0, 2)):
        one = kvsink.KVSinkCache.for_model(klt)
        with torch.no_grad():
            klt(input_ids=rows[row : row + 1, :12], past_key_values=one, use_cache=True)
        assert torch.equal(out[at], alone(klt, rows[row, 12:], cache=one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inference_mode_and_narrow_dtypes(dtype: torch.dtype) -> None:
    model = rewritten("llama", "klt", dtype)[0]
    row = ids(1, 13, 3)
    with torch.inference_mode():
        out = model.generate(row, **GREEDY)
    assert torch.equal(out[0, 13:], alone(model, row[0]))


def test_threads_with_several_models_and_caches(klt: Any) -> None:
    other = rewritten("qwen3", "rtn")[0]
    jobs = [(m, ids(1, 13, seed)[0]) for seed in (3, 4) for m in (klt, other)]
    wanted, found = [alone(m, row) for m, row in jobs], [None] * len(jobs)

    def work(at: int) -> None:
        found[at] = alone(*jobs[at])  # type: ignore[call-overload]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f is not None and torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def test_crop_of_a_sliding_window_says_what_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvsink.sliding.SLACK", 8)
    monkeypatch.setattr("kvsink.sliding.BACK", 4)
    model = rewritten("mistral-sliding", "klt")[0]
    cache = kvsink.KVSinkCache.for_model(model)
    alone(model, ids(1, 13, 3)[0], 30, cache)
    assert cache.sliding is not None and cache.sliding.before() > 0
    with pytest.raises(KvsinkError, match="slides over 8 tokens and has given up"):
        cache.crop(-20)


@pytest.mark.parametrize(
    ("family", "method"),
    [("mistral-sliding", "klt"), *(pytest.param(f, m, marks=pytest.mark.slow) for f, m in (
        ("mistral-sliding", "rtn"), ("gemma3", "klt"), ("gemma3", "rtn"), ("gpt-oss", "klt"), ("gpt-oss", "rtn")))],
)  # fmt: skip
def test_a_packed_window_that_moves_changes_no_token(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same codec with a window that never has to move, uncompiled; and compiled, with left padding."""
    model = rewritten(family, method, sliding=True)[0]
    prompt = ids(2, 13, 3)
    mask = torch.ones_like(prompt)
    prompt[1, :3], mask[1, :3] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    wanted = model.generate(prompt, **settings)
    monkeypatch.setattr("kvsink.sliding.SLACK", 8)
    monkeypatch.setattr("kvsink.sliding.BACK", 2)
    for config in (None, compiled()):
        torch._dynamo.reset()
        out = model.generate(prompt, compile_config=config, return_dict_in_generate=True, **settings)
        cache = out["cache"] if "cache" in out else out["past_key_values"]
        assert cache.sliding.before() > 0 and cache.sliding.layers[0].k_codes.shape[2] <= 256
        assert torch.equal(out.sequences, wanted)
