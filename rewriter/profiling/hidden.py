"""The life of a massive activation: where it emerges, in which channels, on which tokens, and where it goes.

Formula    stable channels of a stage: those above 100 and a tenth of its size in at least 90 % of the blocks it lives in
           carriers: tokens t with |H_t| in the main channel above 100 and a tenth of the stage's size
           end: the first block behind which the median carrier holds less than half of what it had
Source     KVSink, arXiv 2508.04257 section 3; massive activations, arXiv 2402.17762
Differs    several stages per model; carriers that a later stage raises further are left out when the end is looked for
Shapes     per window: peak |H| [L, E], largest |H| per token [L, T], main channel of each stage [stages, L, T]
Raises     CalibrationError for NaN or infinite hidden states
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvsink.codecs.protect import SinkStage
from kvsink.errors import CalibrationError
from kvsink.model.anatomy import Anatomy

__all__ = ["Hidden", "StageLife", "life_of", "watching_hidden"]


@dataclass
class Hidden:
    """What the block outputs of some windows were; `channels` are kept for every token."""

    channels: tuple[int, ...] = ()
    peak: dict[int, Tensor] = field(default_factory=dict)  # [E]
    medians: dict[int, list[float]] = field(default_factory=dict)
    per_window: dict[int, list[float]] = field(default_factory=dict)  # largest |H|
    kept: dict[int, list[Tensor]] = field(default_factory=dict)  # [T, channels], signed, one per window
    entering: float = 0.0  # largest |H| that enters block 0
    snap: dict[int, Tensor | None] = field(default_factory=dict)  # |H| [T, E] of the first window, for the blocks put in

    def largest(self) -> list[float]:
        return [float(self.peak[i].max()) for i in range(len(self.peak))]

    def median(self) -> list[float]:
        return [sum(self.medians[i]) / len(self.medians[i]) for i in range(len(self.medians))]

    def top(self, count: int = 4) -> list[tuple[int, ...]]:
        """The largest channels of each block."""
        return [tuple(self.peak[i].topk(min(count, len(self.peak[i]))).indices.tolist()) for i in range(len(self.peak))]

    def of_channel(self, channel: int) -> Tensor:
        """H of one kept channel [L, N, T], signed."""
        at = self.channels.index(channel)
        return torch.stack([torch.stack([w[:, at] for w in self.kept[i]]) for i in range(len(self.kept))])


@contextmanager
def watching_hidden(model: nn.Module, where: Anatomy, into: Hidden) -> Iterator[None]:
    """Within the block every block output goes into `into`."""

    def hook(i: int) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            hidden = (output[0] if isinstance(output, tuple) else output).detach().float().flatten(0, -2)
            size = hidden.abs()
            if not bool(torch.isfinite(size).all()):
                raise CalibrationError(f"block {i} puts out NaN or infinite activations; check the weights or profile in float32")
            peak = size.amax(0).cpu()
            into.peak[i] = torch.maximum(into.peak[i], peak) if i in into.peak else peak
            into.medians.setdefault(i, []).append(float(size.flatten()[:: max(1, size.numel() // 65536)].median()))
            into.per_window.setdefault(i, []).append(float(peak.max()))
            if into.channels:
                into.kept.setdefault(i, []).append(hidden[:, list(into.channels)].cpu())
            if i in into.snap and into.snap[i] is None:
                into.snap[i] = size.cpu()
            if i == 0:
                entered = args[0] if args else kwargs["hidden_states"]
                into.entering = max(into.entering, float(entered.abs().max()))

        return record

    handles = [model.get_submodule(name).register_forward_hook(hook(i), with_kwargs=True) for i, name in enumerate(where.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class StageLife:
    """One stage: carriers as (window, position, signed value); `end` is None when the model ends first."""

    stage: SinkStage
    stable: tuple[int, ...]
    carriers: tuple[tuple[int, int, float], ...]
    end: int | None
    at_once: bool  # the block before the end still had three quarters of it
    curve: tuple[float, ...]  # median carrier |H| in the main channel, by block


def life_of(stage: SinkStage, hidden: Hidden) -> StageLife:
    """Follow one stage through the blocks behind it."""
    main, b = stage.channels[0], stage.block
    h = hidden.of_channel(main).abs()  # [L, N, T]
    held = h[b]
    carried = held > max(100.0, 0.1 * stage.size)
    windows, positions = carried.nonzero(as_tuple=True)
    later = h[b:, windows, positions]  # [L - b, carriers]
    final = later.amax(0) <= 3 * later[0]
    kept = later[:, final] if bool(final.any()) else later
    middle = kept.median(1).values if kept.shape[1] else torch.zeros(len(later))
    gone = [i for i in range(1, len(middle)) if middle[i] < 0.5 * middle[0]]
    end = b + gone[0] if gone else None
    lives = range(b, end if end is not None else len(h) - 1)
    above = torch.stack([hidden.peak[i] > max(100.0, 0.1 * stage.size) for i in lives]).float().mean(0)
    stable = [c for c in hidden.peak[b].argsort(descending=True)[:32].tolist() if above[c] >= 0.9]
    signed = hidden.of_channel(main)[b]
    order = held[windows, positions].argsort(descending=True)
    return StageLife(
        stage,
        tuple(stable),
        tuple((int(windows[i]), int(positions[i]), float(signed[windows[i], positions[i]])) for i in order),
        end,
        end is not None and bool(middle[end - b - 1] >= 0.75 * middle[0]),
        tuple([0.0] * b + [float(x) for x in middle]),
    )
