"""Put the Hadamard rotation of values into the weights: v_proj turned forwards, o_proj backwards, the model unchanged.

Formula    W_V' = (I ⊗ H)^T W_V,  b_V' = b_V (I ⊗ H),  W_O' = W_O (I ⊗ H), one block per KV head and per query head
Source     QuaRot, arXiv 2404.00456; RotateKV, arXiv 2501.16383
Shapes     v_proj.weight [Hkv·D, E], o_proj.weight [E, Hq·D] (the layout of nn.Linear)
Exact      yes in real arithmetic; the products are float64 and rounded once to the dtype of the weight
Declines   fused, weight-quantized or shared projections, and value norms between projection and cache: the rotation then runs
           online
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvsink.kernels.hadamard import hadamard_ref

__all__ = ["FOLDED", "fold_value_rotation", "foldable", "folded", "is_plain", "shared_weights"]

FOLDED = ("v_proj.weight", "v_proj.bias", "o_proj.weight")


def foldable(attention: nn.Module) -> str | None:
    """None when the value rotation can be folded into this attention module, else the reason."""
    for name in ("v_proj", "o_proj"):
        projection = getattr(attention, name, None)
        if type(projection) is not nn.Linear:
            kind = type(projection).__name__ if projection is not None else "nothing"
            return f"{name} is {kind}, not a plain Linear"
        if not is_plain(projection.weight):
            kind = type(projection.weight).__name__
            return f"the weight of {name} is {kind if kind != 'Parameter' else projection.weight.dtype}, not plain floating point"
    if any(hasattr(attention, name) for name in ("v_norm", "value_norm")):
        return "values are normalised after v_proj"
    return None


def is_plain(weight: Any) -> bool:
    """Whether a weight is a tensor of floating-point numbers that can be written, and not quantized in some format of its own."""
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def shared_weights(named: Iterable[tuple[str, Tensor]]) -> frozenset[int]:
    """ids of the weights, of all `named_parameters(remove_duplicate=False)` of a model, that stand under more than one name, or in
    memory that another stands in too: what turns one would turn the others."""
    seen: dict[int, int] = {}
    spans: list[tuple[int, int, int]] = []
    for _, p in named:
        seen[id(p)] = seen.get(id(p), 0) + 1
        if seen[id(p)] == 1 and type(p) is nn.Parameter and not p.is_meta and p.numel() and p.layout == torch.strided:
            reach = sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True)) + 1
            spans.append((p.data_ptr(), p.data_ptr() + reach * p.element_size(), id(p)))
    shared = {key for key, count in seen.items() if count > 1}
    end, last = 0, 0
    for start, stop, key in sorted(spans):
        if start < end:
            shared |= {key, last}
        if stop > end:
            end, last = stop, key
    return frozenset(shared)


@torch.no_grad()
def fold_value_rotation(attention: nn.Module, order: int, storage: torch.dtype | None = None, inverse: bool = False) -> None:
    """Rotate v_proj and o_proj in place. storage: dtype of the checkpoint, when the weights in memory are wider. inverse: take the
    rotation out again."""
    held = {n: p for n, p in attention.named_parameters() if n in FOLDED}
    for name, new in folded(held, order, inverse).items():
        held[name].copy_(new.to(storage) if storage is not None else new)


def folded(weights: Mapping[str, Tensor], order: int, inverse: bool = False) -> dict[str, Tensor]:
    """The weights of `FOLDED` that are given, turned, or turned back where `inverse`, in float64."""
    out = {"v_proj.weight": hadamard_ref(weights["v_proj.weight"].double().T, order, inverse).T}  # rows of W_V are channels
    if "v_proj.bias" in weights:
        out["v_proj.bias"] = hadamard_ref(weights["v_proj.bias"].double(), order, inverse)
    return {**out, "o_proj.weight": hadamard_ref(weights["o_proj.weight"].double(), order, inverse)}
