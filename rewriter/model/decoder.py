"""A live model as the steps of a rewrite work on it: what is known of it once, and the few things that are done with it.

Source     ours
Raises     UnsupportedError for a model without decoder blocks; ModelError for damaged weights
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvsink.codecs.protect import SinkStage
from kvsink.errors import ModelError
from kvsink.model.anatomy import Anatomy, anatomy
from kvsink.model.fingerprint import fingerprint_of
from kvsink.model.fold import is_plain
from kvsink.model.offload import number_of, place_of, weight_of
from kvsink.model.passing import name_in
from kvsink.model.runtime import Runtime, attach
from kvsink.model.tables import LayerPlan

if TYPE_CHECKING:
    from kvsink.calibrate.streaming import Stream

__all__ = ["Decoder"]


class Decoder:
    """A model, where its modules stand, and what it computes on.

    stream: gives a model without weights its layers one at a time; None for a model that holds them. where: what is known of its
    modules already. device, dtype: those its weights are, or will be, computed on and in.
    """

    def __init__(self, model: nn.Module, where: Anatomy | None = None, stream: Stream | None = None) -> None:
        self.model: Any = model
        self.stream = stream
        self.where = anatomy(model) if where is None else where
        self.config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        base = model.get_submodule(self.where.base)
        self.device = place_of(base) if stream is None else stream.device
        self.dtype = number_of(base).dtype
        self._cache_name = name_in(type(model).forward)

    @property
    def name(self) -> str:
        """Where the model came from, or its class."""
        return getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__

    @property
    def runtime(self) -> Runtime | None:
        """What an earlier rewrite has attached, or None."""
        found: Runtime | None = self.model.__dict__.get("_kvsink_runtime")
        return found

    def carrying(
        self, plans: tuple[LayerPlan, ...], tables: Mapping[str, Tensor], stages: tuple[SinkStage, ...], method: str
    ) -> Runtime:
        """A runtime of this model, attached to nothing yet."""
        return Runtime(self.model, plans, tables, stages, method, self.where)

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a layer."""
        found: nn.Module = self.model.get_submodule(self.where.attentions[layer])
        return found

    def given(self, cache: Any) -> dict[str, Any]:
        """The keyword argument that gives the model a cache."""
        return {self._cache_name: cache}

    def fingerprint(self) -> Tensor:
        """See `kvsink.model.fingerprint`."""
        return fingerprint_of(self.model.named_parameters(), self.read)

    def read(self, name: str) -> Tensor:
        """One parameter, from where it was offloaded to, or from the checkpoint, when it is not in memory."""
        if self.stream is not None:
            return self.stream.read(name)
        held: Tensor = self.model.get_parameter(name)
        return weight_of(self.model, name) if held.is_meta else held

    @contextmanager
    def attached(self, runtime: Runtime) -> Iterator[None]:
        """The model with a runtime for a while; afterwards with the one it had."""
        earlier = self.runtime
        self.restore(runtime)
        try:
            yield
        finally:
            self.restore(earlier)

    def restore(self, earlier: Runtime | None) -> None:
        """Give the model the runtime back that it had, or one that it is to have, in place of any other; None: take it off."""
        attach(self.model, earlier)

    def check_weights(self) -> None:
        """Raise ModelError when a weight is NaN or infinite; weights in a format of their own are not looked into."""
        for name, p in self.model.named_parameters():
            if is_plain(p) and not p.is_meta and not torch.isfinite(p).all():
                raise ModelError(f"weight {name} holds NaN or infinite numbers; the checkpoint is damaged, fetch it again")
