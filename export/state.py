"""Names and shapes of the packed cache as plain tensors of an exported graph.

Per packed layer N: `past_key_values.N.key` and `.value` (codes uint8 [B, H, P, bytes], or rows of a side kept in 16 bit),
`.key_scale`, `.value_scale` (float16, where the quantizer has scales), and the side store `.exact_key`, `.exact_value`,
`.exact_slot`, `.exact_score` where rows are kept exact. Layers left alone have `.key` and `.value` alone.
`past_key_values.positions` int32 [B, P] is shared. Everything but the side store grows by the new rows;
`present.…` has the same names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvsink.codecs import Codec
from kvsink.model.runtime import Runtime

__all__ = ["FIXED", "STATE_OF", "empty_past", "past_names"]

FIXED = ("exact_key", "exact_value", "exact_slot", "exact_score")  # state that does not grow with the tokens
STATE_OF = {
    "key": "k_codes",
    "key_scale": "k_scale",
    "value": "v_codes",
    "value_scale": "v_scale",
    "exact_key": "exact_k",
    "exact_value": "exact_v",
    "exact_slot": "exact_slot",
    "exact_score": "exact_score",
}
"""Name in the graph → name in `kvsink.codecs.STATE_NAMES`."""


def past_names(codec: Codec | None) -> tuple[str, ...]:
    """Names of the tensors of one layer, without the prefix."""
    if codec is None:
        return ("key", "value")
    names = []
    for name, side in (("key", codec.key), ("value", codec.value)):
        names.append(name)
        if side.packed and codec.row_scales(side, 8 * side.group_size):
            names.append(f"{name}_scale")
    return (*names, *FIXED) if codec.segments else tuple(names)


def empty_past(runtime: Runtime, batch: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A past of `length` slots by graph name, as a cache would begin it; every slot holds zeros."""
    a = runtime.anatomy
    out = {"positions": torch.zeros(batch, length, dtype=torch.int32)}
    for i, plan in enumerate(runtime.plans):
        if plan.codec is None:
            for name in ("key", "value"):
                out[f"{i}.{name}"] = torch.zeros(batch, a.kv_heads, length, a.head_dim, dtype=dtype)
            continue
        layout = plan.codec.layout(batch, a.kv_heads, a.head_dim, a.head_dim, length, dtype)
        for name in past_names(plan.codec):
            shape, kind, fill = layout[STATE_OF[name]]
            out[f"{i}.{name}"] = torch.full(shape, fill, dtype=kind)
    return out
