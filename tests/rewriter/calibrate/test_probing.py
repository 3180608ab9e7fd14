"""What a look at a model says of its layers, against the configs the models were built from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

import kvsink
from kvsink.calibrate.probing import look, probe_ids
from kvsink.errors import UnsupportedError
from kvsink.model.anatomy import Heads
from kvsink.model.decoder import Decoder
from kvsink.model.turning import NONE, Turning
from kvsink.tools.tiny_models import build_family

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}


def seen(model: Any) -> Any:
    return look(Decoder(model))


def gemma4(**more: Any) -> Any:
    torch.manual_seed(0)
    config = hf.Gemma4TextConfig(
        **{**SMALL, "num_key_value_heads": 1, "num_attention_heads": 2},
        num_hidden_layers=4,
        sliding_window=8,
        global_head_dim=32,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
        **more,
    )
    return hf.Gemma4ForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("family", "turning"),
    [
        ("llama", Turning(16)),
        ("cohere", Turning(16, "pairs", "pairs")),
        ("gpt-oss", Turning(16, "halves", "once")),
        ("gpt-neox", Turning(4)),
        ("gpt2", NONE),
        ("falcon-alibi", NONE),
    ],
)
def test_turnings(family: str, turning: Turning) -> None:
    assert set(seen(build_family(family)).turnings) == {turning}


def test_layers_without_rope_beside_layers_with_it() -> None:
    assert seen(build_family("smollm3")).turnings == (Turning(16), NONE)


def test_heads_that_differ_by_layer() -> None:
    assert seen(gemma4()).layers == (Heads(2, 1, 16, 16), Heads(2, 1, 32, 32)) * 2


def test_shared_keys_are_named_and_their_source_hands_them_out_whole() -> None:
    found = seen(gemma4(num_kv_shared_layers=2))
    assert [bool(a) for a in found.absent] == [False, False, True, True]
    assert found.absent[3] == "shared: it reads the keys and values of layer 1"
    assert found.apart == {0, 1}


def test_attention_that_is_called_twice_hands_keys_out_whole() -> None:
    torch.manual_seed(0)
    model = hf.DiffLlamaForCausalLM(hf.DiffLlamaConfig(**SMALL, num_hidden_layers=2)).eval()
    assert seen(model).apart == {0, 1}
    assert seen(build_family("llama")).apart == frozenset()


def test_linear_layers_hold_no_keys() -> None:
    found = seen(build_family("qwen3-next"))
    assert [a.partition(":")[0] for a in found.absent] == ["linear attention", ""]


def test_a_recurrent_state_beside_keys() -> None:
    torch.manual_seed(0)
    small = {k: v for k, v in SMALL.items() if k != "initializer_range"}
    config = hf.FalconH1Config(**small, num_hidden_layers=2, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16)
    assert seen(hf.FalconH1ForCausalLM(config).eval()).layer_types == ("hybrid", "hybrid")


def test_a_cache_of_a_class_of_its_own_is_declined() -> None:
    torch.manual_seed(0)
    config = hf.MiniMaxConfig(
        **SMALL, num_hidden_layers=2, num_local_experts=2, layer_types=["linear_attention", "full_attention"], block_size=8
    )
    with pytest.raises(UnsupportedError, match="keeps its past in a MiniMaxCache of its own"):
        kvsink.rewrite(hf.MiniMaxForCausalLM(config).eval(), "rtn")


def test_probe_tokens_stand_for_no_pictures() -> None:
    model = build_family("llama")
    model.config.image_token_id = 5
    assert 5 not in probe_ids(model.config, 64, 8).tolist()


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gemma4", "its layers have KV heads of several shapes"),
        ("falcon-h1", "a recurrent state beside keys, which the graph does not carry"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_before_it_is_traced(family: str, words: str, tmp_path: Any) -> None:
    pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
    from kvsink.export import onnx
    from tests.models import tokens

    model = build_family(family)
    kvsink.rewrite(model, "rtn", protect="none", calibration=tokens(4, 32, seed=1))
    with pytest.raises(kvsink.errors.KvsinkError, match=words) as raised:
        onnx(model, tmp_path / "model.onnx")
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())
