"""`kvsink-rewrite`: from a model folder to a rewritten one that appears complete or not at all.

The folder is built beside its final place under a hidden name and renamed at the end (see `kvsink.folder.place`). Weights are
copied a shard at a time, and what was folded is written over its bytes; a model that does not fit is calibrated layer by layer.

Raises     KvsinkError children; OSError from the disk passes through after the hidden folder is gone
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsink.calibrate.choices import LEARNING_TOKENS, RewriteOptions
from kvsink.calibrate.memory import SHARE_OF_MEMORY, available_memory, needs
from kvsink.calibrate.observing import CALIBRATION_WINDOW, Progress
from kvsink.calibrate.record import Calibration
from kvsink.calibrate.skeleton import skeleton
from kvsink.calibrate.streaming import Stream
from kvsink.calibrate.uncalibrated import is_none
from kvsink.errors import KvsinkError, UnsupportedError
from kvsink.evaluate.imagetext import is_source, load_processor, prompts, read_examples
from kvsink.evaluate.stepcheck import check_step
from kvsink.folder.checkpoint import Checkpoint
from kvsink.folder.loading import load_model, load_tokenizer, pick_device, read_config
from kvsink.folder.place import building, sweep
from kvsink.folder.sidecar import SIDECAR_JSON, SIDECAR_TENSORS, write_sidecar
from kvsink.methods import DEFAULT, get_method
from kvsink.model.fold import FOLDED, folded
from kvsink.model.runtime import runtime_of
from kvsink.report import Report, versions
from kvsink.rewrite import rewrite
from kvsink.saving import quantization_record, text_configs

__all__ = ["rewrite_dir"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".onnx", ".msgpack", ".h5")


def rewrite_dir(
    model_dir: str | Path,
    out_dir: str | Path,
    options: RewriteOptions | None = None,
    *,
    onnx: str = "",
    device: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    by_layer: bool | None = None,
) -> Report:
    """Calibrate and rewrite the model in `model_dir` (a local folder) and leave it in `out_dir`.

    With `force` an existing out_dir is replaced, at the very end. With `dry_run` nothing is written. `onnx` names the flavour of
    a model.onnx in the folder, with its dtype behind a colon where it is not float32, see `kvsink.export.onnx`; empty: none.
    by_layer: read the weights one layer at a time; None does so when they would fill the memory.
    """
    options = options or RewriteOptions()
    options = replace(options, method=options.method or DEFAULT)
    source, target = Path(model_dir), Path(out_dir)
    if onnx:
        from kvsink.export.flavours import check_expressible
        from kvsink.export.model import check_extras

        check_extras()
    config = read_config(source)
    _refuse_quantized(source, config)
    if not dry_run:
        sweep(target)
    if target.exists() and not target.is_dir():
        raise KvsinkError(f"{target} is not a folder; choose another OUT_DIR")
    if target.is_dir() and any(target.iterdir()) and not (force or dry_run):
        raise KvsinkError(f"{target} exists; pass --force to replace it, or choose another OUT_DIR")
    place = pick_device(device)
    checkpoint = Checkpoint.find(source)
    stream, notes = None, []
    if checkpoint is not None:
        bare = skeleton(source)
        wanted = needs(bare, checkpoint, options.calibration_tokens or LEARNING_TOKENS, CALIBRATION_WINDOW)
        free, room = available_memory(place), shutil.disk_usage(_existing(target)).free
        notes.append(f"needs {wanted}; {free / 2**30:.1f} and {room / 2**30:.1f} GiB are free")
        if wanted.disk > room and not dry_run:
            raise KvsinkError(
                f"{target} takes {wanted.disk / 2**30:.1f} GiB, {room / 2**30:.1f} GiB are free; free some, or choose another disk"
            )
        if by_layer or (by_layer is None and wanted.whole > SHARE_OF_MEMORY * free and not _needs_whole(options, bool(onnx))):
            stream = Stream(bare, checkpoint, place)
            _check_writable(stream)
            notes.append("read layer by layer")
    elif by_layer:
        raise UnsupportedError(f"{source} has no safetensors files, which reading by layers needs; use --whole")
    if stream is not None and onnx:
        raise UnsupportedError("--onnx needs the whole model in memory; leave it out, or use --whole")
    model = load_model(source, place) if stream is None else stream.model
    tokenizer = load_tokenizer(source) if _needs_text(options.calibration) else None
    storage = _storage_dtype(config)
    calibration: Any = options.calibration
    if calibration.endswith(".safetensors"):
        calibration = Calibration.load(calibration, model if stream is None else None)
    elif is_source(calibration):
        if stream is not None:
            raise UnsupportedError("pictures run through the whole model, tower included; use --whole")
        seen = prompts(read_examples(calibration), load_processor(source), model)
        calibration = [p.inputs for p in seen]
    report = rewrite(
        model,
        options.method,
        key_bits=options.key_bits,
        value_bits=options.value_bits,
        protect=options.protect,
        window=options.window,
        calibration=calibration,
        calibration_tokens=options.calibration_tokens,
        layers=options.layers,
        tokenizer=tokenizer,
        fold=options.fold,
        storage_dtype=storage,
        progress=progress,
        bits=options.bits,
        plan=options.plan,
        profile=options.profile,
        modality=options.modality,
        stream=stream,
        sliding=options.sliding,
        check=options.check,
    )
    if options.check and stream is None:
        if progress is not None:
            progress("checking a compiled step", 0, 1)
        report.check.step = check_step(model, runtime_of(model), report.notes)
        if progress is not None:
            progress("checking a compiled step", 1, 1)
    report.model = str(model_dir)
    report.notes += notes
    if onnx:
        flavour, _, dtype = onnx.partition(":")
        check_expressible(model, runtime_of(model), anywhere=True, flavour=flavour, lean=dtype == "float16")
    if dry_run:
        return report
    with building(target, force) as build:
        weights = _write_weights(build, model, checkpoint, storage, stream)
        _write(build, source, model, report, options, weights)
        if onnx:
            del model
            _export(build, onnx, progress)
    return report


def _check_writable(stream: Stream) -> None:
    """What may be folded into weights is written over their bytes, so the files have to hold these as the model does."""
    for attention in stream.where.attentions:
        for part in FOLDED:
            name = f"{attention}.{part}"
            if name in stream.names and not stream.weights.plain(name):
                raise UnsupportedError(
                    f"{stream.checkpoint.folder} stores {name} under another name, so it cannot be written layer by layer; use a "
                    "machine where it fits whole (--whole)"
                )


def _existing(path: Path) -> Path:
    """The nearest folder above a path that exists already."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


