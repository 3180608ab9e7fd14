"""Look at every feed-forward output of a running model, and leave named experts out of it.

Formula    a[l, e] = max over all tokens t routed to e and all channels c of |down_proj_{l,e}(h_t)[c]|, before the
           multiplication by the routing weight
           neuron behind it: argmax_j |W[c, j] h_t[j]| at the row of the maximum
Source     Super Experts, arXiv 2507.23279 section 3 (equation 6)
Differs    all routed rows count, not the first of a window; leaving an expert out keeps the other routing weights as they are
Shapes     outputs of an expert [n_e, E]; h_t the input of the down projection [n_e, F]
Raises     CalibrationError for NaN or infinite outputs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvsink.errors import CalibrationError
from kvsink.profiling.layout import Entry, Layout

__all__ = ["EntryStats", "Stats", "down_weight", "merge_stats", "watching_experts"]


@dataclass
class EntryStats:
    """What one entry has put out so far; `routing` is the weight the router gave it at the row of the maximum."""

    largest: float = 0.0
    window: int = -1
    position: int = -1
    channel: int = -1
    value: float = 0.0
    neuron: int = -1
    weight: float = 0.0
    activation: float = 0.0
    share: float = 0.0  # of the output value that this neuron alone makes
    rows: int = 0
    routing: float | None = None
    routing_total: float = 0.0

    def merge(self, other: EntryStats) -> EntryStats:
        """Both shards together: the larger maximum with all that belongs to it, the sum of the counts."""
        best = self if self.largest >= other.largest else other
        fields = {**best.__dict__, "rows": self.rows + other.rows, "routing_total": self.routing_total + other.routing_total}
        return EntryStats(**fields)


@dataclass
class Stats:
    """Statistics of every entry, by label; `window` is the number of the window that is running."""

    entries: dict[str, EntryStats] = field(default_factory=dict)
    window: int = 0


def merge_stats(a: Stats, b: Stats) -> Stats:
    """Max-reduce two shards of the same model, as ranks that hold different windows or different experts leave them."""
    out = dict(a.entries)
    for label, entry in b.entries.items():
        out[label] = out[label].merge(entry) if label in out else entry
    return Stats(out, max(a.window, b.window))


def down_weight(model: nn.Module, entry: Entry) -> Tensor:
    """The down projection [E, F] of an entry, however the model stores it."""
    module: Any = model.get_submodule(entry.module)
    if entry.stacked:
        weight = module.down_proj.detach()[int(entry.name)]
        return weight.T if module.is_transposed else weight
    weight = module.weight.detach()
    return weight.T if type(module).__name__ == "Conv1D" else weight


@contextmanager
def watching_experts(
    model: nn.Module, layout: Layout, stats: Stats | None = None, skip: frozenset[str] = frozenset()
) -> Iterator[None]:
    """Within the block, fill `stats` where given, and leave the entries labelled in `skip` out of the sum."""
    handles: list[Any] = []
    replaced: list[nn.Module] = []
    try:
        for name in dict.fromkeys(e.module for e in layout.entries if e.stacked):
            mine = [e for e in layout.entries if e.module == name]
            module = model.get_submodule(name)
            module.forward = _stacked(model, module, mine, stats, skip)
            replaced.append(module)
        for entry in layout.entries:
            if not entry.stacked and (stats is not None or entry.label in skip):
                find = _finder(model, entry, handles) if entry.routed and stats is not None else None
                module = model.get_submodule(entry.module)
                handles.append(module.register_forward_hook(_linear(model, entry, stats, entry.label in skip, find)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            module.__dict__.pop("forward", None)


def _stacked(
    model: nn.Module, module: Any, entries: list[Entry], stats: Stats | None, skip: frozenset[str]
) -> Callable[..., Tensor]:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x @ (weight if module.is_transposed else weight.T)
        return y if bias is None else y + bias

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        gated = getattr(module, "has_gate", True)
        first = module.gate_up_proj if gated else module.up_proj
        first_bias = getattr(module, "gate_up_proj_bias" if gated else "up_proj_bias", None)
        bias = getattr(module, "down_proj_bias", None)
        for e, entry in enumerate(entries):
            rows, slots = (top_k_index == e).nonzero(as_tuple=True)
            if not len(rows):
                continue
            up = linear(hidden_states[rows], first[e], None if first_bias is None else first_bias[e])
            inner = module._apply_gate(up) if gated else module.act_fn(up)
            y = linear(inner, module.down_proj[e], None if bias is None else bias[e])
            weights = top_k_weights[rows, slots]
            if stats is not None:
                _note(model, entry, stats, y, inner, weights, rows.tolist().__getitem__)
            if entry.label not in skip:
                if getattr(module, "has_post_expert_norm", False):
                    y = module.post_expert_norm(y)
                out.index_add_(0, rows, (y * weights[:, None]).to(out.dtype))
        return out

    return forward


def _linear(
    model: nn.Module, entry: Entry, stats: Stats | None, skipped: bool, find: Callable[[int], int] | None
) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if stats is not None and output.numel():
            y, inner = output.flatten(0, -2), args[0].flatten(0, -2)
            _note(model, entry, stats, y, inner, None, find or (lambda r: r))
        return torch.zeros_like(output) if skipped else None

    return hook


def _finder(model: nn.Module, entry: Entry, handles: list[Any]) -> Callable[[int], int]:
    """Which token a row of a routed expert is: the row of the block's input that equals it."""
    expert = entry.module.rsplit(".", 1)[0]
    seen: dict[str, Tensor] = {}

    def keep(what: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            seen[what] = args[0].detach().flatten(0, -2)

        return hook

    handles.append(model.get_submodule(entry.module.split(".experts.")[0]).register_forward_pre_hook(keep("all")))
    handles.append(model.get_submodule(expert).register_forward_pre_hook(keep("own")))

    def find(row: int) -> int:
        same = (seen["all"] == seen["own"][row]).all(-1).nonzero()
        return int(same[0]) if len(same) else -1

    return find


def _note(
    model: nn.Module, entry: Entry, stats: Stats, y: Tensor, inner: Tensor, routing: Tensor | None, find: Callable[[int], int]
) -> None:
    held = stats.entries.setdefault(entry.label, EntryStats())
    best, flat = y.detach().abs().flatten().float().max(0)
    largest = float(best)
    if not largest < float("inf"):
        raise CalibrationError(
            f"layer {entry.layer}, expert {entry.name} puts out NaN or infinite activations; check the weights or profile in "
            "float32"
        )
    held.rows += len(y)
    if routing is not None:
        held.routing_total += float(routing.sum())
    if largest <= held.largest:
        return
    row, channel = divmod(int(flat), y.shape[-1])
    parts = down_weight(model, entry)[channel].float() * inner[row].float()
    neuron = int(parts.abs().argmax())
    value = float(y[row, channel])
    held.largest, held.value, held.channel, held.neuron = largest, value, channel, neuron
    held.window, held.position = stats.window, find(row)
    held.weight, held.activation = float(down_weight(model, entry)[channel, neuron]), float(inner[row, neuron])
    held.share = float(parts[neuron]) / value if value else 0.0
    held.routing = None if routing is None else float(routing[row])
