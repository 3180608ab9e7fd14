"""Every way of generating gives the tokens of the same codec run uncompiled on one sequence, in float64 where ties decide."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CompileConfig

import kvsink
from kvsink.cache.sliding import SlidingWindow
from kvsink.errors import KvsinkError, UnsupportedError
from kvsink.model.runtime import detach
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


def test_sampling_draws_what_one_sequence_by_hand_draws(klt: Any) -> None:
    row = ids(1, 13, 3)
    torch.manual_seed(5)
    cache, given, wanted = kvsink.KVSinkCache.for_model(klt), row, []
    with torch.no_grad():
        for _ in range(NEW):
            logits = klt(input_ids=given, past_key_values=cache, use_cache=True).logits[:, -1].float() / 1.3
            given = torch.multinomial(logits.softmax(-1), 1)
            wanted.append(given)
    for compile_config in (None, compiled()):
        torch.manual_seed(5)
        settings = {"do_sample": True, "temperature": 1.3, "top_k": 0, "max_new_tokens": NEW}
        out = klt.generate(row, compile_config=compile_config, **settings)
        assert torch.equal(out[:, 13:], torch.cat(wanted, 1))


def compiled() -> CompileConfig:
    config = CompileConfig(backend="kvsink", fullgraph=True, mode=None, options={"kvsink.inner": "eager"})
    config._compile_all_devices = True
    return config


def test_beams_have_the_scores_of_their_sequences_alone(klt: Any) -> None:
    """Compiled and uncompiled find the same sequences; each scores what one sequence, token by token, says of it."""
    rows = ids(2, 9, 3)
    settings = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "eos_token_id": None, **GREEDY}
    outs = [
        klt.generate(rows, compile_config=c, return_dict_in_generate=True, output_scores=True, **settings)
        for c in (None, compiled())
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    for i, said in enumerate(outs[0].sequences_scores.tolist()):
        cache, total = kvsink.KVSinkCache.for_model(klt), 0.0
        given = rows[i // 3][None]
        with torch.no_grad():
            for token in outs[0].sequences[i, 9:]:
                logits = klt(input_ids=given, past_key_values=cache, use_cache=True).logits[0, -1]
                total += float(logits.log_softmax(-1)[token])
                given = token[None, None]
        assert abs(total - said) <= 1e-5 * abs(said)


def contrastive(model: Any, rows: Tensor, width: int, new: int) -> Tensor:
    """Search that tries the `width` best tokens of every row at once and keeps the one whose next step is surest."""
    cache, given, out = kvsink.KVSinkCache.for_model(model), rows, []
    for _ in range(new):
        if given is rows:
            logits = model(input_ids=given, past_key_values=cache, use_cache=True).logits[:, -1]
        tried = logits.topk(width, dim=-1).indices  # [B, width]
        cache.batch_repeat_interleave(width)
        ahead = model(input_ids=tried.reshape(-1, 1), past_key_values=cache, use_cache=True).logits[:, -1]
        best = ahead.amax(-1).reshape(-1, width).argmax(-1)  # [B]
        kept = torch.arange(len(rows)) * width + best
        cache.batch_select_indices(kept)
        logits, given = ahead[kept], tried.gather(1, best[:, None])
        out.append(given)
    return torch.cat(out, 1)


def contrastive_alone(model: Any, row: Tensor, width: int, new: int) -> Tensor:
    """The same for one sequence: every candidate of every step is fed anew, token by token, to a cache of its own."""

    def after(tokens: list[int]) -> Tensor:
        cache = kvsink.KVSinkCache.for_model(model)
        logits = model(input_ids=row[None], past_key_values=cache, use_cache=True).logits[0, -1]
        for token in tokens:
            logits = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
        return logits

    said: list[int] = []
    for _ in range(new):
        tried = after(said).topk(width).indices.tolist()
        said.append(max(tried, key=lambda token: float(after([*said, token]).max())))
    return torch.tensor(said)


@torch.no_grad()
def test_repeats_as_in_contrastive_search(model: Any) -> None:
    rows = ids(2, 11, 3)
    out = contrastive(model, rows, 3, 8)
    for row, tokens in zip(rows, out, strict=True):
        assert torch.equal(tokens, contrastive_alone(model, row, 3, 8))


@torch.no_grad()
def test_right_padding(model: Any) -> None:
    """Rows of 13 and 9 tokens, padded on the right, go on together; the mask hides the gap, positions do not count it."""
    if model._kvsink_runtime.method == "kivi":
        pytest.skip("kivi codes 128 slots together: a gap among them makes other blocks than the row alone has")
    long, short = ids(1, 13, 3), ids(1, 9, 4)
    both = torch.cat([long, torch.cat([short, torch.zeros(1, 4, dtype=torch.int64)], 1)])
    mask = torch.ones_like(both)
    mask[1, 9:] = 0
    cache, lengths = kvsink.KVSinkCache.for_model(model), torch.tensor([13, 9])
    places = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(input_ids=both, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True).logits
    given, out = logits[torch.arange(2), lengths - 1].argmax(-1)[:, None], []
    for i in range(NEW):
        out.append(given)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        places = (lengths + i)[:, None]
        step = model(input_ids=given, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
        given = step.logits[:, -1].argmax(-1, keepdim=True)
    found = torch.cat(out, 1)
    assert torch.equal(found[0], alone(model, long[0])) and torch.equal(found[1], alone(model, short[0]))


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


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("family", "method", "options", "fixed"),
    [
        ("llama", "klt", {}, None),
        ("llama", "klt", {}, 96),
        ("llama", "rtn", {"window": 4}, None),
        ("llama", "rtn", {"window": 4}, 96),
        ("gpt2", "rtn", {}, None),
        ("gpt2", "rtn", {}, 96),
        ("bloom", "centred", {}, None),  # BLOOM's forward takes the mask for the length of the cache: no fixed one by hand
    ],
)
@torch.no_grad()
def test_rows_join_and_leave_a_batch(family: str, method: str, options: dict[str, Any], fixed: int | None) -> None:
    """Three requests of different lengths: the second joins a running first, the third takes the place of the first."""
    model = rewritten(family, method, **options)[0]
    prompts = [ids(1, 21, 3), ids(1, 13, 4), ids(1, 40, 5)]
    wanted = [alone(model, p[0], 12) for p in prompts]
    said: list[list[int]] = [[], [], []]
    running: list[int] = []
    cache: Any = None
    mask = torch.zeros(0, 0, dtype=torch.int64)
    given = torch.zeros(0, 1, dtype=torch.int64)

    def join(request: int) -> None:
        nonlocal cache, mask, given
        fresh, prompt = kvsink.KVSinkCache.for_model(model, 1, fixed), prompts[request]
        first = model(input_ids=prompt, past_key_values=fresh, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        pads = cache.batch_join(fresh) if running else (0, 0)
        cache = cache if running else fresh
        new = torch.ones_like(prompt)
        mask = torch.cat([F.pad(m, (pad, 0)) for m, pad in zip((mask, new), pads, strict=True) if len(m)])
        given, running[len(running) :] = torch.cat([given, first]), [request]
        said[request].append(int(first))

    def steps(count: int) -> None:
        nonlocal mask, given
        for _ in range(count):
            mask = F.pad(mask, (0, 1), value=1)
            places = mask.sum(1, keepdim=True) - 1
            extra = {"position_ids": places} if "position_ids" in inspect.signature(model.forward).parameters else {}
            out = model(input_ids=given, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
            given = out.logits[:, -1].argmax(-1, keepdim=True)
            for request, token in zip(running, given[:, 0].tolist(), strict=True):
                said[request].append(token)

    def leave(request: int) -> None:
        nonlocal mask, given
        kept = torch.tensor([i for i, r in enumerate(running) if r != request])
        cache.batch_select_indices(kept)
        mask, given = mask[kept], given[kept]
        running.remove(request)

    join(0)
    steps(4)
    join(1)
    steps(7)
    leave(0)
    join(2)
    steps(4)
    leave(1)
    steps(7)
    assert [len(s) for s in said] == [12, 12, 12]
    assert said == [w.tolist() for w in wanted]


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


@pytest.mark.parametrize(
    ("asked", "length"), [(None, -1), ("dynamic", -1), ("static", 26), ("sliding_window", 26), ("hybrid_chunked", 26)]
)
def test_every_kind_of_cache_that_generate_knows_is_packed(klt: Any, asked: str | None, length: int) -> None:
    row = ids(1, 13, 3)
    out = klt.generate(row, cache_implementation=asked, return_dict_in_generate=True, **GREEDY)
    cache = out["cache"] if "cache" in out else out["past_key_values"]
    assert isinstance(cache, kvsink.KVSinkCache) and cache.get_max_length() == length
    assert torch.equal(out.sequences[0, 13:], alone(klt, row[0]))


def test_a_fixed_cache_can_be_made_longer(klt: Any) -> None:
    row = ids(1, 13, 3)
    out = klt.generate(row, cache_implementation="static", max_cache_len=80, return_dict_in_generate=True, **GREEDY)
    cache = out["cache"] if "cache" in out else out["past_key_values"]
    assert cache.get_max_length() == 80 and torch.equal(out.sequences[0, 13:], alone(klt, row[0]))


@pytest.mark.parametrize("asked", ["quantized", "offloaded", "offloaded_static", "offloaded_hybrid"])
def test_a_cache_that_is_not_packed_is_refused(klt: Any, asked: str) -> None:
    with pytest.raises(UnsupportedError, match=f"cache_implementation='{asked}'") as raised:
        klt.generate(ids(1, 13, 3), cache_implementation=asked, **GREEDY)
    assert "\n" not in str(raised.value)


def test_every_kind_of_cache_in_transformers_is_served_or_refused(klt: Any) -> None:
    """A new name in transformers must not lead to its stock cache unseen."""
    from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

    for asked in ALL_CACHE_IMPLEMENTATIONS:
        try:
            out = klt.generate(ids(1, 5, 3), cache_implementation=asked, return_dict_in_generate=True, max_new_tokens=2)
        except UnsupportedError:
            continue
        assert isinstance(out["cache"] if "cache" in out else out["past_key_values"], kvsink.KVSinkCache), asked


def test_continuous_batching_is_refused(klt: Any) -> None:
    """Its pages are transformers' own and hold 16 bit; a model without a runtime goes on as ever."""
    for ask in (
        lambda: klt.generate_batch([[5, 6, 7]], max_new_tokens=2),
        lambda: klt.generate(ids(1, 5, 3), cache_implementation="paged", **GREEDY),
        lambda: klt.init_continuous_batching(),
    ):
        with pytest.raises(UnsupportedError, match="16-bit pages, which hold no packed rows; serve the folder with vLLM") as raised:
            ask()
        assert "\n" not in str(raised.value)
    other = rewritten("llama", "rtn")[0]
    detach(other)
    assert type(other.init_continuous_batching()).__name__ == "ContinuousBatchingManager"


