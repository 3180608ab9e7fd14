"""Sort the key channels of all heads by their calibrated mean, so that channels of like value share a scale.

Formula    z = x[perm], undone by z[perm^-1]; x the H·D channels of all heads side by side
Source     RotateKV, arXiv 2501.16383 (channel reordering)
Differs    no
Shapes     x [B, Hkv, S, D] float32, perm int64 [Hkv·D]
Exact      yes, a permutation
Declines   sites without a codec; codecs that do not reorder
Cost       no flops; one gather per row
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsink.passes.base import register_pass
from kvsink.passes.staged import StagedPass


@register_pass
@dataclass(frozen=True)
class Reorder(StagedPass):
    name: ClassVar[str] = "reorder"
    after: ClassVar[tuple[str, ...]] = ("attach", "center", "rotate")
    before: ClassVar[tuple[str, ...]] = ("quantize",)
    without: ClassVar[str] = "its codec does not reorder"
