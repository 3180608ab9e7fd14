"""A Walsh-Hadamard rotation of the last axis, in independent runs of `order` channels.

Formula    y = x · (I ⊗ H_n),  H_{2m} = [[H_m, H_m], [H_m, -H_m]] / sqrt(2), H_1 = [1]; for n = 12·2^j, 20·2^j the core of
           order 12 or 20 is Paley's: H = I + S for the skew conference matrix S of the quadratic residues mod 11 or 19
Source     QuaRot (arXiv 2404.00456), RotateKV (arXiv 2501.16383 section on grouped-head rotation)
Differs    the cores of order 12 and 20 are not symmetric, so the inverse is the transpose, a flag of the op
Shapes     x [..., C], C divisible by `order` → y, the same shape and dtype; the arithmetic is float32 or wider
Exact      yes, orthogonal; y of `inverse=True` undoes y of `inverse=False`
Declines   orders that are not 2^j, 12·2^j or 20·2^j
Cost       C·(log2(order / core) + core) flops per row
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from .base import Cost, OpSpec, nbytes, register_op
from .lasting import lasting

__all__ = ["hadamard", "hadamard_core", "hadamard_matrix", "hadamard_ref"]


@cache
def hadamard_core(order: int) -> int:
    """The odd-shaped core of a Hadamard order: 1, 12 or 20. Raises ValueError when the order has none."""
    for core in (1, 12, 20):
        rest, remainder = divmod(order, core)
        if remainder == 0 and rest & (rest - 1) == 0 and rest > 0:
            return core
    raise ValueError(f"no Hadamard matrix of order {order}: it must be a power of two, or 12 or 20 times one")


@cache
def _paley(order: int) -> Tensor:
    p = order - 1
    residues = {i * i % p for i in range(1, p)}
    chi = [0 if i == 0 else (1 if i in residues else -1) for i in range(p)]
    s = torch.zeros(order, order, dtype=torch.float64)
    s[0, 1:], s[1:, 0] = 1.0, -1.0
    for i in range(p):
        for j in range(p):
            s[i + 1, j + 1] = chi[(j - i) % p]
    return (s + torch.eye(order, dtype=torch.float64)) / math.sqrt(order)


_CORES: dict[tuple[int, torch.dtype, str], Tensor] = {}


def _core(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One tensor per device: a copy from the host at every call would break the capture of CUDA graphs."""
    key = (order, dtype, str(device))
    held = _CORES.get(key)
    if held is None:
        held = lasting(device, lambda: _paley(order).to(device=device, dtype=dtype))
        if type(held) is Tensor:  # not the stand-in of a tracer
            _CORES[key] = held
    return held


def hadamard_ref(x: Tensor, order: int, inverse: bool = False) -> Tensor:
    """The definition: butterflies of size two down to the core, then the core as a small matrix."""
    core = hadamard_core(order)
    if x.shape[-1] % order:
        raise ValueError(f"{x.shape[-1]} channels do not split into runs of {order}")
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide.reshape(*x.shape[:-1], x.shape[-1] // order, order // core, core)
    if core > 1:
        m = _core(core, wide.dtype, x.device)
        y = y @ (m.mT if inverse else m)
    h = 1
    while h < order // core:
        y = y.unflatten(-2, (-1, 2, h))  # [..., blocks, 2, h, core]
        a, b = y.unbind(-3)
        y = torch.stack((a + b, a - b), dim=-3).flatten(-4, -2)
        h *= 2
    return (y * (core / order) ** 0.5).reshape(x.shape).to(x.dtype)


def hadamard_matrix(order: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The orthogonal matrix H [order, order] with hadamard(x, order) = x @ H."""
    return hadamard_ref(torch.eye(order, dtype=torch.float64), order).to(dtype)


@torch.library.custom_op("kvsink::hadamard", mutates_args=())
def hadamard(x: Tensor, order: int, inverse: bool = False) -> Tensor:
    y = hadamard_ref(x, order, inverse)
    return y.clone() if y.data_ptr() == x.data_ptr() else y


@hadamard.register_fake
def _outputs(x: Tensor, order: int, inverse: bool = False) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


SPEC = register_op(
    OpSpec(
        name="hadamard",
        op=hadamard,
        ref=hadamard_ref,
        cost=lambda **a: Cost(
            flops=int(a["x"].numel() * math.log2(max(2, a["order"]))), read=nbytes(a["x"]), written=nbytes(a["x"])
        ),
        examples=(
            lambda g: dict(x=torch.randn(1, 3, 7, 64, generator=g), order=64),
            lambda g: dict(x=torch.randn(2, 5, 192, generator=g), order=192, inverse=True),
            lambda g: dict(x=torch.randn(1, 2, 1, 80, generator=g).half(), order=80),
            lambda g: dict(x=torch.randn(3, 96, generator=g), order=16),
        ),
    )
)
