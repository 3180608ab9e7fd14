"""`kvsink.export.onnx`: a rewritten model becomes model.onnx, its manifest and its tokenizer; all of them or none.

Raises     ExportError and its kin before anything is written; what an export that failed had written is removed
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsink.errors import KvsinkError, UnknownName
from kvsink.evaluate.evaluation import versions
from kvsink.evaluate.texts import builtin_text
from kvsink.export.bodies import DOMAIN, OPSET
from kvsink.export.check import check_file, check_run
from kvsink.export.errors import ExportError
from kvsink.export.flavours import FLAVOURS, check_expressible, takes_functions
from kvsink.export.genai import write_genai
from kvsink.export.graph import append_functions, build_graph
from kvsink.export.manifest import FORMAT, describe, manifest_path
from kvsink.export.tiles import kernels_of
from kvsink.export.wide import in_float64, parameters_as
from kvsink.folder.loading import load_model, load_tokenizer
from kvsink.kernels.layout import TILE_SLOTS
from kvsink.model.runtime import runtime_of

__all__ = ["check_extras", "onnx"]

_OPSETS = {"gqa": (18, OPSET)}  # oldest and newest of a flavour; the others write their cache by an operator that 24 brought
_SINGLE = {"Erf", "Gelu"}  # of the operators that models use, those without a kernel for float64 on the CPU
_DTYPES = ("float32", "float16", "float64")
_LARGE = 1 << 30  # bytes of weights from which they go into a file of their own
_CHECKED = 29  # tokens of one row
_TOKENIZER = ("tokenizer", "special_tokens_map", "vocab", "merges", "added_tokens", "chat_template", "generation_config")


def check_extras() -> None:
    """Raise ExportError unless onnx, onnxscript and onnxruntime can be imported."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise ExportError(f"{name} is not installed, which ONNX export needs; pip install 'kvsink[onnx]'")


def onnx(
    source: Any,
    path: str | Path,
    flavour: str = "functions",
    *,
    opset: int | None = None,
    tokens: int | None = None,
    external_data: bool | None = None,
    dtype: str = "float32",
    embeds: bool = False,
) -> dict[str, Any]:
    """Export a rewritten model, or the folder of one, to the file `path`; returns its manifest.

    flavour: "functions" runs in stock onnxruntime; "custom" has the same nodes without bodies; "gqa" is for models of the method
    static: GroupQueryAttention over an int8 or int4 cache under the standard names, with a genai_config.json. tokens: positions it
    serves, by default the model's own limit. external_data: weights in path + ".data"; by default from 1 GB on. dtype: "float16"
    is for CUDA; flavour gqa then has no attention bias, which its kernel there declines: rows of equal length, keys not centred.
    Flavour custom is then one node a layer that codes and attends by the kernels of the cache itself: rows of equal length, and a
    library that `build_ort_ops --cuda` builds.
    "float64" is for comparisons, of flavour functions: its tokens and bytes are those of the torch model under `in_float64`.
    embeds: the graph takes inputs_embeds in place of input_ids, as the language part of a vision-language model does that is to
    see pictures.

    The graph is checked and run beside the torch model first, on text where a tokenizer is at hand. Raises KvsinkError children.
    """
    target = Path(path)
    if flavour not in FLAVOURS:
        raise UnknownName("flavour", flavour, FLAVOURS)
    if dtype not in _DTYPES:
        raise ExportError(f"dtype {dtype} is none of {', '.join(_DTYPES)}")
    if dtype == "float64" and flavour != "functions":
        raise ExportError(f"flavour {flavour} computes in float32 or float16; float64 is for flavour functions")
    if dtype != "float32" and embeds:
        raise ExportError("embeddings come in float32; leave dtype out with embeds=True")
    oldest, newest = _OPSETS.get(flavour, (OPSET, OPSET))
    opset = newest if opset is None else opset
    if not oldest <= opset <= newest:
        known = f"{oldest} to {newest}" if oldest < newest else str(oldest)
        raise ExportError(f"opset {opset} is not one of flavour {flavour}, which has {known}; leave opset out")
    if target.suffix != ".onnx" or target.is_dir():
        raise ExportError(f"{target} is not the name of an ONNX file; write for example {target.with_suffix('') / 'model.onnx'}")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise ExportError(f"{target.parent} is not a folder that can be written to; make it, or choose another path")
    check_extras()
    folder = Path(source) if isinstance(source, (str, Path)) else None
    model = load_model(folder, "cpu", torch.float32) if folder is not None else source
    runtime = runtime_of(model)
    if dtype == "float64" and not takes_functions(model):
        raise ExportError(f"{type(model).__name__} spells its attention out, in float32 whatever it is; export it in float32")
    check_expressible(model, runtime, flavour=flavour, lean=dtype == "float16", embeds=embeds)
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or 4096
    reach = limit if tokens is None else tokens
    if not _CHECKED <= reach <= limit:
        raise ExportError(f"tokens={reach} is outside {_CHECKED} to the {limit} positions of the model")
    build = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        ids = _ids(folder, config.vocab_size)
        with in_float64(model) if dtype == "float64" else nullcontext():  # the graph refers to the parameters
            manifest = _write(build / target.name, model, flavour, opset, reach, ids, external_data, dtype, embeds)
        if folder is not None and folder.resolve() != target.parent.resolve():
            for file in folder.iterdir():
                if file.is_file() and file.name.startswith(_TOKENIZER):
                    shutil.copyfile(file, build / file.name)
        (target.parent / (target.name + ".data")).unlink(missing_ok=True)
        for file in sorted(build.iterdir(), key=lambda f: f.name == target.name):  # the model last
            os.replace(file, target.parent / file.name)
    finally:
        shutil.rmtree(build, ignore_errors=True)
    return manifest


