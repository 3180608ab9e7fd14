"""Sessions of onnxruntime for an exported model: what they need is asked for first, so that what is missing is one line.

Raises     ExportError for an onnxruntime that is missing or too old, a provider it has not or that does not start, nodes without
           kernels, and a library of operators that cannot be loaded, is of another version or runs elsewhere
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsink.export.errors import ExportError
from kvsink.export.manifest import FORMAT

__all__ = ["Provider", "load_cuda", "open_session"]

Provider = str | tuple[str, Mapping[str, Any]]
OLDEST = (1, 30)
"""Of onnxruntime: the first that is tested here; TensorScatter (opset 24) came a little before."""
_BUILD = "python -m kvsink.tools.build_ort_ops"


def open_session(
    path: Path,
    manifest: Mapping[str, Any],
    providers: Sequence[Provider],
    threads: int,
    library: Path | None,
    profile: str | Path | None,
) -> tuple[Any, Any, str]:
    """onnxruntime, a session of the model at `path`, and the device that its cache lies on; arguments as of `OnnxGenerator`."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError("onnxruntime is not installed; pip install 'kvsink[onnx]'") from error
    if tuple(int(n) for n in re.findall(r"\d+", onnxruntime.__version__)[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} is older than {oldest}, the first known to write a cache in place; "
            f"pip install 'onnxruntime>={oldest}'"
        )
    names = [p if isinstance(p, str) else p[0] for p in providers]
    tiled, build = "kernels" in manifest, f"{_BUILD} {library or 'ops.so'} --cuda {path}"
    place, advice = "the CPU", 'leave providers out, or export dtype="float16", whose kernels run on CUDA'
    if tiled:
        place, advice = "CUDA", "pass providers=('CUDAExecutionProvider',), or export float32"
    if manifest["flavour"] == "custom" and names[0] != ("CUDAExecutionProvider" if tiled else "CPUExecutionProvider"):
        raise ExportError(f"{path.name} has nodes whose kernels run on {place} alone, not on {names[0]}; {advice}")
    missing = set(names) - set(onnxruntime.get_available_providers())
    if tiled and "CUDAExecutionProvider" in missing:
        raise ExportError(
            f"{path.name} runs on NVIDIA GPUs alone, for which onnxruntime has no provider here; pip install onnxruntime-gpu, or "
            "export float32"
        )
    if missing:
        raise ExportError(f"onnxruntime has no {min(missing)} here; install one that has, or leave providers out")
    if manifest["flavour"] == "custom" and library is None:
        how = build if tiled else _BUILD
        raise ExportError(f"{path} has nodes without bodies; pass library= with what `{how}` builds, or export flavour functions")
    if any(not isinstance(p, str) and str(p[1].get("device_id", "0")) != "0" for p in providers):
        raise ExportError("caches are made on the first GPU; choose another by CUDA_VISIBLE_DEVICES, and leave device_id out")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if library is not None:
        loaded = _register(options, library, threads)
        if tiled and not set(manifest["kernels"]) <= _kernels(loaded):
            raise ExportError(f"{library} has no kernels for the layers of {path.name}; build them in with {build}")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if "CUDAExecutionProvider" in names:
        load_cuda(onnxruntime)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime raises kinds of its own
        raise ExportError(f"onnxruntime cannot load {path} ({_first(error)}); export the model again") from error
    if session.get_providers()[0] != names[0]:
        raise ExportError(f"onnxruntime cannot start {names[0]} here, see its message above; leave providers out")
    return onnxruntime, session, "cuda" if names[0] == "CUDAExecutionProvider" else "cpu"


def load_cuda(onnxruntime: Any) -> None:
    """Load the libraries of CUDA from pip's packages, wherever these are: onnxruntime itself looks beside its own folder."""
    if not hasattr(onnxruntime, "preload_dlls"):
        return
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = [folder for place in places for folder in Path(place).glob("cu[0-9]*/lib") if any(folder.glob("libcudart.so*"))]
    onnxruntime.preload_dlls(directory=str(found[-1]) if found else None)


def _register(options: Any, library: Path, threads: int) -> Any:
    """Load the operators of a library; `threads` is of the process, as its OpenMP threads are."""
    try:
        loaded = ctypes.CDLL(str(library.resolve()))
        options.register_custom_ops_library(str(library.resolve()))
    except Exception as error:  # onnxruntime raises kinds of its own
        raise ExportError(f"{library} cannot be loaded ({_first(error)}); build it with {_BUILD}") from error
    found = "none that it names"
    if hasattr(loaded, "kvsink_format"):
        loaded.kvsink_format.restype = ctypes.c_char_p
        found = loaded.kvsink_format().decode()
    if found != FORMAT:
        raise ExportError(f"{library} has nodes of another format ({found}, not {FORMAT}); build it again with {_BUILD}")
    loaded.kvsink_set_threads(threads)
    return loaded


def _kernels(loaded: Any) -> set[str]:
    """Names of the machine code for CUDA that a library has."""
    if not hasattr(loaded, "kvsink_kernels"):  # built before there was any
        return set()
    loaded.kvsink_kernels.restype = ctypes.c_char_p
    return set(loaded.kvsink_kernels().decode().split())


def _first(error: BaseException) -> str:
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)
