"""How transformers' attention asks a packed cache: outside compiled graphs, packed layers attend over their codes themselves.

Formula    see `kvsink.kernels.attend`
Source     ours
Differs    transformers' "sdpa" attention goes through here; the first rows of a sequence pass on to it as they came, and so do keys
           that do not come from a kvsink layer
Shapes     query [B, Hq, S, D], key and value the rows just appended [B, Hkv, S, D] → [B, S, Hq, D]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvsink.model.handover import Handover

__all__ = ["ASKED", "NOTES", "causal_mask", "install_attention", "is_plain_causal"]

ASKED: Handover[ReferenceType[Any]] = Handover()
"""With keys that a packed layer returned: the layer, which attends over them itself."""
NOTES: Handover[Callable[[nn.Module, Tensor, Tensor], None]] = Handover()
"""With keys that somebody looks at: who is told of the attention module, its queries and its values."""
_CAUSAL: Handover[bool] = Handover()


def causal_mask(rows: int, slots: int, device: torch.device) -> Tensor:
    """A mask that stands for plain causality: transformers passes a 4-D mask on as it is, and none of L x S is built."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(1, 1, rows, max(slots, 1))
    _CAUSAL.leave(mask, True)
    return mask


def is_plain_causal(mask: Tensor | None) -> bool:
    """True for no mask, and for one made by `causal_mask`."""
    return mask is None or _CAUSAL.found(mask) is not None


def install_attention() -> None:
    """Put the question to kvsink layers before transformers' own "sdpa" attention. Safe to call again."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if getattr(plain, "_kvsink", False):
        return

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        compiling = torch.compiler.is_compiling()
        asked = None if compiling else ASKED.found(key)
        layer = None if asked is None else asked()
        if layer is None:
            note = None if compiling else NOTES.found(key)
            if note is not None:
                note(module, query, value)
            return plain(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
        layer.check_given(key, value)
        query = layer.in_order(query)
        if layer.begins():
            seen = None if attention_mask is None or is_plain_causal(attention_mask) else attention_mask[..., : key.shape[2]]
            return plain(module, query, key, value, seen, dropout, scaling, is_causal, **kwargs)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = None if is_plain_causal(attention_mask) else attention_mask
        return layer.attend(query, mask, scale, mask is None).transpose(1, 2).contiguous(), None

    attention._kvsink = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS.register("sdpa", attention)
