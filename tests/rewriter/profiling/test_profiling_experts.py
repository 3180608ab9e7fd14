"""Super Experts on planted models: every layout, the criterion, skipping, pruning, sharded statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kvsink.errors import CalibrationError, UnsupportedError
from kvsink.profiling import ProfileOptions, profile
from kvsink.profiling.causal import random_control, run_model
from kvsink.profiling.passes import passes_of
from kvsink.profiling.record import prune
from kvsink.profiling.superexperts import forming_layers, judge, robustness
from kvsink.profiling.watch import EntryStats, Stats, merge_stats, watching_experts
from kvsink.tools.to_mixtral import as_mixtral
from tests import models
from tests.planted import EXPERTS, LAYERS, MIXTURES, OUT, TRIGGER, add_sinks, build, layout_of, plant, windows

QUICK = ProfileOptions(causal_windows=0)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_planted_expert_is_found_whatever_the_layout_and_the_position_of_its_trigger(family) -> None:
    model = plant(build(family), "1:3")
    before = model(windows(7)).logits
    record, _ = profile(model, windows(7, 19), QUICK)
    experts, entry = record["experts"], record["entries"]["1:3"]
    assert experts["super_experts"] == ["1:3"] and experts["candidates"] == [] and experts["forming_layers"] == [1]
    assert entry["channel"] == OUT and entry["neuron"] == 0
    assert (entry["window"], entry["position"]) in ((0, 7), (1, 19))  # not the first row that was routed there
    assert [(s["block"], s["channels"][0]) for s in record["stages"]] == [(1, OUT)]
    assert {(c["window"], c["position"]) for c in record["stages"][0]["carriers"]} == {(0, 7), (1, 19)}
    shared, dense = ("deepseek" in family or "qwen2" in family), family.startswith("deepseek")
    assert experts["entries"] == (LAYERS - dense) * (EXPERTS + shared) + dense
    assert torch.equal(model(windows(7)).logits, before)  # nothing is left behind


@pytest.mark.parametrize("label", ["2:shared", "0:dense"])
def test_shared_and_dense_parts_are_entries_of_their_own(label) -> None:
    record, _ = profile(plant(build("deepseek-v3"), label), windows(0, 3), QUICK)
    assert record["experts"]["super_experts"] == [label]


def test_an_outlier_of_the_last_layer_is_not_reported() -> None:
    record, _ = profile(plant(build("mixtral"), "3:2"), windows(0, 5), QUICK)
    experts = record["experts"]
    assert experts["ranking"][0] == "3:2" and experts["outside"] == ["3:2"]
    assert not experts["super_experts"] and not experts["candidates"]
    both = plant(plant(build("mixtral"), "1:3", 90.0), "3:2", 60.0)
    with torch.no_grad():  # the last layer fires on the mark that block 1 leaves
        module = both.get_submodule(layout_of(both).find("3:2").module)
        module.gate_up_proj[2, [0, 48]] = 0.0
        module.gate_up_proj[2, [0, 48], OUT] = 1.0
        both.model.layers[3].mlp.gate.weight[2, OUT] = 3.0
    record, _ = profile(both, windows(0, 5), QUICK)
    assert record["experts"]["super_experts"] == ["1:3"] and set(record["experts"]["ranking"][:2]) == {"1:3", "3:2"}


def test_a_quiet_model_says_so() -> None:
    record, _ = profile(build("qwen3-moe"), windows(0, 5))
    assert record["status"] == "complete" and record["stages"] == [] and record["experts"]["super_experts"] == []
    assert record["findings"][0].startswith("No massive activations") and record["experts"]["causal"] is None
    assert record["experts"]["ignore"]["llm-compressor"]["ignore"] == ["lm_head"]


def test_the_causal_check_confirms_the_maker_of_the_sinks() -> None:
    model = add_sinks(plant(build("mixtral"), "1:3"), range(2, 4))
    record, arrays = profile(model, windows(0, 0), ProfileOptions(causal_windows=2))
    check = record["experts"]["causal"]
    assert check["driven"] and [m["confirmed"] for m in check["members"]] == [True]
    assert check["all"]["d_sink_behind"] > 0.8 and max(check["all"]["largest"]) < 10
    assert abs(check["random"]["d_sink_behind"]) < 0.01 and max(check["random"]["largest"]) > 1000
    assert check["random"]["skipped"] != ["1:3"] and check["random"]["skipped"][0].startswith("1:")
    assert record["experts"]["protected"] == ["1:3"]
    assert record["experts"]["ignore"]["llm-compressor"]["ignore"][1].endswith("layers.1.mlp.experts.3.down_proj")
    assert "map.with.2" in arrays and "map.without.2" in arrays


def test_a_massive_activation_that_makes_no_sink_is_not_confirmed() -> None:
    record, _ = profile(plant(build("mixtral"), "1:3"), windows(0, 0), ProfileOptions(causal_windows=1))
    assert not record["experts"]["causal"]["driven"]
    assert not any(m["confirmed"] for m in record["experts"]["causal"]["members"])


def test_skipping_is_the_same_as_zeroed_weights() -> None:
    model = plant(build("gpt-oss"), "1:3")
    ids = windows(4, 9)
    with torch.no_grad(), watching_experts(model, layout_of(model), skip=frozenset({"1:3", "2:0"})):
        skipped = model(ids[:1]).logits
    whole = model(ids[:1]).logits
    prune(model, ["1:3", "2:0"])
    pruned = model(ids[:1]).logits
    assert torch.allclose(skipped, pruned, atol=1e-5) and not torch.allclose(skipped, whole, atol=1e-3)


def test_pruning_a_shared_expert() -> None:
    model = plant(build("deepseek-v3"), "2:shared")
    prune(model, ["2:shared"])
    record, _ = profile(model, windows(0, 3), QUICK)
    assert record["stages"] == [] and record["entries"]["2:shared"]["largest"] == 0.0
    with pytest.raises(UnsupportedError, match=r"no expert is called '2:99'; layer 2 has 2:0 to 2:shared"):
        prune(model, ["2:99"])


class _Expert(nn.Module):
    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.w13, self.w2 = nn.Linear(*gate_up.T.shape, bias=False), nn.Linear(*down.T.shape, bias=False)
        self.w13.weight.data, self.w2.weight.data = gate_up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.w13(x).chunk(2, -1)
        return self.w2(nn.functional.silu(gate) * up)


class _Block(nn.Module):
    """A mixture whose experts are modules of their own, as older and remote code has them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.gate = block.gate
        stacked = block.experts
        self.experts = nn.ModuleList(_Expert(a, b) for a, b in zip(stacked.gate_up_proj, stacked.down_proj, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        _, weights, index = self.gate(flat)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, slots = (index == e).nonzero(as_tuple=True)
            if len(rows):
                out.index_add_(0, rows, expert(flat[rows]) * weights[rows, slots, None])
        return out.view_as(x)


def test_experts_as_modules_give_what_stacked_experts_give() -> None:
    stacked = plant(build("mixtral"), "1:3")
    apart = copy.deepcopy(stacked)
    for layer in apart.model.layers:
        layer.mlp = _Block(layer.mlp)
    assert {e.stacked for e in layout_of(apart).entries} == {False}
    ids = windows(7, 19)
    a, b = profile(stacked, ids, QUICK)[0], profile(apart, ids, QUICK)[0]
    assert b["experts"]["super_experts"] == ["1:3"]
    for label, e in a["entries"].items():
        other = b["entries"][label]
        for name in ("window", "position", "channel", "rows"):
            assert e[name] == other[name], (label, name)
        assert other["largest"] == pytest.approx(e["largest"], rel=1e-4)
    skip = frozenset({"1:3"})
    mine = run_model(passes_of(apart), layout_of(apart), ids, skip).perplexity
    assert mine == pytest.approx(run_model(passes_of(stacked), layout_of(stacked), ids, skip).perplexity, rel=1e-5)
    assert b["experts"]["ignore"]["torchao"]["modules_to_not_convert"][1].endswith("mlp.experts.3.w2")


def test_an_unknown_layout_names_what_it_saw() -> None:
    model = build("qwen3-moe")
    for layer in model.model.layers:
        layer.mlp.experts.fancy = layer.mlp.experts.down_proj
        del layer.mlp.experts.down_proj
    with pytest.raises(UnsupportedError, match=r"declares 8 experts.*mlp\.experts \(Qwen3MoeExperts\)"):
        layout_of(model)


def test_a_dense_model_has_no_experts() -> None:
    with pytest.raises(UnsupportedError, match="is dense: it has no experts"):
        profile(build("llama"), windows(0), ProfileOptions(experts=True))


def test_nan_in_an_expert_names_it() -> None:
    model = build("mixtral")
    model.model.layers[2].mlp.experts.down_proj[:, 0, 0] = float("nan")
    record: dict = {}
    with pytest.raises(CalibrationError, match="block 2 puts out NaN"):
        profile(model, windows(0, 1), record=record)
    assert record["status"] == "partial" and len(record["hidden"]["largest"]) == 2  # blocks 0 and 1
    watched = watching_experts(model, layout_of(model), Stats())
    with pytest.raises(CalibrationError, match=r"layer 2, expert \d puts out NaN"), watched:
        model(windows(0))


def test_the_criterion_by_hand() -> None:
    a = {f"{l}:{e}": 0.01 * e for l in range(10) for e in range(100)}
    a |= {"1:3": 500.0, "2:5": 300.0, "2:6": 40.0, "9:9": 450.0}
    verdict = judge(a, (1, 2))
    assert verdict.super_experts == ("1:3", "2:5") and verdict.candidates == ("2:6",)  # 40 > 500 / 20, not > 500 / 10
    assert verdict.entries == 1000 and verdict.largest == 500.0
    # sorted: ..., 0.99, 40, 300, 450, 500; the 99.5th percentile lies at index 994.005
    values = sorted(a.values())
    assert verdict.percentile == pytest.approx(values[994] + 0.005 * (values[995] - values[994]))
    counts = {(r["percentile"], r["share"]): r["count"] for r in robustness(a, (1, 2))}
    assert len(counts) == 16 and counts[95.0, 0.07] == 3 and counts[99.5, 0.1] == 2 and counts[99.9, 0.1] == 1


def test_a_tenth_is_a_true_tenth() -> None:
    """Floor division would let every entry above 0 pass where the largest is below 10."""
    a = {f"1:{e}": 0.0 for e in range(1000)} | {"1:1": 8.0, "1:2": 0.7}
    assert judge(a, (1,)).super_experts == ("1:1",)


def test_forming_layers() -> None:
    median = [0.1] * 8
    assert forming_layers([2, 744, 1280, 1700, 1710, 1700, 900, 50], median) == (1, 2, 3)  # a climb over three blocks
    assert forming_layers([2, 3, 3, 3, 3, 3, 3, 5000], median) == ()  # the last block
    assert forming_layers([2, 3, 5000, 40, 3, 3, 3, 3], median) == ()  # cancelled at once
    assert forming_layers([2, 200, 190, 180, 2000, 2100, 2050, 2000], [1.0] * 8) == (4,)  # 200 is below 1000 medians
    assert forming_layers([900, 910, 905, 900], [0.1] * 4, embedding=880.0) == ()  # it came with the embedding


def test_shards_merge_to_the_whole() -> None:
    model = plant(build("olmoe"), "1:3")
    ids = windows(3, 8, 30)

    def stats(span: range) -> Stats:
        out = Stats()
        with torch.no_grad(), watching_experts(model, layout_of(model), out):
            for i in span:
                out.window = i
                model(ids[i : i + 1])
        return out

    whole, merged = stats(range(3)), merge_stats(stats(range(2)), stats(range(2, 3)))
    assert merged.entries.keys() == whole.entries.keys()
    for label, entry in whole.entries.items():
        assert merged.entries[label].__dict__ == pytest.approx(entry.__dict__), label
    assert EntryStats(largest=1.0, rows=2).merge(EntryStats(largest=3.0, rows=5)).rows == 7


def test_the_random_control_spares_the_suspects() -> None:
    layout = layout_of(build("mixtral"))
    for seed in range(20):
        control = random_control(layout, ("1:3", "1:4"), ("1:5",), seed)
        assert len(set(control)) == 2 and not {"1:3", "1:4", "1:5"} & set(control)
        assert all(c.startswith("1:") for c in control)


def test_a_llama_written_as_mixtral_has_the_same_logits() -> None:
    dense = models.build("llama").double()
    moe = as_mixtral(dense, 8)
    moe.config._experts_implementation = "eager"  # the grouped product has no float64
    ids = models.tokens(2, 40)
    assert torch.allclose(dense(ids).logits, moe(ids).logits, atol=1e-12)
    assert moe.model.layers[0].mlp.experts.down_proj.shape == (8, 64, 12)


def test_the_expert_that_holds_the_planted_neuron_of_a_dense_model() -> None:
    record, _ = profile(as_mixtral(plant(build("llama"), "1:dense"), 8), windows(0, 0), QUICK)
    assert record["experts"]["super_experts"] == ["1:0"]  # neuron 0 is in the first run
    assert record["entries"]["1:0"]["rows"] == 2 * 96  # every token goes to every expert
    assert TRIGGER == 5
