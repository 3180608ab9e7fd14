"""The 16-bit side of `kvsink-bench kernels` and `shapes`: decode attention by the fastest of PyTorch's backends and FlashInfer,
alone and with its cache write.

Formula    alone: softmax(q K^T / sqrt(D)) V over T rows; with its write: row T - 1 of both caches is written first
Source     the write is that of transformers' StaticCache, two `index_copy_`, or one launch for both rows as a compiler fuses them
Shapes     q [B, Hq, 1, D]; caches [B, Hkv, T, D]; new rows [B, Hkv, 1, D]; position int64 [1], read on the device
Differs    the write cannot run beside attention, which reads the row
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvsink.errors import KvsinkError
from kvsink.tools.timing import Times, graph_times

__all__ = [
    "UPDATES",
    "Baseline",
    "flashinfer_calls",
    "fused_update",
    "index_copies",
    "inputs",
    "sdpa_baseline",
    "sdpa_best",
    "sdpa_calls",
    "updated",
]

DISTINCT = 200_000_000  # bytes of all input sets together: four times the L2 cache

_OFF = 2e-3  # relative error of FlashInfer's output in float16, as of our own
_PAGE, _ROOM = 16, 1 << 27  # tokens of FlashInfer's page, bytes that it asks for

Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object]


@dataclass(frozen=True)
class Baseline:
    """Fastest attention in 16 bit, and the fastest of attention behind a write of the new row."""

    backend: str
    times: Times
    updated_backend: str
    update: str
    updated_times: Times
    flashinfer: str = ""  # why it is not among the backends, or how long it took

    def text(self) -> str:
        """One line for people."""
        found = f"{self.backend} {self.times[1] * 1e3:.2f} us, with its write {self.updated_times[1] * 1e3:.2f} us "
        return f"{found}({self.updated_backend}, {self.update}); FlashInfer: {self.flashinfer}"

    def facts(self) -> dict[str, Any]:
        """What a row says of it."""
        return {
            "sdpa": self.backend,
            "sdpa_ms": round(self.times[1], 5),
            "sdpa_with_update": self.updated_backend,
            "fp16_update": self.update,
            "fp16_with_update_ms": round(self.updated_times[1], 5),
            "flashinfer": self.flashinfer,
        }


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

    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
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


def flashinfer_calls(
    b: int, t: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str
) -> dict[str, Callable[[Sequence[Tensor]], Tensor]]:
    """FlashInfer's decode attention over pages, on both kinds of cores. Raises what it raises where it cannot be built.

    A cache [B, Hkv, T, D] is read as pages [B T / 16, Hkv, 16, D] of the same memory: other rows, as many bytes.
    """
    import flashinfer

    pages = b * t // _PAGE
    first = torch.arange(b + 1, dtype=torch.int32, device=device) * (t // _PAGE)
    each = torch.arange(pages, dtype=torch.int32, device=device)
    last = torch.full((b,), _PAGE, dtype=torch.int32, device=device)

    def made(cores: bool) -> Callable[[Sequence[Tensor]], Tensor]:
        room = torch.zeros(_ROOM, dtype=torch.uint8, device=device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(room, "HND", use_tensor_cores=cores)
        wrapper.plan(first, each, last, heads, kv_heads, dim, _PAGE, q_data_type=dtype, kv_data_type=dtype)

        def call(data: Sequence[Tensor]) -> Tensor:
            paged = tuple(x.view(pages, kv_heads, _PAGE, dim) for x in data[1:3])
            return wrapper.run(data[0].view(b, heads, dim), paged)

        return call

    return {f"flashinfer{'-mma' if cores else ''}": made(cores) for cores in (False, True)}


def off(call: Callable[[Sequence[Tensor]], Tensor], data: Sequence[Tensor]) -> float:
    """Relative error of a call over pages against attention over the rows that it reads."""
    q = data[0]
    b, kv_heads, t, dim = data[1].shape
    k, v = (x.view(b, t // _PAGE, kv_heads, _PAGE, dim).transpose(1, 2).flatten(2, 3) for x in data[1:3])
    wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).float()
    return float((call(data).view_as(q).float() - wanted).norm() / wanted.norm())


def inputs(b: int, t: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str = "cuda") -> list[list[Tensor]]:
    """Sets of q, caches, new rows and position, so many that none stays in the L2 cache."""
    sets = max(1, min(32, -(-DISTINCT // (b * t * kv_heads * dim * 4))))
    shapes = ((b, heads, 1, dim), *((b, kv_heads, n, dim) for n in (t, t, 1, 1)))
    position = torch.full((1,), t - 1, device=device)
    return [[*(torch.randn(s, device=device, dtype=dtype) for s in shapes), position] for _ in range(sets)]


def _times(calls: Mapping[Any, Callable[[Sequence[Tensor]], Any]], data: Sequence[Sequence[Tensor]]) -> dict[Any, Times]:
    """Times of the calls that serve the shape, the fastest first."""
    found: dict[Any, Times] = {}
    for name, call in calls.items():
        try:
            found[name] = graph_times([partial(call, d) for d in data])
        except RuntimeError:
            continue  # a backend that does not serve the shape
    if not found:
        raise KvsinkError(f"none of {', '.join(map(str, calls))} attends to {tuple(data[0][1].shape)} on this machine")
    return dict(sorted(found.items(), key=lambda item: item[1][1]))


def sdpa_best(b: int, t: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[str, Times]:
    """Name and times of the fastest backend of PyTorch."""
    found = _times(sdpa_calls(b, t, heads, kv_heads, dim, dtype), inputs(b, t, heads, kv_heads, dim, dtype))
    return next(iter(found.items()))


def updated(call: Callable[[Sequence[Tensor]], Tensor], update: Update) -> Callable[[Sequence[Tensor]], Tensor]:
    """Attention that writes its new row first."""

    def both(data: Sequence[Tensor]) -> Tensor:
        update(data[1], data[2], *data[3:])
        return call(data)

    return both


def sdpa_baseline(b: int, t: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str = "cuda") -> Baseline:
    """Every backend alone, the two fastest behind either write; the fastest of each count."""
    calls, data = sdpa_calls(b, t, heads, kv_heads, dim, dtype), inputs(b, t, heads, kv_heads, dim, dtype, device)
    said = "not installed"
    if importlib.util.find_spec("flashinfer") is not None:
        try:
            more = flashinfer_calls(b, t, heads, kv_heads, dim, dtype, device)
            worst = max(off(call, data[0]) for call in more.values())
            said = "" if worst <= _OFF else f"wrong by {worst:.1e}"
        except Exception as error:  # it compiles its kernels, by whatever means there are
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        calls = calls if said else {**calls, **more}
    alone = _times(calls, data)
    for name, times in alone.items():
        if name.startswith("flashinfer"):
            said = said or f"{times[1] * 1e3:.2f} us"
    pairs = {(name, how): updated(calls[name], update) for name in list(alone)[:2] for how, update in _updates(device).items()}
    (behind, how), with_update = next(iter(_times(pairs, data).items()))
    backend, times = next(iter(alone.items()))
    return Baseline(backend, times, behind, how, with_update, said)


def _updates(device: str) -> dict[str, Update]:
    return UPDATES if device == "cuda" else {"index-copy": index_copies}
