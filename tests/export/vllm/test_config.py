"""The quantization that vLLM finds: its folder, the tables beside the weights, what it makes of a model's layers."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvsink.errors import SidecarError, UnsupportedError
from tests.export.vllm.plans import engine, folder, layer, planted

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/serving installs it")

from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.quantization import get_quantization_config

from kvsink.export.vllm import config as module
from kvsink.export.vllm import register
from kvsink.export.vllm.config import KVSinkConfig


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KVSinkConfig:
    made = KVSinkConfig.from_config({"quant_method": "kvsink"})
    made.maybe_update_config(str(folder(planted(), tmp_path / "out", places=3)))
    options = engine(model_config__max_model_len=256, scheduler_config=SimpleNamespace(max_num_batched_tokens=64))
    monkeypatch.setattr(module, "get_current_vllm_config", lambda: options)
    monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1)
    return made


def test_vllm_knows_it_by_name() -> None:
    register()
    assert get_quantization_config("kvsink") is KVSinkConfig and callable(set_current_vllm_config)


def test_tables_are_no_weights(config: KVSinkConfig) -> None:
    names = ["layers.0.k_mean", "layers.11.v_unsigma", "layers.3.offset_cos", "fingerprint", "decoder"]
    kept = ["model.layers.0.self_attn.k_proj.weight", "layers.0.self_attn.k_proj.weight", "lm_head.weight", "model.norm.weight"]
    mapped = [name for name, _ in config.get_checkpoint_weight_mapper().apply([(n, torch.zeros(1)) for n in names + kept])]
    assert mapped == kept
    from safetensors import safe_open

    assert config.folder is not None
    with safe_open(str(config.folder / "kvsink_calibration.safetensors"), "pt") as file:
        every = list(file.keys())
    assert every and not list(config.get_checkpoint_weight_mapper().apply([(n, torch.zeros(1)) for n in every]))


def test_a_folder_goes_to_other_processes_without_its_tables(config: KVSinkConfig) -> None:
    runtime, _ = config.live()
    assert len(runtime.plans) == 4
    other = pickle.loads(pickle.dumps(KVSinkConfig.from_config({})))
    assert other.plan is None
    fresh = KVSinkConfig.from_config({})
    fresh.maybe_update_config(str(config.folder))
    assert pickle.loads(pickle.dumps(fresh)).plan == config.plan and len(pickle.dumps(fresh)) < 20_000


def test_what_is_not_served_is_said_first(config: KVSinkConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="layer 0 keeps the newest 4 rows exact"):
        KVSinkConfig({}).maybe_update_config(str(folder(planted("rtn", window=4), tmp_path / "window")))
    with pytest.raises(SidecarError, match="says it is a kvsink model but its plan cannot be had"):
        KVSinkConfig({}).maybe_update_config("no-such/model")
    monkeypatch.setattr(module, "get_current_vllm_config", lambda: engine(cache_config__block_size=64))
    with pytest.raises(UnsupportedError, match="--block-size 64 is not the page of 128 tokens"):
        config.get_quant_method(torch.nn.Embedding(3, 4), "model.embed_tokens")


def test_layers_get_their_pages_and_blocks_are_found(config: KVSinkConfig) -> None:
    given: dict[str, Any] = {"num_kv_heads": 2, "num_heads": 4, "head_size": 16, "dtype": torch.bfloat16}
    with pytest.raises(UnsupportedError, match="layer 2 keeps rows that block 1 marks, .* was not found"):
        config.pages_of(layer(**given), 2)
    _, sinks = config.live()
    sinks.watch("model.layers.1.mlp.down_proj", torch.nn.Linear(4, 64))
    pages = config.pages_of(layer(**given), 2)
    assert pages.format.places == 3 and pages.format.dtype == torch.bfloat16 and pages.format.dims == (16, 16)

    class SomeMoE(torch.nn.Module):
        pass

    with pytest.raises(UnsupportedError, match=r"model.layers.0.mlp is a mixture of experts"):
        config.get_quant_method(SomeMoE(), "model.layers.0.mlp")
