"""Weights that are not where they are used: read them back from a disk, and find the device their module computes on.

`device_map` with "disk" (or a CPU beside a GPU) leaves parameters on the meta device; accelerate's hooks bring them for the time of
one forward pass. Nothing here imports accelerate.

Source     ours
Raises     UnsupportedError for a weight that is on the meta device and nowhere else
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvsink.errors import UnsupportedError

__all__ = ["is_held", "number_of", "place_of", "weight_of"]


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The parameter `name` of a model, read from where it was offloaded to when it is not in memory."""
    held = model.get_parameter(name)
    if not held.is_meta:
        return held
    parts = name.split(".")
    for i in range(len(parts) - 1, -1, -1):  # the innermost module whose hook has it
        inner = model.get_submodule(".".join(parts[:i]))
        weights = getattr(getattr(inner, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            try:
                return weights[".".join(parts[i:])]
            except KeyError:
                continue
    raise UnsupportedError(f"weight {name} is on the meta device and was not offloaded anywhere; load the model's weights first")


def is_held(model: nn.Module) -> bool:
    """Whether every weight can be read: in memory, or where it was offloaded to."""
    hooked = any(getattr(getattr(m, "_hf_hook", None), "weights_map", None) is not None for m in model.modules())
    return hooked or not any(p.is_meta for p in model.parameters())


def place_of(module: nn.Module) -> torch.device:
    """The device a module computes on; the CPU for one whose weights are still to come."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    places = (getattr(getattr(m, "_hf_hook", None), "execution_device", None) for m in module.modules())
    place: Any = next((p for p in places if p is not None), "cpu")
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def number_of(module: nn.Module) -> Tensor:
    """A weight of the dtype a module computes in: the first of at least 16-bit floating point, whatever quantized ones stand by."""
    plain = (p for p in module.parameters() if p.is_floating_point() and p.itemsize > 1)
    return next(plain, next(module.parameters()))
