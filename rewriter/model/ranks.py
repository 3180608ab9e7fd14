"""A model that transformers' tensor parallelism splits over processes: which heads of a plan are here, and what cannot be split.

Every process holds the residual stream whole and the heads of its rank, so that all name the same rows to stay exact.

Source     transformers' `DistributedConfig`, `tp_plan` and meshes, as 5.24 has them
Declines   key-value heads that do not divide, codecs that code heads together, hybrid and vision models, anchors, attention that is
           split otherwise than by heads; pipelines, FSDP and expert parallelism
Raises     UnsupportedError in one line, before weights load where the plan is at hand
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from kvsink.errors import UnsupportedError
from kvsink.model.runtime import Runtime

__all__ = ["check_ranks", "ranks_of", "split"]

_OTHERS = {"pp_size": "pipeline parallelism", "dp_size": "FSDP", "ep_size": "expert parallelism"}
_PARTS = ("colwise", "packed_colwise", "local_params")  # styles that leave a process with a part of what a module puts out
_WHOLE = "load it in one process"


def ranks_of(model: nn.Module) -> int:
    """Processes among which the weights of a model are split, or are going to be; 1 for a whole one."""
    asked: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    sizes = (getattr(asked, name, None) or 1 for name in ("tp_size", *_OTHERS))
    return int(max(getattr(model, "_tp_size", None) or 1, *sizes))


def check_ranks(model: nn.Module) -> None:
    """Raise UnsupportedError for a model that is split, or is going to be, by something else than tensor parallelism that is read
    here."""
    asked: Any = getattr(model.config, "distributed_config", None)
    why = next((f"{words} is not served" for name, words in _OTHERS.items() if (getattr(asked, name, None) or 1) > 1), "")
    if not why and ranks_of(model) > 1 and not hasattr(type(model), "maybe_distribute_model"):
        why = "this version of transformers splits weights in a way that is not read here (5.24 does otherwise)"
    if why:
        raise UnsupportedError(f"kvsink over {ranks_of(model)} processes: {why}; pass DistributedConfig(tp_size=N) alone")


def split(model: nn.Module, runtime: Runtime) -> None:
    """Check that a runtime can be split as its model is going to be; once weights are here, leave the heads of this rank."""
    if (ranks := ranks_of(model)) == 1:
        return
    if why := _why(runtime, ranks):
        raise UnsupportedError(f"kvsink over {ranks} processes: {why}; {_WHOLE}")
    runtime.ranks = ranks
    meshes: Any = getattr(model, "_mesh_manager", None)  # made between the two
    if _by_heads(model, runtime) and meshes is not None:
        runtime.keep(meshes.get_mesh("tp").get_local_rank(), ranks)


def _why(runtime: Runtime, ranks: int) -> str:
    """Why a plan cannot be split; empty where it can."""
    a = runtime.anatomy
    if a.towers:
        return f"{a.towers[0][0]} is an encoder beside the decoder, and vision models are not split"
    for i, (plan, heads) in enumerate(zip(runtime.plans, a.layers, strict=True)):
        if a.layer_types[i] not in ("full_attention", "sliding_attention"):
            return f"layer {i} is {a.layer_types[i]}, and hybrid models are not split"
        if heads.kv % ranks or heads.query % ranks:
            return f"{heads.kv} key-value and {heads.query} query heads of layer {i} do not divide"
        c = plan.codec
        if c is None:
            continue
        if i in a.apart:
            return f"keys and values of layer {i} are read by more than one call of its own attention"
        if c.anchors is not None:
            return f"layer {i} keeps {c.anchors} exact, which the attention of all heads decides"
        if c.modal:
            return f"layer {i} is coded by modality, and vision models are not split"
        for name, side in (("keys", c.key), ("values", c.value)):
            if side.shares_heads:
                return f"{name} of layer {i} {side.shares_heads}"
    return ""


def _by_heads(model: Any, runtime: Runtime) -> bool:
    """Whether each process attends with heads of its own, or all with every head."""
    over, plan = model.config.distributed_config.tp_plan, model.tp_plan or {}
    if isinstance(over, dict):
        plan = {**plan, **over} if over else {}
    found = set()
    for name in runtime.anatomy.attentions:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        parts = {n.removeprefix(name) for n, s in plan.items() if s in _PARTS and f"{n}.".startswith(f"{name}.")}
        found.add("heads" if parts == {".q_proj", ".k_proj", ".v_proj"} else "other" if parts else "whole")
    if len(found) > 1 or "other" in found:
        name, ranks = type(model).__name__, ranks_of(model)
        raise UnsupportedError(
            f"kvsink over {ranks} processes: {name} is split otherwise than by the heads of q_proj, k_proj and v_proj; {_WHOLE}"
        )
    return found == {"heads"}
