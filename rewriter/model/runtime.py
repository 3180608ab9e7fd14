"""What a rewritten model carries: the plan of each layer and its tables, and the hooks that tell a cache what it cannot see."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kvsink.codecs.protect import SinkStage
from kvsink.errors import UnsupportedError
from kvsink.model.anatomy import Anatomy, anatomy, last_projection
from kvsink.model.hooks import EndFrame, Massive, Modality, NewFrame, Observe, Pivots, Positions, Stage, Written
from kvsink.model.observed import Observer, switch_attention
from kvsink.model.rows import visual_tokens
from kvsink.model.tables import LayerPlan, Tables
from kvsink.model.turning import turns_back

__all__ = ["Runtime", "attach", "detach", "runtime_of"]


class Runtime(Tables):
    """Plan, calibrated tables and rotary angles of one model; shared by all its caches.

    plans: one LayerPlan per layer; tables: tensors named `layers.{i}.{param}` (float32, or int64 permutations); stages: the
    emergence stages; method: the name reports show; where: what is known of the model, None to look at its modules alone.
    """

    def __init__(
        self,
        model: nn.Module,
        plans: tuple[LayerPlan, ...],
        tables: Mapping[str, Tensor],
        stages: tuple[SinkStage, ...],
        method: str,
        where: Anatomy | None = None,
    ) -> None:
        where = anatomy(model) if where is None else where
        super().__init__(plans, tables, where, model.get_submodule(where.rotary) if where.rotary else None)
        self.config: Any = model.config
        self._through_functions = bool(getattr(model, "_supports_attention_backend", False))
        self.stages, self.method = stages, method
        self.extra: dict[str, Any] = {}  # what a folder's plan says beside it, written again with it
        self.ranks = 1  # processes that the model is split over
        self.replaced = ""  # why caches made from this one are refused, once the model has another

    @property
    def asks(self) -> bool:
        """Whether attention goes through transformers' "sdpa" function, where a layer can answer it."""
        return self._through_functions and self.config.get_text_config(decoder=True)._attn_implementation == "sdpa"

    @property
    def anchored(self) -> list[int]:
        """Layers that keep anchors, and so have their queries looked at."""
        return [i for i, p in enumerate(self.plans) if p.codec is not None and p.codec.anchors is not None]

    @property
    def turns(self) -> bool:
        """Whether a layer takes the rotation of its keys back, or its statistics are being taken: positions then have one axis.

        With positions in several axes (M-RoPE) a row's key is taken as turned by its first axis alone; what the others turn it
        further stays in the key, so that storing and reading agree for every row.
        """
        return any(p.codec is None or turns_back(p.codec) for p in self.plans)


def attach(model: nn.Module, runtime: Runtime | None) -> None:
    """Give a model its runtime and hooks; an earlier runtime is detached first, and None leaves it at that."""
    detach(model)
    if runtime is None:
        return
    a = runtime.anatomy
    handles = []
    base = model.get_submodule(a.base) if a.base else model
    handles.append(base.register_forward_pre_hook(NewFrame(base, runtime.turns, _one_kind(model, a)), with_kwargs=True))
    handles.append(base.register_forward_hook(EndFrame(base), with_kwargs=True))
    for name in a.attentions:
        attention = model.get_submodule(name)
        handles.append(attention.register_forward_pre_hook(Positions(attention, runtime.rotary is not None), with_kwargs=True))
    stages = {f"stage:{s.block}": s for s in runtime.stages}
    done = set()
    for layer, plan in enumerate(runtime.plans):
        for segment in plan.segments:
            if segment.source in stages and segment.key not in done:
                done.add(segment.key)
                stage = stages[segment.source]
                block = model.get_submodule(a.blocks[stage.block])
                hook = Stage(block, segment.key, stage.channels, segment.count)
                handles.append(block.register_forward_hook(hook, with_kwargs=True))
            elif segment.source.startswith("sinks:") and segment.key not in done:
                done.add(segment.key)
                _, at, share = segment.source.split(":")
                stage, name = stages[f"stage:{at}"], a.blocks[int(at)]
                block, last = model.get_submodule(name), model.get_submodule(last_projection(model, a, int(at)))
                written = Written(block, segment.key, stage.channels[0], float(share) * stage.size, segment.count)
                handles += [last.register_forward_hook(written.see), block.register_forward_hook(written, with_kwargs=True)]
            elif segment.source.startswith("pivots:") and segment.key not in done:
                done.add(segment.key)
                _, at, least, ratio = segment.source.split(":")
                block = model.get_submodule(a.blocks[int(at)])
                pivots = Pivots(block, segment.key, segment.count, float(least), float(ratio))
                handles.append(block.register_forward_hook(pivots, with_kwargs=True))
            elif segment.source == "massive":
                block = model.get_submodule(a.blocks[layer])
                entries = Massive(block, f"{segment.key}@{layer}", segment.count)
                handles.append(block.register_forward_pre_hook(entries, with_kwargs=True))
    if any(p.codec is not None and p.codec.modal for p in runtime.plans):
        tokens = visual_tokens(model.config)
        around = [".".join(a.base.split(".")[:i]) for i in range(a.base.count(".") + 2)] if a.base else [""]
        for name in around:  # the model itself first, then inwards to the decoder
            outer = model.get_submodule(name)
            handles.insert(0, outer.register_forward_pre_hook(Modality(outer, tokens), with_kwargs=True, prepend=True))
    for layer in runtime.anchored:
        attention = model.get_submodule(a.attentions[layer])
        attention._kvsink_observer = Observer()  # type: ignore[assignment]
        handles.append(attention.register_forward_pre_hook(Observe(attention, layer), with_kwargs=True))
    if runtime.anchored:
        switch_attention(model, True)
    model._kvsink_runtime = runtime  # type: ignore[assignment]
    model._kvsink_handles = handles  # type: ignore[assignment]


def _one_kind(model: nn.Module, where: Anatomy) -> nn.Module | None:
    """The rotary module of a model whose layers all turn by the same angles, or None."""
    rotary = model.get_submodule(where.rotary) if where.rotary else None
    return None if rotary is None or "layer_type" in inspect.signature(rotary.forward).parameters else rotary


def detach(model: nn.Module) -> None:
    """Remove the hooks and the runtime, if there are any."""
    for handle in model.__dict__.pop("_kvsink_handles", ()):
        handle.remove()
    model.__dict__.pop("_kvsink_last_cache", None)  # see kvsink.cache.reuse
    earlier = model.__dict__.pop("_kvsink_runtime", None)
    for name in earlier.anatomy.attentions if earlier is not None else ():
        model.get_submodule(name).__dict__.pop("_kvsink_observer", None)
    if earlier is not None and earlier.anchored:
        switch_attention(model, False)


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime of a rewritten model; raises UnsupportedError when there is none."""
    runtime = getattr(model, "_kvsink_runtime", None)
    if runtime is None:
        raise UnsupportedError(
            f"{type(model).__name__} is not rewritten; call kvsink.rewrite(model, …) or load a folder made by kvsink-rewrite"
        )
    return runtime
