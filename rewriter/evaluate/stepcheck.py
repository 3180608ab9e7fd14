"""The compiled step of a rewritten model against the same step uncompiled: the last part of what a rewrite proves of itself.

Formula    three compiled steps give the logits of the same steps uncompiled; each attends to what those before have coded;
           |difference| / |uncompiled| in the Euclidean norm
Source     ours
Shapes     ids int64 [1, 11]: eight tokens of a prompt, three steps
Raises     UnsupportedError naming what was found and the bound it had to keep
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from kvsink.cache.cache import KVSinkCache
from kvsink.calibrate.probing import probe_ids
from kvsink.errors import KvsinkError, UnsupportedError
from kvsink.evaluate.selfcheck import at_eight_bits, off, rounding
from kvsink.model.anatomy import Anatomy
from kvsink.model.offload import number_of, place_of
from kvsink.model.passing import given_cache
from kvsink.model.runtime import Runtime

__all__ = ["check_step"]


@torch.no_grad()
def check_step(model: nn.Module, runtime: Runtime, notes: list[str]) -> float | None:
    """Steps of the compiled model against the same steps uncompiled, over two caches of a fixed length filled alike.

    The graph runs operator by operator: what is checked is what the passes made of it. It holds the first layers of the model, as
    many as it takes to have one of every kind. Where it cannot be run at all, a note is left. Raises UnsupportedError.
    """
    dtype = number_of(model).dtype
    with _first_layers(model, runtime.anatomy, _one_of_each(runtime)):
        try:
            plain, compiled = _steps(model)
        except KvsinkError:
            raise
        except Exception as error:  # a model that wants a mask of its own over a cache of a fixed length
            notes.append(
                f"a compiled step was not checked: {type(error).__name__}: {' '.join(str(error).split())[:160]}; leave "
                "compile_config and torch.compile out"
            )
            return None
    apart = off(compiled, plain)
    bound = max(rounding(dtype) * len(runtime.plans) ** 0.5, 1e-3 if dtype == torch.float32 else 0.0)
    if not apart <= bound:
        raise UnsupportedError(
            f"self-check: a compiled step gives logits {apart:.2g} of their size off the same step uncompiled ({bound:.2g} would "
            "be rounding); leave this model as it is, or rewrite it with --no-check and do not compile it"
        )
    return apart


def _steps(model: nn.Module) -> list[Tensor]:
    """Logits of the last of three steps behind a prompt of eight tokens, uncompiled and compiled."""
    ids = probe_ids(model.config, 1, 11, 3).to(place_of(model))
    found = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="kvsink", options={"kvsink.inner": "eager"}, dynamic=False)
    for step in (model, compiled):
        cache = KVSinkCache.for_model(model, 1, 256)
        model(input_ids=ids[:, :8], use_cache=True, **given_cache(model, cache))
        for at in range(8, 11):
            logits = step(input_ids=ids[:, at : at + 1], use_cache=True, **given_cache(model, cache)).logits
        found.append(logits)
    torch._dynamo.reset()
    return found


def _one_of_each(runtime: Runtime) -> int:
    """Layers from the first on that show every kind: of layer, heads, turning, codec but for its widths, and sources of rows."""
    seen, last = set(), 0
    where = runtime.anatomy
    for i, plan in enumerate(runtime.plans):
        codec = None if plan.codec is None else at_eight_bits(plan.codec)
        sources = tuple(dict.fromkeys(s.source.partition(":")[0] for s in plan.segments))
        kinds = tuple(s.kind for s in (plan.codec.key, plan.codec.value)) if plan.codec is not None else ()
        kind = where.layer_types[i], where.layers[i], where.turnings[i], codec and replace(codec, segments=()), sources, kinds
        if kind not in seen:
            seen.add(kind)
            last = i
    return last + 1


@contextmanager
def _first_layers(model: nn.Module, where: Anatomy, count: int) -> Iterator[None]:
    """The model with its first layers alone, where they stand in one list and a pass over them goes through."""
    path = where.blocks[0].rpartition(".")[0]
    blocks = model.get_submodule(path)
    if not isinstance(blocks, nn.ModuleList) or count >= len(blocks) or len(blocks) != len(where.blocks):
        yield
        return
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, blocks[:count])
    try:
        try:
            model(input_ids=probe_ids(model.config, 1, 2), use_cache=False)
        except Exception:  # a model that counts its layers elsewhere runs whole
            setattr(model.get_submodule(owner), name, blocks)
        yield
    finally:
        setattr(model.get_submodule(owner), name, blocks)
