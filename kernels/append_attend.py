"""`append_` and `attend` as one op, for codecs in tiles: in a decode step both run side by side.

Formula    append_(k, v, …); out = attend(q, k, v, …), see `kvsink.kernels.append` and `kvsink.kernels.attend`
Source     ours
Differs    side by side, a new row enters the exact rows after attention: the row it drives out is exact one step longer
Shapes     q [B, Hq, S, D], k after RoPE and v [B, Hkv, S, D], candidates, state, params, mask as in the two ops
           → [B, Hq, S, D]
Exact      codes as `append_`; output as `attend`
Cost       as both; under CUDA graphs the coding runs in the shadow of the attention
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import packed
from .append import append_cpu, append_ref, append_tiles
from .attend import attend_any, attend_packed
from .base import resolve_codec

__all__ = ["append_attend", "append_attend_"]


def append_attend(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, candidates: Sequence[Tensor], state: Sequence[Tensor],
    params: Sequence[Tensor], mask: Tensor | None, scale: float, is_causal: bool, codec: str,
) -> Tensor:  # fmt: skip
    """The op outside graphs; its result may have any strides."""
    c = resolve_codec(codec)
    lib = packed.usable(c, q.shape[1], k)
    if lib is not None:
        p, st = dict(zip(c.param_names(), params, strict=True)), c.named(state)
        if q.shape[2] == 1:
            out = packed.step(lib, c, q, k, v, positions, candidates, st, p, mask, scale)
            if out is not None:
                return out
        append_tiles(lib, c, k, v, positions, candidates, state, params)
        found = attend_packed(lib, c, q, k, v, state, params, mask, scale, is_causal)
        if found is not None:
            return found
    else:
        none = k.new_empty(1, k.shape[2], 0)
        if not append_cpu(k, v, positions, none, none, candidates, state, params, c, True):
            append_ref(k, v, positions, none, none, candidates, state, params, codec, True)
    return attend_any(q, k, v, state, params, mask, scale, is_causal, codec)


@torch.library.custom_op("kvsink::append_attend_", mutates_args=("state",))
def append_attend_(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, candidates: Sequence[Tensor], state: Sequence[Tensor],
    params: Sequence[Tensor], mask: Tensor | None, scale: float, is_causal: bool, codec: str,
) -> Tensor:  # fmt: skip
    out = append_attend(q, k, v, positions, candidates, state, params, mask, scale, is_causal, codec)
    return out.contiguous()


@append_attend_.register_fake
def _outputs(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, candidates: Sequence[Tensor], state: Sequence[Tensor],
    params: Sequence[Tensor], mask: Tensor | None, scale: float, is_causal: bool, codec: str,
) -> Tensor:  # fmt: skip
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
