"""Where the feed-forward outputs of a decoder are written: every expert, shared expert and dense layer as one entry.

Layouts    stacked weights [E, ...] in one module (transformers: Mixtral, Qwen2/3-MoE, DeepSeek-V2/V3, OLMoE, gpt-oss) and
           one module per expert (`experts.3.down_proj`, `experts.3.w2`); shared experts; dense layers between them
Source     ours
Raises     UnsupportedError for a mixture of experts whose layout is not one of these, with the module tree that was seen
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvsink.errors import UnsupportedError
from kvsink.model.anatomy import LAST, Anatomy

__all__ = ["DENSE", "SHARED", "Entry", "Layout", "find_layout"]

DENSE, SHARED = "dense", "shared"
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ROUTED = re.compile(r"experts\.(\d+)\.")


@dataclass(frozen=True)
class Entry:
    """One feed-forward part whose output joins the residual stream.

    name: the number of a routed expert, "shared" or "dense"; module: the down projection, or the module of stacked experts.
    """

    layer: int
    name: str
    module: str
    stacked: bool

    @property
    def label(self) -> str:
        """`layer:name`, as `--prune` reads it."""
        return f"{self.layer}:{self.name}"

    @property
    def routed(self) -> bool:
        return self.name.isdigit()


@dataclass(frozen=True)
class Layout:
    """All entries of a model, in the order of its layers."""

    entries: tuple[Entry, ...]
    layers: int

    @property
    def is_moe(self) -> bool:
        return any(e.routed for e in self.entries)

    def of_layer(self, layer: int) -> list[Entry]:
        return [e for e in self.entries if e.layer == layer]

    def find(self, label: str) -> Entry:
        """The entry `layer:name`. Raises UnsupportedError with the entries of that layer."""
        found = next((e for e in self.entries if e.label == label), None)
        if found is None:
            layer = label.partition(":")[0]
            known = [e.label for e in self.of_layer(int(layer))] if layer.isdigit() else []
            said = f"layer {layer} has {known[0]} to {known[-1]}" if known else f"layers go from 0 to {self.layers - 1}"
            raise UnsupportedError(f"no expert is called {label!r}; {said}. Write for example 3:0 or 3:shared")
        return found


def find_layout(model: nn.Module, where: Anatomy) -> Layout:
    """Find the down projections of every block."""
    entries: list[Entry] = []
    for layer, block in enumerate(where.blocks):
        inside = where.attentions[layer].removeprefix(block + ".")
        entries += _of_block(layer, block, inside, model.get_submodule(block))
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    declared = max((getattr(config, n, None) or 0 for n in _COUNTS), default=0)
    if declared > 1 and not any(e.routed for e in entries):
        raise UnsupportedError(
            f"{type(model).__name__} declares {declared} experts, but their layout is not known; a block holds "
            f"{_tree(model.get_submodule(where.blocks[-1]))}. Known are "
            "stacked down_proj [experts, ...] and experts.N.down_proj or .w2"
        )
    return Layout(tuple(entries), len(where.blocks))


def _of_block(layer: int, block: str, attention: str, module: nn.Module) -> list[Entry]:
    found: list[Entry] = []
    for name, part in module.named_modules():
        if not name or name == attention or name.startswith(attention + "."):
            continue
        weight = getattr(part, "down_proj", None)
        if isinstance(weight, Tensor) and weight.dim() == 3:
            if hasattr(part, "_apply_gate") and hasattr(part, "is_transposed"):
                found += [Entry(layer, str(e), f"{block}.{name}", True) for e in range(weight.shape[0])]
            continue
        if name.rpartition(".")[2] not in LAST or getattr(getattr(part, "weight", None), "dim", int)() != 2:
            continue
        routed = _ROUTED.search(name)
        if "shared" in name:
            same = sum(e.name.startswith(SHARED) for e in found)
            found.append(Entry(layer, SHARED + (str(same) if same else ""), f"{block}.{name}", False))
        elif routed:
            found.append(Entry(layer, routed[1], f"{block}.{name}", False))
        else:
            found.append(Entry(layer, DENSE, f"{block}.{name}", False))
    return found


def _tree(block: nn.Module) -> str:
    return ", ".join(f"{n} ({type(m).__name__})" for n, m in block.named_modules() if n.count(".") < 2 and n)[:400]
