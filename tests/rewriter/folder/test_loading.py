"""Loading refuses, in one line, what transformers would fill with random numbers or report at length."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvsink.errors import ModelError, UnsupportedError
from kvsink.folder.loading import load_model, load_tokenizer, pick_device, pick_dtype, read_config
from tests.models import build


@pytest.fixture
def folder(tmp_path):
    build("llama").save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_whole_model_loads(folder):
    model = load_model(folder, "cpu")
    assert not model.training
    assert model.dtype == torch.float32


def test_missing_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"do not fit its config.json: they lack model.layers.1.self_attn.k_proj.weight"):
        load_model(folder, "cpu")


def test_fewer_layers_than_weights(folder):
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(ModelError, match="it has 1 layers, but they hold model.layers.1"):
        load_model(folder, "cpu")


def test_other_shape(folder):
    change_config(folder, intermediate_size=100)
    with pytest.raises(ModelError, match="do not fit its config.json"):
        load_model(folder, "cpu")


def test_unknown_architecture(folder):
    change_config(folder, model_type="nosuch")
    with pytest.raises(ModelError, match=r"architecture this transformers does not know \(nosuch\)"):
        load_model(folder, "cpu")


def test_not_a_language_model(tmp_path):
    build("clip-vision").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not a causal language model"):
        load_model(tmp_path, "cpu")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        load_model(folder, "cpu")


@pytest.mark.parametrize("kept", [0, 4, 1000])
def test_truncated_weights(folder, kept):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:kept])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder, "cpu")


def test_broken_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError):
        load_model(folder, "cpu")


def test_a_folder_with_an_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter; merge it into its model"):
        read_config(folder)


def test_no_tokenizer(folder):
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(folder)


def test_device_and_dtype():
    assert pick_device("cpu").type == "cpu"
    assert pick_dtype("auto", torch.device("cpu")) is torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == "auto"
    for name in ("nosuch", "cuda:99"):
        with pytest.raises(UnsupportedError, match="not available"):
            pick_device(name)
    with pytest.raises(UnsupportedError, match="float8"):
        pick_dtype("float8", torch.device("cpu"))