def _needs_whole(options: RewriteOptions, onnx: bool) -> bool:
    """Whether the options ask for what cannot be done layer by layer."""
    modal = options.modality is not None or get_method(options.method or DEFAULT).modality is not None
    return onnx or modal or options.plan == "auto" or is_source(options.calibration)


def _write_weights(
    build: Path, model: Any, checkpoint: Checkpoint | None, storage: torch.dtype, stream: Stream | None
) -> Callable[[str], Tensor] | None:
    """The weights into the folder, a shard at a time where they can stay as they are but for what was folded into them.

    Returns what reads one of them by name when the model does not hold them itself.
    """
    runtime = runtime_of(model)
    where = runtime.anatomy
    if stream is not None:
        turned = dict(stream.folds)
        stream.checkpoint.copy(build)
        for name, order in turned.items():
            mine = [f"{name}.{part}" for part in FOLDED if f"{name}.{part}" in stream.checkpoint.entries]
            held = {n.removeprefix(f"{name}."): t for n, t in stream.checkpoint.tensors(mine).items()}
            for part, new in folded(held, order).items():
                stream.checkpoint.put(build, f"{name}.{part}", new)
        return Stream(model, _found(build), stream.device).read
    plans = enumerate(runtime.plans)
    turned_in = {where.attentions[i] for i, p in plans if p.codec is not None and p.codec.value.folded}
    changed = {n: p for n, p in model.named_parameters() if any(n == f"{name}.{part}" for name in turned_in for part in FOLDED)}
    if checkpoint is not None and _holds(checkpoint, model, storage):
        checkpoint.copy(build, changed)
        model.to(storage)
        return None
    model.to(storage)
    type(model).save_pretrained(model, build)  # the plan is written with the rest
    return None


def _holds(checkpoint: Checkpoint, model: Any, storage: torch.dtype) -> bool:
    """Whether the checkpoint's tensors are the model's parameters, by name, shape and the dtype they are to be saved in."""
    return all(
        (e := checkpoint.entries.get(n)) is not None and e.shape == tuple(p.shape) and e.dtype == storage
        for n, p in model.named_parameters()
    )


def _found(build: Path) -> Checkpoint:
    checkpoint = Checkpoint.find(build)
    assert checkpoint is not None
    return checkpoint


def _export(build: Path, flavour: str, progress: Progress | None) -> None:
    """model.onnx into the folder that has just been written, from what it holds."""
    from kvsink.export import onnx

    if progress is not None:
        progress("export", 0, 1)
    name, _, dtype = flavour.partition(":")
    onnx(build, build / "model.onnx", name, dtype=dtype or "float32")
    if progress is not None:
        progress("export", 1, 1)


def _refuse_quantized(source: Path, config: dict[str, Any]) -> None:
    if quantized := (config.get("quantization_config") or {}).get("quant_method"):
        raise UnsupportedError(
            f"the weights in {source} are quantized by {quantized}, and a folder can name one quantizer only; load it with "
            "transformers and call kvsink.rewrite(model)"
        )


def _needs_text(calibration: str) -> bool:
    return not (calibration.endswith(".safetensors") or is_none(calibration))


def _storage_dtype(config: dict[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name), torch.float32)


def _write(
    build: Path, source: Path, model: Any, report: Report, options: RewriteOptions, weights: Callable[[str], Tensor] | None
) -> None:
    """Everything beside the weights."""
    runtime = runtime_of(model)
    if not (build / "config.json").is_file():
        shutil.copyfile(source / "config.json", build / "config.json")
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in ("config.json", "kvsink_demo.json") and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, build / file.name)
    config_path = build / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for part in (config, *(p for n in text_configs(model.config) if isinstance(p := config.get(n), dict))):
        part["quantization_config"] = quantization_record(report.method, report.bits)
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_sidecar(
        build,
        model,
        runtime,
        {
            "options": {k: getattr(options, k) for k in options.__dataclass_fields__},
            "source": str(source.name),
            "versions": versions(),
            "check": report.check.as_dict(),
            **({"pages": runtime.extra["pages"]} if "pages" in runtime.extra else {}),
        },
        weights,
    )
    (build / "kvsink_report.json").write_text(report.to_json() + "\n", encoding="utf-8")
    (build / "kvsink_report.md").write_text(report.to_markdown(), encoding="utf-8")
    for name in ("config.json", "model.safetensors", SIDECAR_JSON, SIDECAR_TENSORS):
        if name.endswith(".json") or (build / name).exists():
            with open(build / name, "rb") as handle:
                os.fsync(handle.fileno())
