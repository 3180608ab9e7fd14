"""One attention site as text, with names that say what a value is and do not change from run to run.

Names      q, k_pre, k_rope, v_new, cos, sin, positions, mask, hidden_in by role; cache.*, codec.* for what cache
           and codec bring; weights by the end of their path; everything else by operator and count
Lines      name = operator(arguments)  # dtype [sizes]; one node each, gone on with further in where 140 columns are over
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx import Node

from kvsink.graph.sites import AttentionSite, module_path
from kvsink.graph.targets import CHECKS, kind, value

if TYPE_CHECKING:
    from kvsink.passes.chain import Chain

_SHORT = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_ATTENTION = ("scaled_dot_product_attention", "kvsink.attend", "kvsink.append_attend_")
COLUMNS = 140
_ROLES = ("hidden_in", "q", "k_pre", "k_rope", "v_new", "cos", "sin", "positions", "mask")


def render_site(site: AttentionSite, gm: fx.GraphModule, chain: Chain | None = None, whole: bool = False) -> str:
    """The site from its new rows to its attention, in order; `whole` shows projections, RoPE and output too."""
    names = {getattr(site, role): role for role in reversed(_ROLES) if getattr(site, role) is not None}
    for prefix, nodes in (("cache", chain.state), ("codec", chain.params)) if chain is not None else ():
        names |= {node: f"{prefix}.{name}" for name, node in nodes.items()}
    brought = set() if whole else _before_storage(site)
    counts: Counter[str] = Counter()
    lines = []
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method", "call_module") or kind(node) in CHECKS or not _inside(node, site.path):
            continue
        if node not in names:
            stem = kind(node).rpartition(".")[2]
            counts[stem] += 1
            names[node] = f"{stem}_{counts[stem]}"
        call = f"{kind(node)}({', '.join(_arguments(node, names))})" if node not in brought else "…"
        if call == "…" and names[node] not in _ROLES:
            counts[kind(node).rpartition(".")[2]] -= 1
            continue
        lines.append((f"{names[node]} = {call}", _type(node)))
        if not whole and kind(node) in _ATTENTION:
            break
    width = min(96, max((len(text) for text, _ in lines), default=0))
    return "\n".join(_wrapped(f"{text:<{width}}  # {kind_}" if kind_ else text) for text, kind_ in lines)


def _wrapped(line: str) -> str:
    """The line in pieces of at most `COLUMNS`, cut behind commas; the next ones stand further in."""
    pieces = []
    while len(line) > COLUMNS and (at := line.rfind(", ", 8, COLUMNS)) > 0:
        pieces.append(line[: at + 1])
        line = f"        {line[at + 2 :]}"
    return "\n".join([*pieces, line])


def _before_storage(site: AttentionSite) -> set[Node]:
    """What new rows and queries are computed from."""
    todo = [node for node in (site.q, site.k_rope, site.v_new) if not node._erased]
    seen = set(todo)
    while todo:
        fresh = [arg for arg in todo.pop().all_input_nodes if arg not in seen]
        seen.update(fresh)
        todo.extend(fresh)
    return seen


def _inside(node: Node, path: str) -> bool:
    own = module_path(node)
    return own == path or own.startswith(path + ".")


def _arguments(node: Node, names: dict[Node, str]) -> list[str]:
    shown = [_text(arg, names) for arg in node.args]
    return shown + [f"{key}={_text(arg, names)}" for key, arg in node.kwargs.items()]


def _text(arg: Any, names: dict[Node, str]) -> str:
    if isinstance(arg, Node):
        return names.get(arg) or _outside_name(arg)
    if isinstance(arg, (list, tuple)):
        shown = [_text(each, names) for each in arg]
        groups = {text.partition(".")[0] for text in shown}
        if len(shown) > 3 and len(groups) == 1 and groups <= {"cache", "codec"}:
            return f"[{groups.pop()}.*]"
        return f"[{', '.join(shown)}]"
    if isinstance(arg, slice):
        return ":".join("" if part is None else _text(part, names) for part in (arg.start, arg.stop)) + (
            f":{arg.step}" if arg.step else ""
        )
    if arg is Ellipsis:
        return "..."
    if isinstance(arg, str) and arg.startswith("{"):
        return "codec"
    if isinstance(arg, float):
        return f"{arg:g}"
    return str(arg)


def _outside_name(node: Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        source = str(node.meta.get("kvsink_source") or node.target)
        if cached := re.search(r"layers\[(\d+)\]\.(\w+)$", source):
            return f"past.{cached.group(2)}"
        parts = re.findall(r"\w+", re.sub(r"_(modules|parameters|buffers)\b", "", source))
        return ".".join(parts[-2:]) if len(parts) > 1 else parts[-1]
    return kind(node)


def _type(node: Node) -> str:
    fake = value(node)
    if isinstance(fake, torch.Tensor):
        return f"{_SHORT.get(fake.dtype, str(fake.dtype))} [{', '.join(str(size) for size in fake.shape)}]"
    if isinstance(fake, (tuple, list)) and all(isinstance(each, torch.Tensor) for each in fake):
        return ", ".join(
            f"{_SHORT.get(each.dtype, str(each.dtype))} [{', '.join(str(size) for size in each.shape)}]" for each in fake
        )
    return ""
