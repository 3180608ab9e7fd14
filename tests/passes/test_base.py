"""The two ways to edit a graph: nodes come with their fake values, and only pure orphans go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kvsink.errors import UnknownName
from kvsink.graph.sites import AttentionSite, find_sites
from kvsink.graph.targets import kind, shape, value
from kvsink.passes.base import RewritePass, erase_orphans, insert_op, insert_tensor, pass_named, register_pass, registered_passes

from ..graphs import run, stock_graph


def first_site(cache: str = "static", length: int = 1) -> tuple[torch.fx.GraphModule, AttentionSite]:
    gm = stock_graph("llama", "sdpa", cache, length)
    site = find_sites(gm)[0]
    assert isinstance(site, AttentionSite)
    return gm, site


def test_inserted_nodes_carry_value_and_module() -> None:
    gm, site = first_site()
    node = insert_op(site.attn, torch.flatten, site.q, 2)
    method = insert_op(site.attn, "to", node, torch.float64)
    assert shape(node) == (1, 4, 16) and value(method).dtype == torch.float64
    assert node.meta["nn_module_stack"] == site.attn.meta["nn_module_stack"]
    assert node < method < site.attn
    gm.graph.lint()


def test_constants_are_shared_by_name() -> None:
    gm, site = first_site()
    before = run(gm)[0]
    first = insert_tensor(site.attn, gm, "kvsink.mean", torch.ones(2, 16))
    assert insert_tensor(site.attn, gm, "kvsink.mean", torch.ones(2, 16)) is first
    assert shape(first) == (2, 16) and torch.equal(gm.kvsink_mean, torch.ones(2, 16))
    gm.recompile()
    assert torch.equal(run(gm)[0][0], before[0])


def test_orphans_go_and_writes_stay() -> None:
    gm, site = first_site()
    ahead = site.q
    site.attn.replace_all_uses_with(ahead)
    erase_orphans(gm.graph, [site.attn])
    names = [kind(node) for node in gm.graph.nodes]
    assert names.count("scaled_dot_product_attention") == 1 and names.count("index_copy_") == 4 and names.count("add_") == 2
    assert all(node._erased for node in (site.k, site.v)) and not any(write._erased for write in site.writes)
    gm.graph.lint()


def test_a_used_node_is_never_an_orphan() -> None:
    gm, site = first_site()
    count = len(gm.graph.nodes)
    erase_orphans(gm.graph, [site.attn, site.k, *site.writes])
    assert len(gm.graph.nodes) == count


def test_every_file_of_the_folder_registers() -> None:
    wanted = {"normalize", "locate", "attach", "center", "rotate", "reorder", "quantize", "preserve", "fuse", "verify"}
    assert wanted <= set(registered_passes())


def test_unknown_names_list_near_ones() -> None:
    with pytest.raises(UnknownName, match="nearest known: rotate"):
        pass_named("rotat")


def test_a_name_is_taken_once() -> None:
    @dataclass(frozen=True)
    class Other(RewritePass):
        name: ClassVar[str] = "fuse"
        exact: ClassVar[bool] = True

    with pytest.raises(ValueError, match="two passes are called 'fuse'"):
        register_pass(Other)