def _write(
    path: Path, model: Any, flavour: str, opset: int, tokens: int, ids: Tensor, external: bool | None, dtype: str, embeds: bool
) -> dict[str, Any]:
    import json

    import onnx_ir

    half = dtype == "float16"
    runtime, config = runtime_of(model), model.config.get_text_config(decoder=True)
    plain, grouped = flavour == "custom", flavour == "gqa"
    lean = half and (plain or grouped)
    graph = build_graph(model, opset, tokens, flavour, lean and grouped, embeds)
    if dtype == "float64" and (found := {node.op_type for node in graph.graph} & _SINGLE):
        raise ExportError(f"{type(model).__name__} cannot be exported in float64: onnxruntime has {min(found)} in float32 alone")
    append_functions(graph, opset)
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
    data = f"{path.name}.data" if (size >= _LARGE if external is None else external) else None
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    a = runtime.anatomy
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "flavour": "gqa" if grouped else "functions",
        "opset": opset,
        "domain": "com.microsoft" if grouped else DOMAIN,
        "model": type(model).__name__,
        "method": runtime.method,
        "max_positions": tokens,
        "vocab_size": config.vocab_size,
        "eos_token_id": config.eos_token_id if ends is None else ends,
        "pad_token_id": pad if isinstance(pad := getattr(config, "pad_token_id", None), int) else 0,
        "elements_per_token": 2 * len(runtime.plans) * a.kv_heads * a.head_dim,
        "inputs": describe(graph.graph.inputs),
        "outputs": describe(graph.graph.outputs),
        "dtype": "float64" if dtype == "float64" else "float32",
        "padding": not (lean and grouped),
        "codecs": [None if p.codec is None else p.codec.text() for p in runtime.plans],
        "versions": versions(),
    }

    def describe_it() -> None:
        manifest_path(path).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    def save() -> None:
        onnx_ir.save(graph, path, external_data=data)
        describe_it()
        check_file(path)

    save()
    manifest["check"] = check_run(path, model, ids)
    if half:  # what was run is its twin in float32
        del graph
        with parameters_as(model, torch.float16):  # until the file is written: the graph refers to the parameters
            graph = build_graph(model, opset, tokens, flavour, lean)
            append_functions(graph, opset)
            manifest |= {"dtype": "float16", "inputs": describe(graph.graph.inputs), "outputs": describe(graph.graph.outputs)}
            if grouped:
                write_genai(path, model, manifest)
            elif plain:
                manifest |= {"flavour": flavour, "padding": False}
                manifest |= {"slot_multiple": TILE_SLOTS, "kernels": {n: asdict(v) for n, v in kernels_of(runtime).items()}}
            save()
        return manifest
    if grouped:
        write_genai(path, model, manifest)
    if not plain:
        describe_it()
        return manifest
    graph.functions.clear()  # what was run is its twin with bodies
    for node in graph.graph:
        node.overload = ""
    manifest["flavour"] = flavour
    save()
    return manifest


def _ids(folder: Path | None, vocabulary: int) -> Tensor:
    """Two rows of tokens to check the graph on: of a text where the tokenizer is known, else spread over the vocabulary.

    No token stands twice in a row: equal ones have equal hidden states before the first layer and would tie for exact places.
    """
    if folder is not None:
        try:
            found = load_tokenizer(folder)(builtin_text()[:4000], add_special_tokens=False)["input_ids"]
        except KvsinkError:
            found = []
        half = len(found) // 2
        rows = [list(dict.fromkeys(part))[:_CHECKED] for part in (found[:half], found[half:])]
        if min(map(len, rows)) == _CHECKED:
            return torch.tensor(rows)
    step = max(1, vocabulary // (2 * _CHECKED + 1))
    return (torch.arange(1, 2 * _CHECKED + 1) * step % vocabulary).reshape(2, _CHECKED)
