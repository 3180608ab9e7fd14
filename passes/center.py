"""Take the calibrated mean out of keys and values before they are coded, and put it back after they are read.

Formula    keys    x = k_pre - mu; in domain "post" RoPE follows, x = R_j (k_pre - mu)
                   undone by the table M[d] = R_d mu (+ the mean of the next stage), turned to the start of the block
           values  x = v - mu, undone by + mu
Source     ours
Differs    no
Shapes     x [B, Hkv, S, D] float32, mean [Hkv, D], table [Hkv, n, D]
Exact      yes
Declines   sites without a codec; codecs without centring
Cost       1 flop per element written; on the fused path the table acts on the query, once per block
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsink.passes.base import register_pass
from kvsink.passes.staged import StagedPass


@register_pass
@dataclass(frozen=True)
class Center(StagedPass):
    name: ClassVar[str] = "center"
    after: ClassVar[tuple[str, ...]] = ("attach",)
    before: ClassVar[tuple[str, ...]] = ("rotate", "reorder", "quantize")
    without: ClassVar[str] = "its codec does not centre"