def test_a_cache_of_another_model_is_refused(klt: Any) -> None:
    row, again = ids(1, 13, 3), rewritten("llama", "klt")[0]
    cache = kvsink.KVSinkCache.for_model(again)  # the same model, loaded twice
    assert torch.equal(klt.generate(row, past_key_values=cache, **GREEDY)[0, 13:], alone(klt, row[0]))
    for other in (rewritten("llama", "rtn")[0], rewritten("llama", "klt", calibration=ids(8, 64, 2))[0]):
        with pytest.raises(KvsinkError, match="made for another model"):
            klt.generate(row, past_key_values=kvsink.KVSinkCache.for_model(other), **GREEDY)


@pytest.mark.parametrize(("family", "method"), [("falcon-alibi", "klt"), ("falcon-alibi", "rtn"), ("bloom", "rtn")])
@torch.no_grad()
def test_position_biases_over_a_fixed_cache(family: str, method: str) -> None:
    """These forwards read a 2-D mask: over all slots of a fixed cache it must still say which new rows are padding. Falcon makes
    angles that its attention does not use with ALiBi, so its keys are not to be turned."""
    model = rewritten(family, method, protect="first:2")[0]
    assert model._kvsink_runtime.rotary is None
    rows = ids(2, 13, 3)
    mask = torch.ones_like(rows)
    rows[1, :3], mask[1, :3] = 0, 0
    wanted = [alone(model, rows[0]), alone(model, rows[1, 3:])]
    padded = () if family == "bloom" else (mask,)  # BLOOM itself answers NaN to left padding in float64
    for options in ({}, {"cache_implementation": "static"}, {"compile_config": compiled()}):
        torch._dynamo.reset()
        for given in (*padded, None):
            held = rows if given is not None else rows[:1]
            out = model.generate(held, attention_mask=given, return_dict_in_generate=True, **options, **GREEDY)
            cache = out["cache"] if "cache" in out else out["past_key_values"]
            for i, row in enumerate(out.sequences[:, 13:]):
                assert torch.equal(row, wanted[i]), (options, i)
                assert sorted(cache.layers[0].exact_slot[i].tolist()) == ([0, 1] if i == 0 else [3, 4]), (options, i)


