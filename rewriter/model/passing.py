"""Under which name a model takes a cache, and gives it back: transformers says `cache` since 5.24, `past_key_values` before.

Differs    a model of its own code may take the old name still: the signature decides, not the version
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import transformers

__all__ = ["cache_name", "cache_of", "given_cache", "name_in"]


_NEW = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 24)


@lru_cache(maxsize=256)
def name_in(forward: Any) -> str:
    """The keyword under which a function takes a cache, or hands it on."""
    taken = inspect.signature(forward).parameters if forward is not None else ()
    if "cache" in taken or "past_key_values" in taken:
        return "cache" if "cache" in taken else "past_key_values"
    return "cache" if _NEW and forward is not None else "past_key_values"  # handed on to a model inside, under today's name


def cache_name(model: Any) -> str:
    """The keyword under which `model`, compiled or with adapters around it, takes its cache."""
    model = getattr(model, "_orig_mod", model)
    inner = getattr(model, "get_base_model", None)  # adapters: their own forward takes anything
    return name_in(getattr(type(inner() if inner is not None else model), "forward", None))


def given_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that gives `cache` to `model`."""
    return {cache_name(model): cache}


def cache_of(output: Any) -> Any:
    """The cache in what a model or `generate()` returned, or None."""
    held = getattr(output, "cache", None)
    return getattr(output, "past_key_values", None) if held is None else held
