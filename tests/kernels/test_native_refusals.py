"""What keeps the CUDA kernels from a machine, said once and in words; compiled code is kept and found again."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvsink.kernels import native, packed

from .test_tiles import layer_of

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(("capability", "reason"), [((8, 6), "8.6"), ((12, 0), "12.0"), ((9, 0), None)])
def test_a_gpu_of_another_generation_is_named(
    capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    said = native.too_old(GPU)
    assert said is None if reason is None else reason in str(said)


def test_without_a_compiler_the_reason_names_what_brings_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_nvrtc", lambda: None)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.raises(native.NativeError, match="pip install nvidia-cuda-nvrtc"):
        native.compile_cubin("", "sm_90a")


def test_code_is_compiled_once_per_source_and_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []

    def compile_(nvcc: str, source: str, arch: str) -> bytes:
        made.append((source, arch))
        return f"{source} for {arch}".encode()

    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_nvrtc", lambda: None)
    monkeypatch.setattr(native.shutil, "which", lambda name: "nvcc")
    monkeypatch.setattr(native, "_by_nvcc", compile_)
    wanted = [("a", "sm_90a"), ("a", "sm_90a"), ("b", "sm_90a"), ("a", "sm_100a"), ("b", "sm_90a")]
    assert [native.compile_cubin(*w) for w in wanted] == [f"{s} for {a}".encode() for s, a in wanted]
    assert made == [("a", "sm_90a"), ("b", "sm_90a"), ("a", "sm_100a")] and len(list(tmp_path.rglob("*.cubin"))) == 3


def test_a_refusal_is_told_once_and_the_plain_operators_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def library(variant: native.Variant, device: torch.device) -> Any:
        raise native.NativeError("this GPU is a toaster")

    monkeypatch.setattr(native, "library", library)
    monkeypatch.setattr(packed, "_told", set())
    codec = layer_of(0).codec
    rows: Any = SimpleNamespace(device=GPU, dtype=torch.float16, shape=(1, 2, 1, 128))
    with pytest.warns(UserWarning, match="plain operators: this GPU is a toaster"):
        assert packed.usable(codec, 8, rows) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packed.usable(codec, 8, rows) is None
    assert packed.serves(codec, 8, 2, 128, 128, 128, torch.float16, GPU) == "this GPU is a toaster"
    assert packed.serves(codec, 8, 2, 128, 128, 128, torch.float32, GPU) == "the model computes in float32"
    assert packed.serves(codec, 8, 2, 128, 128, 128, torch.float16, torch.device("cpu")) == "the device is cpu"


def test_widths_that_need_more_memory_than_a_block_has_are_refused() -> None:
    with pytest.raises(native.NativeError, match="shared memory"):
        native.Variant(2, (8,) * 16, (8,) * 16, 4).defines()
