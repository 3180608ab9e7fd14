"""What every op of kvsink is made of: its registration, its shape rule, its cost, and how a codec text becomes a codec.

An op file holds, in this order: the reference in plain torch, the shape rule that serves launch and fake alike, the
registration. Ops live in the `kvsink` namespace of `torch.ops`; they have no gradient. Behind that, what their kernels share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Cost", "OpSpec", "cache_folder", "nbytes", "op_specs", "register_op", "resolve_codec", "set_codec_resolver", "stream_beside",
]  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """Work of one call: floating-point operations, bytes read and bytes written."""

    flops: int
    read: int
    written: int


@dataclass(frozen=True)
class OpSpec:
    """One op: the callable, its definition in plain torch, its cost and the inputs that drive tests and benchmarks.

    `examples` are functions of a seeded generator that return keyword arguments for the op; `mutates` names the
    arguments written in place.
    """

    name: str
    op: Callable[..., Any]
    ref: Callable[..., Any]
    cost: Callable[..., Cost]
    examples: tuple[Callable[[torch.Generator], Mapping[str, Any]], ...]
    mutates: tuple[str, ...] = field(default=())


_SPECS: dict[str, OpSpec] = {}


def register_op(spec: OpSpec) -> OpSpec:
    """Add one op to the table that tests, benchmarks and `explain` walk. A name is registered once."""
    if spec.name in _SPECS:
        raise ValueError(f"op {spec.name} is registered twice; import kvsink.kernels, never the folder `kernels`")
    _SPECS[spec.name] = spec
    return spec


def op_specs() -> dict[str, OpSpec]:
    """All registered ops by name."""
    return dict(_SPECS)


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the elements of the given tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


_resolver: Callable[[str], Any] | None = None


def set_codec_resolver(resolver: Callable[[str], Any]) -> None:
    """Tell the ops how a codec text becomes a codec object; called once by `kvsink.codecs`."""
    global _resolver
    _resolver = resolver


def resolve_codec(text: str) -> Any:
    """The codec that `text` describes. The ops carry the text because a graph node can hold a string."""
    if _resolver is None:
        raise RuntimeError("no codec resolver is set; import kvsink before calling kvsink ops")
    return _resolver(text)


def cache_folder() -> Path:
    """The folder for everything kvsink stores outside its outputs: $KVSINK_CACHE, else kvsink in the user's cache folder."""
    if own := os.environ.get("KVSINK_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "kvsink"


def stream_beside(here: Any, held: Any) -> Any:
    """The stream held, or another of its GPU where that is `here` itself: torch hands out 32 in turn, and captures a graph on one.

    On one stream launches that should run side by side would run in turn, and nothing would say so.
    """
    while held == here:
        held = torch.cuda.Stream(here.device)
    return held
