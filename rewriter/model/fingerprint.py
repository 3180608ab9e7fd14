"""Which weights a model has: a few of their values, by which records and sidecars know whose they are.

Source     ours
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from kvsink.model.fold import is_plain
from kvsink.model.offload import weight_of

__all__ = ["fingerprint", "fingerprint_of", "same_model"]


def fingerprint(model: nn.Module, weight: Callable[[str], Tensor] | None = None, within: str = "") -> Tensor:
    """float32 samples of the weights, the same for every storage precision up to rounding: up to 64 tensors, 16 values each.
    Weights in a format of their own are left out; offloaded ones are read back.

    weight: gives a parameter by name, where the model holds none. within: the part of the model to look at alone.
    """
    parts = ((n, p) for n, p in model.named_parameters() if n.startswith(f"{within}." if within else ""))
    return fingerprint_of(parts, (lambda name: weight_of(model, name)) if weight is None else weight)


def fingerprint_of(parts: Iterable[tuple[str, Tensor]], weight: Callable[[str], Tensor]) -> Tensor:
    """`fingerprint` of parameters by name, which `weight` reads."""
    named = sorted(((n, p) for n, p in parts if p.numel() >= 16 and (is_plain(p) or _is_split(p))), key=lambda row: row[0])
    step = max(1, len(named) // 64)
    out = []
    for name, _ in named[::step][:64]:
        p = _whole(weight(name))
        index = torch.linspace(0, p.numel() - 1, 16, dtype=torch.float64).long().to(p.device)
        out.append(p.detach().flatten()[index].float().cpu())
    return torch.cat(out) if out else torch.zeros(0)


def _is_split(weight: Tensor) -> bool:
    """Whether every process holds a part of a weight of floating-point numbers."""
    return hasattr(weight, "full_tensor") and weight.is_floating_point() and weight.itemsize > 1


def _whole(weight: Tensor) -> Tensor:
    """A weight that may be split over processes, of which all have to ask."""
    full: Tensor = weight.full_tensor() if _is_split(weight) else weight  # type: ignore[attr-defined]
    return full


def same_model(a: Tensor, b: Tensor) -> bool:
    """Whether two fingerprints are of the same weights, allowing for a change of precision down to bfloat16."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=2.0**-7, atol=1e-6)
