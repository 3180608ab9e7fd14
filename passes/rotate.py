"""Turn keys and values into the basis they are coded in: block RoPE, then a Hadamard rotation or a KLT basis.

Formula    keys    domain "block": x = R_d x with d = position mod n, undone by R_{j-d}, which leaves the key after RoPE
           both    Hadamard: z = x H over one or several heads;  KLT: z = (x - mu2) U
Source     Hadamard per head QuaRot (arXiv 2404.00456), across heads RotateKV (arXiv 2501.16383); block KLT ours
Differs    no
Shapes     x [B, Hkv, S, D] float32, basis [Hkv, D, D], offset tables [n, rotary]
Exact      yes, all maps are orthogonal
Declines   sites without a codec; codecs that code the rows as they are; a Hadamard folded into the weights
Cost       Hadamard D·log2 D, KLT 2·D² flops per row and head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsink.passes.base import register_pass
from kvsink.passes.staged import StagedPass


@register_pass
@dataclass(frozen=True)
class Rotate(StagedPass):
    name: ClassVar[str] = "rotate"
    after: ClassVar[tuple[str, ...]] = ("attach", "center")
    before: ClassVar[tuple[str, ...]] = ("reorder", "quantize")
    without: ClassVar[str] = "its codec does not rotate"
