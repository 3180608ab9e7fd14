"""Norms and rotary embeddings as one operator each: `RMSNormalization` and `RotaryEmbedding`, of opset 23.

What transformers spells out is nine operators a norm and seven for the rotation of queries or keys, each of them a launch on a GPU.
Graphs for onnxruntime alone take its own `SkipSimplifiedLayerNormalization`, which adds the residual too.

Exact      up to the order of sums and to roundings between operators; in float16 a norm still computes in float32
Declines   what is not recognised stays as it was: norms spelled otherwise, interleaved rotations, rotations in float64, for which
           onnxruntime has no kernel
"""

from __future__ import annotations

from typing import Any

__all__ = ["FUSED_OPSET", "fuse"]

FUSED_OPSET = 23
"""The first with both operators."""


def fuse(model: Any, runtime: bool = False) -> None:
    """Rewrite a graph of opset 23 or later in place; runtime: with operators that onnxruntime alone has."""
    from onnxscript.rewriter import RewriteRule, rewrite

    rotary = RewriteRule(_spelled_rotation, _rotation, _is_rotation, remove_nodes=False)  # queries and keys share the tables
    rewrite(model, [*_norms(), rotary])
    if runtime:
        rewrite(model, [RewriteRule(_sum_and_norm, _norm_of_sum, _is_norm_of_sum)])


def _norms() -> list[Any]:
    """The rules of onnxscript for norms of rows and scales of one type, which they do not ask for; a scale in float32 has the rows
    widened before it, as the norm itself has them."""
    from onnxscript.rewriter.pattern import MatchResult
    from onnxscript.rewriter.rules.fusion._rms_normalization import RmsNormFusion

    class Norm(RmsNormFusion):
        def check(self, op: Any, x: Any, scale: Any, *rest: Any, **named: Any) -> Any:
            found = super().check(op, x, scale, *rest, **named)
            if not found:
                return found
            narrow = x.dtype != scale.dtype and str(scale.dtype) != "FLOAT"
            if narrow or scale.shape is None or x.shape is None or len(scale.shape) > len(x.shape):
                return MatchResult().fail("a scale of another type or of more axes", scale)
            return found

        def rewrite(self, op: Any, x: Any, scale: Any, *rest: Any, **named: Any) -> Any:
            wide = x if x.dtype == scale.dtype else op.Cast(x, to=scale.dtype)
            return super().rewrite(op, wide, scale, *rest, **named)

    return [Norm.rule(f"norm {order}", order) for order in (True, False)]


def _alike(x: Any, y: Any) -> bool:
    """Whether two dimensions are known to be equal: numbers, or one symbol with a name."""
    return bool(x == y and (isinstance(x, int) or x.value is not None))


def _number(value: Any) -> Any:
    """What a constant of one element holds, or None."""
    import onnx_ir as ir

    held = ir.convenience.get_const_tensor(value)
    return held.numpy().item() if held is not None and held.size == 1 else None


# x · cos + rotate_half(x) · sin of x [B, H, S, D], tables [B, S, D] that hold every angle twice


def _spelled_rotation(op: Any, x: Any, cos: Any, sin: Any, at: Any, low: Any, half: Any, high: Any, end: Any) -> Any:
    first, second = op.Slice(x, low, half, [3], [1]), op.Slice(x, high, end, [3], [1])
    turned = op.Concat(op.Neg(second), first, axis=-1)
    return op.Add(op.Mul(x, op.Unsqueeze(cos, at)), op.Mul(turned, op.Unsqueeze(sin, at)))


def _is_rotation(context: Any, x: Any, cos: Any, sin: Any, at: Any, low: Any, half: Any, high: Any, end: Any, **_: Any) -> bool:
    """Whether its halves are equal, those of the tables too, and every sequence has a row of angles of its own."""
    width = x.shape[3] if x.shape is not None and len(x.shape) == 4 else None
    if not isinstance(width, int) or str(x.dtype) not in ("FLOAT", "FLOAT16"):
        return False
    if [_number(v) for v in (low, half, high, at)] != [0, width // 2, width // 2, 1] or (_number(end) or 0) < width:
        return False
    for table, function in ((cos, "Cos"), (sin, "Sin")):
        if table.shape is None or len(table.shape) != 3 or not _doubled(table, function):
            return False
        if not (_alike(table.shape[0], x.shape[0]) and _alike(table.shape[1], x.shape[2]) and table.shape[2] == width):
            return False
    return True


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


def _rotation(op: Any, x: Any, cos: Any, sin: Any, **_: Any) -> Any:
    zero, half, last, one = (op.Constant(value_ints=[n]) for n in (0, x.shape[3] // 2, 2, 1))
    return op.RotaryEmbedding(x, *(op.Slice(table, zero, half, last, one) for table in (cos, sin)))


# A norm of a sum of two [B, S, C], and the sum, which others read too


def _sum_and_norm(op: Any, x: Any, y: Any, scale: Any) -> Any:
    total = op.Add(x, y)
    return op.RMSNormalization(total, scale, _allow_other_attributes=True, _outputs=["norm"]), total


def _is_norm_of_sum(context: Any, x: Any, y: Any, scale: Any, norm: Any, **_: Any) -> bool:
    attributes = norm.producer().attributes
    if x.shape is None or y.shape is None or scale.shape is None or x.dtype != scale.dtype:
        return False
    alike = len(x.shape) == len(y.shape) == 3 and all(map(_alike, x.shape, y.shape)) and list(scale.shape) == [x.shape[2]]
    return bool(alike and attributes.get_int("axis", -1) in (-1, 2) and attributes.get_int("stash_type", 1) == 1)


def _norm_of_sum(op: Any, x: Any, y: Any, scale: Any, norm: Any, **_: Any) -> Any:
    size = norm.producer().attributes.get_float("epsilon", 1e-5)
    out = op.SkipSimplifiedLayerNormalization(x, y, scale, epsilon=size, _outputs=4, _domain="com.microsoft")
    return out[0], out[3]
