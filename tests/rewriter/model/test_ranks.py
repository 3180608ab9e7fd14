"""A rewritten folder under transformers' tensor parallelism: what one process computes, close to the stock model split alike."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

import kvsink
from kvsink.errors import UnsupportedError
from kvsink.methods import methods
from kvsink.model.ranks import check_ranks, ranks_of, split
from kvsink.model.runtime import runtime_of
from tests.export.vllm.plans import planted
from tests.graphs import rewritten
from tests.models import build, tokens
from tests.rewriter.model.split_run import STEPS, launch

AUTO = {"tp_plan": "auto"}
CHUNK = 8
no_gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch has no gloo to run two processes with"
)


def folder(path: Path, family: str, method: str, **options: Any) -> Path:
    """A tiny model's folder, rewritten, with the stock one beside it."""
    wide = torch.float32 if "moe" in family else torch.float64  # which its experts do not take
    model: Any = build(family, dtype=wide)  # in float32 the order of a sum decides which code a number gets
    model.save_pretrained(f"{path}-stock")
    text = torch.cat([tokens(1, 64, seed=seed) for seed in range(6)])
    kvsink.rewrite(model, method, calibration=text, check=False, **options)
    model.save_pretrained(path)
    return path


def job(path: Path | str, **more: Any) -> dict[str, Any]:
    return {"folder": str(path), "config": AUTO, "chunk": CHUNK, **more}


def same(one: dict[str, Any], ranks: list[dict[str, Any]], heads: list[int]) -> None:
    """Every process has the tokens and logits of one, up to the order of a sum, and holds so many heads."""
    for rank in ranks:
        assert rank["heads"] == heads
        for name in ("grown", "static"):
            assert torch.equal(rank[name][0], one[name][0]) and rank[name][1].shape[1] == STEPS
            assert rank["text"].dtype == torch.float32 or (rank[name][1] - one[name][1]).abs().max() <= 1e-12
        assert rank["text"].dtype == torch.float32 or (rank["text"] - one["text"]).abs().max() <= 1e-12


@no_gloo
def test_two_processes_are_as_one(tmp_path: Path) -> None:
    """And near the stock model split alike; codebooks of the wrong head would be at 0.6. What a split model cannot do is said."""
    near = {"klt": 0.03, "cq": 0.15}  # of the spread of logits
    paths = [folder(tmp_path / "klt", "llama", "klt", key_bits=8, value_bits=8)]
    paths.append(folder(tmp_path / "cq", "qwen2", "cq", key_bits=4, value_bits=4))
    bad = folder(tmp_path / "rotatekv", "llama", "rotatekv")
    one = launch([job(path, config={}) for path in paths], tmp_path / "one", 1)[0]
    jobs = [job(path, saves=path == paths[0]) for path in paths] + [job(f"{path}-stock") for path in paths] + [job(bad)]
    two = launch(jobs, tmp_path / "two", 2)
    for i, path in enumerate(paths):
        same(one[i], [rank[i] for rank in two], [1, 1])
        for rank in two:
            packed, stock = rank[i]["text"], rank[2 + i]["text"]
            assert rank[2 + i]["heads"] == [1, 1] and 1e-6 < (packed - stock).std() / stock.std() <= near[path.name]
    for rank in two:
        wanted = "UnsupportedError: kvsink over 2 processes: keys of layer 0 are turned across heads; load it in one process"
        assert rank[4] == {"error": wanted, "loaded": 0}
        words = ("copy the folder", "save the prompt", "run the prompt", "rewrite it in one", "split over 2 processes, which")
        assert all(a in b for a, b in zip(words, rank[0]["declined"], strict=True)), rank[0]["declined"]


@no_gloo
@pytest.mark.slow
def test_methods_and_families_are_as_one(tmp_path: Path) -> None:
    cases = (
        ("qwen2", "klt", [1, 1]),
        ("llama", "cq", [1, 1]),
        ("qwen3", "kivi", [1, 1]),
        ("phi3", "klt", [2, 2]),  # its plan gathers all heads in every process
        ("gemma3", "klt", [1, 1]),
        ("qwen3-moe", "rtn", [1, 1]),
    )
    paths = [folder(tmp_path / f"{family}-{method}", family, method) for family, method, _ in cases]
    planted("klt", "kvsink:3+first:1").double().save_pretrained(tmp_path / "sinks")
    paths.append(tmp_path / "sinks")
    one = launch([job(p, config={}) for p in paths], tmp_path / "one", 1)[0]
    two = launch([job(p) for p in paths], tmp_path / "two", 2)
    for i, heads in enumerate([*(heads for *_, heads in cases), [1] * 4]):
        same(one[i], [rank[i] for rank in two], heads)


