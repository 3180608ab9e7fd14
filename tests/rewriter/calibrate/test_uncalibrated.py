"""Without text: what stands in for it and how much, that none is read, what the tables are, and what is refused in one line."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import kvsink
from kvsink.calibrate.uncalibrated import TOKENS, WINDOW, tokens_for
from kvsink.errors import CalibrationError
from kvsink.model.anatomy import Heads
from kvsink.model.runtime import runtime_of
from tests.models import VOCAB, build


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("text was read, or the model was run for statistics")

    for name in names:
        monkeypatch.setattr(f"kvsink.calibrate.observing.{name}", never)


def drawn(length: int) -> torch.Tensor:
    """Windows of a model of `length` positions whose config begins a text by 1."""
    ids = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(0)).reshape(-1, length)
    ids[:, 0] = 1
    return ids


def test_no_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, "builtin_text", "read_text", "_tokenizer_of")
    model, asked = build("llama"), build("llama")
    report = kvsink.rewrite(model, calibration="none", key_bits=3, value_bits=3)
    assert (report.method, report.protect, report.calibration_tokens) == ("klt", kvsink.get_method("klt").protect, TOKENS)
    assert f"no text: what is known of the layers comes from {TOKENS} tokens drawn at random" in report.to_markdown()
    kvsink.rewrite(asked, "klt", key_bits=3, value_bits=3, calibration=drawn(128))
    mine, theirs = (runtime_of(m).tables for m in (model, asked))
    assert mine.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in mine.items())


def test_tables_are_those_of_the_tokens() -> None:
    """The mean of keys before RoPE, by the first layer's own projection in float64; the first row of a window stays exact."""
    model = build("llama")
    inner, attention = model.model, model.model.layers[0].self_attn
    x = inner.layers[0].input_layernorm(inner.embed_tokens(drawn(128)[:, 1:]))
    mean = attention.k_proj(x).detach().double().mean((0, 1))
    kvsink.rewrite(model, calibration="none")
    found = runtime_of(model).tables["layers.0.k_mean"].double()
    assert (found.flatten() - mean).abs().max() <= 1e-5 * mean.abs().max()


def test_bits_without_text() -> None:
    """Four a side by the default method, unless asked; a method that is named has its own."""
    for options, bits in (({}, (4, 4)), ({"value_bits": 2}, (4, 2)), ({"method": "rotated"}, (4, 4)), ({"method": "kivi"}, (2, 2))):
        model = build("llama")
        kvsink.rewrite(model, calibration="none", **options)
        assert [(p.codec.key.bits, p.codec.value.bits) for p in runtime_of(model).plans] == [bits] * 2


@pytest.mark.parametrize("method", ["kivi", "kvarn", "oscar", "rotated", "rtn"])
def test_methods_without_statistics_run_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, "gather", "calibration_windows")
    report = kvsink.rewrite(build("llama"), method, calibration="none")
    assert report.calibration_tokens == 0 and "Calibrated on nothing" in report.to_markdown()


@pytest.mark.parametrize("shape", [(9, 3, 64), (32, 32, 128), (32, 8, 128), (4, 1, 256), (8, 8, 256), (16, 1, 512)])
def test_there_are_enough_tokens(shape: tuple[int, int, int]) -> None:
    """Eight rows a channel of a key, and two queries: every eighth is looked at, of all query heads of a key-value head."""
    query, kv, dim = shape
    count = tokens_for([Heads(query, kv, dim, dim), Heads(2, 1, 8, 8)])
    assert count >= TOKENS and count % WINDOW == 0
    assert count >= 8 * dim and count // WINDOW * len(range(0, WINDOW, 8)) * (query // kv) >= 2 * dim


@pytest.mark.parametrize(("method", "centroids"), [("cq", 256), ("tasq", 1024)])
def test_codebooks_have_rows_enough(method: str, centroids: int) -> None:
    model = build("llama")
    report = kvsink.rewrite(model, method, calibration="none")
    books = [t for n, t in runtime_of(model).tables.items() if n.endswith("_book")]
    assert report.calibration_tokens >= 2 * centroids and books and all(b.shape[-2] == centroids for b in books)


@pytest.mark.parametrize("calibration", ["none", "random"])
def test_plans_by_text_are_refused(calibration: str) -> None:
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=f"--plan auto measures widths.*is '{calibration}'; use --plan uniform") as error:
        kvsink.rewrite(model, calibration=calibration, plan="auto")
    assert "\n" not in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
