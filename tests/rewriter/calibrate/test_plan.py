"""The automatic plan: the budget holds, equal widths are never beaten by a worse plan, and what cannot be is said."""

from __future__ import annotations

import pytest
import torch

import kvsink
import kvsink.calibrate.plan as plan_module
from kvsink.calibrate.plan import Curves, Plan, allocate, candidates, layers_text, straight
from kvsink.errors import KvsinkError, UnknownName
from kvsink.methods import get_method
from kvsink.model.runtime import runtime_of
from tests.models import build, tokens

IDS = tokens(8, 64, seed=1)


def curves(damage, cost, fixed=0.0, layers=1):
    return Curves(damage, cost, fixed, layers)


def test_the_greedy_spends_where_it_helps_most():
    cost = {(0, 0): {1: 1.0, 2: 2.0, 3: 3.0}, (0, 1): {1: 1.0, 2: 2.0, 3: 3.0}}
    damage = {(0, 0): {1: 8.0, 2: 2.0, 3: 0.5}, (0, 1): {1: 1.0, 2: 0.25, 3: 0.06}}
    assert allocate(curves(damage, cost), 2.0) == {(0, 0): 3, (0, 1): 1}
    assert allocate(curves(damage, cost), 2.5) == {(0, 0): 3, (0, 1): 2}
    assert allocate(curves(damage, cost), 9.0) == {(0, 0): 3, (0, 1): 3}


def test_the_greedy_finds_the_best_of_all_plans():
    """On convex curves with equal prices it is the exact optimum."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(3, 2, generator=generator).tolist()
    cost = {(i, s): {w: float(w) for w in (1, 2, 3, 4)} for i in range(3) for s in (0, 1)}
    damage = {(i, s): {w: weight[i][s] * 4.0**-w for w in (1, 2, 3, 4)} for i, s in cost}
    c = curves(damage, cost, layers=3)
    best = min(
        (sum(damage[at][w] for at, w in zip(cost, pick, strict=True)), pick)
        for pick in torch.cartesian_prod(*[torch.arange(1, 5)] * 6).tolist()
        if sum(pick) <= 13
    )
    assert c.total(allocate(c, 13 / 6)) == pytest.approx(best[0])


def test_damage_never_grows_with_bits():
    found = straight((1.0, 2.0, 3.0, 4.0), (1.0, 0.5), (3.0, 0.6))  # noise: two more bits measured worse
    assert list(found.values()) == sorted(found.values(), reverse=True)


@pytest.mark.parametrize("method", ["klt", "klt:even"])
def test_quarters_are_tried_where_widths_differ_by_channel(method):
    keys, values = candidates(get_method(method))
    assert 2.25 in keys and 2.25 not in values


def test_the_text_leaves_out_exact_layers():
    assert layers_text(((2, 4), (16, 16), (1.5, 2))) == "0:key_bits=2,value_bits=4;2:key_bits=1.5,value_bits=2"


@pytest.mark.parametrize(("method", "budget"), [("rtn", 4.8), ("klt", None), ("rotatekv", 4.6), ("centred", 5.0)])
def test_the_budget_holds_and_equal_widths_are_never_beaten_by_worse(method, budget, monkeypatch):
    chosen: list[Plan] = []
    choose = plan_module.choose_plan
    monkeypatch.setattr(plan_module, "choose_plan", lambda *a, **k: chosen.append(choose(*a, **k)) or chosen[-1])
    model = build("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = kvsink.rewrite(model, method, plan="auto", bits=budget, calibration=IDS, fold=False)
    plain = kvsink.rewrite(build("llama"), method, calibration=IDS)
    assert report.bits <= (plain.bits if budget is None else budget) + 1e-9
    (plan,) = chosen
    assert plan.kl <= plan.uniform_kl
    assert report.bits == pytest.approx(plan.bits)
    assert any(note.startswith("automatic plan") for note in report.notes)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    widths = [(p.codec.key.bits, p.codec.value.bits) for p in runtime_of(model).plans]
    assert tuple(widths) == plan.widths


def test_layers_that_are_left_alone_stay_so():
    model = build("gemma3")
    report = kvsink.rewrite(model, "rtn", plan="auto", calibration=IDS)
    assert [r.packed for r in report.layers] == [False, True]


def test_a_worse_plan_is_not_taken(monkeypatch):
    """With the damages turned over, the greedy spends on the wrong sides; the held-out windows must notice."""
    import kvsink.calibrate.plan as plan

    right = kvsink.calibrate.plan.allocate

    def wrong(c, budget):
        top = max(max(d.values()) for d in c.damage.values())
        turned = {at: {w: top / d[min(d)] * 4.0**-w for w in d} for at, d in c.damage.items()}
        return right(Curves(turned, c.cost, c.fixed, c.layers), budget)

    monkeypatch.setattr(plan, "allocate", wrong)
    model = build("llama")
    report = kvsink.rewrite(model, "rtn", plan="auto", bits=6.3, calibration=IDS)
    widths = {(p.codec.key.bits, p.codec.value.bits) for p in runtime_of(model).plans}
    assert len(widths) == 1 and "equal widths were kept" in report.notes[-1]


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"plan": "auto", "bits": 1.0}, KvsinkError, r"need at least 3\.\d+ counted bits"),
        ({"plan": "best"}, UnknownName, "nearest known: auto"),
        ({"bits": 2.2}, KvsinkError, "--plan auto"),
        ({"plan": "auto", "layers": "0:key_bits=4"}, KvsinkError, "leave --layers out"),
    ],
)
def test_what_cannot_be_is_said(options, kind, words):
    model = build("llama")
    with pytest.raises(kind, match=words):
        kvsink.rewrite(model, "rtn", calibration=IDS, **options)
    assert "_kvsink_runtime" not in vars(model)


def test_the_least_that_is_named_can_be_reached():
    with pytest.raises(KvsinkError) as error:
        kvsink.rewrite(build("llama"), "rtn", plan="auto", bits=1.0, calibration=IDS)
    least = float(str(error.value).split("at least ")[1].split()[0])
    assert kvsink.rewrite(build("llama"), "rtn", plan="auto", bits=least, calibration=IDS).bits <= least
    with pytest.raises(KvsinkError, match="at least"):
        kvsink.rewrite(build("llama"), "rtn", plan="auto", bits=least - 0.01, calibration=IDS)
