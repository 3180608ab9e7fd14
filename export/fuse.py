"""Norms and rotary embeddings as one operator each: `RMSNormalization` and `RotaryEmbedding`, of opset 23.

What transformers spells out is nine operators a norm and seven for the rotation of queries or keys, each of them a launch on a GPU.
Graphs for onnxruntime alone take its own `SkipSimplifiedLayerNormalization`, which adds the residual too.

Exact      up to the order of sums and to roundings between operators; in float16 a norm still computes in float32
Declines   what is not recognised stays as it was: norms spelled otherwise, interleaved rotations, rotations in float64, for which
           onnxruntime has no kernel
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern, rewrite
from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_rules

__all__ = ["FUSED_OPSET", "fuse"]

FUSED_OPSET = 23
"""The first with both operators."""


def _number(value: Any) -> Any:
    """What a constant of one element holds, or None."""
    held = ir.convenience.get_const_tensor(value)
    return held.numpy().item() if held is not None and held.size == 1 else None


def _doubled(table: Any, function: str) -> bool:
    """Whether the two halves of a table [B, S, D] are known to be equal: `function`, Cos or Sin, of angles that stand there twice.

    Casts and products with one number (YaRN) may stand between.
    """
    node = table.producer()
    while node is not None and (node.op_type == "Cast" or (node.op_type == "Mul" and _number(node.inputs[1]) is not None)):
        node = node.inputs[0].producer()
    if node is None or node.op_type != function:
        return False
    joined = node.inputs[0].producer()
    twice = joined is not None and joined.op_type == "Concat" and len(joined.inputs) == 2 and len(set(joined.inputs)) == 1
    return bool(twice and joined.attributes.get_int("axis", 0) in (-1, 2))


class _Rotary(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """x · cos + rotate_half(x) · sin of x [B, H, S, D], tables [B, S, D] that hold every angle twice."""

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)  # queries and keys share the tables

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, at: Any, low: Any, half: Any, high: Any, end: Any) -> Any:
        first, second = op.Slice(x, low, half, [3], [1]), op.Slice(x, high, end, [3], [1])
        turned = op.Concat(op.Neg(second), first, axis=-1)
        return op.Add(op.Mul(x, op.Unsqueeze(cos, at)), op.Mul(turned, op.Unsqueeze(sin, at)))

    def check(self, op: Any, x: Any, cos: Any, sin: Any, at: Any, low: Any, half: Any, high: Any, end: Any, **_: Any) -> Any:
        found = pattern.MatchResult()
        width = x.shape[3] if x.shape is not None and len(x.shape) == 4 else None
        if not isinstance(width, int) or x.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            return found.fail("not of four axes in float32 or float16, the last of known width", x)
        if [_number(v) for v in (low, half, high, at)] != [0, width // 2, width // 2, 1] or _number(end) < width:
            return found.fail("not the two halves", x)
        if cos.shape is None or cos.shape[0] == 1 or not _doubled(cos, "Cos") or not _doubled(sin, "Sin"):
            return found.fail("tables of one row for all, or whose halves are not known to be equal", cos)
        return found

    def rewrite(self, op: Any, x: Any, cos: Any, sin: Any, **_: Any) -> Any:
        half = op.Constant(value_ints=[x.shape[3] // 2])
        zero, last, one = (op.Constant(value_ints=[n]) for n in (0, 2, 1))
        return op.RotaryEmbedding(x, *(op.Slice(table, zero, half, last, one) for table in (cos, sin)))


class _Skip(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """A norm of a sum of two [B, S, C], and the sum, which others read too."""

    def pattern(self, op: Any, x: Any, y: Any, scale: Any) -> Any:
        total = op.Add(x, y)
        return op.RMSNormalization(total, scale, _allow_other_attributes=True, _outputs=["norm"]), total

    def check(self, op: Any, x: Any, y: Any, scale: Any, norm: Any, **_: Any) -> Any:
        found, attributes = pattern.MatchResult(), norm.producer().attributes
        alike = x.shape is not None and len(x.shape) == 3 and x.shape == y.shape and x.dtype == scale.dtype
        if not alike or attributes.get_int("axis", -1) not in (-1, 2) or attributes.get_int("stash_type", 1) != 1:
            return found.fail("shapes, types or axes that the operator does not take", norm)
        return found

    def rewrite(self, op: Any, x: Any, y: Any, scale: Any, norm: Any, **_: Any) -> Any:
        size = norm.producer().attributes.get_float("epsilon", 1e-5)
        out = op.SkipSimplifiedLayerNormalization(x, y, scale, epsilon=size, _outputs=4, _domain="com.microsoft")
        return out[0], out[3]


def fuse(model: Any, runtime: bool = False) -> None:
    """Rewrite a graph of opset 23 or later in place; runtime: with operators that onnxruntime alone has."""
    rewrite(model, [*rms_normalization_rules, _Rotary.rule()])
    if runtime:
        rewrite(model, [_Skip.rule()])
