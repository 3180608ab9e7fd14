"""The table of families: tiny models of every decoder, what a cell says of right and wrong, and what is written of it."""

from __future__ import annotations

import json
import time
from functools import partial

import pytest
import torch
import transformers

from kvsink.model.runtime import Runtime
from kvsink.tools import families, family_cells
from kvsink.tools.against_stock import BOUND, cached_logits, distance, forced_logits, planted
from kvsink.tools.cache_share import MODELS, share, weight
from kvsink.tools.families import check_family, ids, main, page
from kvsink.tools.family_cells import Subject
from kvsink.tools.tiny_models import FAMILIES, VOCAB, build_family

QUICK = ("8 bits", "chunked", "padded")
SAMPLE = ("llama", "gemma3", "gpt2", "falcon-alibi", "bert", "qwen3-moe", "mistral-sliding", "olmo-hybrid")
NAMED = (
    "qwen3-5",
    "qwen3-5-moe",
    "qwen3-5-vl",
    "gemma4",
    "gemma4-shared",
    "gemma4-keys",
    "gemma3n",
    "gpt-oss",
    "qwen3-next",
    "glm",
    "glm4",
    "glm4-moe",
    "glm4v-vl",
    "minimax",
    "minimax-m2",
    "falcon-h1",
    "cohere",
    "cohere2",
    "exaone4",
    "llama4",
    "smollm3",
    "diffllama",
    "mllama",
    "gptj",
    "codegen",
    "persimmon",
    "zamba",
    "zamba2",
    "jamba",
    "bamba",
)


@pytest.mark.sample(3)
@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_is_held_against_its_stock_model(family: str) -> None:
    found = check_family(family, QUICK)
    assert all(outcome.startswith("right (0.0") for outcome in found.values()), found


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "family",
    ["qwen3-5", "gemma4", "gpt-oss", "cohere2", "exaone4", "smollm3", "falcon-h1", "diffllama", "lfm2-moe", "mllama", "llama4"],
)
def test_layers_unlike_llamas_are_right_compiled_too(family: str) -> None:
    """Gates, several head sizes, other spellings of RoPE and layers without, recurrent states, attention called twice."""
    found = check_family(family, ("8 bits", "compiled"))
    assert found["8 bits"].startswith("right (0.0"), found
    assert found["compiled"].startswith(("right (0.0", "declined (0.0")), found


def test_a_graph_takes_keys_as_turned_where_the_cache_knows_no_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotary module that is not found: the graph shows RoPE, and the codec must not code the keys before it."""
    monkeypatch.setattr("kvsink.model.anatomy._rotary_of", lambda model, base: None)
    assert check_family("llama", ("compiled",))["compiled"].startswith("right (0.0")


@pytest.mark.parametrize("family", ["llama-dynamic", "deepseek-v3", "mamba"])
def test_a_refusal_is_no_wrong_cell(family: str) -> None:
    found = check_family(family, QUICK)
    assert all(outcome.startswith("declined (") for outcome in found.values()), found


def test_a_model_that_needs_more_than_text_is_not_judged() -> None:
    assert check_family("blip-vl", ("8 bits",))["8 bits"].startswith("not judged (TypeError")


def _swapped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    original = family_cells.kvsink.rewrite

    def rewrite(model, *args, **options):
        report = original(model, *args, **options)
        weight = model.model.layers[1].self_attn.o_proj.weight
        weight.copy_(weight.unflatten(1, (4, 16)).flip(1).flatten(1))
        return report

    monkeypatch.setattr(family_cells.kvsink, "rewrite", rewrite)


def _wrong_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Runtime.angles

    def angles(self, layer, positions):
        return tuple(t[..., : t.shape[-1] // 2].repeat_interleave(2, -1) for t in original(self, layer, positions))

    monkeypatch.setattr(Runtime, "angles", angles)


def _late_row(monkeypatch: pytest.MonkeyPatch) -> None:
    original = family_cells.kvsink.KVSinkCache.get_seq_length

    def length(self, *args):
        held = original(self, *args)
        return held + 1 if isinstance(held, int) and held else held

    monkeypatch.setattr(family_cells.kvsink.KVSinkCache, "get_seq_length", length)


@pytest.mark.parametrize(("plant", "cells"), [(_swapped_heads, QUICK), (_wrong_pairs, QUICK), (_late_row, ("8 bits", "chunked"))])
def test_a_planted_fault_shows(plant, cells, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    unchecked = partial(family_cells.kvsink.rewrite, check=False)  # the cells have to see it themselves
    monkeypatch.setattr(family_cells.kvsink, "rewrite", unchecked)
    found = check_family("llama", cells)
    assert all(outcome.startswith("wrong (") for outcome in found.values()), found


def test_a_model_in_which_keys_do_not_matter_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(family, dtype):
        model = build_family(family, dtype)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
        return model

    monkeypatch.setattr(family_cells, "build_family", flat)
    assert check_family("llama", ("8 bits",))["8 bits"].startswith("not judged (keys in the wrong")


def test_where_the_stock_cache_is_off_the_uncached_model_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moshi's windows are in its cache, not in its mask: the self-check declines it, and unchecked it is the uncached model."""
    assert "declined (self-check: logits over the packed cache" in check_family("moshi", ("8 bits",))["8 bits"]
    monkeypatch.setattr(family_cells.kvsink, "rewrite", partial(family_cells.kvsink.rewrite, check=False))
    assert "as without a cache" in check_family("moshi", ("8 bits",))["8 bits"]


