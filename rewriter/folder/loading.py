"""Load a causal language model and its tokenizer from a local folder, or say in one line why that cannot be done.

transformers fills weights that a checkpoint lacks with random numbers and only warns; here that is an error, as are
weights of the wrong shape and layers the config does not have.

Raises     ModelError, UnsupportedError; SidecarError from a rewritten folder passes through
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from kvsink.errors import KvsinkError, ModelError, UnsupportedError


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; anything else must exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(
            f"device {name!r} is not available here. Pass --device cpu, or install a PyTorch built for it"
        ) from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """`auto` is the checkpoint's own dtype on an accelerator and float32 on a CPU, where 16-bit arithmetic is slow."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in known:
        raise UnsupportedError(f"dtype {name!r} is not one of auto, {', '.join(known)}")
    return known[name]


def load_model(folder: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> Any:
    """The model in eval mode, on its device; a folder made by kvsink-rewrite comes with its packed cache attached."""
    place = pick_device(device) if isinstance(device, str) else device
    kind = pick_dtype(dtype, place) if isinstance(dtype, str) else dtype
    where = Path(folder)
    try:
        model, info = model_class(where).from_pretrained(where, dtype=kind, output_loading_info=True, local_files_only=True)
    except (KvsinkError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # transformers, safetensors and pickle each raise their own kinds
        raise ModelError(refusal(where, error)) from error
    _check_fit(where, model, info)
    return model.eval().to(place)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError for a folder without one, or one that kvsink has rewritten."""
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter; merge it into its model (merge_and_unload of PEFT), save that, and pass its folder"
        )
    if not folder.is_dir() or not path.is_file():
        raise ModelError(f"{folder} is not a model folder (no config.json); pass a folder, a hub id or demo:smollm2")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not a model configuration ({error!r}); fetch the model again") from error
    if (config.get("quantization_config") or {}).get("quant_method") == "kvsink":
        raise ModelError(f"{folder} has been rewritten by kvsink already; pass the model it was made from")
    return dict(config)


def model_class(folder: Path) -> Any:
    """The class that loads a folder: with its pictures where the model sees, else the language model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    sees = getattr(config, "vision_config", None) is not None and type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer stored beside the model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"{folder} has no usable tokenizer ({_first_line(error)}). Put its tokenizer files beside config.json"
        ) from error


def _check_fit(folder: Path, model: Any, info: Any) -> None:
    def named(kind: str) -> list[str]:
        return sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(kind) or ())

    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    beyond = [
        key
        for key in named("unexpected_keys")
        if (n := re.search(r"(?:layers|h|blocks)\.(\d+)\.", key)) and layers and int(n[1]) >= layers
    ]
    for what, keys in (("lack", named("missing_keys")), ("have another shape for", named("mismatched_keys"))):
        if keys:
            raise ModelError(f"{_fit(folder)}: they {what} {_some(keys)}. Fetch the model again, config and weights together")
    if beyond:
        raise ModelError(
            f"{_fit(folder)}: it has {layers} layers, but they hold {_some(beyond)}. Fetch the model again, config and"
            " weights together"
        )


def refusal(folder: Path, error: Exception) -> str:
    """Why a folder cannot be loaded, in one line, from what transformers raised."""
    text = str(error)
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        kind = re.search(r"model type `?([\w.-]+)`?", text)
        return (
            f"{folder} has an architecture this transformers does not know{f' ({kind[1]})' if kind else ''}. Update"
            " transformers, or pass another model"
        )
    if "Unrecognized configuration class" in text:
        return f"{folder} is not a causal language model. Pass one that AutoModelForCausalLM can load"
    if "size mismatch" in text or "mismatched" in text or "ignore_mismatched_sizes" in text:
        return f"{_fit(folder)}: a shape differs. Fetch the model again, config and weights together"
    if isinstance(error, OSError) and "no file named" in text:
        return f"{folder} holds no weights (no model.safetensors or pytorch_model.bin). Pass a complete model folder"
    return f"{folder} cannot be loaded: {type(error).__name__}: {_first_line(error)}. Fetch the model again"


def _fit(folder: Path) -> str:
    return f"the weights in {folder} do not fit its config.json"


def _some(keys: list[str]) -> str:
    return keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200].rstrip(".")
