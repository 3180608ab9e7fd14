"""The engine: options are read, the impossible is refused with the model unchanged, the report says what was done."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import kvsink
from kvsink.errors import CalibrationError, KvsinkError, ModelError, UnsupportedError
from kvsink.model.runtime import runtime_of
from tests.graphs import text_for
from tests.models import _DECODER, LAYERS, build, tokens

IDS = tokens(8, 64, seed=1)


# -- options -----------------------------------------------------------------------------------------------------------


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "kltt"}, kvsink.errors.UnknownName, "unknown method 'kltt'; nearest known: klt"),
        ({"key_bits": 0}, KvsinkError, "key bits=0 is impossible"),
        ({"value_bits": 17}, KvsinkError, "value bits=17 is impossible"),
        ({"layers": "1:key_bits=12"}, KvsinkError, "key bits=12 is impossible"),
        ({"method": "rtn", "key_bits": 2.5}, UnsupportedError, "bits=2.5 is not whole.*use 2 or 3"),
        ({"method": "rtn", "key_bits": 0.5}, UnsupportedError, "bits=0.5 is not whole.*use 1$"),
        ({"method": "kvarn", "value_bits": 2.5}, UnsupportedError, "bits=2.5 is not whole.*use 2 or 3"),
        ({"method": "tasq", "key_bits": 3}, UnsupportedError, "bits=3 has no codebook setting; use 2.25 .known: 4 = 2c8b"),
        ({"method": "rotated", "key_bits": 0.5}, KvsinkError, "key bits=0.5: rotated has 1 to 4 .trellis.; use 1$"),
        ({"window": -1}, KvsinkError, "window=-1 is negative"),
        ({"layers": "1:window=-4"}, KvsinkError, "window=-4 is negative"),
        ({"protect": "sink:4"}, KvsinkError, "unknown protection 'sink'"),
        ({"protect": "sinks:4"}, KvsinkError, "protection 'sinks:4' needs a share above 0 and up to 1"),
        ({"layers": "0:protect=first:x"}, KvsinkError, "needs a positive number"),
        ({"calibration": tokens(1, 8)}, CalibrationError, "8 calibration tokens are too few"),
    ],
)
def test_a_refusal_leaves_the_model_alone(options: dict[str, Any], error: type[KvsinkError], words: str) -> None:
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        kvsink.rewrite(model, **{"calibration": IDS, **options})
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not hasattr(model, "_kvsink_runtime") and "_prepare_cache_for_generation" not in vars(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_damaged_weights(number: float) -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight[3, 3] = number
    with pytest.raises(ModelError, match="weight model.layers.1.mlp.up_proj.weight holds NaN or infinite"):
        kvsink.rewrite(model, "rtn")


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("bart", "BartForConditionalGeneration is an encoder-decoder model"),
        ("clip-vision", "no decoder attention layers found in CLIPVisionModel; modules seen: "),
    ],
)
def test_other_architectures(family: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        kvsink.rewrite(build(family), "rtn")


def test_a_cache_of_latents_is_declined() -> None:
    from kvsink.tools.tiny_models import build_family

    with pytest.raises(UnsupportedError, match="DeepseekV2ForCausalLM has multi-head latent attention"):
        kvsink.rewrite(build_family("deepseek-v2"), "rtn")


def head_of(dim: int) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**_DECODER, "head_dim": dim})).eval().requires_grad_(False)


@pytest.mark.parametrize("method", sorted(kvsink.methods()))
def test_heads_that_cannot_be_packed(method: str) -> None:
    with pytest.raises(UnsupportedError, match=r"head_dim=12 is not divisible by 8, which packing needs; keep 16 bit"):
        kvsink.rewrite(head_of(12), method, calibration=IDS)
    kvsink.rewrite(head_of(12), method, key_bits=16, value_bits=16)


def few(method: str) -> str:
    """The protection of a method, with less than a tiny text exact."""
    protect = kvsink.get_method(method).protect
    return "first:1" if protect.startswith("first:") else protect


@pytest.mark.sample(3)
@pytest.mark.parametrize("dim", [24, 40, 56])
@pytest.mark.parametrize("method", sorted(kvsink.methods()))
def test_heads_that_are_not_a_power_of_two(method: str, dim: int) -> None:
    """Rotated in the largest runs that have a Hadamard matrix: 24, 40 and 8 channels. Codebooks have 4 bits at most."""
    model, bits = head_of(dim), 4 if kvsink.get_method(method).key.kind.startswith("vector") else 8
    options = {"key_bits": bits, "value_bits": bits, "window": 0, "protect": few(method)}
    kvsink.rewrite(model, method, calibration=text_for(method, **options), **options)
    ids = tokens(1, 12 + runtime_of(model).plans[0].codec.ring, seed=3)  # recent rows are exact even when strict
    with torch.no_grad():
        wanted = model(ids).logits
        got = model(ids, past_key_values=kvsink.KVSinkCache.for_model(model, strict=True)).logits
    assert 0 < (got - wanted).abs().max() <= (0.05 if bits == 8 else 0.4) * wanted.abs().max()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_change_with_the_length(kind: str) -> None:
    model = build("llama")
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    words = rf"layer 0 \(model.layers.0.self_attn\): rope type {kind} changes its angles.*--method rtn"
    with pytest.raises(UnsupportedError, match=words):
        kvsink.rewrite(model, "klt", calibration=IDS)
    kvsink.rewrite(model, "rtn")


def test_a_model_is_rewritten_once_when_its_weights_were_turned() -> None:
    model = build("llama")
    kvsink.rewrite(model, "rotatekv", calibration=IDS)
    with pytest.raises(UnsupportedError, match="rewritten by rotatekv, which turned its value weights; load the model again"):
        kvsink.rewrite(model, "klt", calibration=IDS)
    assert runtime_of(model).method == "rotatekv"


def test_a_model_that_was_not_turned_can_be_rewritten_again() -> None:
    one, two = build("llama"), build("llama")
    kvsink.rewrite(one, "rtn", protect="massive:3")
    runtime = runtime_of(one)
    with pytest.raises(CalibrationError):
        kvsink.rewrite(one, "klt", calibration=tokens(1, 8))
    assert runtime_of(one) is runtime  # a failed attempt leaves the earlier plan in place
    reports = [kvsink.rewrite(m, "klt", calibration=IDS) for m in (one, two)]
    assert reports[0].layers == reports[1].layers
    for model in (one, two):  # no hook of the first plan is left
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 2 + LAYERS
    ids = tokens(1, 9, seed=3)
    outs = [m.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None) for m in (one, two)]
    assert torch.equal(outs[0], outs[1])


# -- the report --------------------------------------------------------------------------------------------------------


def test_rotations_that_run_online_are_noted() -> None:
    notes = kvsink.rewrite(build("phi3"), "rotatekv", calibration=IDS).notes
    assert notes == ["value rotation runs online: v_proj is nothing, not a plain Linear"]
    assert kvsink.rewrite(build("llama"), "rotatekv", calibration=IDS, fold=False).notes == []


def test_a_saved_rewritten_model_is_a_valid_plain_one(tmp_path: Path) -> None:
    """Whoever takes the name of the quantizer out, or has never heard of it, reads a model that computes the same."""
    model, ids = build("llama"), tokens(1, 9)
    with torch.no_grad():
        wanted = build("llama")(ids).logits
    kvsink.rewrite(model, "rotatekv", calibration=IDS)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not hasattr(again, "_kvsink_runtime")
    with torch.no_grad():
        assert (again(ids).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_copy_of_a_rewritten_model_works_alone() -> None:
    model, ids = build("llama"), tokens(1, 9)
    kvsink.rewrite(model, "klt", calibration=IDS)
    other = copy.deepcopy(model)
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    wanted = model.generate(ids, **settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(other.generate(ids, **settings), wanted)


@pytest.mark.parametrize("method", ["klt", "rtn"])
def test_the_model_passes_through_few_files(method: str) -> None:
    """Counted as one reads. A call that hands the model on is a stay in the file of its caller, who may have it from a `Decoder`,
    then one in that of the function called, and its return one in the caller's again. Neighbours in one file are one stay, each
    place of a call counts once, and a return is a stay in a file that was left before."""
    model, calls, handed, files = build("llama"), set(), list[Any](), list[str]()

    def ours(frame: Any) -> bool:
        return bool(frame.f_globals.get("__name__", "").partition(".")[0] == "kvsink")

    def stay(frame: Any) -> None:
        if ours(frame) and files[-1:] != [frame.f_code.co_filename]:
            files.append(frame.f_code.co_filename)

    def note(frame: Any, event: str, _: Any) -> None:
        code, caller = frame.f_code, frame.f_back
        if event == "return" and handed and handed[-1] is frame:
            handed.pop()
            stay(caller)
        if event != "call" or not ours(frame):
            return
        given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        place = (caller.f_code, caller.f_lineno, code)
        if code.co_name[0] != "<" and place not in calls and any(frame.f_locals.get(name) is model for name in given):
            calls.add(place)
            handed.append(frame)
            stay(caller)
            stay(frame)

    sys.setprofile(note)
    try:
        kvsink.rewrite(model, method, calibration=IDS)
    finally:
        sys.setprofile(None)
    stays = [Path(file).name for file in files]
    assert stays[:2] == ["rewrite.py", "anatomy.py"] and not handed and {"decoder.py", "runtime.py", "hf.py"} < set(stays)
    assert len(set(files)) <= 8 and len(files) - len(set(files)) <= 10, stays


@pytest.mark.parametrize("given", ["out", None])
def test_what_is_no_model_is_refused_in_one_line(given: object) -> None:
    with pytest.raises(KvsinkError, match=f"takes a model, not {given!r}; load it by AutoModelForCausalLM.from_pretrained, or run"):
        kvsink.rewrite(given)  # type: ignore[arg-type]
