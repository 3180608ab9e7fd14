"""On kvsink's own cache every pass leaves a graph that runs, with the same outputs and the same bytes in the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvsink.graph.pipeline import DEFAULT, run_passes
from kvsink.graph.targets import kind

from ..close import FUSED_FLOAT32, SOFTMAX_IN_FLOAT32, largest_difference
from ..graphs import packed_graph, run

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("klt", {}),
    ("klt", {"window": 4}),
    ("klt", {"strict": True}),
    ("klt", {"protect": "none", "key_bits": 16}),
    ("centred", {}),
    ("rtn", {}),
    ("rtn", {"value_bits": 16, "protect": "first:2"}),
    ("rotatekv", {}),
    ("rotatekv", {"fold": False, "window": 3}),
    ("klt", {"value_bits": 2.25, "windows": 12}),
    ("cq", {"key_bits": 1.25, "window": 3, "windows": 16}),
    ("kvquant", {}),
)


def passes_and_runs(gm: torch.fx.GraphModule) -> dict[str, tuple[list[torch.Tensor], list[Any]]]:
    runs = {"before": run(gm)}
    run_passes(gm, watch=lambda name, rewritten: runs.__setitem__(name, run(rewritten)))
    assert tuple(runs) == ("before", *DEFAULT)
    return runs


def furthest(found: list[Any], wanted: list[Any], bound: float) -> float:
    """How far a difference goes beyond `bound`; a number stored in float16 may round the other way where its input differs."""
    worst = -1.0
    for a, b in zip(found, wanted, strict=True):
        step = torch.finfo(torch.float16).eps * b.abs().double() if bound and b.dtype == torch.float16 else 0.0
        apart = torch.where(a == b, 0.0, (a.double() - b.double()).abs()) - bound - step
        worst = max(worst, float(apart.max()) if apart.numel() else -1.0)
    return worst


def check_runs(runs: dict[str, tuple[list[torch.Tensor], list[Any]]], eager: bool) -> None:
    for name, (outputs, state) in runs.items():
        fused = name in ("fuse", "verify")
        bound = FUSED_FLOAT32 if fused else SOFTMAX_IN_FLOAT32 if eager else 0.0
        assert largest_difference(outputs, runs["before"][0]) <= bound, name
        assert furthest(state, runs["before"][1], bound) <= 0, name  # codes too: a code that moves differs by 1


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("method", "options", "length"),
    [
        pytest.param(
            *case, length, id="-".join(map(str, (case[0], *case[1].items(), length))), marks=() if quick else pytest.mark.slow
        )
        for i, case in enumerate(CASES)
        for length, quick in ((1, i % 2 == 0 or i == 1), (6, i % 2 == 1 or i == 0))
    ],
)
def test_every_pass_keeps_outputs_and_bytes(method: str, options: dict[str, Any], length: int) -> None:
    check_runs(passes_and_runs(packed_graph("llama", "sdpa", method, length, **options)), eager=False)


@pytest.mark.sample(3)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3", "gemma3", "qwen3-moe"])
def test_every_family(family: str, attention: str) -> None:
    check_runs(passes_and_runs(packed_graph(family, attention, "klt", 1)), eager=attention == "eager")


def test_a_model_without_rope() -> None:
    check_runs(passes_and_runs(packed_graph("gpt2", "sdpa", "rtn", 6, protect="first:2")), eager=False)


@pytest.mark.parametrize(("method", "options"), [("rotatekv", {"fold": False}), ("klt", {"fold": False})])
def test_rotations_that_are_not_their_own_inverse(method: str, options: dict[str, Any]) -> None:
    """At powers of two the matrix is symmetric, and the way back is the way in; at 24 and 48 it is not."""
    gm = packed_graph("llama-24", "sdpa", method, 1, **options)
    check_runs(passes_and_runs(gm), eager=False)


def test_a_batch() -> None:
    check_runs(passes_and_runs(packed_graph("llama", "sdpa", "klt", 6, batch=3)), eager=False)


def test_the_fused_graph_stores_once_and_attends_once_per_site() -> None:
    gm = packed_graph("llama", "sdpa", "klt", 1)
    report = run_passes(gm)
    names = [kind(node) for node in gm.graph.nodes]
    assert names.count("kvsink.append_") == names.count("kvsink.attend") == 2
    for gone in (
        "kvsink.read",
        "kvsink.quantize",
        "kvsink.dequantize",
        "kvsink.encode",
        "kvsink.decode",
        "scaled_dot_product_attention",
        "index_copy_",
        "merge_exact",
    ):
        assert gone not in names
    assert [record.layer for record in report.done("verify")] == [0, 1]


def test_keys_before_rope_reach_the_store() -> None:
    gm = packed_graph("llama", "sdpa", "klt", 1)
    sites = run_passes(gm).sites
    stores = [node for node in gm.graph.nodes if kind(node) == "kvsink.append_"]
    for site, store in zip(sites, stores, strict=True):
        assert store.args[0] is site.k_pre and store.args[9] is False


def test_keys_after_rope_reach_the_store_when_nothing_acts_before_it() -> None:
    gm = packed_graph("llama", "sdpa", "rtn", 1)
    sites = run_passes(gm).sites
    for site, store in zip(sites, [node for node in gm.graph.nodes if kind(node) == "kvsink.append_"], strict=True):
        assert store.args[0] is site.k_rope and store.args[9] is True


def test_a_layer_the_plan_leaves_alone_keeps_its_arithmetic() -> None:
    gm = packed_graph("gemma3", "sdpa", "klt", 1)
    report = run_passes(gm)
    assert [record.layer for record in report.done("fuse")] == [1]
    assert report.left_alone() == {"model.layers.0.self_attn": "a stock static cache and no codec for it"}


def test_one_graph_serves_several_lengths() -> None:
    """Lengths become symbolic after the second prompt; the passes must not fix them."""
    import kvsink

    from ..graphs import rewritten
    from ..models import tokens

    torch._dynamo.reset()  # other tests compiled this model class often enough for dynamo to give it up
    model, fused, plain = rewritten("llama", "sdpa", "klt", window=4), [], []
    one, two, three = (kvsink.KVSinkCache.for_model(model, 1, max_length=64) for _ in range(3))

    def untouched(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        plain.append(gm)
        return gm.forward

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        fused.append(len(run_passes(gm).done("fuse")))
        return gm.forward

    prompts = [tokens(length=length, seed=length) for length in (6, 7, 9, 1, 1)]
    with torch.no_grad():
        other = torch.compile(model, backend=untouched)
        for ids in prompts:
            other(ids, past_key_values=three)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        for ids in prompts:
            left, right = (run_(ids, past_key_values=cache).logits for run_, cache in ((compiled, one), (model, two)))
            assert largest_difference(left, right) <= FUSED_FLOAT32
    assert fused == [2] * len(plain)  # as many graphs as dynamo makes without the passes
    assert largest_difference(list(one.tensors().values()), list(two.tensors().values())) <= FUSED_FLOAT32
