"""What keeps the CUDA kernels from a machine, said once and in words; compiled code is kept and found again."""

from __future__ import annotations

import dataclasses
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kvsink.cache import served
from kvsink.kernels import backends
from kvsink.kernels.backends import Device, Shape, plan
from kvsink.kernels.cuda import backend, driver, module, variants
from kvsink.model.runtime import runtime_of

from .test_tiles import CODECS, layer_of, model_of

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("heads", "dim", "walks", "target", "warps"),
    [
        (8, 128, True, 90, 12),
        (16, 128, True, 90, 12),
        (4, 128, True, 90, 8),
        (8, 64, True, 90, 8),
        (8, 128, False, 90, 8),
        (8, 128, True, 80, 4),
    ],
)
def test_twelve_warps_where_they_were_faster(heads: int, dim: int, walks: bool, target: int, warps: int) -> None:
    widths = (2,) * (dim // 8)
    variant = variants.Variant(2, widths, widths, heads, dim, key_trellis=walks, value_trellis=walks)
    assert variant.shape(variants.Card(target)).warps == warps


@pytest.mark.parametrize(
    ("mode", "walks", "heads", "shape"),
    [
        (2, True, 4, (4, 1, 4, 2)),
        (2, True, 8, (4, 1, 2, 2)),
        (2, False, 4, (4, 1, 4, 2)),
        (2, False, 8, (4, 1, 2, 2)),
        (1, False, 4, (8, 1, 2, 2)),
        (1, False, 8, (4, 2, 2, 2)),
    ],
)
def test_a_block_with_99_kb_works_as_was_fastest(mode: int, walks: bool, heads: int, shape: tuple[int, ...]) -> None:
    variant = variants.Variant(mode, (2,) * 16, (2,) * 16, heads, key_trellis=walks, value_trellis=walks)
    for target in (86, 89, 120):
        assert dataclasses.astuple(variant.shape(variants.Card(target, variants.SMALL)))[:4] == shape


@pytest.mark.parametrize(("capability", "reason"), [((7, 5), "7.5"), ((6, 1), "6.1")])
def test_a_gpu_of_another_generation_is_named(capability: tuple[int, int], reason: str) -> None:
    assert reason in variants.too_old(capability, "a GPU") and variants.too_old((9, 0), "a GPU") == ""


def test_without_a_compiler_the_reason_names_what_brings_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_nvrtc", lambda: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(module.NativeError, match="pip install nvidia-cuda-nvrtc"):
        module.compile_cubin("", "sm_90a")


def test_code_is_compiled_once_per_source_and_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []

    def compile_(nvcc: str, source: str, arch: str) -> bytes:
        made.append((source, arch))
        return f"{source} for {arch}".encode()

    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_nvrtc", lambda: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: "nvcc")
    monkeypatch.setattr(module, "_by_nvcc", compile_)
    wanted = [("a", "sm_90a"), ("a", "sm_90a"), ("b", "sm_90a"), ("a", "sm_100a"), ("b", "sm_90a")]
    assert [module.compile_cubin(*w) for w in wanted] == [f"{s} for {a}".encode() for s, a in wanted]
    assert made == [("a", "sm_90a"), ("b", "sm_90a"), ("a", "sm_100a")] and len(list(tmp_path.rglob("*.cubin"))) == 3


def _refused(variant: variants.Variant, device: torch.device) -> Any:
    raise module.NativeError("this GPU is a toaster")


def test_a_refusal_is_told_once_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "library", _refused)
    monkeypatch.setattr(backends, "_TOLD", set())
    monkeypatch.setattr(backends, "choose", cache(backends.choose.__wrapped__))
    card = Device("cuda", (9, 0), "a GPU", False, GPU)
    monkeypatch.setattr(served, "device_of", lambda place: card)
    runtime = runtime_of(model_of(0))
    with pytest.warns(UserWarning, match="plain operators .*this GPU is a toaster.*Triton is not installed"):
        assert not served.tiles_serve(runtime, torch.float16, GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not served.tiles_serve(runtime, torch.float16, GPU)
    codec = layer_of(0).codec
    f, shape = codec.format.in_tiles(), Shape(8, 2, 128, 128, 128, torch.float16)
    assert backend.declines(f, shape, card) == "this GPU is a toaster"
    assert backend.declines(f, shape._replace(dtype=torch.float32), card) == "the model computes in float32"
    assert backend.declines(f, shape, Device("cpu")) == "the device is cpu"


def test_a_gpu_on_which_no_test_has_run_is_used_and_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "library", lambda variant, device: object())
    monkeypatch.setattr(backends, "_TOLD", set())
    monkeypatch.setattr(backend, "WALKED", ())
    f, shape = layer_of(0).codec.format.in_tiles(), Shape(8, 2, 128, 128, 128, torch.float16)
    walked = layer_of(6).codec.format.in_tiles()
    with pytest.warns(UserWarning, match=r"9\.0 is one on which no test of codes of a trellis has run"):
        assert backend.declines(walked, shape, Device("cuda", (9, 0), "a GPU", True, GPU)) == ""
    with pytest.warns(UserWarning, match=r"a new GPU: compute capability 9\.7 is one on which no test has run"):
        assert backend.declines(f, shape, Device("cuda", (9, 7), "a new GPU", True, GPU)) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.declines(f, shape, Device("cuda", (9, 7), "a new GPU", True, GPU)) == ""
        assert backend.declines(f, shape, Device("cuda", (9, 0), "a GPU", True, GPU)) == ""


