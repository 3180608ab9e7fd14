"""What every pass is made of: `RewritePass`, the record it leaves, and the two ways a pass may edit a graph.

A pass is a frozen dataclass in a file of its own; being in this folder registers it. `check` looks and never edits;
`rewrite` edits one site and never looks elsewhere. What one pass must tell a later one about a site lives in
`Work.chains` (see `kvsink.passes.chain`). Order, lint, recompile and reporting belong to `kvsink.graph.pipeline`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node

from kvsink.errors import UnknownName
from kvsink.graph.sites import AttentionSite, Declined
from kvsink.graph.targets import CHECKS, PURE, kind, value

if TYPE_CHECKING:
    from kvsink.passes.chain import Chain, SitePlan

__all__ = [
    "Declined",
    "RewritePass",
    "Work",
    "erase_orphans",
    "insert_op",
    "insert_tensor",
    "pass_named",
    "register_pass",
    "registered_passes",
    "size_of",
]


@dataclass
class Work:
    """One graph under rewrite. plan: what to do with a site whose cache does not say it itself (any stock cache)."""

    gm: fx.GraphModule
    plan: Callable[[AttentionSite], SitePlan | None] = lambda site: None
    chains: dict[Node, Chain] = field(default_factory=dict)  # by the site's attention node
    sites: list[AttentionSite] = field(default_factory=list)  # as last located
    refused: list[Declined] = field(default_factory=list)  # attention that is no site, as last located

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    def chain(self, site: AttentionSite) -> Chain | None:
        return self.chains.get(site.attn)


@dataclass(frozen=True)
class RewritePass:
    """One rewrite. exact: the same function in real arithmetic. before, after: passes it must precede, follow."""

    name: ClassVar[str]
    exact: ClassVar[bool]
    before: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    moves_sites: ClassVar[bool] = False  # True when sites must be located again after this pass

    def refused(self, work: Work) -> list[Declined]:
        """What this pass leaves alone beside sites."""
        return []

    def check(self, site: AttentionSite, work: Work) -> Declined | None:
        """Why this site is left alone, or None."""
        return None

    def rewrite(self, site: AttentionSite, work: Work) -> None:
        """Edit the site; only called when `check` returned None."""


_PASSES: dict[str, type[RewritePass]] = {}


def register_pass(cls: type[RewritePass]) -> type[RewritePass]:
    """Make a pass known by its name; a name is taken once."""
    if cls.name in _PASSES and _PASSES[cls.name].__qualname__ != cls.__qualname__:
        raise ValueError(f"two passes are called {cls.name!r}: {_PASSES[cls.name].__module__} and {cls.__module__}")
    _PASSES[cls.name] = cls
    return cls


@lru_cache(maxsize=1)
def _walk_folder() -> None:
    package = importlib.import_module(__package__ or "kvsink.passes")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")  # an import error names its file


def registered_passes() -> dict[str, type[RewritePass]]:
    """Every pass in the folder, by name."""
    _walk_folder()
    return dict(_PASSES)


def pass_named(name: str) -> type[RewritePass]:
    """A pass by name; an unknown name lists the nearest known ones."""
    known = registered_passes()
    if name not in known:
        raise UnknownName("pass", name, known)
    return known[name]


# ---------------------------------------------------------------- editing


def insert_op(before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Insert one call before a node, with its fake value and the module path of that node. A str is a method."""
    op = "call_method" if isinstance(target, str) else "call_function"
    with before.graph.inserting_before(before):
        node = before.graph.create_node(op, target, args, kwargs)
    if "nn_module_stack" in before.meta:
        node.meta["nn_module_stack"] = before.meta["nn_module_stack"]
    fake_args, fake_kwargs = fx.node.map_arg(args, value), fx.node.map_arg(kwargs, value)
    call = getattr(torch.Tensor, target) if isinstance(target, str) else target
    with _fake_mode(before.graph), torch.no_grad():
        node.meta[_value_key(before)] = call(*fake_args, **fake_kwargs)
    return node


def insert_tensor(before: Node, gm: fx.GraphModule, name: str, tensor: Tensor) -> Node:
    """A constant of the graph: `tensor` becomes a buffer of `gm` and one node that reads it, shared by name."""
    name = name.replace(".", "_")
    if not hasattr(gm, name):
        gm.register_buffer(name, tensor, persistent=False)
        first = next(node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr"))
        with gm.graph.inserting_before(first):
            node = gm.graph.get_attr(name)
        node.meta[_value_key(before)] = _fake_mode(gm.graph).from_tensor(tensor, static_shapes=True)
        return node
    return next(node for node in gm.graph.find_nodes(op="get_attr") if node.target == name)


def size_of(before: Node, node: Node, axis: int) -> Any:
    """A size as an argument: the number itself, or a node when it is symbolic."""
    size = value(node).shape[axis]
    return size if isinstance(size, int) else insert_op(before, "size", node, axis)


def erase_orphans(graph: fx.Graph, nodes: Iterable[Node]) -> None:
    """Erase `nodes` and what they were computed from, as far as nothing uses it; only operators without side effects.

    A graph's own dead-code removal must never run: in dynamo graphs it deletes in-place cache writes.
    """
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node._erased or kind(node) not in PURE or any(kind(user) not in CHECKS for user in node.users):
            continue
        for user in list(node.users):
            graph.erase_node(user)
        inputs = node.all_input_nodes
        graph.erase_node(node)
        todo.extend(inputs)


def _value_key(before: Node) -> str:
    near = [before, *before.all_input_nodes]
    return (
        "val"
        if any("val" in node.meta for node in near) and not any("example_value" in node.meta for node in near)
        else "example_value"
    )


def _fake_mode(graph: fx.Graph) -> Any:
    """The mode the graph was traced under; a graph without fake values gets a fresh one."""
    for node in graph.nodes:
        for leaf in torch.utils._pytree.tree_leaves(value(node)):
            if isinstance(leaf, FakeTensor):
                return leaf.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)
