"""From a module to an onnx_ir graph, without the work that torch's exporter does twice or for other models than ours.

Route      torch.export → translated as it is, where nothing in it needs decomposing → the rules of onnxscript that have something
           to do in a language model
Saved      torch.export's memory of fake results: with symbolic sizes a look-up takes longer than the result; half of the trace
           decompositions: two more traces, needed only where a graph writes in place or has an operator without translation
           the rule that looks for two outputs at once: it goes through the whole graph for every node
Exact      yes: the same operators on the same values; `kvsink.export.check` runs what comes out
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["trace"]

_SAME = {torch.ops.aten.__and__.Tensor: torch.ops.aten.bitwise_and.Tensor}
_CASTS = tuple(getattr(torch.ops.aten.to, name) for name in ("dtype", "dtype_layout", "device", "other"))
_ROUNDS = 2
_SPOKEN = 18  # opset of torch's translations: later ones say some operators otherwise (Gelu), which fewer types and providers have


def trace(
    module: nn.Module,
    inputs: dict[str, Any],
    shapes: dict[str, Any],
    opset: int,
    table: Mapping[Any, Callable[..., Any]],
    runtime: bool = False,
) -> Any:
    """The onnx_ir model of `module(**inputs)`; shapes: dynamic axes as torch.export takes them; table: translators of our ops.

    opset: 18 or later; runtime: for onnxruntime alone, whose own operators may stand in it. Raises whatever torch raises.
    """
    from onnxscript import version_converter

    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        program: Any = torch.export.export(module, (), kwargs=inputs, dynamic_shapes=shapes, strict=False)
        decompose = program.run_decompositions
        options: dict[str, Any] = {"opset_version": _SPOKEN, "custom_translation_table": _SHAPED | dict(table)}
        program.run_decompositions = lambda known: program if _respell(program.graph, known) else decompose(known)
        try:
            made = torch.onnx.export(program, (), dynamo=True, verbose=False, optimize=False, **options)
        except torch.onnx.OnnxExporterError:  # an operator that has to be decomposed although no table says so
            del program.run_decompositions
            made = torch.onnx.export(program, (), dynamo=True, verbose=False, optimize=False, **options)
    assert made is not None
    version_converter.convert_version(made.model, opset)
    _simplify(made.model, opset, runtime)
    return made.model


def _respell(graph: Any, known: Mapping[Any, Any]) -> bool:
    """Write what changes a dtype, and `&`, as the operators that decomposing them gives, and drop what does nothing.

    Returns False, and leaves the graph alone, where a node writes in place, holds a graph of its own, or is one of those `known`
    to be decomposed.
    """
    ops = {node.target for node in graph.nodes if node.op == "call_function"} - set(_SAME)
    for op in ops:
        if isinstance(op, torch._ops.HigherOrderOperator) or op in known:
            return False
        if isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable:
            return False
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target in _CASTS:
            dtype = node.meta["val"].dtype
            node.target, node.args, node.kwargs = torch.ops.aten._to_copy.default, node.args[:1], {"dtype": dtype}
            if node.args[0].meta["val"].dtype == dtype and not any(user.op == "output" for user in node.users):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        else:
            node.target = _SAME.get(node.target, node.target)
    return True


def _flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Neighbouring axes as one."""
    first, last = start_dim % len(x.shape), end_dim % len(x.shape)
    merged, after = x.shape[first : last + 1], x.shape[last + 1 :]
    return _reshape(x, first, [math.prod(merged) if all(isinstance(n, int) for n in merged) else -1], after)


def _unflatten(x: Any, dim: int, sizes: Sequence[int]) -> Any:
    """One axis as several."""
    at = dim % len(x.shape)
    if -1 in sizes and isinstance(x.shape[at], int):
        sizes = [x.shape[at] // -math.prod(sizes) if n == -1 else n for n in sizes]
    return _reshape(x, at, sizes, x.shape[at + 1 :])


def _reshape(x: Any, kept: int, sizes: Sequence[Any], after: Sequence[Any]) -> Any:
    """One Reshape, where torch's own translation measures every axis; the first `kept` axes stay as they are."""
    from onnxscript import opset18 as op

    shape = [0] * kept + [*sizes, *after]
    if not all(isinstance(n, int) for n in shape):
        raise NotImplementedError("an axis of unknown length behind those that change")
    return op.Reshape(x, op.Constant(value_ints=shape))


_SHAPED: dict[Any, Callable[..., Any]] = {torch.ops.aten.flatten.using_ints: _flatten, torch.ops.aten.unflatten.int: _unflatten}


def _simplify(model: Any, opset: int, runtime: bool) -> None:
    """Fold constants, drop what does nothing and fuse what has an operator of its own, in place."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules

    from kvsink.export.fuse import FUSED_OPSET, fuse

    useful = [
        rules.add_0_rule,
        rules.sub_0_rule,
        rules.mul_by_1_rule,
        rules.div_by_1_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.cast_cast_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.no_op_transpose_rule,
        rules.transpose_transpose_rule,
        rules.reshape_reshape_rule,
        rules.squeeze_reshape_1d_rule,
        rules.unsqueeze_unsqueeze_rule,
    ]
    passes.InlinePass()(model)
    for _ in range(_ROUNDS):
        optimizer.fold_constants_ir(model)
        rewriter.rewrite(model, useful)
    if opset >= FUSED_OPSET:
        fuse(model, runtime)
    for step in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        step(model)