@pytest.mark.parametrize("index", range(len(CODECS)))
def test_a_gpu_of_another_maker_never_meets_the_cuda_driver(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: Any) -> Any:
        raise AssertionError("the CUDA driver or its compiler was asked for")

    for home, name in ((driver, "driver"), (module, "_driver"), (module, "_nvrtc"), (module, "compile_cubin")):
        monkeypatch.setattr(home, name, touched)
    shape, card = Shape(8, 2, 128, 128, 128, torch.float16), Device("hip", (9, 4), "an MI300X", True, GPU)
    f = layer_of(index, tiled=False).codec.format
    rows = ("torch", "triton") if f.key.kind == "trellis" else ("triton",)
    for what, wanted in (("attend", rows), ("append", rows), ("step", ("append, then attend",))):
        found = plan(what, f, shape, card)
        assert found.name in wanted and found.why[0] == ("cuda (tiles)", "the GPU is not one of NVIDIA's")


def test_widths_that_need_more_memory_than_a_block_has_are_refused() -> None:
    with pytest.raises(module.NativeError, match="shared memory"):
        variants.Variant(1, (8,) * 32, (8,) * 32, 8).defines(variants.Card(89, 101376))


def test_how_a_block_works_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = variants.Variant(2, (2,) * 16, (2,) * 16, 4, key_trellis=True, value_trellis=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    for asked, warps in (("", 8), ("12,1,4,2", 12)):
        monkeypatch.setenv("KVSINK_CUDA_SHAPE", asked)
        assert variant.shape(variants.card_of.__wrapped__(GPU)).warps == warps
    for wrong in ("12", "12,1,4", "10,1,4,2", "12,0,4,2", "12,1,2,4", "12,1,x,2", "twelve"):
        monkeypatch.setenv("KVSINK_CUDA_SHAPE", wrong)
        with pytest.raises(module.NativeError, match=f"KVSINK_CUDA_SHAPE={wrong}: write warps,stages,items,steps, as 12,1,4,2"):
            variants.card_of.__wrapped__(GPU)
    with pytest.raises(module.NativeError, match="bytes of shared memory, more than"):
        variant.shape(variants.Card(shape=variants.Shape(16, 2, 4, 2)))


def test_a_smaller_card_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    for asked, arch in (
        ("", "sm_90a"),
        ("90", "sm_90a"),
        ("sm_90a", "sm_90a"),
        ("compute_80", "compute_80"),
        ("sm_89", "compute_89"),
    ):
        monkeypatch.setenv("KVSINK_CUDA_TARGET", asked)
        assert variants.card_of.__wrapped__(GPU).arch == arch
    for wrong, said in (
        ("abc", "write a target"),
        ("8.0", "write a target"),
        ("compute_", "write a target"),
        ("75", "write compute_80"),
    ):
        monkeypatch.setenv("KVSINK_CUDA_TARGET", wrong)
        with pytest.raises(module.NativeError, match=f"^KVSINK_CUDA_TARGET={wrong}: .*{said}[^\n]*$"):
            variants.card_of.__wrapped__(GPU)
    monkeypatch.delenv("KVSINK_CUDA_TARGET")
    for asked, shared in (("", 232448), ("101376", 101376), ("1", 1), ("232448", 232448)):
        monkeypatch.setenv("KVSINK_CUDA_SHARED", asked)
        assert variants.card_of.__wrapped__(GPU).shared == shared
    for wrong in ("abc", "-5", "0", "99 KB", "1e5", "232449"):
        monkeypatch.setenv("KVSINK_CUDA_SHARED", wrong)
        with pytest.raises(module.NativeError, match=f"^KVSINK_CUDA_SHARED={wrong}: write bytes of shared memory from 1 to 232448"):
            variants.card_of.__wrapped__(GPU)
