"""Adapters on a rewritten model: a folded rotation leaves the weights that an adapter is put on.

An adapter is made for the weights of its checkpoint, and those of v_proj and o_proj are others once a rotation is folded in. So
the rotation of a layer is taken out again, and runs online from then on, before anything wraps one of its projections. That
holds for every way an adapter gets on (PEFT's wrappers, `load_adapter`, training a new one, merging it) and for wrappers of any
other library, because each registers the projection as a part of a module of its own, which torch reports.

Formula    W_V = (I ⊗ H) W_V',  b_V = b_V' (I ⊗ H)^T,  W_O = W_O' (I ⊗ H)^T; float64, rounded once to the dtype of the weight
Source     ours
Raises     UnsupportedError for a wrapper with keys and values of its own, and for folded weights that are offloaded
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.nn.modules.module import (
    _global_module_registration_hooks,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.utils.parametrize import ParametrizationList

from kvsink.errors import UnsupportedError
from kvsink.kernels.hadamard import hadamard_ref
from kvsink.model.fold import FOLDED, fold_value_rotation

__all__ = ["check_prompts", "unfold", "watch"]

_MARK = "_kvsink_folded"  # on a projection that holds a rotation; copied and pickled with it
_MODELS: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_PROJECTIONS = tuple(dict.fromkeys(name.partition(".")[0] for name in FOLDED))
_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")


def check_prompts(wrapper: Any) -> None:
    """Raise UnsupportedError for a PEFT wrapper that hands the model keys and values of its own, in a cache of its own."""
    kind = getattr(wrapper, "__dict__", {}).get("peft_type", "")
    if (name := str(getattr(kind, "value", kind))) in _PREFIXES:
        raise UnsupportedError(
            f"{name} hands the model keys and values in a 16-bit cache of its own, which holds no packed rows and knows of no "
            "rotated values; use it on the model before its rewrite"
        )


def watch(model: nn.Module) -> None:
    """Take the rotations folded into this model out again when something is put on their projections. Safe to call again."""
    if _registered not in _global_module_registration_hooks.values():
        register_module_module_registration_hook(_registered)
        register_module_parameter_registration_hook(_parametrized)
    _MODELS.add(model)
    runtime: Any = model.__dict__.get("_kvsink_runtime")
    for layer in _folded(runtime):
        attention = model.get_submodule(runtime.anatomy.attentions[layer])
        for name in _PROJECTIONS:
            getattr(attention, name).__dict__[_MARK] = True


def _folded(runtime: Any) -> list[int]:
    """Layers whose value rotation is in the weights."""
    plans = runtime.plans if runtime is not None else ()
    return [i for i, p in enumerate(plans) if p.codec is not None and p.codec.value.folded]


def _registered(module: nn.Module, name: str, part: nn.Module | None) -> None:
    """Called by torch whenever a module becomes a part of another one."""
    if part is not None and "_kvsink_runtime" in part.__dict__:
        check_prompts(module)
    if part is None or _MARK not in part.__dict__ or isinstance(module, fx.GraphModule) or type(module) is nn.Module:
        return  # the latter two are graphs that were traced: nothing is put on it
    _give_back(part, module)


def _parametrized(module: nn.Module, name: str, weight: nn.Parameter | None) -> None:
    """Called by torch whenever a parameter becomes part of a module. One that is computed from the same numbers stays folded."""
    if isinstance(module, ParametrizationList) and not any(hasattr(m, "right_inverse") for m in module):
        _give_back(weight, module)


def _give_back(taken: nn.Module | nn.Parameter | None, taker: nn.Module) -> None:
    """Unfold the layer that a projection or its weight belongs to, unless its own attention module takes it."""
    for model in list(_MODELS):
        runtime: Any = model.__dict__.get("_kvsink_runtime")
        for layer in _folded(runtime):
            attention = model.get_submodule(runtime.anatomy.attentions[layer])
            for projection in (getattr(attention, name) for name in _PROJECTIONS):
                if taker is not attention and any(part is taken for part in (projection, *projection.parameters(False))):
                    unfold(model, layer)
                    return


def unfold(model: nn.Module, layer: int) -> None:
    """Take the value rotation of one layer out of the weights, and let it run online. Caches made before are refused afterwards.

    Raises UnsupportedError when the weights are offloaded, or computed from others.
    """
    runtime: Any = model.__dict__["_kvsink_runtime"]
    name = runtime.anatomy.attentions[layer]
    attention, plan = model.get_submodule(name), runtime.plans[layer]
    order = plan.codec.value.order
    held = dict(attention.named_parameters())
    if any(part not in held or held[part].is_meta for part in FOLDED if "bias" not in part):
        raise UnsupportedError(
            f"{name} holds a folded value rotation in weights that are offloaded or computed from others, so no adapter can be put "
            "on it; rewrite the model with fold=False"
        )
    fold_value_rotation(attention, order, inverse=True)
    new = copy.copy(runtime)
    value = replace(plan.codec.value, folded=False)
    new.plans = (*runtime.plans[:layer], replace(plan, codec=replace(plan.codec, value=value)), *runtime.plans[layer + 1 :])
    new.tables, mean = dict(runtime.tables), f"layers.{layer}.v_mean"
    if mean in new.tables:
        new.tables[mean] = hadamard_ref(new.tables[mean], order, inverse=True)
    runtime.replaced = f"something was put on {name} since this cache was made; make one with kvsink.KVSinkCache.for_model(model)"
    model._kvsink_runtime = new
    for projection in _PROJECTIONS:
        getattr(attention, projection).__dict__.pop(_MARK, None)
