"""Read a model's parameters from a checkpoint that stores them otherwise: one tensor per expert, fused or renamed.

transformers renames and converts the tensors of a checkpoint while it loads a model whole, by tables that it keeps per
architecture: `experts.3.w1.weight` of every expert become one stacked parameter, for example. Here the same tables are
applied to one parameter at a time.

Source     transformers' conversion_mapping and core_model_loading
Exact      yes: the operations are transformers' own, in the dtype of the file
Raises     ModelError for tensors that cannot be put together
Cost       memory: the tensors one parameter is made of, twice while they are put together, in the dtype of the file
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvsink.errors import ModelError
from kvsink.folder.checkpoint import Checkpoint

__all__ = ["Weights"]


@dataclass
class _Group:
    """Tensors of the file that are put together, under the name of the first parameter they make."""

    first: str
    converter: Any = None  # None: one tensor that is taken as it is
    parts: list[tuple[str, str]] = field(default_factory=list)  # (pattern of the converter, name in the checkpoint)


class Weights:
    """The parameters and buffers of `model`, a model without weights, as `checkpoint` stores them."""

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        self._groups: dict[str, _Group] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # of all that can be read
        self._collect()

    def _collect(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        table = get_model_conversion_mapping(self.model)
        renamings = [t for t in table if isinstance(t, WeightRenaming)]
        converters = [t for t in table if isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        groups: dict[str, _Group] = {}
        for key in sorted(self.checkpoint.entries, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if name in state:
                converter = None if pattern is None else by_pattern[pattern]
                groups.setdefault(name, _Group(name, converter)).parts.append((pattern or key, key))
        for group in groups.values():
            if group.converter is None:
                made = {group.first: self.checkpoint.entries[group.parts[0][1]].shape}
            else:  # tried on tensors without content
                try:
                    made = {n: tuple(t.shape) for n, t in self._convert(group, self._empty).items()}
                except Exception:  # what it is made of is not complete: reported as a parameter that is not there
                    continue
            self.shapes |= made
            self._groups |= dict.fromkeys(made, group)

    def floating(self, name: str) -> bool:
        """Whether all that a parameter is made of are floating-point numbers of a kind that torch reads here."""
        entries = [self.checkpoint.entries[key] for _, key in self._groups[name].parts]
        return all(e.dtype is not None and e.dtype.is_floating_point for e in entries)

    def plain(self, name: str) -> bool:
        """Whether the checkpoint has the parameter as one tensor of the same name."""
        group = self._groups.get(name)
        return group is not None and group.converter is None and group.parts[0][1] == name

    def nbytes(self, name: str) -> int:
        """Bytes of the file that a parameter is made of."""
        return sum(self.checkpoint.entries[key].nbytes for _, key in self._groups[name].parts)

    def read(self, name: str) -> Tensor:
        """One parameter in the dtype of the file; its memory may be the file's until it is copied."""
        group = self._groups[name]
        if group.converter is None:
            (tensor,) = self.checkpoint.tensors([group.parts[0][1]]).values()
            return tensor
        try:
            held = self.checkpoint.tensors(key for _, key in group.parts)
            return self._convert(group, lambda key: lambda: held.pop(key))[name]
        except ModelError:
            raise
        except Exception as error:  # an operation of transformers met what it does not expect
            raise ModelError(
                f"{name} cannot be put together from {group.parts[0][1]} and its like ({error}); fetch the model again"
            ) from error

    def _convert(self, group: _Group, make: Callable[[str], Callable[[], Tensor]]) -> dict[str, Tensor]:
        converter = deepcopy(group.converter)
        for pattern, key in group.parts:
            converter.add_tensor(group.first, key, pattern, make(key))
        made = converter.convert(group.first, model=self.model, config=self.model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}

    def _empty(self, key: str) -> Callable[[], Tensor]:
        entry = self.checkpoint.entries[key]
        return lambda: torch.empty(entry.shape, dtype=entry.dtype or torch.uint8, device="meta")

    def __contains__(self, name: object) -> bool:
        return name in self.shapes
