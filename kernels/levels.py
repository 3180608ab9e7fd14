"""Levels of the minimum-error scalar quantizer of a unit Gaussian (Lloyd-Max), for 1 to 8 bits, free or equally spaced.

Formula    levels y_i = E[x | t_i < x < t_{i+1}],  thresholds t_i = (y_{i-1} + y_i) / 2, iterated to a fixed point
Source     Lloyd 1957 / Max 1960; distortion at 1..4 bit is 0.3634, 0.1175, 0.0345, 0.0095
Shapes     levels float32 [2**bits] ascending, thresholds float32 [2**bits - 1]
           equally spaced: y_i = step (i - (2**bits - 1) / 2) with the step of least error; 0.3634, 0.1188, 0.0374, 0.0115
Exact      symmetric to the last bit: level i is minus level 2**bits - 1 - i
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .lasting import lasting

__all__ = ["EVEN_STEP", "distortion", "even_levels", "even_thresholds", "levels_of", "levels_of_bytes", "lloyd_max", "thresholds"]

EVEN_STEP = {1: 1.5957691, 2: 0.9956867, 3: 0.5860194, 4: 0.3352006, 5: 0.1881388, 6: 0.104063, 7: 0.0568677, 8: 0.0307624}
"""By bits, the step of least mean squared error of a quantizer with equally spaced levels on a unit Gaussian."""

_erf = np.vectorize(math.erf, otypes=[np.float64])


@cache
def _solve(bits: int) -> tuple[tuple[float, ...], float]:
    half = 1 << (bits - 1)  # the positive half; the other is its mirror image
    y = (np.arange(half) + 0.5) / half * (1.2 + 0.55 * bits)
    moved, steps = 1.0, 0
    while moved > 1e-12 and steps < 40_000:
        t = np.concatenate(([0.0], (y[1:] + y[:-1]) / 2, [40.0]))
        density = np.exp(-t * t / 2) / math.sqrt(2 * math.pi)
        mass = np.maximum(np.diff(0.5 * _erf(t / math.sqrt(2))), 1e-300)
        centre = (density[:-1] - density[1:]) / mass
        moved = float(np.abs(centre - y).max())
        y = centre
        steps += 1
    t = np.concatenate(([0.0], (y[1:] + y[:-1]) / 2, [40.0]))
    density = np.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    mass = np.diff(0.5 * _erf(t / math.sqrt(2)))
    error = 0.5 + np.sum(mass * y * y - 2.0 * y * (density[:-1] - density[1:]))  # of the positive half, at any levels
    return tuple(float(v) for v in y), float(2.0 * error)


def distortion(bits: int) -> float:
    """Mean squared error of `bits` bits on a unit Gaussian; 1 at 0 bits."""
    return 1.0 if bits == 0 else _solve(bits)[1]


_SHARED: dict[tuple[str, int, str], Tensor] = {}


def _shared(name: str, bits: int, device: torch.device | str, values: Callable[[], tuple[float, ...]]) -> Tensor:
    """One tensor per device: a copy from the host at every call would break the capture of CUDA graphs."""
    key = (name, bits, str(device))
    held = _SHARED.get(key)
    if held is None:
        held = lasting(torch.device(device), lambda: torch.tensor(values(), dtype=torch.float32, device=device))
        if type(held) is Tensor:  # not the stand-in of a tracer
            _SHARED[key] = held
    return held


def lloyd_max(bits: int, device: torch.device | str = "cpu") -> Tensor:
    """Levels float32 [2**bits], ascending, of the Lloyd-Max quantizer of a unit Gaussian."""

    def values() -> tuple[float, ...]:
        half = _solve(bits)[0]
        return (*(-y for y in reversed(half)), *half)

    return _shared("levels", bits, device, values)


def thresholds(bits: int, device: torch.device | str = "cpu") -> Tensor:
    """Decision thresholds float32 [2**bits - 1] that belong to `lloyd_max(bits)`."""

    def values() -> tuple[float, ...]:
        y = lloyd_max(bits)
        return tuple(((y[1:] + y[:-1]) / 2).tolist())

    return _shared("thresholds", bits, device, values)


def even_levels(bits: int, device: torch.device | str = "cpu") -> Tensor:
    """Levels float32 [2**bits], ascending, equally spaced."""
    middle = (2**bits - 1) / 2
    return _shared("even", bits, device, lambda: _even(bits, [i - middle for i in range(2**bits)]))


def levels_of(kind: str, bits: int) -> Tensor:
    """What the codes of a quantizer of `kvsink.kernels.quantize`, or of "static", stand for: float32 [2**bits]."""
    if kind.startswith(("uniform", "static")):
        return torch.arange(2.0**bits) - (2.0 ** (bits - 1) if kind == "static" else 0.0)
    return even_levels(bits) if kind == "lloyd-even" else lloyd_max(bits)


def levels_of_bytes(kind: str, bits: int) -> Tensor:
    """The same for every byte of 8 / bits codes, lowest first: float32 [256, 8 / bits]."""
    byte = torch.arange(256)[:, None] >> torch.arange(0, 8, bits)
    return levels_of(kind, bits)[byte & (2**bits - 1)].contiguous()


def even_thresholds(bits: int, device: torch.device | str = "cpu") -> Tensor:
    """Decision thresholds float32 [2**bits - 1] half way between `even_levels(bits)`."""
    half = 2 ** (bits - 1)
    return _shared("even thresholds", bits, device, lambda: _even(bits, [i + 1.0 - half for i in range(2**bits - 1)]))


def _even(bits: int, units: list[float]) -> tuple[float, ...]:
    """Multiples of the step, rounded as float32 products: kernels compute them so."""
    return tuple(float(v) for v in np.float32(EVEN_STEP[bits]) * np.array(units, dtype=np.float32))
