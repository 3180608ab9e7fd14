"""`save_pretrained` of a rewritten model: a folder that loads with its packed cache again, as one made by kvsink-rewrite does.

The plan goes beside the weights and `quantization_config` into config.json, for a model that was loaded and for one rewritten
in memory, and so into what push_to_hub uploads and into a Trainer's checkpoints. Weights are saved as they are, a folded
rotation included: read without kvsink they are a plain model that computes the same. Adapters alone are saved as ever.

Source     ours
Differs    `_upload_modified_files` is private to transformers: with push_to_hub=True it uploads before `save_pretrained` returns;
           the replacement is `model.push_to_hub(...)`
"""

from __future__ import annotations

import inspect
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from kvsink.errors import UnsupportedError
from kvsink.folder.sidecar import write_sidecar
from kvsink.model.offload import number_of, place_of, weight_of
from kvsink.report import make_report, versions

__all__ = ["quantization_record", "save_pretrained", "text_configs"]


def quantization_record(method: str, bits: float) -> dict[str, Any]:
    """`quantization_config` of a rewritten folder; bits: counted bits per element."""
    return {"quant_method": "kvsink", "method": method, "bits": round(bits, 4), "format": 1}


def text_configs(config: Any) -> list[str]:
    """Names of the parts of a config that describe its decoder alone: what a class for text reads of a folder that sees."""
    text = config.get_text_config(decoder=True)
    return [name for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is text]


def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """Takes and returns what the model's own `save_pretrained` does."""
    original = partial(type(self).save_pretrained, self, save_directory, *args, **kwargs)
    runtime, adapters = self.__dict__.get("_kvsink_runtime"), getattr(self, "_hf_peft_config_loaded", False)
    if runtime is None or adapters:
        return original()
    if (ranks := runtime.ranks) > 1:
        raise UnsupportedError(f"each of {ranks} processes holds the tables of its own heads; copy the folder that was loaded")
    if other := getattr(self.config, "quantization_config", None):
        named = other.get("quant_method") if isinstance(other, dict) else getattr(other, "quant_method", "")
        warnings.warn(
            f"{save_directory} is saved without its packed cache: it names {getattr(named, 'value', named)} as its quantizer, "
            "and a folder can name one only; call kvsink.rewrite(model) after loading it",
            stacklevel=3,
        )
        return original()
    given = inspect.signature(type(self).save_pretrained).bind(self, save_directory, *args, **kwargs).arguments
    state: dict[str, Tensor] = dict(given.get("state_dict") or {})  # the one that was given is emptied while it is written
    written = not given.get("is_main_process", True)

    def write() -> None:
        nonlocal written
        if not written and os.path.isdir(save_directory):
            extra = {**runtime.extra, "versions": versions()}
            write_sidecar(Path(save_directory), self, runtime, extra, lambda n: state[n] if n in state else weight_of(self, n))
        written = True

    def upload(*files: Any, **options: Any) -> Any:
        write()
        return type(self)._upload_modified_files(self, *files, **options)

    parts = [self.config, *(getattr(self.config, name) for name in text_configs(self.config))]
    bits = make_report(runtime, "", number_of(self).dtype, place_of(self), "", 0, ()).bits
    for part in parts:
        part.quantization_config = quantization_record(runtime.method, bits)
    self._upload_modified_files = upload
    try:
        result = original()
        write()
    finally:
        del self._upload_modified_files
        for part in parts:
            del part.quantization_config
    return result
