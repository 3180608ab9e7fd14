"""The 16-bit side of `kvsink-bench kernels`: decode attention by PyTorch's fastest backend, alone and with its cache write.

Formula    alone: softmax(q K^T / sqrt(D)) V over T rows; with its write: row T - 1 of both caches is written first
Source     the write is that of transformers' StaticCache, two `index_copy_`, or one launch for both rows as a compiler fuses them
Shapes     q [B, Hq, 1, D]; caches [B, Hkv, T, D]; new rows [B, Hkv, 1, D]; position int64 [1], read on the device
Differs    the write cannot run beside attention, which reads the row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvsink.tools.timing import Times, graph_times

__all__ = [
    "UPDATES", "Baseline", "fused_update", "index_copies", "inputs", "sdpa_baseline", "sdpa_best", "sdpa_calls", "updated",
]  # fmt: skip

DISTINCT = 200_000_000  # bytes of all input sets together: four times the L2 cache

Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object]


@dataclass(frozen=True)
class Baseline:
    """Fastest attention in 16 bit, and the fastest of attention behind a write of the new row."""

    backend: str
    times: Times
    updated_backend: str
    update: str
    updated_times: Times


def sdpa_calls(
    b: int, t: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> dict[str, Callable[[Sequence[Tensor]], Tensor]]:
    """Ways to ask PyTorch for decode attention of grouped heads."""

    def backend(kind: SDPBackend, rows: bool) -> Callable[[Sequence[Tensor]], Tensor]:
        def call(data: Sequence[Tensor]) -> Tensor:
            q, k, v = data[:3]
            with sdpa_kernel(kind):
                if rows:  # heads that share keys as rows of one head
                    return F.scaled_dot_product_attention(q.view(b, kv_heads, heads // kv_heads, dim), k, v)
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return call

    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return {f"{n}{'-rows' if rows else ''}": backend(kind, rows) for n, kind in kinds.items() for rows in (False, True)}


def index_copies(k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor, position: Tensor) -> None:
    """Write one row of both caches as StaticCache does."""
    k.index_copy_(2, position, new_k)
    v.index_copy_(2, position, new_v)


def fused_update(k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor, position: Tensor) -> None:
    """The same in one launch."""
    from kvsink.tools.triton_update import write_rows

    b, h, t, d = k.shape
    write_rows[(-(-b * h * d // 1024), 2)](k, v, new_k, new_v, position, b * h * d, t * d, D=d, BLOCK=1024, num_warps=4)


UPDATES: dict[str, Update] = {"index-copy": index_copies, "fused": fused_update}


def inputs(b: int, t: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """Sets of q, caches, new rows and position, so many that none stays in the L2 cache."""
    sets = max(1, min(32, -(-DISTINCT // (b * t * kv_heads * dim * 4))))
    shapes = ((b, heads, 1, dim), *((b, kv_heads, n, dim) for n in (t, t, 1, 1)))
    position = torch.full((1,), t - 1, device="cuda")
    return [[*(torch.randn(s, device="cuda", dtype=dtype) for s in shapes), position] for _ in range(sets)]


def _fastest(calls: dict[Any, Callable[[Sequence[Tensor]], Any]], data: Sequence[Sequence[Tensor]]) -> tuple[Any, Times]:
    found: dict[Any, Times] = {}
    for name, call in calls.items():
        try:
            found[name] = graph_times([partial(call, d) for d in data])
        except RuntimeError:
            continue  # a backend that does not serve the shape
    best = min(found, key=lambda n: found[n][1])
    return best, found[best]


def sdpa_best(b: int, t: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[str, Times]:
    """Name and times of the fastest backend."""
    return _fastest(sdpa_calls(b, t, heads, kv_heads, dim, dtype), inputs(b, t, heads, kv_heads, dim, dtype))


def updated(call: Callable[[Sequence[Tensor]], Tensor], update: Update) -> Callable[[Sequence[Tensor]], Tensor]:
    """Attention that writes its new row first."""

    def both(data: Sequence[Tensor]) -> Tensor:
        update(data[1], data[2], *data[3:])
        return call(data)

    return both


def sdpa_baseline(b: int, t: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> Baseline:
    """Every backend alone and behind either write; the fastest of each count."""
    calls, data = sdpa_calls(b, t, heads, kv_heads, dim, dtype), inputs(b, t, heads, kv_heads, dim, dtype)
    backend, times = _fastest(calls, data)
    pairs = {(name, how): updated(call, update) for name, call in calls.items() for how, update in UPDATES.items()}
    (behind, how), with_update = _fastest(pairs, data)
    return Baseline(backend, times, behind, how, with_update)
