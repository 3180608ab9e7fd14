"""The safetensors files of a model folder: names, shapes and bytes without loading them, and a copy with some tensors replaced.

Formula    a file is 8 bytes (length n of its header), n bytes of JSON (name → dtype, shape, data_offsets), then the data
Source     the safetensors format
Shapes     a replaced tensor keeps its shape and dtype, so that its bytes go where the old ones were
Exact      every byte that is not replaced is the source's
Raises     ModelError when a file is missing, truncated or says what it does not hold
Cost       a copy reads and writes every byte once and holds none of them; a replaced tensor is held while it is written
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvsink.errors import ModelError

__all__ = ["Checkpoint"]

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: a kind that torch's tensors of this version do not have here
    start: int  # of its bytes in the file
    nbytes: int


class Checkpoint:
    """The weight files of one folder."""

    def __init__(self, folder: Path, entries: Mapping[str, Entry], files: tuple[str, ...]) -> None:
        self.folder, self.entries, self.files = folder, dict(entries), files

    @classmethod
    def find(cls, folder: str | Path) -> Checkpoint | None:
        """The checkpoint of a folder; None when its weights are not safetensors files."""
        where = Path(folder)
        if (where / _ONE).is_file():
            files: tuple[str, ...] = (_ONE,)
        elif (where / _INDEX).is_file():
            try:
                named = json.loads((where / _INDEX).read_text(encoding="utf-8"))["weight_map"]
                files = tuple(sorted(set(named.values())))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{where / _INDEX} cannot be read ({error!r}); fetch the model again") from error
            if odd := [f for f in files if Path(f).name != f]:
                raise ModelError(f"{where / _INDEX} names {odd[0]!r}, which is no file of this folder; fetch the model again")
        else:
            return None
        entries: dict[str, Entry] = {}
        for file in files:
            entries.update(_header(where / file, file))
        return cls(where, entries, files)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum((self.folder / f).stat().st_size for f in self.files)

    @property
    def parameters(self) -> int:
        """Numbers stored."""
        return sum(math.prod(e.shape) for e in self.entries.values())

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors; their memory is the files' until it is copied."""
        out: dict[str, Tensor] = {}
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(name)
        for file, wanted in by_file.items():
            try:
                with safe_open(str(self.folder / file), framework="pt") as opened:
                    out.update({name: opened.get_tensor(name) for name in wanted})
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{self.folder / file} cannot be read ({error}); fetch the model again") from error
        return out

    def copy(self, target: Path, replaced: Mapping[str, Tensor] | None = None) -> None:
        """Copy every file into `target`, a shard at a time; hard links would let a later change of one folder reach the other."""
        for file in self.files:
            shutil.copyfile(self.folder / file, target / file)
        if (self.folder / _INDEX).is_file() and self.files != (_ONE,):
            shutil.copyfile(self.folder / _INDEX, target / _INDEX)
        for name, tensor in (replaced or {}).items():
            self.put(target, name, tensor)
        for file in self.files:
            with open(target / file, "rb") as handle:
                os.fsync(handle.fileno())

    def put(self, target: Path, name: str, tensor: Tensor) -> None:
        """Write one tensor over its bytes in a copy of this checkpoint."""
        entry = self.entries[name]
        if tuple(tensor.shape) != entry.shape or entry.dtype is None:
            raise ModelError(f"{name} has shape {entry.shape} in {entry.file}, not {tuple(tensor.shape)}; fetch the model again")
        data = tensor.detach().to("cpu", entry.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        with open(target / entry.file, "r+b") as handle:
            handle.seek(entry.start)
            handle.write(data.data)


def _header(path: Path, file: str) -> dict[str, Entry]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            n = int.from_bytes(handle.read(8), "little")
            if not 2 <= n <= min(size - 8, 1 << 28):
                raise ValueError(f"a header of {n} bytes in a file of {size}")
            header: dict[str, Any] = json.loads(handle.read(n))
        header.pop("__metadata__", None)
        out = {}
        for name, e in header.items():
            start, end = (int(x) for x in e["data_offsets"])
            if not 0 <= start <= end <= size - 8 - n:
                raise ValueError(f"{name} lies outside the file")
            out[name] = Entry(file, tuple(int(d) for d in e["shape"]), _DTYPES.get(e["dtype"]), 8 + n + start, end - start)
        return out
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read ({error}); fetch the model again") from error
