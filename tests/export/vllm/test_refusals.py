"""One line for every folder, layer and option that is not served; none for what is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvsink.errors import SidecarError, UnsupportedError
from kvsink.export.vllm.refusals import check_engine, check_folder, check_layer, read_plan
from tests.export.vllm.plans import engine, folder, layer, planted

SERVED = ("klt", "klt:best", "centred", "rtn", "static", "kvquant")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return read_plan(folder(planted(), tmp_path_factory.mktemp("folder") / "klt"))


@pytest.mark.parametrize("method", SERVED)
def test_codecs_that_keep_rows_apart_are_served(method: str, tmp_path: Path) -> None:
    found = read_plan(folder(planted(method), tmp_path / "out", places=3))
    check_folder(found)
    assert len(found.codecs) == 4 and found.kv_heads == (2,) * 4 and found.blocks == (1,) and found.places == 3
    assert [str(s.source) for s in found.segments[2]] == ["sinks:1:0.25", "first"]


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("kivi", {}, "has keys coded in blocks of tokens"),
        ("rotatekv", {}, "has keys that are turned across heads"),
        ("kvquant-1%", {}, "has keys with outliers"),
        ("rtn", {"window": 4}, "keeps the newest 4 rows exact"),
        ("rtn", {"value_bits": 16}, "has values in 16 bit"),
        ("rtn", {"protect": "massive:3"}, r"keeps rows exact by 'massive', .* \(use sinks:0.25\+first:1\)"),
        ("rtn", {"protect": "anchors:10%"}, "keeps anchors:10% exact, which later rows decide"),
    ],
)
def test_codecs_that_do_not_are_named(method: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    found = read_plan(folder(planted(method, **{"protect": "none", **options}), tmp_path / "out"))
    with pytest.raises(UnsupportedError, match=f"kvsink in vLLM: layer 0 {words}.*; rewrite the model") as caught:
        check_folder(found)
    assert "\n" not in str(caught.value)


def test_a_layer_that_is_left_alone_is_named_with_its_reason(plan: Any) -> None:
    reasons = ("", "sliding attention: kept in 16 bit", "", "")
    with pytest.raises(UnsupportedError, match=r"layer 1 is left in 16 bit \(sliding attention: kept in 16 bit\)"):
        check_folder(plan._replace(codecs=(plan.codecs[0], None, *plan.codecs[2:]), reasons=reasons))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"format": 99}, "has format 99, this version reads 1; run kvsink-rewrite"), ({"layers": 3}, "cannot be")],
)
def test_a_folder_of_another_version_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(SidecarError, match=words):
        read_plan(folder(planted(), tmp_path / "out", **changes))


def test_codecs_of_another_version_are_named(tmp_path: Path) -> None:
    path = folder(planted(), tmp_path / "out") / "kvsink.json"
    path.write_text(path.read_text().replace('"kind"', '"a_field_to_come": 1, "kind"', 1))
    with pytest.raises(SidecarError, match="kvsink.json is not read: .*a_field_to_come.* version of kvsink; run kvsink-rewrite"):
        read_plan(path.parent)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache_config__cache_dtype": "fp8"}, "--kv-cache-dtype fp8 codes a cache that is coded already; leave it out"),
        ({"cache_config__block_size": 16}, "--block-size 16 is not the page of 128 tokens; pass --block-size 128"),
        ({"speculative_config": object()}, "speculative decoding takes rows back"),
        ({"parallel_config__tensor_parallel_size": 3}, r"\[2\] key-value heads do not divide among 3 ranks"),
        ({"parallel_config__pipeline_parallel_size": 2}, "use --pipeline-parallel-size 1"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallel attention is not served"),
    ],
)
def test_options_that_are_not_served_are_named(plan: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=f"kvsink in vLLM: .*{words}"):
        check_engine(plan, engine(**changes), "cpu")


def test_options_that_are_served_pass(plan: Any) -> None:
    check_engine(plan, engine(), "cpu")
    check_engine(plan, engine(cache_config__cache_dtype="float32"), "cpu")
    for ranks in (2, 4):
        check_engine(plan, engine(parallel_config__tensor_parallel_size=ranks), "cpu")
    check_engine(plan, engine(), "cuda")
    check_engine(plan, engine(cache_config__block_size=16, cache_config__user_specified_block_size=False), "cuda")
    with pytest.raises(UnsupportedError, match="the device is xpu; pages have kernels on CPUs and NVIDIA GPUs alone"):
        check_engine(plan, engine(), "xpu")


def test_a_number_of_a_token_does_not_go_over_ranks(tmp_path: Path) -> None:
    found = read_plan(folder(planted("kvquant"), tmp_path / "out"))
    check_engine(found, engine(), "cpu")
    with pytest.raises(UnsupportedError, match="shared by heads of 2 ranks"):
        check_engine(found, engine(parallel_config__tensor_parallel_size=2), "cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": 64}, "has a window of 64 tokens"),
        ({"attn_type": "encoder"}, "attends as encoder, not as a decoder"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "reads the cache of model.layers.0"),
        ({"logits_soft_cap": 50.0}, "caps its logits at 50.0"),
        ({"alibi_slopes": [1.0]}, "has a position bias"),
        ({"has_sink": True}, "has learned sink logits"),
    ],
)
def test_layers_that_attend_otherwise_are_named(plan: Any, changes: dict[str, Any], words: str) -> None:
    check_layer(plan, 2, layer())
    with pytest.raises(UnsupportedError, match=rf"layer 2 \(model.layers.2.self_attn.attn\) {words}, which pages do not serve"):
        check_layer(plan, 2, layer(**changes))
    with pytest.raises(UnsupportedError, match="is not one of the plan's 4"):
        check_layer(plan, 4, layer())
