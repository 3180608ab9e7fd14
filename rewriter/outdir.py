"""`kvsink-rewrite`: from a model folder to a rewritten one that appears complete or not at all.

The folder is built beside its final place under a hidden name and renamed at the end; whatever goes wrong before leaves
nothing but, at worst, that hidden folder, which the next run into the same place removes.

Raises     KvsinkError children; OSError from the disk passes through after the hidden folder is gone
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from kvsink.calibration import Calibration
from kvsink.errors import KvsinkError, ModelError
from kvsink.loading import load_model, load_tokenizer, pick_device
from kvsink.report import Report
from kvsink.rewrite import Progress, RewriteOptions, rewrite, versions
from kvsink.runtime import runtime_of
from kvsink.sidecar import SIDECAR_JSON, SIDECAR_TENSORS, write_sidecar

__all__ = ["rewrite_dir"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".onnx", ".msgpack", ".h5")


def rewrite_dir(
    model_dir: str | Path, out_dir: str | Path, options: RewriteOptions | None = None, *, onnx: str = "",
    device: str = "auto", force: bool = False, dry_run: bool = False, progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Calibrate and rewrite the model in `model_dir` (a local folder) and leave it in `out_dir`.

    With `force` an existing out_dir is replaced, at the very end. With `dry_run` nothing is written. `onnx` names
    the flavour of a model.onnx in the folder, see `kvsink.export.onnx`; empty: none.
    """
    options = options or RewriteOptions()
    source, target = Path(model_dir), Path(out_dir)
    if onnx:
        from kvsink.export.flavours import check_expressible
        from kvsink.export.model import check_extras

        check_extras()
    config = _read_config(source)
    if not dry_run:
        _sweep(target)
    if target.exists() and not target.is_dir():
        raise KvsinkError(f"{target} is not a folder; choose another OUT_DIR")
    if target.is_dir() and any(target.iterdir()) and not (force or dry_run):
        raise KvsinkError(f"{target} exists; pass --force to replace it, or choose another OUT_DIR")
    place = pick_device(device)
    model = load_model(source, place)
    tokenizer = load_tokenizer(source) if _needs_text(options.calibration) else None
    storage = _storage_dtype(config)
    calibration: Any = options.calibration
    if calibration.endswith(".safetensors"):
        calibration = Calibration.load(calibration, model)
    report = rewrite(
        model, options.method, key_bits=options.key_bits, value_bits=options.value_bits, protect=options.protect,
        window=options.window, calibration=calibration, calibration_tokens=options.calibration_tokens,
        layers=options.layers, tokenizer=tokenizer, fold=options.fold, storage_dtype=storage, progress=progress,
        bits=options.bits, plan=options.plan, profile=options.profile,
    )  # fmt: skip
    report.model = str(model_dir)
    if onnx:
        check_expressible(model, runtime_of(model), anywhere=True, flavour=onnx)
    if dry_run:
        return report
    target.parent.mkdir(parents=True, exist_ok=True)
    build = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        _write(build, source, model, storage, report, options)
        if onnx:
            del model
            _export(build, onnx, progress)
        os.chmod(build, 0o755)
        _exchange(build, target)
    except BaseException:
        shutil.rmtree(build, ignore_errors=True)
        raise
    return report


def _export(build: Path, flavour: str, progress: Progress | None) -> None:
    """model.onnx into the folder that has just been written, from what it holds."""
    from kvsink.export import onnx

    if progress is not None:
        progress("export", 0, 1)
    onnx(build, build / "model.onnx", flavour)
    if progress is not None:
        progress("export", 1, 1)


def _read_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    if not source.is_dir() or not path.is_file():
        raise ModelError(f"{source} is not a model folder (no config.json); pass a folder, a hub id or demo:smollm2")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not a model configuration ({error!r}); fetch the model again") from error
    if (config.get("quantization_config") or {}).get("quant_method") == "kvsink":
        raise ModelError(f"{source} has been rewritten by kvsink already; pass the model it was made from")
    return dict(config)


def _needs_text(calibration: str) -> bool:
    return not calibration.endswith(".safetensors")


def _storage_dtype(config: dict[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name), torch.float32)


def _write(
    build: Path, source: Path, model: Any, storage: torch.dtype, report: Report, options: RewriteOptions
) -> None:
    runtime = runtime_of(model)
    model.to(storage)
    model.save_pretrained(build)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in ("config.json", "kvsink_demo.json") and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, build / file.name)
    config_path = build / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "kvsink", "method": report.method, "bits": round(report.bits, 4), "format": 1,
    }  # fmt: skip
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_sidecar(
        build, model, runtime,
        {"options": {k: getattr(options, k) for k in options.__dataclass_fields__}, "source": str(source.name),
         "versions": versions()},
    )  # fmt: skip
    (build / "kvsink_report.json").write_text(report.to_json() + "\n", encoding="utf-8")
    (build / "kvsink_report.md").write_text(report.to_markdown(), encoding="utf-8")
    for name in ("config.json", "model.safetensors", SIDECAR_JSON, SIDECAR_TENSORS):
        if name.endswith(".json") or (build / name).exists():
            with open(build / name, "rb") as handle:
                os.fsync(handle.fileno())


def _exchange(build: Path, target: Path) -> None:
    """Put `build` where `target` is; an existing target is kept aside until the new one stands."""
    if not target.exists():
        os.rename(build, target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    os.rename(target, aside / "old")
    try:
        os.rename(build, target)
    except BaseException:
        os.rename(aside / "old", target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove what an interrupted run left beside `target`, and bring back a target it had set aside."""
    if not target.parent.is_dir():
        return
    for left in target.parent.glob(f".{target.name}.*.old"):
        if not target.exists() and (left / "old").is_dir():
            os.rename(left / "old", target)
        shutil.rmtree(left, ignore_errors=True)
    for left in target.parent.glob(f".{target.name}.*.partial"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
