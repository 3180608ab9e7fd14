"""`append_` and `attend` as one op, for codecs in tiles and for steps on a GPU: there both run side by side.

Formula    append_(k, v, …); out = attend(q, k, v, …), see `kvsink.kernels.append` and `kvsink.kernels.attend`
Source     ours
Differs    side by side, a new row enters the exact rows after attention: the row it drives out is exact one step longer
Shapes     q [B, Hq, S, D], k after RoPE and v [B, Hkv, S, D], candidates, state, params, mask as in the two ops; before: empty, or
           the keys before RoPE with the cosines and sines of their positions, for codecs that take those → [B, Hq, S, D]
Exact      codes as `append_`; output as `attend`
Cost       as both; under CUDA graphs the coding runs in the shadow of the attention
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import append_triton, attend_triton, native, packed
from .append import append, append_cpu, append_ref, append_tiles
from .attend import attend_any, attend_packed
from .base import resolve_codec

__all__ = ["append_attend", "append_attend_"]


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class _Beside:
    """The launches of `append_triton`: in a CUDA graph on two streams that leave the current one and come back, else on that."""

    def __init__(self, positions: Tensor, launches: Sequence[Callable[[], None]]) -> None:
        self.positions, (*self._code, self._enter) = positions.long(), launches
        self._here = torch.cuda.current_stream(positions.device)
        apart = native.BESIDE and torch.cuda.is_current_stream_capturing()
        self._sides = _streams(positions.device) if apart else (self._here, self._here)

    def code(self) -> None:
        for stream, launch in zip(self._sides, self._code, strict=True):
            stream.wait_stream(self._here)
            with torch.cuda.stream(stream):
                launch()

    def enter(self) -> None:
        self._sides[0].wait_stream(self._here)
        with torch.cuda.stream(self._sides[0]):
            self._enter()

    def join(self) -> None:
        for stream in self._sides:
            self._here.wait_stream(stream)


def _side_by_side(
    c: Any, q: Tensor, k: Tensor, v: Tensor, coded: tuple[Tensor, Tensor, Tensor], positions: Tensor, candidates: Sequence[Tensor],
    state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None, scale: float, roped: bool,
) -> Tensor | None:  # fmt: skip
    """One new row per sequence where kernels in CUDA C++ attend and Triton codes; else None."""
    if q.device.type != "cuda" or q.shape[2] != 1 or c.strict or append_triton.why_not(c, coded[0], candidates):
        return None
    st = c.named(state)
    if attend_triton.why_not(c, q, k, mask, st["exact_k"].shape[2]):
        return None
    p = dict(zip(c.param_names(), params, strict=True))
    launches = append_triton.launches(coded[0], v, positions, *coded[1:], candidates, state, params, c, roped)
    return attend_triton.by_cuda(c, q, k, v, st, p, mask, scale, _Beside(positions, launches))


def append_attend(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, candidates: Sequence[Tensor], state: Sequence[Tensor],
    params: Sequence[Tensor], mask: Tensor | None, scale: float, is_causal: bool, codec: str, before: Sequence[Tensor] = (),
) -> Tensor:  # fmt: skip
    """The op outside graphs; its result may have any strides."""
    c = resolve_codec(codec)
    lib = packed.usable(c, q.shape[1], k, params)
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
    elif c.tiles:
        none = k.new_empty(1, k.shape[2], 0)
        if not append_cpu(k, v, positions, none, none, candidates, state, params, c, True):
            append_ref(k, v, positions, none, none, candidates, state, params, codec, True)
    else:
        rows, cos, sin = before or (k, *[k.new_empty(1, k.shape[2], 0)] * 2)
        beside = _side_by_side(c, q, k, v, (rows, cos, sin), positions, candidates, state, params, mask, scale, not before)
        if beside is not None:
            return beside
        append(rows, v, positions, cos, sin, candidates, state, params, codec, not before)
    return attend_any(q, k, v, state, params, mask, scale, is_causal, codec)


@torch.library.custom_op("kvsink::append_attend_", mutates_args=("state",))
def append_attend_(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, candidates: Sequence[Tensor], state: Sequence[Tensor],
    params: Sequence[Tensor], mask: Tensor | None, scale: float, is_causal: bool, codec: str, before: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    out = append_attend(q, k, v, positions, candidates, state, params, mask, scale, is_causal, codec, before)
    return out.contiguous()


@append_attend_.register_fake
def _outputs(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, candidates: Sequence[Tensor], state: Sequence[Tensor],
    params: Sequence[Tensor], mask: Tensor | None, scale: float, is_causal: bool, codec: str, before: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
