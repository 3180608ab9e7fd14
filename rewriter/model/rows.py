"""What a call of a model says of its new rows: which of them are padding, and which stand for images and video.

Shapes     masks as transformers takes them, ids [B, S] → bool [B, S]
Raises     KvsinkError for a modality mask that is not that of its rows
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvsink.errors import KvsinkError

__all__ = ["MODALITY_MASKS", "check_mask", "first_slot", "mask_of", "real_rows", "visual_rows", "visual_tokens"]

_HIDDEN = -1000.0  # an additive mask hides from here down: exp(-1000) is 0 in float64


def visual_tokens(config: Any) -> tuple[int, ...]:
    """Token ids that stand for image and video patches in a model's input; empty for a text model."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = (getattr(config, name, None) for name in names)
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int) and token >= 0))


def visual_rows(ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """bool [B, S]: True at the given token ids."""
    out = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens:
        out = out | (ids == token)
    return out


MODALITY_MASKS = ("mm_token_type_ids", "token_type_ids")
"""What processors call their modality mask: 0 text, 1 image, 2 video."""


def check_mask(visual: Tensor, rows: Any) -> None:
    """Raise KvsinkError when a modality mask is not that of the rows it goes with."""
    if tuple(visual.shape) != tuple(rows[:2]):
        raise KvsinkError(
            f"the modality mask is {tuple(visual.shape)} for {tuple(rows[:2])} tokens; pass the processor's mask with the ids it "
            "came with"
        )


def mask_of(kinds: Tensor, ids: Tensor, held: Any) -> Tensor:
    """bool [B, S]: where a processor's mask of the new ids, or of everything held and the new ids, says image or video."""
    new = ids.shape[1]
    if kinds.shape[1] > new and not torch.compiler.is_compiling() and kinds.shape[1] == int(held) + new:
        kinds = kinds[:, -new:]
    check_mask(kinds, ids.shape)
    return kinds != 0


def real_rows(mask: Any, batch: int, new: int, cache: Any) -> Tensor | None:
    """bool [B, S]: False where a new row is padding, by what the attention mask says; None without a mask.

    2-D, 0 at padding: a column stands for a token. 4-D, bool or additive: a row that some new row looks at is real. A mask of
    flex attention: a row that looks at itself. Documents packed in one sequence, which do not see each other, are real.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if callable(look := getattr(mask, "mask_mod", None)):
        row = torch.arange(new, device=mask.kv_num_blocks.device)[None]
        sequence = torch.arange(mask.shape[0], device=row.device)[:, None]
        return look(sequence, torch.zeros_like(sequence), row, row + first_slot(cache)).expand(batch, new)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        held = first_slot(cache, True)
        if isinstance(held, Tensor):  # a fixed length: the mask may have a column for every slot
            columns = torch.arange(new, device=mask.device) + held
            part = mask.index_select(1, columns.clamp_max(mask.shape[1] - 1)).to(torch.bool)
            return part if mask.shape[1] == cache.get_max_length() else part & (columns < mask.shape[1])
        ahead = isinstance(held, int) and hasattr(cache, "first_slot") and mask.shape[1] > held + new
        return (mask[:, held : held + new] if ahead else mask[:, -new:]).to(torch.bool)
    seen = mask[:, 0]  # [B or 1, S or 1, slots]
    if seen.shape[-1] > new:
        first = first_slot(cache)
        slots = torch.arange(new, device=mask.device) + first
        seen = seen.index_select(2, slots.clamp_max(seen.shape[2] - 1))  # rows that do not fit are refused where they are stored
    if seen.dtype != torch.bool:
        seen = seen > _HIDDEN
    if seen.shape[1] > 1:  # a row that sees everything, though the last one does not, stands for one that sees nothing
        whole = seen.all(2, keepdim=True)
        seen = seen & (~whole | whole[:, -1:])
    return seen.any(1).expand(batch, -1)


def first_slot(cache: Any, moved: bool = False) -> Any:
    """See `KVSinkCache.first_slot`; other caches of a rewritten model know their length."""
    return cache.first_slot(moved) if hasattr(cache, "first_slot") else cache.get_seq_length()
