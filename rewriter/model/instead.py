"""A function in place of a method of one model, that is copied and pickled with the model, as a bound method is not.

A bound method pickles as the name of its function, looked up on a model that is not built yet; what comes back is the class's
own method, or nothing.

Source     ours
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from kvsink.model.adapters import watch
from kvsink.model.attention import install_attention

__all__ = ["Instead", "instead"]


class Instead:
    """Calls ours(model, ...); it has the signature of the method `name` of the model's class."""

    def __init__(self, model: nn.Module, name: str, ours: Callable[..., Any]) -> None:
        self.model, self.name, self.ours = model, name, ours

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.ours(self.model, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(getattr(type(self.model), self.name))
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or a model read in another process, which has not been told of packed caches yet."""
        self.__dict__.update(state)
        install_attention()
        watch(self.model)


def instead(model: nn.Module, **ours: Callable[..., Any]) -> None:
    """Put functions of (model, ...) in place of the methods of those names, of this model alone, unless that has been done."""
    for name, function in ours.items():
        if name not in vars(model) and hasattr(type(model), name):
            setattr(model, name, Instead(model, name, function))
