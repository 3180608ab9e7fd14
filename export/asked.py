"""Attention of models whose layers attend themselves: a layer leaves itself with the keys it returns, and is asked by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ReferenceType

from torch import Tensor, nn

from kvsink.model.handover import Handover

__all__ = ["ASKED", "attention_forward", "register"]

ASKED: Handover[ReferenceType[Any]] = Handover()  # with keys that a layer returned: the layer


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers that asks the layer; s_aux: learned sink logits [Hq]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    asked = ASKED.found(key)
    layer = None if asked is None else asked()
    assert layer is not None, "attention was given other keys than the cache returned"
    return layer.attend(query, key, value, attention_mask, scale, s_aux), None


def register(name: str, mask: Callable[..., Any] | None = None) -> None:
    """Make `attention_forward` known to transformers by a name; mask: what makes its mask, without it there is none."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(name, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask or (lambda *args, **kwargs: None))
