"""One name for what a node does, whichever of the three spellings it has: function, method or ATen overload.

Names come from the target itself (`torch.matmul`, `Tensor.matmul` and `aten.matmul.default` are all "matmul"), so the
only table is the short list of spellings whose own name differs. Operators of other libraries keep their namespace:
`torch.ops.kvsink.append_` and its `.default` are both "kvsink.append_".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

# Same meaning, another name. In-place arithmetic is not here: it writes, and a rewrite must see that.
_ALIAS = {
    "concat": "cat",
    "concatenate": "cat",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "negative": "neg",
    "swapaxes": "transpose",
    "type": "to",
    "type_as": "to",
    "float": "to",
    "half": "to",
    "bfloat16": "to",
    "double": "to",
    "_to_copy": "to",
    "_softmax": "softmax",
    "special_softmax": "softmax",
    "feature_dropout": "dropout",
    "_unsafe_view": "view",
    "__matmul__": "matmul",
}
CASTS = frozenset({"to", "contiguous", "clone", "alias", "detach"})
CHECKS = frozenset({"_assert_tensor_metadata"})  # look at a value and return nothing; never a reason to keep it
RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten"})
VIEWS = RESHAPES | frozenset(
    {"getitem", "slice", "select", "unsqueeze", "squeeze", "expand", "transpose", "permute", "unbind", "split", "chunk"}
)
# Operators without a side effect: the only ones that may be erased once nothing uses them.
PURE = (
    VIEWS
    | CASTS
    | frozenset(
        {
            "add",
            "sub",
            "mul",
            "div",
            "neg",
            "cat",
            "matmul",
            "bmm",
            "softmax",
            "dropout",
            "repeat_interleave",
            "masked_fill",
            "where",
            "tanh",
            "index_select",
            "gather",
            "scatter",
            "index_copy",
            "eq",
            "ne",
            "le",
            "lt",
            "ge",
            "gt",
            "and_",
            "or_",
            "logical_and",
            "logical_or",
            "size",
            "sym_size",
            "cos",
            "sin",
            "arange",
            "zeros",
            "zeros_like",
            "new_empty",
            "scaled_dot_product_attention",
            "kvsink.read",
            "kvsink.hadamard",
            "kvsink.quantize",
            "kvsink.dequantize",
            "kvsink.select_sinks",
        }
    )
)


def kind(node: Any) -> str:
    """The canonical name of what `node` does; "" for anything that is not a call."""
    if not isinstance(node, fx.Node):
        return ""
    target = node.target
    if node.op == "call_method":
        return _ALIAS.get(str(target), str(target))
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
    elif isinstance(target, torch._ops.OpOverloadPacket):
        namespace, name = target._qualified_op_name.split("::")
    else:
        namespace, name = "aten", getattr(target, "__name__", str(target))
    name = _ALIAS.get(name, name)
    return name if namespace in ("aten", "prims") else f"{namespace}.{name}"


def value(node: Any) -> Any:
    """The fake value a node was traced with: `example_value` in dynamo graphs, `val` in exported ones."""
    meta = getattr(node, "meta", {})
    return meta.get("example_value", meta.get("val"))


def shape(node: Any) -> tuple[Any, ...] | None:
    """Sizes of a node's tensor, some of which may be symbolic; None when it is not a tensor."""
    fake = value(node)
    return tuple(fake.shape) if isinstance(fake, torch.Tensor) else None


def arg(node: Any, position: int) -> Any:
    """One positional argument; fx types it too wide to be of use."""
    return node.args[position]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
