"""What a session needs is asked for before it is made, and what is missing is one line that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

from kvsink.export import ExportError, OnnxGenerator, onnx
from kvsink.tools import build_ort_ops
from tests.graphs import rewritten


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    for flavour in ("functions", "custom"):
        onnx(rewritten("llama", method="rtn"), folder / f"{flavour}.onnx", flavour)
    return folder


def refused(words: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(ExportError, match=words) as raised:
        OnnxGenerator(*arguments, **options)
    assert "\n" not in str(raised.value)


def test_an_onnxruntime_that_is_too_old(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.29.1")
    refused(r"onnxruntime 1.29.1 is older than 1.30, .*; pip install 'onnxruntime>=1.30'", folder / "functions.onnx")


def test_a_provider_that_has_no_operators(folder: Path) -> None:
    given = dict(providers=["CUDAExecutionProvider", "CPUExecutionProvider"], library="ops.so")
    refused("kernels run on the CPU alone, not on CUDAExecutionProvider; leave providers out", folder / "custom.onnx", **given)
    refused("onnxruntime has no NoSuchProvider here", folder / "functions.onnx", providers=["NoSuchProvider"])
    refused("has nodes without bodies; pass library=", folder / "custom.onnx")


def test_a_library_that_is_another(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No library, one of other operators, and one whose nodes are of an older format."""
    if build_ort_ops.compiler() is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "none.so").write_text("no library")
    refused("none.so cannot be loaded .*; build it with python -m", folder / "custom.onnx", library=tmp_path / "none.so")
    source = tmp_path / "other.c"
    for name, body, found in (
        ("unnamed", "", "none that it names"),
        ("old", 'const char* kvsink_format() { return "kvsink-onnx-1"; }', "kvsink-onnx-1"),
    ):
        source.write_text(f"void* RegisterCustomOps() {{ return 0; }}\n{body}\n")
        built = tmp_path / f"{name}.so"
        build_ort_ops._run([str(build_ort_ops.compiler()), "-x", "c", "-shared", "-fPIC", "-o", str(built), str(source)], source)
        refused(
            rf"has nodes of another format \({found}, not kvsink-onnx-2\); build it again", folder / "custom.onnx", library=built
        )


def test_a_cache_on_another_device(folder: Path) -> None:
    runner, one = OnnxGenerator(folder / "functions.onnx"), np.ones((1, 1), dtype=np.int64)
    past = runner.empty(1)
    runner.device = "cuda"
    with pytest.raises(ExportError, match=r"positions is on cpu, the model runs on cuda; make it with value\(\) or empty\(\)"):
        runner.step(one, one, one * 0, past)
