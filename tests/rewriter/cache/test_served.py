"""Reports and `explain()` print one table: which kernels serve every layer, and in words why no faster ones do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvsink
from kvsink.cache import served
from kvsink.cache.cache import KVSinkCache
from kvsink.kernels.backends import Device, table
from kvsink.model.runtime import runtime_of
from tests.close import FUSED_FLOAT32, largest_difference
from tests.kernels.cuda.test_tiles import model_of, rewritten
from tests.models import build, tokens

IDS = torch.randint(3, 97, (4, 64), generator=torch.Generator().manual_seed(1))
HERE = torch.device("cpu")


def test_reports_and_explain_print_the_same_lines() -> None:
    model = build("llama")
    report = kvsink.rewrite(model, "kivi", calibration=IDS)
    (line,) = report.served
    assert line == "layers 0 to 1 on cpu: rows coded by torch, attention by torch | cpu (C): ranges along tokens"
    assert f"- {line}\n" in report.to_markdown() and line in kvsink.explain(model)
    assert kvsink.rewrite(build("llama"), "rtn", calibration=IDS).served[0].count("by cpu (C)") == 2


def test_a_line_names_the_layers_that_are_served_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_of(model_of(0))
    monkeypatch.setattr(served, "device_of", lambda place: Device("cuda", (7, 5), "a GPU", True))
    (line,) = served.served_lines(runtime, torch.float16, HERE)
    assert line.startswith("layers 0 to 1 on cpu: rows coded by triton, attention by triton | cuda (tiles): a GPU has compute")
    changed = replace(runtime.plans[0], codec=replace(runtime.plans[0].codec, window=600))
    monkeypatch.setattr(runtime, "plans", (changed, runtime.plans[1]))
    first, second = served.served_lines(runtime, torch.float16, HERE)
    assert first.startswith("layer 0 on") and "cuda (tiles): a window of 600 recent rows" in first
    assert second.startswith("layer 1 on") and "a window" not in second


def test_what_a_model_forbids_is_said_in_place_of_what_kernels_do(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_of(model_of(0))
    monkeypatch.setattr(runtime, "anatomy", replace(runtime.anatomy, apart=frozenset({1})))
    found = served.served(runtime, torch.float16, Device("cuda", (9, 0), "a GPU", True))
    name = table()[0].name
    assert found[0][0].name == name
    assert found[1][0].why[0] == (name, "its keys and values are read by more than one call of its own attention")
    assert served.in_tiles(runtime, 0) == "" and "more than one call" in served.in_tiles(runtime, 1)


def test_keys_whose_basis_float16_does_not_hold_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_of(model_of(0))
    sigma = runtime.tables["layers.1.k_sigma"]
    monkeypatch.setattr(runtime, "tables", {**runtime.tables, "layers.1.k_sigma": torch.full_like(sigma, 2000.0)})
    monkeypatch.setattr(runtime, "_beyond_half", {})
    assert served.in_tiles(runtime, 0) == "" and "float16" in served.in_tiles(runtime, 1)


@pytest.mark.parametrize("bits", [1, 1.25])
def test_keys_with_runs_of_no_bits_are_left_to_others(bits: float) -> None:
    logits = []
    for attention in ("sdpa", "eager"):  # "eager" attends to decoded rows
        model = rewritten("klt:even", 4, key_bits=bits, value_bits=1)
        model.set_attn_implementation(attention)
        held = KVSinkCache.for_model(model, 2, 64)
        with torch.no_grad():
            logits.append([model(tokens(2, n, seed=n), past_key_values=held).logits for n in (20, 1, 1)])
    assert largest_difference(*logits) <= FUSED_FLOAT32 * float(logits[1][0].abs().max())
    runtime = runtime_of(model)
    assert 0 in held.packed_layers()[0].codec.key.widths
    assert served.in_tiles(runtime, 0) == "lloyd-even keys of 0 to 3 bits, not of 1 to 6"
    (line,) = served.served_lines(runtime, torch.float32, HERE)
    assert line == "layers 0 to 1 on cpu: rows coded by cpu (C), attention by cpu (C)"
    found = served.served(runtime, torch.float16, Device("cuda", (9, 0), "a GPU", True))
    assert {choice.name for pair in found.values() for choice in pair} == {"triton", "cuda (rows of bytes)"}
