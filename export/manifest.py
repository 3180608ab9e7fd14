"""The JSON beside an exported model: what every tensor is called, holds and means. The runner reads it, and so can others.

Fields     format, flavour, opset, domain, method, max_positions, vocab_size, special token ids, inputs, outputs (name, dtype,
           shape, meaning), codecs (one canonical text per layer, null for layers left alone), check, versions
Raises     ExportError when the file is missing, cannot be read or is of another version
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvsink.export.errors import ExportError

__all__ = ["FORMAT", "describe", "manifest_path", "read_manifest"]

FORMAT = "kvsink-onnx-2"
_NEEDED = ("flavour", "inputs", "outputs", "max_positions", "vocab_size", "eos_token_id", "pad_token_id", "elements_per_token")
_MEANING = {
    "input_ids": "new tokens, padding on the left",
    "inputs_embeds": "embeddings of new tokens and of pictures, in place of input_ids",
    "attention_mask": "1 at tokens, 0 at padding, past tokens included",
    "position_ids": "position of every new token in its row; padding may have any",
    "logits": "float32 scores of the next token",
    "last_logits": "those of the last token",
    "positions": "position of every stored token, shared by all layers",
    "key": "codes of keys (int8, or two of 4 bits in a byte, in flavour gqa), or keys after RoPE of a layer or side that is "
    "not packed",
    "value": "codes of values, in the same way, or values of a layer or side that is not packed",
    "key_scale": "float16 numbers of every row of key codes",
    "value_scale": "float16 numbers of every row of value codes",
    "exact_key": "keys of the rows kept exact, after RoPE",
    "exact_value": "values of the rows kept exact",
    "exact_slot": "slot of every exact row; -1: empty, -(slot + 2): held by an earlier place; -1 in an empty cache",
    "exact_score": "score by which a row holds its place; -inf in an empty cache",
}


def manifest_path(path: Path) -> Path:
    """model.onnx → model.onnx.json."""
    return path.with_name(path.name + ".json")


def describe(values: Any) -> list[dict[str, Any]]:
    """Name, dtype, shape and meaning of onnx_ir values; dynamic dimensions by name."""
    out = []
    for value in values:
        shape = [d if isinstance(d, int) else str(d.value) for d in value.shape]
        meaning = _MEANING[value.name if value.name in _MEANING else value.name.rpartition(".")[2]]
        out.append({"name": value.name, "dtype": str(value.dtype).lower(), "shape": shape, "meaning": meaning})
    return out


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of model.onnx at `path`."""
    beside = manifest_path(path)
    if not path.is_file():
        raise ExportError(f"{path} does not exist; write it with kvsink-rewrite MODEL_DIR OUT_DIR --onnx")
    try:
        record = json.loads(beside.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r} is not {FORMAT}")
        if missing := [name for name in _NEEDED if name not in record]:
            raise ValueError(f"it has no {missing[0]}")
        kernels = record.get("kernels", {"": {}})
        if not kernels or not isinstance(kernels, dict) or not all(isinstance(fields, dict) for fields in kernels.values()):
            raise ValueError("its kernels are no layers by name")
    except FileNotFoundError as error:
        raise ExportError(f"{beside} is missing; copy it beside {path.name}, or export the model again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{beside} cannot be read ({error}); export the model again") from error
    return dict(record)