def test_the_planted_fault_is_a_fault_of_the_named_layers_only() -> None:
    model, given = build_family("llama", torch.float64), ids(1, 12, 3)
    with torch.no_grad():
        whole = model(given, use_cache=False).logits
        assert distance(cached_logits(model, given, (7, 2)), whole) < 1e-6  # norms round to float32
        assert distance(cached_logits(model, given, (7, 2), planted(model, ())), whole) < 1e-6
        assert distance(cached_logits(model, given, (7, 2), planted(model, (1,))), whole) > 2 * BOUND


def test_distance_is_that_of_the_worst_position() -> None:
    wanted = torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])
    assert distance(wanted + torch.tensor([[[0.0, 0.0], [0.3, 0.4]]]), wanted) == pytest.approx(0.1)
    assert distance(wanted * float("nan"), wanted) == float("inf")


def test_forced_tokens_meet_the_logits_of_a_plain_pass() -> None:
    model, given = build_family("llama", torch.float64), ids(2, 9, 3)
    said = ids(2, 4, 4)
    with torch.no_grad():
        logits, out = forced_logits(model, given, torch.ones_like(given), said)
        plain = model(torch.cat([given, said], 1), use_cache=False).logits[:, 8:-1]
    assert torch.equal(out.sequences[:, 9:], said) and distance(logits, plain) < 1e-6


@pytest.mark.parametrize("family", NAMED)
def test_the_families_of_today_are_built_tiny(family: str) -> None:
    if family not in FAMILIES and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    with torch.device("meta"):
        model = FAMILIES[family][1]()
    text = model.config.get_text_config(decoder=True)
    assert text.vocab_size == VOCAB and text.hidden_size == 64 and 2 <= text.num_hidden_layers <= 5
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    assert kinds[-1] in ("full_attention", "hybrid") and sum(p.numel() for p in model.parameters()) < 30e6


@pytest.mark.skipif("gemma4-keys" not in FAMILIES, reason="this transformers has no Gemma 4")
def test_gemma_4_has_both_head_sizes() -> None:
    layers = build_family("gemma4-keys").model.layers
    assert [(a.self_attn.head_dim, a.self_attn.k_proj.out_features) for a in layers] == [(16, 32), (32, 32)] * 2


def test_a_run_goes_on_and_stops_what_hangs(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def check(family, cells):
        if family == "gemma2":
            time.sleep(60)
        if family == "gpt2":
            raise SystemExit(3)
        return dict.fromkeys(cells, "right")

    monkeypatch.setattr(families, "check_family", check)
    record, out = tmp_path / "record.json", tmp_path / "page.md"
    record.write_text(json.dumps({"llama": dict.fromkeys(families.CELLS, "declined (seen before)")}))
    asked = ["--only", "llama,gemma2,gpt2,qwen2", "--resume", "--jobs", "3", "--timeout", "5"]
    assert main([*asked, "--record", str(record), "--out", str(out)]) == 1
    found = {family: row["8 bits"] for family, row in json.loads(record.read_text()).items()}
    assert found["llama"] == "declined (seen before)" and found["qwen2"] == "right"
    assert found["gemma2"] == "wrong (stopped after 5 s)" and found["gpt2"].startswith("wrong (its process ended")
    assert "declined (seen before) | declined | declined" in out.read_text() and "llama" not in capsys.readouterr().out


def test_the_page_counts_what_it_shows() -> None:
    rows = {
        "llama": dict.fromkeys(families.CELLS, "right (0.01)"),
        "udop-vl": dict.fromkeys(families.CELLS, "not judged (needs boxes)"),
    }
    text = page(rows)
    assert "1 families; cells: 6 right, 0 declined, 0 wrong" in text and "- UdopForConditionalGeneration: needs boxes" in text


def test_shares_are_those_counted_by_hand() -> None:
    by_name = {m.name: m for m in MODELS}
    assert len(by_name) == 20
    assert share(by_name["meta-llama/Llama-3.1-8B"]) == 0
    assert share(by_name["mistralai/Mistral-7B-v0.1"]) == 0  # a model with nothing but windows has them packed
    assert share(by_name["google/gemma-2-9b"]) == pytest.approx(4096 / (4096 + 32768))
    gemma4 = 50 * 1024 * 16 * 512, 10 * 32768 * 4 * 1024
    assert share(by_name["google/gemma-4-31B-it"]) == pytest.approx(gemma4[0] / sum(gemma4))
    assert share(by_name["google/gemma-4-31B-it"], sliding=True) == 0
    assert weight(0.5) == pytest.approx(16 / 19.4) and weight(0) == 0
    assert share(by_name["google/gemma-2-9b"], tokens=4096) == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_compiled_and_from_a_folder(family: str) -> None:
    found = check_family(family, ("compiled", "folder"))
    assert not [c for c, outcome in found.items() if outcome.startswith(("wrong", "not judged"))], found


@pytest.mark.slow
def test_every_other_family_is_built_or_says_why() -> None:
    missing = {}
    for family in FAMILIES:
        try:
            with torch.no_grad():
                assert Subject(family).stock is not None
        except family_cells.NotJudged as error:
            missing[family] = str(error)
    assert len(FAMILIES) - len(missing) >= 200, missing
