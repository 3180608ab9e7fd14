"""Function, method and ATen spellings of an operator have one name; writes are never called pure."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from kvsink.graph.targets import PURE, kind

ATEN = torch.ops.aten


@pytest.mark.parametrize(
    ("targets", "name"),
    [
        ((torch.matmul, "matmul", ATEN.matmul.default, operator.matmul), "matmul"),
        ((torch.add, "add", ATEN.add.Tensor, operator.add), "add"),
        ((torch.softmax, F.softmax, "softmax", ATEN.softmax.int, ATEN._softmax.default), "softmax"),
        (("to", "float", "type_as", ATEN._to_copy.default, ATEN.to.dtype), "to"),
        ((F.scaled_dot_product_attention, ATEN.scaled_dot_product_attention.default), "scaled_dot_product_attention"),
        (("index_copy_", ATEN.index_copy_.default), "index_copy_"),
        ((torch.ops.kvsink.append_, torch.ops.kvsink.append_.default), "kvsink.append_"),
    ],
)
def test_spellings(targets: tuple[object, ...], name: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for target in targets:
        node = graph.call_method(target, (x, x)) if isinstance(target, str) else graph.call_function(target, (x, x))  # type: ignore[arg-type]
        assert kind(node) == name
    assert kind(x) == kind(3) == ""


@pytest.mark.parametrize("target", [operator.iadd, operator.imul, operator.setitem, ATEN.add_.Tensor, ATEN.copy_.default])
def test_writes_are_not_pure(target: object) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert kind(graph.call_function(target, (x, x))) not in PURE  # type: ignore[arg-type]
    assert not any(name.endswith("_") and not name.endswith("__") for name in PURE - {"and_", "or_"})
