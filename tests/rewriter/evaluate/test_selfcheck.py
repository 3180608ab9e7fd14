"""Planted faults: each is found by the self-check, and the model is then as it was; what is right passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import kvsink
from kvsink import codecs
from kvsink.calibrate import probing
from kvsink.errors import CalibrationError, KvsinkError, SidecarError, UnsupportedError
from kvsink.evaluate.selfcheck import Check, check_cache
from kvsink.kernels import stages
from kvsink.model.decoder import Decoder
from kvsink.model.passing import given_cache
from kvsink.model.runtime import runtime_of
from kvsink.model.turning import Turning
from kvsink.tools.tiny_models import build_family
from tests.models import build, tokens

ids = tokens(8, 64, seed=1)


def rewritten(family: str = "llama", method: str = "klt", model: Any = None, **options: Any) -> Any:
    model = build(family) if model is None else model
    kvsink.rewrite(model, method, **{"key_bits": 4, "value_bits": 4, "calibration": ids, **options})
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_what_is_right_passes_and_is_reported() -> None:
    report = kvsink.rewrite(build("llama"), "klt", key_bits=4, value_bits=4, calibration=ids)
    found = report.check
    assert found.fold is not None and 0 < found.fold < 1e-5
    assert found.folded is not None and 0 < found.folded < 1e-5
    assert 1e-4 < found.keys < 0.02 and 1e-4 < found.values < 0.02
    assert found.exact < 1e-5 < found.coded < 0.1
    assert "keys at 8 bits" in report.to_markdown()


def test_keys_in_a_whitened_basis_are_held_to_more() -> None:
    """One range a token would leave weak components to rounding; a wrong inverse is found all the same."""
    model = build("llama")
    found = kvsink.rewrite(model, "nova", calibration=ids, protect="first:1").check
    assert 0 < found.keys < 2e-3
    runtime = runtime_of(model)
    runtime.tables["layers.1.k_unbasis"] = runtime.tables["layers.1.k_basis"]
    with pytest.raises(UnsupportedError, match=r"self-check: layer 1 .*: keys read back at 8 bits are .* of their size off"):
        check_cache(Decoder(model), runtime)


def test_switched_off_it_says_so() -> None:
    report = kvsink.rewrite(build("llama"), "klt", key_bits=4, value_bits=4, calibration=ids, check=False)
    assert "NOT CHECKED" in report.to_markdown()


def test_wrong_pairs_of_channels_are_found(monkeypatch: Any) -> None:
    model = build("cohere")
    monkeypatch.setattr(probing, "look", lambda decoder: replace(decoder.where, turnings=(Turning(16), Turning(16))))
    before = weights(model)
    with pytest.raises(UnsupportedError, match=r"self-check: layer 0 \(model.layers.0.self_attn\): keys read back at 8 bits"):
        rewritten(model=model)
    assert "_kvsink_runtime" not in model.__dict__
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    monkeypatch.undo()
    rewritten(model=model)


def test_swapped_heads_are_found(monkeypatch: Any) -> None:
    plain = codecs.Codec.restore_values
    monkeypatch.setattr(codecs.Codec, "restore_values", lambda self, x, p, steps=stages: plain(self, x, p, steps).flip(1))
    with pytest.raises(UnsupportedError, match="layer 0 .*: values read back at 8 bits"):
        rewritten()


def test_a_mask_off_by_one_is_found(monkeypatch: Any) -> None:
    from kvsink.cache.layer import KVSinkLayer

    plain = KVSinkLayer.attend

    def off(self: Any, q: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
        return plain(self, q, mask.roll(1, -1) if mask is not None else None, scale, is_causal)

    monkeypatch.setattr(KVSinkLayer, "attend", off)
    report = kvsink.rewrite(build("llama"), "rtn", key_bits=4, value_bits=4, calibration=ids)
    assert any("handed keys and values read back whole" in note for note in report.notes)
    monkeypatch.setattr(KVSinkLayer, "_defers", lambda self, frame: False)
    wrong = KVSinkLayer.get_mask_sizes
    monkeypatch.setattr(KVSinkLayer, "get_mask_sizes", lambda self, n: (wrong(self, n)[0], 1))
    with pytest.raises(UnsupportedError, match="self-check: "):
        rewritten(method="rtn")


def test_every_codec_is_compared_with_rows_that_it_codes() -> None:
    for method in ("rtn", "kivi", "oscar", "kvquant", "rotatekv", "centred"):
        model = rewritten(method=method, protect="none")
        found = check_cache(Decoder(model, runtime_of(model).anatomy), runtime_of(model))
        assert found.keys and found.keys > 1e-4, method
        assert found.values and found.values > 1e-4, method


def test_the_words_of_a_check() -> None:
    assert str(Check(skipped="why")) == "NOT CHECKED (why)"
    assert "compiled step 0.5" in str(Check(step=0.5))


@pytest.mark.parametrize("method", ["klt", "centred"])
def test_too_few_rows_beside_the_protected_ones_are_refused(method: str) -> None:
    with pytest.raises(
        CalibrationError,
        match="rows are left to calibrate on beside those that are kept exact, fewer than 32; .*protect fewer rows",
    ):
        rewritten(method=method, protect="first:63")
    rewritten(method=method, protect="first:56")


def test_the_prompt_of_the_check_reaches_behind_protected_rows() -> None:
    model = rewritten(method="rtn", protect="first:40")
    found = check_cache(Decoder(model, runtime_of(model).anatomy), runtime_of(model))
    assert found.keys and found.keys > 1e-4


def test_a_full_cache_of_a_fixed_length_is_said_by_generate() -> None:
    model = rewritten(method="rtn")
    cache = kvsink.KVSinkCache.for_model(model, 2, max_length=12)
    with pytest.raises(KvsinkError, match="rows do not fit behind 12 of max_length=12"):
        model.generate(tokens(2, 10, seed=2), max_new_tokens=8, do_sample=False, eos_token_id=None, **given_cache(model, cache))


def test_a_model_without_layers_to_count_is_declined() -> None:
    with pytest.raises(KvsinkError) as raised:
        kvsink.rewrite(build_family("blt"), "rtn", calibration=ids)
    assert "\n" not in str(raised.value)


def test_a_folder_loaded_with_other_angles_is_refused(tmp_path: Any) -> None:
    model = rewritten(protect="first:1")
    model.save_pretrained(tmp_path)
    hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    for rope in ({"rope_type": "default", "rope_theta": 1e6}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}):
        with pytest.raises(SidecarError, match="made for other RoPE angles in its full attention layers"):
            hf.AutoModelForCausalLM.from_pretrained(tmp_path, rope_parameters=rope)
