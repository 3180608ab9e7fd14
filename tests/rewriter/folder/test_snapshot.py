"""The plan comes from the very snapshot that the weights came from, whatever was asked of from_pretrained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

import kvsink
import kvsink.folder.snapshot
from kvsink.errors import SidecarError, UnsupportedError
from kvsink.model.runtime import runtime_of
from tests import vision
from tests.graphs import rewritten
from tests.models import build, tokens

BITS = {"main": 4.0, "v2": 2.0}
COMMIT = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per revision; the key bits tell their plans apart, the weights are the same but for what was folded."""
    place = tmp_path_factory.mktemp("revisions")
    for name, bits in BITS.items():
        rewritten("llama", "sdpa", "klt", key_bits=bits, value_bits=4).save_pretrained(place / name)
    return {name: place / name for name in BITS}


@pytest.fixture
def hub(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with two revisions of me/m, both wholly there, and no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--me--m"
    for name, folder in folders.items():
        shutil.copytree(folder, repository / "snapshots" / COMMIT[name])
        shutil.copytree(folder, repository / "snapshots" / COMMIT[name] / "inner" / "part")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(COMMIT[name])
    return tmp_path / "hub"


def key_bits(*args: Any, **more: Any) -> float:
    return runtime_of(hf.AutoModelForCausalLM.from_pretrained(*args, **more)).plans[0].codec.key.bits


@pytest.mark.parametrize("revision", ["main", "v2", "b" * 40])
@pytest.mark.parametrize("subfolder", ["", "inner/part"])
def test_the_plan_is_that_of_the_revision(hub: Path, revision: str, subfolder: str) -> None:
    wanted = BITS["main" if revision == "main" else "v2"]
    assert key_bits("me/m", cache_dir=hub, revision=revision, subfolder=subfolder) == wanted


def test_a_cache_folder_beside_another(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same repository in two caches, with other plans."""
    other = tmp_path / "other"
    shutil.copytree(hub, other)
    (other / "models--me--m" / "refs" / "main").write_text(COMMIT["v2"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    assert key_bits("me/m", cache_dir=other) == BITS["v2"] and key_bits("me/m", cache_dir=hub) == BITS["main"]


def test_a_subfolder_of_a_local_folder(folders: dict[str, Path]) -> None:
    assert [key_bits(folders["main"].parent, subfolder=name) for name in BITS] == list(BITS.values())


def test_what_is_not_there_yet_is_fetched_from_the_same_snapshot(
    hub: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when only the weights of a private repository have been fetched so far."""
    where = hub / "models--me--m" / "snapshots" / COMMIT["v2"] / "inner" / "part"
    for name in ("kvsink.json", "kvsink_calibration.safetensors"):
        (where / name).unlink()
    asked = []

    def fetch(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, name, options))
        return str(folders["v2"] / name)

    monkeypatch.setattr(kvsink.folder.snapshot, "cached_file", fetch)
    more = {"revision": "v2", "subfolder": "inner/part", "cache_dir": str(hub)}
    assert key_bits("me/m", token="secret", **more) == BITS["v2"]
    for repository, name, options in asked:
        assert repository == "me/m" and name in ("kvsink.json", "kvsink_calibration.safetensors")
        assert options["token"] == "secret" and options["revision"] == COMMIT["v2"] and options["local_files_only"]
        assert options["subfolder"] == "inner/part" and options["cache_dir"] == str(hub)
    assert len(asked) == 2


def test_what_cannot_be_fetched_is_one_line(hub: Path) -> None:
    (hub / "models--me--m" / "snapshots" / COMMIT["main"] / "kvsink.json").unlink()
    with pytest.raises(SidecarError, match=r"^me/m@aaaaaaaa says it is a kvsink model but kvsink.json cannot be had \(.*\)$"):
        key_bits("me/m", cache_dir=hub)


def test_a_local_folder_without_its_plan_says_what_can_be_done(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["main"], tmp_path / "copy")
    (tmp_path / "copy" / "kvsink.json").unlink()
    with pytest.raises(SidecarError, match=r"kvsink.json is missing; .*on the model it was made from, or take quantization_config"):
        key_bits(tmp_path / "copy")
    with pytest.raises(SidecarError, match="no weight files were read"):
        kvsink.folder.snapshot.beside([], "kvsink.json", {})


def test_a_plain_folder_is_not_rewritten_by_its_config(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"kvsink.rewrite\(model\)"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=kvsink.KvsinkConfig("klt"))


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=len(sys.argv) > 2)
out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, return_dict_in_generate=True)
print("kvsink" in sys.modules, type(out["cache"] if "cache" in out else out["past_key_values"]).__name__)
"""


@pytest.mark.parametrize("trust", [False, True])
def test_without_the_import(folders: dict[str, Path], tmp_path: Path, trust: bool) -> None:
    """A plain model, said by transformers in one line; remote code is the one way that needs no import."""
    folder = Path(shutil.copytree(folders["v2"], tmp_path / "folder"))
    (folder / "with_kvsink.py").write_text(
        "import kvsink\nfrom transformers import LlamaForCausalLM\n\n\nclass Model(LlamaForCausalLM):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "with_kvsink.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder), *["trust"] * trust],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "OMP_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "warning",
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ("True KVSinkCache" if trust else "False DynamicCache")
    assert ("Unknown quantization type, got kvsink" in done.stderr) == (not trust)


# -- the class that loads ----------------------------------------------------------------------------------------------


def test_the_model_without_its_head_loads_too(folders: dict[str, Path]) -> None:
    part = hf.AutoModel.from_pretrained(folders["v2"])
    assert type(part).__name__ == "LlamaModel" and runtime_of(part).plans[0].codec.key.bits == BITS["v2"]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = {}
    for family in ("llava", "qwen2.5-vl", "gemma3"):
        model = vision.build(family)
        kvsink.rewrite(model, "rtn", calibration=tokens(8, 64, seed=1))
        out[family] = tmp_path_factory.mktemp("seeing") / family
        model.save_pretrained(out[family])
    return out


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "gemma3"])
def test_a_folder_that_sees_loads_with_and_without_its_head(seeing: dict[str, Path], family: str) -> None:
    whole = hf.AutoModelForImageTextToText.from_pretrained(seeing[family])
    part = hf.AutoModel.from_pretrained(seeing[family])
    assert runtime_of(whole).plans == runtime_of(part).plans


def test_the_text_class_of_a_folder_that_sees(seeing: dict[str, Path]) -> None:
    """transformers finds the weights of some text classes in such a folder, and starts others from random ones."""
    text = hf.Qwen2_5_VLTextModel.from_pretrained(seeing["qwen2.5-vl"])
    whole = hf.AutoModelForImageTextToText.from_pretrained(seeing["qwen2.5-vl"])
    assert runtime_of(text).plans == runtime_of(whole).plans
    for family, kind in (("llava", hf.LlamaForCausalLM), ("gemma3", hf.Gemma3ForCausalLM)):
        with pytest.raises(SidecarError, match=rf"load the folder as a \w+ForConditionalGeneration \(not as a {kind.__name__}\)"):
            kind.from_pretrained(seeing[family])


def test_other_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["main"], tmp_path / "copy")
    build("llama").save_pretrained(tmp_path / "plain")
    shutil.copy(tmp_path / "plain" / "model.safetensors", tmp_path / "copy" / "model.safetensors")
    with pytest.raises(SidecarError, match="made for other weights"):
        key_bits(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "kvsink.json").read_text())["class"] == "LlamaForCausalLM"
