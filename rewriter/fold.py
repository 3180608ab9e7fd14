"""Put the Hadamard rotation of values into the weights: v_proj turned forwards, o_proj backwards, the model unchanged.

Formula    W_V' = (I ⊗ H)^T W_V,  b_V' = b_V (I ⊗ H),  W_O' = W_O (I ⊗ H), one block per KV head and per query head
Source     QuaRot, arXiv 2404.00456; RotateKV, arXiv 2501.16383
Shapes     v_proj.weight [Hkv·D, E], o_proj.weight [E, Hq·D] (the layout of nn.Linear)
Exact      yes in real arithmetic; the products are float64 and rounded once to the dtype of the weight
Declines   fused or weight-quantized projections, and value norms between projection and cache: the rotation then runs online
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kvsink.kernels.hadamard import hadamard_ref

__all__ = ["fold_value_rotation", "foldable", "folded"]

FOLDED = ("v_proj.weight", "v_proj.bias", "o_proj.weight")


def foldable(attention: nn.Module) -> str | None:
    """None when the value rotation can be folded into this attention module, else the reason."""
    for name in ("v_proj", "o_proj"):
        projection = getattr(attention, name, None)
        if type(projection) is not nn.Linear:
            kind = type(projection).__name__ if projection is not None else "nothing"
            return f"{name} is {kind}, not a plain Linear"
    if any(hasattr(attention, name) for name in ("v_norm", "value_norm")):
        return "values are normalised after v_proj"
    return None


@torch.no_grad()
def fold_value_rotation(attention: nn.Module, order: int, storage: torch.dtype | None = None) -> None:
    """Rotate v_proj and o_proj in place. storage: dtype of the checkpoint, when the weights in memory are wider."""
    held = {n: p for n, p in attention.named_parameters() if n in FOLDED}
    for name, new in folded(held, order).items():
        held[name].copy_(new.to(storage) if storage is not None else new)


def folded(weights: Mapping[str, Tensor], order: int) -> dict[str, Tensor]:
    """The weights of `FOLDED` that are given, turned, in float64."""
    out = {"v_proj.weight": hadamard_ref(weights["v_proj.weight"].double().T, order).T}  # rows of W_V are channels
    if "v_proj.bias" in weights:
        out["v_proj.bias"] = hadamard_ref(weights["v_proj.bias"].double(), order)
    return {**out, "o_proj.weight": hadamard_ref(weights["o_proj.weight"].double(), order)}
