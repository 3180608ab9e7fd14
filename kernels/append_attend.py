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

import torch
from torch import Tensor

from . import backends
from .backends import Call, Device, LayerFormat, LayerState, Shape
from .base import resolve_codec, stream_beside
from .cuda import rows_of_bytes
from .triton import append as triton_append

__all__ = ["append_attend", "append_attend_"]


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class _Beside:
    """The launches of new rows by Triton: in a CUDA graph on two streams that leave the current one and come back, else on that."""

    def __init__(self, positions: Tensor, launches: Sequence[Callable[[], None]]) -> None:
        self.positions, (*self._code, self._enter) = positions.long(), launches
        self._here = torch.cuda.current_stream(positions.device)
        apart = torch.cuda.is_current_stream_capturing()
        held = _streams(positions.device) if apart else ()
        self._sides = [stream_beside(self._here, s) for s in held] or [self._here] * 2

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


def declines_beside(f: LayerFormat, s: Shape, d: Device) -> str:
    """What keeps a step from being attention in CUDA C++ with the coding by Triton beside it, in words."""
    if reason := rows_of_bytes.declines(f, s, d) or triton_append.declines(f, s, d):
        return reason
    return "new rows are read back from their codes" if f.strict else ""


def side_by_side(call: Call) -> Tensor:
    """One new row per sequence: its codes are stored while attention runs, and it enters the exact rows behind it."""
    assert call.positions is not None
    return rows_of_bytes.attend(call, _Beside(call.positions, triton_append.launches(call)))


def in_turn(call: Call) -> Tensor:
    """New rows are stored, then attended to with all others."""
    backends.choose("append", *call.facts).run(call)
    out: Tensor = backends.choose("attend", *call.facts).run(call)
    return out


def append_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    candidates: Sequence[Tensor],
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    codec: str,
    before: Sequence[Tensor] = (),
) -> Tensor:
    """The op outside graphs; its result may have any strides."""
    coded, *turn = before or (None,)
    rest = positions, candidates, mask, scale, is_causal, coded, turn, not before
    call = Call(resolve_codec(codec), codec, k, v, LayerState(*state), params, q, *rest)
    out: Tensor = backends.choose("step", *call.facts).run(call)
    return out


@torch.library.custom_op("kvsink::append_attend_", mutates_args=("state",))
def append_attend_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    candidates: Sequence[Tensor],
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    codec: str,
    before: Sequence[Tensor],
) -> Tensor:
    out = append_attend(q, k, v, positions, candidates, state, params, mask, scale, is_causal, codec, before)
    return out.contiguous()


@append_attend_.register_fake
def _outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    candidates: Sequence[Tensor],
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    codec: str,
    before: Sequence[Tensor],
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
