"""The only place that recognises attention: FX graph in, one `AttentionSite` or `Declined` per attention out.

Anchors    `scaled_dot_product_attention`, or the softmax between two matmuls of the eager spelling
Walks      from the anchor upwards: slice, repeat_kv, cache read, cache write, RoPE, projection, block input
Variants   core "sdpa" | "eager_softmax"; heads "mha" | "repeated_kv" | "gqa"; rope "none" | "half" | "partial_half" | "hidden"
           (of a spelling unknown here, before a packed cache, which knows its angles);
           cache "none" | "dynamic" | "static" | "kvsink"; "sliding" when the window is visible in the graph
Graphs     dynamo's torch-level graphs and torch.export's ATen graphs, through the names of `kvsink.graph.targets`
Declines   cross and vision attention, softcap, learned sink logits, dropout, RoPE of an unknown spelling, attention
           weights used elsewhere
Shapes     q [B, Hq, S, D]; k_rope, k_pre, v_new [B, Hkv, S, D]; cos, sin [B or 1, S, rotary]; hidden [B, S, E]
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from kvsink.graph.targets import CASTS, CHECKS, RESHAPES, arg, argument, kind, shape, value

UNKNOWN_WINDOW = 0  # the site slides, but its window cannot be read off the graph


@dataclass(frozen=True)
class Declined:
    """A site, or a rewrite of one, that is left alone: why, at which node, in which module."""

    reason: str
    node: Node | None = None
    path: str = ""

    def __str__(self) -> str:
        return f"{self.path or 'graph'}: {self.reason}"


@dataclass(frozen=True)
class Core:
    """The attention proper: operands as they enter it, and the nodes that compute it (last one first)."""

    name: str
    attn: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    scale: Any  # a number, or the node of a symbolic one
    is_causal: bool


@dataclass(frozen=True)
class AttentionSite:
    """Everything a pass may ask about one attention; nodes only, nothing is computed."""

    path: str  # of its module, without the capture root: model.layers.3.self_attn
    layer: int
    core: str
    attn: Node
    q: Node
    k: Node  # what the core reads, before slice and repeat_kv are peeled off: `k_read` is after
    v: Node
    k_read: Node
    v_read: Node
    k_rope: Node  # new keys after RoPE
    k_pre: Node  # new keys before RoPE; k_rope itself when the model has none
    v_new: Node
    cos: Node | None
    sin: Node | None
    positions: Node | None
    mask: Node | None
    scale: Any  # a number, or the node of a symbolic one
    is_causal: bool
    causal: bool  # by flag, by a mask built in the graph, or because there is a cache
    repeats: int
    rope: str
    window: int | None
    cache: str
    writes: tuple[Node, ...]
    reads: tuple[Node, ...]
    hidden_in: Node | None
    hidden: Node | None
    order: Node | None = None  # int64 [D]: the order in which the packed cache holds the channels of a key, if not the model's
    variants: tuple[str, ...] = field(default=())

    @property
    def kv_heads(self) -> int:
        return _size(self.k_rope, 1)

    @property
    def query_heads(self) -> int:
        return _size(self.q, 1)

    @property
    def head_dim(self) -> int:
        return _size(self.k_rope, 3)

    def declined(self, reason: str, node: Node | None = None) -> Declined:
        return Declined(reason, node or self.attn, self.path)


def find_sites(gm: fx.GraphModule) -> list[AttentionSite | Declined]:
    """Every attention of the graph, in order; what is not attention (a router's softmax) gives nothing."""
    found: list[AttentionSite | Declined] = []
    for node in gm.graph.nodes:
        core = match_core(node)
        if isinstance(core, Core):
            found.append(_site(gm.graph, core))
        elif core is not None:
            found.append(core)
    return found


def module_path(node: Node) -> str:
    """Path of the innermost module a node belongs to, without the capture root."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    return _without_root(str(stack[-1][0]))


@cache
def _without_root(path: str) -> str:
    return re.sub(r"^(L\['\w+'\](\[\d+\])?|L__self__+)\.?", "", re.sub(r"\._modules\['([^']+)'\]", r".\1", path))


# ---------------------------------------------------------------- the core


def match_core(node: Node) -> Core | Declined | None:
    """The core anchored at `node`, a reason to leave it alone, or None when it is no attention."""
    if kind(node) == "scaled_dot_product_attention":
        return _match_sdpa(node)
    if kind(node) == "softmax":
        return _match_eager(node)
    return None


def _match_sdpa(node: Node) -> Core | Declined:
    q, k, v = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    scale, dropout = argument(node, 6, "scale"), argument(node, 4, "dropout_p", 0.0)
    if len(shape(q) or ()) != 4:
        return Declined(f"query of shape {shape(q)}; expected [B, Hq, S, D]", node, module_path(node))
    if dropout:
        return Declined(f"attention dropout of {dropout}; switch the model to evaluation mode", node, module_path(node))
    scale = 1.0 / math.sqrt(_size(q, 3)) if scale is None else scale if isinstance(scale, Node) else float(scale)
    return Core("sdpa", node, q, k, v, argument(node, 3, "attn_mask"), scale, bool(argument(node, 5, "is_causal", False)))


def _match_eager(softmax: Node) -> Core | Declined | None:
    path = module_path(softmax)
    weights: Node = softmax
    attn: Node | None = None
    for _ in range(8):
        users = _users(weights)
        if len(users) != 1:
            later = [user for user in users if kind(user) in ("matmul", "bmm") and arg(user, 0) is weights]
            if later and _scores_of(softmax) is not None:
                return Declined("attention weights are used elsewhere (output_attentions)", softmax, path)
            return None
        (user,) = users
        if kind(user) in ("matmul", "bmm") and arg(user, 0) is weights:
            attn = user
            break
        if kind(user) == "dropout":
            if argument(user, 1, "p", 0.5) and argument(user, 2, "training", True):
                return Declined("attention dropout; switch the model to evaluation mode", softmax, path)
        elif kind(user) not in CASTS:
            return None
        weights = user
    if attn is None or kind(_peel_casts(arg(softmax, 0))) in ("linear", "addmm"):
        return None
    scores = _scores_of(softmax)
    if scores is None or isinstance(scores, Declined):
        return scores
    q, k, mask, scale = scores
    v = arg(attn, 1)
    if any(len(shape(operand) or ()) != 4 for operand in (q, k, v)):
        return Declined(f"query of shape {shape(q)}; expected [B, Hq, S, D]", softmax, path)
    return Core("eager_softmax", attn, q, k, v, mask, scale, is_causal=False)


def _scores_of(softmax: Node) -> tuple[Node, Node, Node | None, Any] | Declined | None:
    """(q, k, mask, scale) from softmax(q @ k.T * scale + mask), walked backwards."""
    path, mask, capped = module_path(softmax), None, None
    scale: Any = 1.0
    node = arg(softmax, 0)
    for _ in range(12):
        name = kind(node)
        if not isinstance(node, Node) or name in ("linear", "addmm", ""):
            return None
        if name in ("matmul", "bmm"):
            if capped is not None:
                return Declined("softcap: tanh between the scores and the softmax has no SDPA form", capped, path)
            q, kt = arg(node, 0), arg(node, 1)
            if kind(kt) not in ("transpose", "permute", "mT") or not isinstance(q, Node):
                return Declined(f"keys enter the scores through '{kind(kt)}', not through a transpose", node, path)
            return q, arg(kt, 0), mask, scale
        if name == "add":
            left, right = arg(node, 0), arg(node, 1)
            scores, bias = (left, right) if _leads_to_matmul(left) else (right, left)
            if mask is not None or not isinstance(bias, Node):
                return Declined("two biases between the scores and the softmax", node, path)
            if scale != 1.0:
                return Declined("scores are scaled after the mask was added", node, path)
            mask, node = bias, scores
        elif name in ("mul", "div") and not isinstance(value(arg(node, 1)), torch.Tensor):
            factor = arg(node, 1)
            if isinstance(factor, Node) or isinstance(scale, Node):
                if name == "div" or scale != 1.0:
                    return Declined("scores are scaled twice, once by a symbolic number", node, path)
                scale, node = factor, arg(node, 0)
            else:
                scale, node = scale * factor if name == "mul" else scale / factor, arg(node, 0)
        elif name in CASTS:
            node = arg(node, 0)
        elif name == "tanh":
            capped, node = node, arg(node, 0)
        else:
            return Declined(f"'{name}' between the scores and the softmax has no SDPA form", node, path)
    return None


def _leads_to_matmul(node: Any) -> bool:
    while isinstance(node, Node) and kind(node) in CASTS | {"mul", "div", "tanh"}:
        node = arg(node, 0)
    return kind(node) in ("matmul", "bmm")


# ---------------------------------------------------------------- operands


@dataclass(frozen=True)
class _Stored:
    """Where a key or value operand comes from: the new rows, the tensor read, and what wrote it."""

    cache: str
    new: Node
    read: Node
    writes: tuple[Node, ...] = ()
    reads: tuple[Node, ...] = ()
    window: int | None = None


@dataclass(frozen=True)
class _Rope:
    name: str
    pre: Node
    cos: Node | None = None
    sin: Node | None = None


def _site(graph: fx.Graph, core: Core) -> AttentionSite | Declined:
    path = module_path(core.attn)
    (k_source, heads), (v_source, _) = _peel_heads(core.k), _peel_heads(core.v)
    if kind(k_source) == "index_select" and arg(k_source, 1) in (-1, 3) and kind(arg(arg(k_source, 0), 0)) == "kvsink.read":
        k_source = arg(k_source, 0)  # a packed cache that holds the channels in an order of its own
    k, v = _stored(k_source), _stored(v_source)
    order = arg(k.new, 2) if k_source is not _peel_heads(core.k)[0] and kind(k.new) == "index_select" else None
    q_rope, k_rope = match_rope(core.q), match_rope(k.new)
    sources = [_entries(node, path) for node in (q_rope.pre, k_rope.pre, v.new)]
    if not sources[0].keys() & sources[1].keys() or not sources[0].keys() & sources[2].keys():
        return Declined(
            "keys come from other hidden states than queries (cross attention, or keys shared between layers)", core.attn, path
        )
    causal = core.is_causal or k.cache != "none" or _is_causal_mask(core.mask)
    if not causal:
        return Declined("neither a cache nor causality (vision or encoder attention)", core.attn, path)
    rope = k_rope.name
    if rope == "none" and _sees_rotary_table(k.new, path):
        if k.cache != "kvsink":
            return Declined("RoPE of an unknown spelling between the key and its cache", k.new, path)
        rope = "hidden"
    if k.cache != v.cache:
        return Declined(f"keys are stored in a {k.cache} cache, values in a {v.cache} one", core.attn, path)
    block = _block(path)
    window = k.window if k.window is not None else _mask_window(core.mask)
    repeats = _size(core.q, 1) // _size(k_source, 1)
    heads = "gqa" if heads == "mha" and repeats > 1 else heads
    return AttentionSite(
        path=path,
        layer=_layer(path),
        core=core.name,
        attn=core.attn,
        q=core.q,
        k=core.k,
        v=core.v,
        k_read=k.read,
        v_read=v.read,
        k_rope=k.new,
        k_pre=k_rope.pre,
        v_new=v.new,
        cos=k_rope.cos,
        sin=k_rope.sin,
        positions=_positions(k_rope.cos),
        mask=core.mask,
        scale=core.scale,
        is_causal=core.is_causal,
        causal=causal,
        repeats=repeats,
        rope=rope,
        window=window,
        cache=k.cache,
        writes=tuple(dict.fromkeys(k.writes + v.writes)),
        reads=tuple(dict.fromkeys(k.reads + v.reads)),
        hidden_in=next(iter(_entries(k_rope.pre, block)), None),
        hidden=_block_output(graph, block),
        order=order,
        variants=(core.name, heads, *(["sliding"] if window is not None else [])),
    )


def _peel_heads(node: Node) -> tuple[Node, str]:
    """A core operand without slice and repeat_kv, and the name of the heads variant."""
    heads = "mha"
    while True:
        name, sizes = kind(node), shape(node) or ()
        source: Any = arg(node, 0) if node.args else None
        before = shape(source) or ()
        if name in CASTS - {"to"} or (name in ("slice", "getitem") and len(before) == 4 and _only_rows(sizes, before)):
            node = source
        elif name in ("repeat_interleave", "expand") and len(before) == 4 and before[1] != sizes[1]:
            node, heads = source, "repeated_kv"
        elif name in RESHAPES and len(sizes) == 4 and len(before) == 5:
            while len(shape(source) or ()) == 5 and kind(source) in (
                "expand",
                "unsqueeze",
                "getitem",
                "slice",
                "clone",
                "contiguous",
            ):
                source = arg(source, 0)
            if len(shape(source) or ()) != 4:
                return node, heads
            node, heads = source, "repeated_kv"
        else:
            return node, heads


def _only_rows(after: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    return len(after) == 4 and (after[0], after[1], after[3]) == (before[0], before[1], before[3])


def _stored(source: Node) -> _Stored:
    if kind(source) == "getitem" and kind(arg(source, 0)) == "kvsink.read":
        read = arg(source, 0)
        state = argument(read, 2, "state")
        writes = tuple(n for n in read.graph.nodes if kind(n) == "kvsink.append_" and list(argument(n, 6, "state")) == list(state))
        return _Stored("kvsink", argument(read, int(arg(source, 1)), "kv"[int(arg(source, 1))]), source, writes, (read, source))
    if kind(source) == "cat" and argument(source, 1, "dim", 0) in (-2, 2) and len(shape(source) or ()) == 4:
        new = argument(source, 0, "tensors")[-1]
        copies = _copies_out(source)
        if copies:
            return _Stored("static", new, source, copies, (source,), _size(arg(copies[0], 0), 2))
        return _Stored("dynamic", new, source, (source,), (source,), _kept_rows(source))
    for write in source.users:
        name = kind(write)
        if write.args and arg(write, 0) is source and name in ("index_copy_", "index_put_", "setitem"):
            new = argument(write, 3 if name == "index_copy_" else 2, "source")
            return _Stored("static", new, source, (write,), (source,))
        if name == "copy_" and arg(write, 0) is source:
            rolled = arg(write, 1)
            for put in rolled.users if isinstance(rolled, Node) else ():
                if kind(put) in ("setitem", "index_put_") and arg(put, 0) is rolled:
                    return _Stored("static", arg(put, 2), source, (put, write), (source,), _size(source, 2))
    copies = _copies_out(source)
    if copies:
        return _Stored("static", source, source, copies, (source,), _size(arg(copies[0], 0), 2))
    return _Stored("none", source, source)


def _copies_out(node: Node) -> tuple[Node, ...]:
    """`buffer.copy_(node[..., -window:, :])`: how a full sliding layer keeps its last rows."""
    cuts = [node, *(user for user in node.users if kind(user) in ("getitem", "slice"))]
    return tuple(user for cut in cuts for user in cut.users if kind(user) == "copy_" and len(user.args) > 1 and arg(user, 1) is cut)


def _kept_rows(cat: Node) -> int | None:
    """The window of a growing sliding layer, which keeps `rows[:, :, -window + 1:]`."""
    for user in cat.users:
        index = arg(user, 1) if kind(user) == "getitem" else None
        if isinstance(index, tuple) and len(index) >= 3 and isinstance(index[2], slice):
            start = index[2].start
            if isinstance(start, int) and start < 0 and index[2].stop is None:
                return 1 - start
    return None


# ---------------------------------------------------------------- RoPE


def match_rope(node: Node) -> _Rope:
    """RoPE in the half-split spelling, whole or partial; name "none" and the node itself when there is none."""
    core = _peel_casts(node)
    if kind(core) == "cat" and argument(core, 1, "dim", 0) in (-1, 3):
        parts = argument(core, 0, "tensors")
        if len(parts) == 2:
            rotated = _rope_sum(parts[0])
            passed = _peel_casts(parts[1])
            if rotated and _cut_of(rotated.pre) is not None and _cut_of(rotated.pre) is _cut_of(passed):
                return _Rope("partial_half", _cut_of(rotated.pre) or node, rotated.cos, rotated.sin)
    return _rope_sum(core) or _Rope("none", node)


def _rope_sum(node: Any) -> _Rope | None:
    """x * cos + cat(-x2, x1) * sin, in any order of the operands."""
    node = _peel_casts(node)
    if kind(node) != "add":
        return None
    products = [_peel_casts(operand) for operand in node.args[:2]]
    if any(kind(product) != "mul" for product in products):
        return None
    for plain, turned in (products, products[::-1]):
        for half, sin in (turned.args[:2], turned.args[1::-1]):
            base = _rotated_half_of(half)
            for x, cos in (plain.args[:2], plain.args[1::-1]):
                if base is not None and x is base:
                    tables = _table(cos), _table(sin)
                    return _Rope("half", base, *tables) if all(tables) else None
    return None


def _rotated_half_of(node: Any) -> Node | None:
    node = _peel_casts(node)
    if kind(node) != "cat" or len(argument(node, 0, "tensors")) != 2:
        return None
    upper, lower = (_peel_casts(part) for part in argument(node, 0, "tensors"))
    if kind(upper) != "neg" or _cut_of(arg(upper, 0)) is None or _cut_of(arg(upper, 0)) is not _cut_of(lower):
        return None
    return _cut_of(lower) if _is_first_half(lower) else None


def _is_first_half(cut: Node) -> bool:
    """x[..., :d/2] rather than x[..., ::2], which is the interleaved spelling."""
    if kind(cut) == "slice":
        return argument(cut, 2, "start") in (0, None) and argument(cut, 4, "step", 1) == 1
    index = arg(cut, 1)
    last = index[-1] if isinstance(index, tuple) else index
    return isinstance(last, slice) and last.start in (0, None) and last.step in (1, None)


def _cut_of(node: Any) -> Node | None:
    return arg(node, 0) if kind(node) in ("getitem", "slice") and isinstance(arg(node, 0), Node) else None


def _table(node: Any) -> Node | None:
    """The [B or 1, S, rotary] table under the unsqueeze that broadcasts it over heads."""
    while isinstance(node, Node) and len(shape(node) or ()) == 4 and kind(node) in CASTS | {"unsqueeze", "getitem", "slice"}:
        node = arg(node, 0)
    return node if isinstance(node, Node) and len(shape(node) or ()) == 3 else None


def _positions(cos: Node | None) -> Node | None:
    """The integer [B or 1, S] node that a rotary table is computed from."""
    for node in _ancestors(cos) if cos is not None else ():
        fake = value(node)
        if isinstance(fake, torch.Tensor) and fake.dim() == 2 and not fake.is_floating_point() and fake.dtype != torch.bool:
            return node
    return None


def _sees_rotary_table(node: Node, path: str) -> bool:
    """Whether a cosine or sine reaches `node` other than through the hidden states."""
    stops = ("linear", "addmm", "embedding", "layer_norm", "scaled_dot_product_attention", "softmax")
    return any(kind(n) in ("cos", "sin", "polar", "view_as_complex") for n in _ancestors(node, stops))


# ---------------------------------------------------------------- surroundings


def _entries(node: Node, path: str) -> dict[Node, None]:
    """Activations [B, S, E] that enter module `path` on the way to `node`; for a cached operand, its 4-D tensor."""
    entries: dict[Node, None] = {}
    todo, seen = [node], {node}
    while todo:
        current = todo.pop()
        inside = any(_within(p, path) for p in _stack(current)) and current.op not in ("placeholder", "get_attr")
        if not inside:
            fake = value(current)
            if isinstance(fake, torch.Tensor) and fake.is_floating_point() and fake.dim() >= 3:
                entries[current] = None
            continue
        fresh = [source for source in current.all_input_nodes if source not in seen]
        seen.update(fresh)
        todo.extend(fresh)
    return entries


def _block(path: str) -> str:
    """model.layers.3.self_attn -> model.layers.3"""
    match = re.match(r"(.*\.\d+)(\.|$)", path)
    return match.group(1) if match else path.rpartition(".")[0]


def _layer(path: str) -> int:
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(numbers[-1]) if numbers else -1


def _block_output(graph: fx.Graph, block: str) -> Node | None:
    """The last activation computed in a block that something outside of it uses."""
    output = None
    for node in graph.nodes:
        if (
            len(shape(node) or ()) == 3
            and any(_within(p, block) for p in _stack(node))
            and node.op not in ("placeholder", "get_attr")
        ):
            outside = [user for user in node.users if not any(_within(p, block) for p in _stack(user))]
            output = node if outside and value(node).is_floating_point() else output
    return output


def _is_causal_mask(mask: Node | None) -> bool:
    """A mask whose rows were compared in the graph: key index <= query index. A comparison with a number says nothing: masks
    that let every row see every row are made by one."""
    return mask is not None and any(
        kind(node) in ("tril", "triu")
        or (kind(node) in ("le", "ge", "lt", "gt") and isinstance(arg(node, 0), Node) and isinstance(arg(node, 1), Node))
        for node in _ancestors(mask, ("embedding",))
    )


def _mask_window(mask: Node | None) -> int | None:
    """The window from `key > query - window` in the mask; UNKNOWN_WINDOW for a sliding mask made outside the graph."""
    for node in _ancestors(mask, ("embedding",)) if mask is not None else ():
        if kind(node) == "gt" and kind(arg(node, 1)) == "sub" and isinstance(arg(arg(node, 1), 1), int):
            return arg(arg(node, 1), 1)
        if node.op == "placeholder" and "sliding" in str(node.meta.get("kvsink_source", "")):
            return UNKNOWN_WINDOW
    return None


def _stack(node: Node) -> Iterator[str]:
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        yield _without_root(str(entry[0]))


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(outer + ".")


def _ancestors(node: Node | None, stops: Iterable[str] = ()) -> Iterator[Node]:
    """`node` and everything it is computed from, nearest first; not beyond operators named in `stops`."""
    todo, seen = [node] if node is not None else [], {node}
    while todo:
        current = todo.pop(0)
        yield current
        if kind(current) in stops:
            continue
        fresh = [source for source in current.all_input_nodes if source not in seen]
        seen.update(fresh)
        todo.extend(fresh)


def _users(node: Node) -> list[Node]:
    return [user for user in node.users if kind(user) not in CHECKS]


def _peel_casts(node: Any) -> Any:
    while kind(node) in CASTS:
        node = arg(node, 0)
    return node


def _size(node: Node, axis: int) -> int:
    return (shape(node) or (1, 1, 1, 1))[axis]
