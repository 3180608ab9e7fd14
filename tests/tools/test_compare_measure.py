"""One row of the comparison: its figures are those of a rewrite and an evaluation alone, its bits those of its packed layers."""

from __future__ import annotations

import pytest

import kvsink
from kvsink.evaluate.evaluation import evaluate
from kvsink.model.runtime import runtime_of
from kvsink.tools import compare_measure
from kvsink.tools.compare_measure import Bench, measure, rewritten_copy, windows_at_once
from kvsink.tools.compare_rows import Row, row
from tests.models import build, tokens

ROWS = (row("rtn", 4, 4), row("klt", 2, 2, "first:1"), row("centred", 2, 2, "first:1"))


def bench(family: str) -> Bench:
    return Bench(build(family), "tiny", tokens(2, 48, seed=3), "random tokens", tokens(8, 64, seed=1), chunk=16, batch=2)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("asked", [row("rtn", 4, 4), row("klt", 2, 2)], ids=lambda r: r.method)
def test_figures_are_those_of_the_evaluation(family, asked):
    one = bench(family)
    found = measure(one, asked, (*ROWS, asked))
    model = build(family)
    report = kvsink.rewrite(
        model, asked.method, key_bits=asked.key_bits, value_bits=asked.value_bits, calibration=one.calibration_ids
    )
    result = evaluate(model, build(family), one.ids, chunk=16, batch=2)
    assert found["perplexity"] == pytest.approx(result.perplexity, rel=1e-6)
    assert found["kl"] == pytest.approx(result.kl, rel=1e-4)
    assert found["cache_bits"] == pytest.approx(report.bits, abs=1e-3)
    assert found["bits_at_window"] != found["bits"]
    assert found["strict_kl"] > found["kl"] > 0


@pytest.mark.parametrize(("family", "packed"), [("llama", 2), ("gemma3", 1)])
def test_bits_are_those_of_the_packed_layers(family, packed):
    """4 bits, scale and zero point of a row of 16 channels, and 40 bits a token for positions, which packed layers share."""
    found = measure(bench(family), ROWS[0], ROWS[:1])
    each = 4 + 32 / 16 + 40 / packed / (2 * 2 * 16)
    window = 8 if family == "gemma3" else 0
    whole = (4096 * each + 16 * window) / (4096 + window)
    assert found["bits"] == pytest.approx(each, abs=2e-3) and found["cache_bits"] == pytest.approx(whole, abs=2e-3)
    assert (found["packed_layers"], found["layers"], found["kv_heads"], found["head_dim"]) == (packed, 2, 2, 16)


def test_exact_rows_are_counted_at_both_lengths():
    """64 first and 256 recent rows of 16 bit beside the codes: 1.25 bit at 4,096 tokens, 0.04 at 131,072."""
    asked = row("rtn", 4, 4, "first:64", 256)
    found = measure(bench("llama"), asked, (asked,))
    each, exact = 4 + 32 / 16 + 40 / 2 / (2 * 2 * 16), 320 * 16
    small = (64 * 64 + 256 * 32 + 64) / 2 / 16 / 2  # slots and scores of first rows, slots of recent ones, the length
    for name, tokens_held in (("bits", 4096), ("bits_far", 131_072)):
        assert found[name] == pytest.approx(each + (exact + small) / tokens_held, abs=2e-3)


def test_layers_that_stay_in_16_bit_are_not_calibrated(monkeypatch):
    seen: list[dict] = []
    calibrate = compare_measure.calibrate
    monkeypatch.setattr(compare_measure, "calibrate", lambda *a, **k: seen.append(a[3]) or calibrate(*a, **k))
    for family, layers in (("gemma3", {1}), ("mistral-sliding", {0, 1})):
        one = bench(family)
        assert measure(one, ROWS[1], ROWS[1:2])["status"] == "measured"
        assert set(seen.pop()) == layers and not seen


def test_layers_may_differ():
    asked = Row("klt", 2, 2, "first:1", options=(("layers", "1:value_bits=4"),))
    work, _ = rewritten_copy(bench("llama"), asked, (asked,))
    alike, _ = rewritten_copy(bench("llama"), ROWS[1], (ROWS[1],))
    widths = [[plan.codec.value.bits for plan in runtime_of(m).plans] for m in (work, alike)]
    assert widths == [[2, 4], [2, 2]] and bench("llama").key(asked) != bench("llama").key(ROWS[1])


def test_windows_of_a_batch_are_as_many_as_memory_bears(monkeypatch):
    model, ids = build("llama"), tokens(8, 32)
    window = 4 * 6 * 4 * 16 * 97  # a quarter of the free memory for six copies in float32 of 16 tokens' logits
    for free, most in ((window - 1, 1), (2 * window, 2), (3.9 * window, 3), (100 * window, 4), (0, 4)):
        monkeypatch.setattr(compare_measure, "free_bytes", lambda device, free=free: int(free))
        assert windows_at_once(model, ids, 16) == most
