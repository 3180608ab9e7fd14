"""Vision-language families on tiny random weights: one packed cache for pictures and text, equal however it is run."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import CompileConfig

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.errors import CalibrationError, KvsinkError, UnknownName
from kvsink.graph.backend import last_report
from kvsink.hf import install_generate
from kvsink.model.anatomy import towers
from kvsink.model.runtime import Runtime, attach, runtime_of
from tests.close import SOFTMAX_IN_FLOAT32, largest_difference
from tests.vision import FAMILIES, build, plain, prompt

IMAGES = (1, 2)
SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def calibration(family: str) -> list[dict[str, Tensor]]:
    return [prompt(family, (2, 1), seed=i) for i in range(8)]


@cache
def rewritten(family: str, method: str = "klt") -> Any:
    model = build(family)
    options = {"window": 4} if method == "akvq-vl" else {}
    kvsink.rewrite(model, method, calibration=calibration(family), **options)
    return model


def new_tokens(model: Any, given: dict[str, Tensor], **options: Any) -> list[list[int]]:
    return model.generate(**given, **SETTINGS, **options)[:, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pictures_matter_to_the_tiny_model(family: str) -> None:
    """Otherwise the other tests would say nothing about pictures."""
    model, given = build(family), prompt(family, IMAGES)
    with torch.no_grad():
        one = model(**given).logits
        two = model(**{**given, "pixel_values": given["pixel_values"] * -1.0}).logits
    assert largest_difference(one[:, -1], two[:, -1]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_of_pictures_equals_single_runs(family: str) -> None:
    model, given = rewritten(family), prompt(family, IMAGES)
    together = new_tokens(model, given)
    assert together == [new_tokens(model, plain(given, row, IMAGES))[0] for row in range(2)]
    held = model.generate(**given, **SETTINGS, return_dict_in_generate=True)
    cache = getattr(held, "cache", None) or held.past_key_values
    assert isinstance(cache, KVSinkCache) and cache.packed_layers()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_kept_exact_give_the_model_itself(family: str) -> None:
    model, given = build(family), prompt(family, IMAGES)
    wanted = new_tokens(model, given)
    kvsink.rewrite(model, "rtn", key_bits=16, value_bits=16, calibration=calibration(family))
    assert new_tokens(model, given) == wanted


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["klt", "centred", "akvq-vl:even"])
def test_eight_bits_read_back_are_close_in_every_position_scheme(family: str, method: str) -> None:
    """Codecs that turn keys back by position store and read the same rotation, also where positions have three axes."""
    model, given = build(family), prompt(family, IMAGES)
    with torch.no_grad():
        wanted = model(**given).logits
        kvsink.rewrite(model, method, key_bits=8, value_bits=8, calibration=calibration(family))
        cache = KVSinkCache.for_model(model, 2, 64, strict=True)
        got = model(**given, past_key_values=cache).logits
    seen = given["attention_mask"].bool()
    assert float((got - wanted)[seen].norm() / wanted[seen].norm()) < 0.03  # 2^-8 of a range per number, two layers


COMPILED = [
    pytest.param(f, m, marks=() if (f, m) in (("llava", "akvq-vl"), ("qwen2.5-vl", "klt")) else pytest.mark.slow)
    for f in FAMILIES
    for m in ("klt", "akvq-vl")
]


@pytest.mark.parametrize(("family", "method"), COMPILED)
def test_compiled_generation_gives_the_same_tokens_and_codes(family: str, method: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, given = rewritten(family, method), prompt(family, IMAGES)
    caches = [KVSinkCache.for_model(model, 2, 64) for _ in range(2)]
    config = CompileConfig(backend="kvsink", fullgraph=True, mode=None, options={"kvsink.inner": "eager"})
    config._compile_all_devices = True
    wanted = new_tokens(model, given, past_key_values=caches[0])
    got = new_tokens(model, given, past_key_values=caches[1], compile_config=config)
    assert got == wanted and torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    for one, two in zip(*(c.packed_layers() for c in caches), strict=True):
        assert torch.equal(one.k_codes, two.k_codes) and torch.equal(one.v_codes, two.v_codes)
    model.generation_config.compile_config = None


def test_several_new_rows_in_three_axes_are_left_to_the_cache() -> None:
    """A compiled prefill of pictures stores what an uncompiled one does."""
    torch._dynamo.reset()
    inner = rewritten("qwen3-vl").model.language_model
    run = torch.compile(inner, backend="kvsink", options={"kvsink.inner": "eager"})
    g = torch.Generator().manual_seed(0)
    axes = torch.tensor([[0, 1, 2, 2, 2, 2, 4, 5], [0, 1, 2, 2, 3, 3, 4, 5], [0, 1, 2, 3, 2, 3, 4, 5]])
    steps = [
        (torch.randn(2, 8, 64, generator=g), axes[:, None].expand(3, 2, 8)),
        (torch.randn(2, 1, 64, generator=g), torch.full((3, 2, 1), 6)),
    ]
    caches = [KVSinkCache.for_model(rewritten("qwen3-vl"), 2, 32) for _ in range(2)]
    reasons = []
    with torch.no_grad():
        for x, positions in steps:
            got, wanted = (
                f(inputs_embeds=x, position_ids=positions, past_key_values=c).last_hidden_state
                for f, c in zip((run, inner), caches, strict=True)
            )
            assert largest_difference(got, wanted) <= SOFTMAX_IN_FLOAT32 * 10 * float(wanted.abs().max())
            reasons.append({r.reason for r in last_report().records if r.pass_name == "attach"})
    assert torch.equal(caches[0].packed_layers()[1].k_codes, caches[1].packed_layers()[1].k_codes)
    assert any("more than one axis" in reason for reason in reasons[0]) and reasons[1] == {""}


_TEXT = {"qwen2-vl": "Qwen2", "qwen2.5-vl": "Qwen2", "qwen3-vl": "Qwen3", "gemma3": "Gemma3", "internvl": "Qwen2"}
"""The text-only class with the same decoder; Llama for the others."""


def text_model(family: str, seeing: Any) -> Any:
    """The text-only causal language model with the decoder weights of a vision-language model, rewritten by the same plans.

    The text models of the Qwen-VL families have no class with a head of their own: Qwen2 and Qwen3 are those decoders with
    positions in one axis, which three equal axes are to be equal to.
    """
    given, name = seeing.config.get_text_config(decoder=True).to_dict(), _TEXT.get(family, "Llama")
    config = getattr(hf, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    if family.startswith("qwen"):
        given["rope_parameters"] = {n: v for n, v in given["rope_parameters"].items() if not n.startswith("mrope")}
    model = getattr(hf, f"{name}ForCausalLM")(config(**{n: v for n, v in given.items() if n != "model_type"}))
    inner = seeing.model.text_model if family in ("idefics3", "smolvlm") else seeing.model.language_model
    model.model.load_state_dict(inner.state_dict())
    model.lm_head.load_state_dict(seeing.lm_head.state_dict())
    model.eval().requires_grad_(False).generation_config.update(pad_token_id=0, eos_token_id=None)
    held = runtime_of(seeing)
    attach(model, Runtime(model, held.plans, held.tables, held.stages, held.method))
    install_generate(model)
    return model


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["klt", "akvq-vl"])
def test_a_prompt_without_pictures_is_that_of_the_text_model(family: str, method: str) -> None:
    """Equal tokens and equal codes, of a left-padded batch and of its rows alone."""
    seeing, given = rewritten(family, method), prompt(family, (0, 1, 0))
    given = {n: given[n][::2].clone() for n in ("input_ids", "attention_mask")}  # rows of 8 tokens behind padding, and of 3
    given["input_ids"][0, -8:] = torch.arange(11, 19)
    given["attention_mask"][0, -8:] = 1
    text = text_model(family, seeing)
    caches = [KVSinkCache.for_model(m, 2, 64) for m in (seeing, text)]
    got, wanted = (new_tokens(m, given, past_key_values=c) for m, c in zip((seeing, text), caches, strict=True))
    assert got == wanted and len({tuple(row) for row in got}) == 2
    assert got == [new_tokens(seeing, plain(given, row, (0, 0)))[0] for row in range(2)]
    seen = given["attention_mask"].bool()
    for one, two in zip(*(c.packed_layers() for c in caches), strict=True):
        held = seen if one.k_codes.shape[2] >= seen.shape[1] else seen[:, -one.k_codes.shape[2] :]
        for a, b in ((one.k_codes, two.k_codes), (one.v_codes, two.v_codes)):
            a, b = (t[:, :, : held.shape[1]].transpose(1, 2)[held] for t in (a, b))
            assert torch.equal(a, b) and a.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_towers_are_left_alone_with_a_reason(family: str) -> None:
    model = build(family)
    weights = {n: p.clone() for n, p in model.named_parameters() if "vision" in n or "visual" in n}
    found = towers(model)
    assert len(found) == 1 and not any(a.startswith(next(iter(found))) for a in runtime_of(rewritten(family)).anatomy.attentions)
    report = kvsink.rewrite(model, "klt", calibration=calibration(family))
    assert any(note.startswith(next(iter(found))) and "keeps no cache" in note for note in report.notes)
    assert weights and all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)


# -- the modality mask --------------------------------------------------------------------------------------------------


def seen_by(model: Any, given: dict[str, Tensor], run: Any = new_tokens) -> list[Tensor]:
    """The masks that reach the first layer of a cache while `run` runs."""
    from kvsink.cache.layer import KVSinkLayer

    masks: list[Tensor] = []
    original = KVSinkLayer._candidates

    def note(self: Any, frame: Any, new: int) -> list[Tensor]:
        if self.layer == 0:
            masks.append(frame.visual)
        return original(self, frame, new)

    KVSinkLayer._candidates = note  # type: ignore[method-assign]
    try:
        run(model, given)
    finally:
        KVSinkLayer._candidates = original  # type: ignore[method-assign]
    return masks


@cache
def salient(family: str) -> Any:
    model = build(family)
    kvsink.rewrite(model, "akvq-vl", calibration=calibration(family), layers="0:pattern=tsa", window=4)
    return model


def test_a_mask_of_another_length_is_refused() -> None:
    model, given = salient("llava"), prompt("llava", IMAGES)
    cache = KVSinkCache.for_model(model, 2, 64)
    with pytest.raises(KvsinkError, match="the modality mask is"):
        model(**given, mm_token_type_ids=torch.zeros(2, 5, dtype=torch.int64), past_key_values=cache)
    cache = KVSinkCache.for_model(model, 2, 64)
    cache.visual = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(KvsinkError, match="the modality mask is"):
        model.model.language_model(inputs_embeds=torch.zeros(2, 4, 64), past_key_values=cache)


def test_an_explicit_cache_takes_a_mask_with_embeddings() -> None:
    model = salient("llava")
    cache = KVSinkCache.for_model(model, 1, 32)
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, 2:4] = True
    cache.visual = mask
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.model.language_model(inputs_embeds=x, past_key_values=cache)
    from kvsink.kernels.packing import unpack_bits

    codes = unpack_bits(cache.packed_layers()[0].k_codes[:, :, :6], 4, 16)
    assert int(codes[:, :, 2:4].max()) <= 3 < int(codes[:, :, 4:].max()) and cache.visual is None


# -- plans over other codecs --------------------------------------------------------------------------------------------


def test_bits_by_layer_class_compose_with_other_codecs() -> None:
    for method in ("klt", "centred"):
        model = build("llava")
        report = kvsink.rewrite(model, method, calibration=calibration("llava"), modality="akvq-vl", layers="0:pattern=tsa")
        first, second = (p.codec.key for p in runtime_of(model).plans)
        assert first.bits == 4 and second.bits == 2 and report.method == f"{method} by modality"
    off = kvsink.rewrite(build("llava"), "akvq-vl", calibration=calibration("llava"), modality="none")
    assert not any("text-salient" in note for note in off.notes)
    with pytest.raises(UnknownName, match="unknown plan by modality 'rtn'"):
        kvsink.rewrite(build("llava"), "klt", calibration=calibration("llava"), modality="rtn")


def test_placeholders_cut_off_are_named() -> None:
    rows = ("input_ids", "attention_mask")
    broken = [{n: t[:, :-8] if n in rows else t for n, t in p.items()} for p in calibration("llava")]
    with pytest.raises(CalibrationError, match="image placeholders must be those"):
        kvsink.rewrite(build("llava"), "klt", calibration=broken)
