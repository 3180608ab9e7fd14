"""Weights on a disk or beside a GPU: the folder loads, and generates what it generates from memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import kvsink
from kvsink.errors import SidecarError, UnsupportedError
from kvsink.model.fingerprint import fingerprint
from kvsink.model.offload import is_held, place_of, weight_of
from kvsink.model.runtime import runtime_of
from tests.graphs import rewritten
from tests.models import build, tokens

pytest.importorskip("accelerate", reason="device_map needs accelerate")

ROW, SETTINGS = tokens(1, 13), dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
DISKS = {"first": {"model.layers.0"}, "last": {"model.layers.1"}, "head": {"lm_head"}, "all": {*PARTS} - {"model.rotary_emb"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("folder")
    rewritten("llama", "sdpa", "klt", key_bits=4, value_bits=4).save_pretrained(place)
    return place


def offloaded(folder: Path, disk: set[str], place: Path) -> Any:
    where = {name: "disk" if name in disk else "cpu" for name in PARTS}
    return hf.AutoModelForCausalLM.from_pretrained(folder, device_map=where, offload_folder=place)


@pytest.mark.parametrize("disk", DISKS)
def test_a_folder_partly_on_a_disk(folder: Path, tmp_path: Path, disk: str) -> None:
    whole, model = hf.AutoModelForCausalLM.from_pretrained(folder), offloaded(folder, DISKS[disk], tmp_path)
    assert any(p.is_meta for p in model.parameters())
    wanted = whole.generate(ROW, **SETTINGS)
    for kind in (None, "static"):
        out = model.generate(ROW, cache_implementation=kind, return_dict_in_generate=True, **SETTINGS)
        assert torch.equal(out.sequences, wanted)
        assert isinstance(out["cache"] if "cache" in out else out["past_key_values"], kvsink.KVSinkCache)
    given = kvsink.KVSinkCache.for_model(model, 1, 32)
    assert given.layers[0].device == torch.device("cpu")
    assert torch.equal(model.generate(ROW, past_key_values=given, **SETTINGS), wanted)
    assert torch.equal(fingerprint(model), fingerprint(whole))


def test_the_weights_on_a_disk_are_checked(folder: Path, tmp_path: Path) -> None:
    """A plan that was made for other weights is refused, though none of them is in memory."""
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    build("llama").save_pretrained(tmp_path / "plain")
    shutil.copy(tmp_path / "plain" / "model.safetensors", tmp_path / "copy" / "model.safetensors")
    with pytest.raises(SidecarError, match="made for other weights"):
        offloaded(tmp_path / "copy", DISKS["all"], tmp_path / "disk")


def test_an_offloaded_model_is_saved_whole(folder: Path, tmp_path: Path) -> None:
    model = offloaded(folder, DISKS["last"], tmp_path / "disk")
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "saved")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert runtime_of(again).plans == runtime_of(model).plans
    assert torch.equal(again.generate(ROW, **SETTINGS), model.generate(ROW, **SETTINGS))


@pytest.mark.parametrize("disk", ["last", "all"])
def test_an_offloaded_model_is_rewritten_in_memory(tmp_path: Path, disk: str) -> None:
    """What is on the disk cannot be folded into; the rotation of those layers runs online."""
    build("llama").save_pretrained(tmp_path / "plain")
    model = offloaded(tmp_path / "plain", DISKS[disk], tmp_path / "disk")
    kvsink.rewrite(model, "klt", key_bits=8, value_bits=8, protect="first:1", calibration=tokens(8, 64, seed=1))
    folded = [p.codec.value.folded for p in runtime_of(model).plans if p.codec is not None]
    assert folded == ([True, False] if disk == "last" else [False, False])
    same = rewritten("llama", "sdpa", "klt", key_bits=8, value_bits=8, protect="first:1")
    assert torch.equal(model.generate(ROW, **SETTINGS), same.generate(ROW, **SETTINGS))


def test_a_weight_that_is_nowhere() -> None:
    model = build("llama")
    assert is_held(model) and place_of(model) == torch.device("cpu")
    assert weight_of(model, "lm_head.weight") is model.lm_head.weight
    bare = model.to("meta")
    assert not is_held(bare) and place_of(bare) == torch.device("cpu")
    with pytest.raises(UnsupportedError, match="lm_head.weight is on the meta device"):
        weight_of(bare, "lm_head.weight")