@pytest.mark.parametrize("method", sorted(methods()))
def test_heads_of_a_method_are_coded_apart_or_it_says_so(method: str) -> None:
    """Rows read back from the codes of each process, beside each other, are those of one; a method that says otherwise differs."""
    whole = runtime_of(rewritten("llama", "sdpa", method, protect="first:1"))
    codec = whole.plans[0].codec
    assert codec is not None
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(2, 2, 400, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    k[:, 1], v[:, 0] = 3 * k[:, 1], 2 * v[:, 0]
    parts = []
    for rank in range(2):
        part, own = copy.deepcopy(whole), slice(rank, rank + 1)
        part.keep(rank, 2)
        if codec.key.heads_per_group > 1:
            with pytest.raises(ValueError, match="16 channels do not split into runs of 32"):
                read(part, k[:, own], v[:, own])
            assert codec.key.shares_heads
            return
        parts.append(read(part, k[:, own], v[:, own]))
    found = zip((codec.key, codec.value), (k, v), read(whole, k, v), zip(*parts, strict=True), strict=True)
    for side, rows, one, halves in found:
        apart = (torch.cat(halves, 1) - one).abs().max()
        assert (one - rows).abs().max() > 0.05  # of codes
        assert apart > 0.05 if side.shares_heads else apart <= 1e-12, side


def read(runtime: Any, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What layer 0 of a new cache says of these rows, new ones read from their codes too."""
    cache = kvsink.KVSinkCache(runtime)
    cache._make_strict()
    found: tuple[torch.Tensor, torch.Tensor] = cache.layers[0].update(k, v)
    return found


def asked(model: Any, **sizes: Any) -> Any:
    """The model as one that is going to be split, and its weights are not here yet."""
    config = {"tp_size": 2, "pp_size": 1, "dp_size": 1, "ep_size": 1, "tp_plan": "auto"}
    model.config.distributed_config = SimpleNamespace(**{**config, **sizes})
    return model


def test_a_whole_model_is_left_alone() -> None:
    model = rewritten("llama", "sdpa", "klt")
    tables = dict(runtime_of(model).tables)
    split(model, runtime_of(model))
    check_ranks(model)
    assert ranks_of(model) == 1 and runtime_of(model).ranks == 1
    assert runtime_of(model).tables.keys() == tables.keys() and all(runtime_of(model).tables[n] is t for n, t in tables.items())


@pytest.mark.parametrize(
    ("family", "method", "options", "words"),
    [
        ("llama", "rotatekv", {}, "keys of layer 0 are turned across heads"),
        ("llama", "kvquant", {"protect": "none"}, "values of layer 0 share numbers of a token among heads"),
        ("llama", "tasq", {}, "share numbers of a token among heads"),
        ("llama", "rtn", {"protect": "anchors:10%"}, "layer 0 keeps anchors:10% exact, which the attention of all heads decides"),
    ],
)
def test_what_is_not_split_is_said(family: str, method: str, options: dict[str, Any], words: str) -> None:
    model = asked(rewritten(family, "sdpa", method, **options))
    with pytest.raises(UnsupportedError, match=f"kvsink over 2 processes: .*{words}.*; load it in one process"):
        split(model, runtime_of(model))


def test_heads_that_do_not_divide_are_said() -> None:
    model = asked(rewritten("llama", "sdpa", "klt"), tp_size=4)
    with pytest.raises(UnsupportedError, match="over 4 processes: 2 key-value and 4 query heads of layer 0 do not divide"):
        split(model, runtime_of(model))


@pytest.mark.parametrize(
    ("plan", "by_heads"),
    [({"model.layers.*.self_attn.k_proj": "colwise_rep"}, None), ({}, False), ("auto", True), ({"lm_head": "colwise_rep"}, True)],
)
def test_the_plan_says_where_heads_are(plan: Any, by_heads: bool | None) -> None:
    model = asked(rewritten("llama", "sdpa", "klt"), tp_plan=plan)
    mesh = SimpleNamespace(get_mesh=lambda name: SimpleNamespace(get_local_rank=lambda: 1))
    model._mesh_manager = mesh
    runtime = runtime_of(model)
    whole = runtime.tables["layers.1.k_basis"]
    if by_heads is None:
        with pytest.raises(UnsupportedError, match="LlamaForCausalLM is split otherwise than by the heads of q_proj, k_proj"):
            split(model, runtime)
        return
    split(model, runtime)
    assert runtime.ranks == 2
    assert torch.equal(runtime.tables["layers.1.k_basis"], whole[1:] if by_heads else whole)
    assert runtime.anatomy.layers[1][:2] == ((2, 1) if by_heads else (4, 2))


@pytest.mark.parametrize(("size", "words"), [("pp_size", "pipeline"), ("dp_size", "FSDP"), ("ep_size", "expert")])
def test_other_parallelism_is_said(size: str, words: str) -> None:
    model = asked(build("llama"), **{"tp_size": 1, size: 2})
    with pytest.raises(UnsupportedError, match=rf"over 2 processes: {words}.* is not served; pass DistributedConfig\(tp_size=N\)"):
        check_ranks(model)


def test_an_older_transformers_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model._tp_size = 2  # type: ignore[assignment]
    check_ranks(model)
    monkeypatch.delattr("transformers.distributed.mixin.DistributedMixin.maybe_distribute_model")
    with pytest.raises(UnsupportedError, match=r"this version of transformers splits weights .* \(5.24 does otherwise\)"):
        check_ranks(model)
