"""Life of massive activations, attention sums, sink decay, and what reads a profile."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import kvsink
from kvsink.errors import CalibrationError, UnsupportedError
from kvsink.model.anatomy import anatomy
from kvsink.profiling import ProfileOptions, load_profile, profile, profile_stages
from kvsink.profiling.attention import AttentionSums, sink_decay, watching_attention
from kvsink.profiling.health import sink_health
from kvsink.profiling.page import render_page
from kvsink.profiling.record import windows_of
from tests import models
from tests.planted import OUT, add_sinks, build, plant, windows


@pytest.fixture(scope="module")
def planted():
    model = add_sinks(plant(build("llama"), "1:dense"), range(2, 4))
    return model, *profile(model, windows(0, 12), ProfileOptions())


def test_a_stage_and_the_neuron_behind_it(planted) -> None:
    _, record, _ = planted
    (stage,) = record["stages"]
    assert (stage["block"], stage["channels"][0], stage["stable_channels"], stage["end"]) == (1, OUT, [OUT], None)
    assert [(c["window"], c["position"]) for c in stage["carriers"]] in ([(0, 0), (1, 12)], [(1, 12), (0, 0)])
    assert not stage["first_token_only"] and stage["carriers_first"] == 1
    (neuron,) = stage["neurons"]
    assert (neuron["entry"], neuron["neuron"], neuron["rank_by_weight"]) == ("1:dense", 0, 1)
    assert neuron["weight"] == 60.0 and neuron["weight_view"][0] == {"neuron": 0, "weight": 60.0}
    assert neuron["share"] == pytest.approx(1.0, abs=1e-3)
    json.dumps(record)


def test_a_canceller_ends_the_stage_and_is_named() -> None:
    model = plant(build("llama"), "1:dense")
    mlp = model.model.layers[2].mlp  # reads what block 1 wrote and takes it back
    size = float(model.model(windows(0), output_hidden_states=True).hidden_states[2][0, 0, OUT])
    for w in (mlp.gate_proj.weight, mlp.up_proj.weight):
        w[0] = 0.0
        w[0, OUT] = 1.0
    mlp.down_proj.weight[OUT, 0] = -size / 64  # silu(8) · 8
    (stage,) = profile(model, windows(0, 12), ProfileOptions())[0]["stages"]
    assert stage["end"] == 2 and stage["ended_at_once"] and stage["ended_by"][0]["entry"] == "2:dense"
    assert stage["layers"] == [2, 2]


def test_the_predictor_finds_a_sink_that_the_first_rows_miss(planted) -> None:
    _, record, _ = planted
    (row,) = record["predictor"]
    one = row["rows"][0]
    assert row["layers"] == [2, 3] and one["kvsink"] == {"recall": 0.2, "precision": 1.0}
    assert one["first"]["precision"] == 0.5  # right in the window whose sink is the first token, wrong in the other
    layer = record["attention"]["layers"][2]
    assert {(s["window"], s["position"]) for s in layer["sinks"][:2]} == {(0, 0), (1, 12)}


def test_ranges_and_norms(planted) -> None:
    model, record, _ = planted
    rows = record["kv"][3]["ranges"]
    keys = model(windows(0, 12)[:1]).past_key_values.layers[3].keys
    assert rows["key"]["largest"] >= float(keys.abs().max())
    assert rows["key, Hadamard"]["rms"] == pytest.approx(rows["key"]["rms"], rel=1e-5)  # a rotation
    assert rows["key before RoPE"]["rms"] == pytest.approx(rows["key"]["rms"], rel=1e-5)
    assert rows["key, Hadamard"]["crest"] < rows["key"]["crest"]  # the planted channel is spread
    assert set(record["kv"][3]["norms"]) == {"key sinks", "key rest", "value sinks", "value rest"}


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2"])
def test_attention_sums_are_those_of_the_probabilities(family) -> None:
    model, ids = models.build(family), models.tokens(1, 40)
    sums = AttentionSums()
    with torch.no_grad(), watching_attention(model, anatomy(model), sums) as how:
        model(ids)
    mass, first = sums.take(models.LAYERS)
    assert how == ("eager" if family == "gemma2" else "sdpa")
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    wanted = torch.cat(eager(ids, output_attentions=True).attentions)  # [L, Hq, S, T]
    assert torch.allclose(mass, wanted.sum(2), atol=1e-4) and torch.allclose(first, wanted[..., 0], atol=1e-5)
    assert getattr(model.config, "_attn_implementation", None) == ("eager" if family == "gemma2" else "sdpa")


def test_sink_decay_by_hand() -> None:
    before = torch.full((2, 2, 3, 40), 0.5)
    before[:, 0, 2] = 1e-4  # a head that holds no sink is left out
    after = before.clone()
    after[:, 0, :2] *= 0.25
    after[:, 0, 2] = 0.9
    after[:, 1, :, 32:] *= torch.linspace(0, 1, 8)
    after[..., :32] = 0.0  # early queries do not count
    decay, left_out = sink_decay(before, after)
    assert decay[0] == pytest.approx(0.75) and decay[1] == pytest.approx(0.5) and left_out == pytest.approx(1 / 6)
    assert sink_decay(torch.zeros(1, 1, 1, 40), torch.ones(1, 1, 1, 40))[0] == [None]


def test_the_record_feeds_protection(planted, tmp_path) -> None:
    model, record, _ = planted
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(record))
    assert profile_stages(load_profile(path), model)[0].channels[0] == OUT
    copied = copy.deepcopy(model)
    called = []
    copied.register_forward_pre_hook(lambda m, args, kwargs: called.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    report = kvsink.rewrite(copied, "rotated", protect="kvsink:2", profile=path, calibration="none")
    assert [s["block"] for s in report.stages] == [1] and max(called) < 40  # looked at and checked, but no text was run
    moved = {**record, "stages": [{**record["stages"][0], "block": 0}]}
    report = kvsink.rewrite(copy.deepcopy(model), "klt", protect="kvsink:2", profile=moved, calibration=windows(0, 12, 3, 4))
    assert [s["block"] for s in report.stages] == [0]  # the record's word, not the calibration's


def test_records_that_cannot_be_used(planted, tmp_path) -> None:
    _, record, _ = planted
    with pytest.raises(CalibrationError, match="other weights"):
        profile_stages(record, models.build("llama"))
    for text, says in (("{", "cannot be read"), ("{}", "not a profile"), (json.dumps({**record, "status": "partial"}), "partial")):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(CalibrationError, match=says):
            load_profile(tmp_path / "p.json")


def test_sink_health_sees_a_cache_that_loses_its_sinks() -> None:
    ids = windows(0, 0, 0, 0, length=128)

    def health(method: str, bits: float, protect: str):
        model = add_sinks(plant(build("llama"), "1:dense"), range(2, 4))
        kvsink.rewrite(model, method, key_bits=bits, value_bits=bits, protect=protect, calibration=ids)
        return sink_health(model, model, ids[:2], chunk=16)

    fine = health("rtn", 8, "first:1")
    assert abs(fine.worst) < 0.02 and "within 0.02" in fine.line()
    model = add_sinks(plant(build("llama"), "1:dense"), range(2, 4))
    kvsink.rewrite(model, "rtn", key_bits=8, value_bits=8, protect="none", calibration=ids)
    plain = add_sinks(plant(build("llama"), "1:dense"), range(2, 4))
    for layer in (2, 3):
        model.model.layers[layer].self_attn.k_proj.weight.mul_(0.25)
    broken = sink_health(model, plain, ids[:2], chunk=16)
    assert broken.worst > 0.5 and "beyond 0.02" in broken.line()
    kvsink.rewrite(plain, "rtn", key_bits=8, value_bits=8, protect="anchors:4", calibration=ids)
    with pytest.raises(UnsupportedError, match="anchors"):
        sink_health(plain, plain, ids[:1])


def test_a_rewritten_model_is_not_profiled(planted) -> None:
    model = copy.deepcopy(planted[0])
    kvsink.rewrite(model, "rtn", protect="none")
    with pytest.raises(UnsupportedError, match="rewritten by kvsink"):
        profile(model, windows(0))


def test_texts_that_are_too_short() -> None:
    def tokenizer(text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}

    with pytest.raises(CalibrationError, match=r"holds 70 tokens.*--window-tokens 70"):
        windows_of("x" * 70, tokenizer, 2, 96)
    with pytest.raises(CalibrationError, match="too short for sinks; give --window-tokens 64"):
        windows_of("x" * 500, tokenizer, 2, 16)
    assert windows_of("x" * 200, tokenizer, 8, 96)[:, 0].tolist() == [0, 104]  # as many as fit, to the end


def test_the_page_holds_everything(planted) -> None:
    pytest.importorskip("matplotlib")
    _, record, arrays = planted
    record = {**record, "model": "a <b> model", "text": "t"}
    page = render_page(record, arrays)
    assert "a &lt;b&gt; model" in page and page.count("<figure>") == page.count("</figure>") >= 7
    assert page.count('class="light"') == page.count('class="dark"') == page.count("<figure>")
    for outside in ('src="', "<script", "<link", "@import"):
        assert outside not in page
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))  # one page holds many pictures
