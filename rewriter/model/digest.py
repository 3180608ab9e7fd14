"""A checksum over what a file says, kept in the file itself: damage is told from a different wish.

Formula    SHA-256 over the names, dtypes, shapes and bytes of the tensors in the order of their names, then over the text
Source     ours
Raises     KvsinkError (of the kind asked for) when a record does not carry its own checksum
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvsink.errors import KvsinkError

__all__ = ["check_digest", "digest"]

DIGEST = "sha256"


def digest(tensors: Mapping[str, Tensor], record: Any = None) -> str:
    """The checksum of named tensors and a record that JSON can write; without the record's own checksum, if it has one."""
    out = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        out.update(f"{name} {t.dtype} {list(t.shape)}\n".encode())
        if t.numel():
            out.update(t.reshape(-1).view(torch.uint8).numpy().data)
    if isinstance(record, Mapping):
        record = {key: value for key, value in record.items() if key != DIGEST}
    out.update(json.dumps(record, sort_keys=True).encode())
    return out.hexdigest()


def check_digest(tensors: Mapping[str, Tensor], record: Mapping[str, Any], what: str, kind: type[KvsinkError], again: str) -> None:
    """Raise `kind` unless the record's checksum is that of tensors and record."""
    if record.get(DIGEST) != digest(tensors, record):
        raise kind(f"{what} is damaged or was changed by hand (its checksum does not fit); {again}")
