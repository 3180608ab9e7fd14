"""A model in float64 for a while: parameters, norms and angles, so that two ways to its numbers agree far below any threshold.

`model.double()` leaves some float32 behind: transformers computes norms and rotary angles in float32 whatever the model is.
`in_float64` has them computed in float64 too. What kvsink itself computes in float32 where the model is float64 are products of
two table entries and of a table entry with a stored scale; no sum is among them, so that everybody gets the same. The epsilon of a
norm is rounded to float32, since LayerNormalization holds it as a number of that type.

Exact      yes: parameters come back as they were, bit for bit
Raises     nothing
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["in_float64", "parameters_as"]

_NARROW = ("Norm", "Rotary", "Router")  # of class names: modules that transformers has in float32 whatever the model is

_EPSILON, _EXPERTS = ("eps", "variance_epsilon"), "_experts_implementation"  # grouped products of experts have no float64


class _Float64(TorchFunctionMode):
    """Where a function is asked for float32, it gives float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(_wider(a) for a in args)
        return func(*args, **{name: _wider(a) for name, a in (kwargs or {}).items()})


def _wider(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def _wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wide(*args: Any, **kwargs: Any) -> Any:
        with _Float64():
            return forward(*args, **kwargs)

    return wide


@contextmanager
def parameters_as(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The parameters of a model in another dtype for the time of a `with` block; tables and angles stay as they are."""
    held = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = held[name]


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """`model` in float64 for the time of a `with` block, with nothing but the tables of kvsink in float32."""
    modules = [m for m in model.modules() if any(part in type(m).__name__ for part in _NARROW)]
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    given = [(m, name, vars(m)[name]) for m in modules for name in _EPSILON if isinstance(vars(m).get(name), float)]
    given += [(config, _EXPERTS, getattr(config, _EXPERTS))] if hasattr(config, _EXPERTS) else []
    with parameters_as(model, torch.float64):
        try:
            for owner, name, value in given:
                setattr(owner, name, "batched_mm" if name == _EXPERTS else float(torch.tensor(value)))
            for module in modules:
                module.forward = _wrapped(module.forward)
            yield
        finally:
            for module in modules:
                vars(module).pop("forward", None)
            for owner, name, value in given:
                setattr(owner, name, value)
