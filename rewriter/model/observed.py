"""The attention function "kvsink_observed": the model's own SDPA, and then somebody looks at its queries.

A cache sees keys and values, never queries; anchors and the attention patterns of layers are judged by them. A model whose
plan needs that is switched to this function, registered with transformers together with SDPA's mask. An attention
module whose observer is idle runs plain SDPA.

Source     ours; transformers' AttentionInterface
Raises     UnsupportedError when the model's present attention is not one that SDPA can stand in for
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvsink.errors import UnsupportedError

__all__ = ["OBSERVED", "Observer", "check_observable", "observed_attention", "switch_attention", "watching"]

OBSERVED = "kvsink_observed"
See = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", float], None]  # q, k, v, out, mask, scale


class Observer:
    """Who watches one attention module at the moment; hangs on the module."""

    def __init__(self) -> None:
        self.see: See | None = None

    def __getstate__(self) -> dict[str, None]:
        """A copy of the module is watched by nobody yet; who watches this one may hold a whole cache."""
        return {"see": None}


def observed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA, then the observer of the module: query [B, Hq, S, D]; key, value [B, H, L, D] → [B, S, Hq, D]."""
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    observer = getattr(module, "_kvsink_observer", None)
    if observer is not None and observer.see is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        observer.see(query, key, value, out.transpose(1, 2), attention_mask, scale)
    return out, None


ALL_ATTENTION_FUNCTIONS.register(OBSERVED, observed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(OBSERVED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def check_observable(model: nn.Module) -> None:
    """Raise UnsupportedError unless the decoder's attention is SDPA, or an eager one without a softcap."""
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    held = getattr(config, "_attn_implementation", None)
    if held not in ("sdpa", "eager", OBSERVED):
        raise UnsupportedError(
            f"{type(model).__name__} runs {held!r} attention, whose queries cannot be observed; load it with "
            "attn_implementation='sdpa', or protect without anchors"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedError(
            f"{type(model).__name__} caps its attention logits, which SDPA does not; protect without anchors (kvsink:5)"
        )


def switch_attention(model: nn.Module, on: bool) -> None:
    """Give the decoder the observed attention, or back what it had."""
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    held = config._attn_implementation
    if on and held != OBSERVED:
        check_observable(model)
        model._kvsink_attention = held
        config._attn_implementation = OBSERVED
    elif not on and held == OBSERVED:
        config._attn_implementation = model.__dict__.pop("_kvsink_attention", "sdpa")


@contextmanager
def watching(model: nn.Module, names: tuple[str, ...], see: Callable[[int], See]) -> Iterator[None]:
    """Let see(i) watch the i-th of the attention modules `names` for the time of a `with` block."""
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    before = config._attn_implementation
    earlier = [model.get_submodule(name).__dict__.get("_kvsink_observer") for name in names]
    try:
        switch_attention(model, True)
        for i, name in enumerate(names):
            observer = Observer()
            observer.see = see(i)
            model.get_submodule(name)._kvsink_observer = observer  # type: ignore[assignment]
        yield
    finally:
        for name, old in zip(names, earlier, strict=True):
            model.get_submodule(name).__dict__["_kvsink_observer"] = old
        if before != OBSERVED:
            switch_attention(model, False)