def test_crop_of_a_sliding_window_says_what_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvsink.cache.cache.SlidingWindow", partial(SlidingWindow, back=4, slack=8))
    model = rewritten("mistral-sliding", "klt")[0]
    cache = kvsink.KVSinkCache.for_model(model)
    alone(model, ids(1, 13, 3)[0], 30, cache)
    assert cache.sliding is not None and cache.sliding.before() > 0
    with pytest.raises(KvsinkError, match="slides over 8 tokens and has given up"):
        cache.crop(-20)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("mistral-sliding", "klt"),
        *(
            pytest.param(f, m, marks=pytest.mark.slow)
            for f, m in (("mistral-sliding", "rtn"), ("gemma3", "klt"), ("gemma3", "rtn"), ("gpt-oss", "klt"), ("gpt-oss", "rtn"))
        ),
    ],
)
def test_a_packed_window_that_moves_changes_no_token(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same codec with a window that never has to move, uncompiled; and compiled, with left padding."""
    model = rewritten(family, method, sliding=True)[0]
    prompt = ids(2, 13, 3)
    mask = torch.ones_like(prompt)
    prompt[1, :3], mask[1, :3] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    wanted = model.generate(prompt, **settings)
    monkeypatch.setattr("kvsink.cache.cache.SlidingWindow", partial(SlidingWindow, back=2, slack=8))
    for config in (None, compiled()):
        torch._dynamo.reset()
        out = model.generate(prompt, compile_config=config, return_dict_in_generate=True, **settings)
        cache = out["cache"] if "cache" in out else out["past_key_values"]
        assert cache.sliding.before() > 0 and cache.sliding.layers[0].k_codes.shape[2] <= 256
        assert torch.equal(out.sequences, wanted)
