"""Skip the suspected experts and see: perplexity, massive activations, and whether the sinks decay.

Formula    confirmed: skipping all suspects raises D_sink above 0.8 in the layers behind them, and the one suspect either
           breaks the sinks when skipped alone (D_sink > 0.8) or keeps them when all others are skipped (D_sink < 0.5)
Source     Super Experts, arXiv 2507.23279 section 4; skipping leaves the routing weights as they are
Differs    the text skips the set; asking each suspect alone is ours, since two experts can each be enough
Shapes     ids int64 [N, T]
Raises     CalibrationError for logits that are not finite
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvsink.errors import CalibrationError
from kvsink.profiling.attention import AttentionSums, sink_decay, watching_attention
from kvsink.profiling.hidden import Hidden, watching_hidden
from kvsink.profiling.layout import Entry, Layout
from kvsink.profiling.passes import Passes, Tell
from kvsink.profiling.watch import watching_experts

__all__ = ["BROKEN", "KEPT", "Run", "causal_check", "random_control", "run_model"]

BROKEN, KEPT, MOST = 0.8, 0.5, 6
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Run:
    """One run over the windows: perplexity, largest |H| by block, first [N, L, Hq, T], attention maps by layer."""

    perplexity: float
    largest: tuple[float, ...]
    first: Tensor
    maps: dict[int, Tensor]


def run_model(
    passes: Passes, layout: Layout, ids: Tensor, skip: frozenset[str] = frozenset(), corner: int = 0, tell: Tell = lambda *a: None
) -> Run:
    """Perplexity, massive activations and sinks with the entries of `skip` left out."""
    hidden, sums = Hidden(), AttentionSums(corner)
    firsts: dict[tuple[int, int], Tensor] = {}
    nll: list[float] = []

    def layer(w: int, l: int, held: Any) -> None:
        firsts[w, l] = sums.take_layer(l)[1]

    model, where = passes.model, passes.where
    with (
        torch.no_grad(),
        watching_experts(model, layout, skip=skip),
        watching_hidden(model, where, hidden),
        watching_attention(model, where, sums),
    ):
        passes.run(ids, layer=layer, logits=lambda w, out: nll.append(negative_log_likelihood(out, ids[w : w + 1])), tell=tell)
    first = torch.stack([torch.stack([firsts[w, l] for l in range(layout.layers)]) for w in range(len(ids))])
    return Run(math.exp(sum(nll) / (ids.shape[0] * (ids.shape[1] - 1))), tuple(hidden.largest()), first, sums.maps)


def negative_log_likelihood(logits: Tensor, ids: Tensor) -> float:
    """Sum of -log q(x_t | x_<t) over one window [1, T], in nats."""
    total = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:].to(logits.device), reduction="sum")
    if not bool(torch.isfinite(total)):
        raise CalibrationError("the model gives logits that are not finite; check its weights or profile in float32")
    return float(total)


def random_control(layout: Layout, suspects: Sequence[str], spared: Sequence[str], seed: int = 0) -> tuple[str, ...]:
    """As many routed experts of the same layers, none of them `spared`; fewer where a layer has no more."""
    generator = torch.Generator().manual_seed(seed)
    chosen: list[str] = []
    for label in suspects:
        layer = int(label.partition(":")[0])
        free = [e.label for e in layout.of_layer(layer) if e.routed and e.label not in {*spared, *suspects, *chosen}]
        if free:
            chosen.append(free[int(torch.randint(len(free), (1,), generator=generator))])
    return tuple(chosen)


def causal_check(
    passes: Passes,
    layout: Layout,
    ids: Tensor,
    suspects: Sequence[str],
    spared: Sequence[str],
    layers: range,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Skip `suspects` (at most six, the largest first), each of them alone, and a random control; compare behind `layers`."""
    suspects = list(suspects)[:MOST]
    tell = progress or (lambda what, done, total: None)
    control = random_control(layout, suspects, spared)
    everything = frozenset(suspects)
    sets = [frozenset(), everything, frozenset(control), *(frozenset([s]) for s in suspects), *(everything - {s} for s in suspects)]
    sets = list(dict.fromkeys(sets))
    runs: dict[frozenset[str], Run] = {}
    for i, skip in enumerate(sets):
        corner = 64 if skip in (frozenset(), everything) else 0
        runs[skip] = run_model(passes, layout, ids, skip, corner, _within(tell, i, len(sets)))
    base = runs[frozenset()]

    def row(skip: frozenset[str]) -> dict[str, Any]:
        decay, left_out = sink_decay(base.first, runs[skip].first)
        known = [d for d in decay[layers.start : layers.stop] if d is not None]
        return {
            "skipped": sorted(skip),
            "perplexity": runs[skip].perplexity,
            "largest": list(runs[skip].largest),
            "d_sink": decay,
            "d_sink_behind": sum(known) / len(known) if known else None,
            "left_out": left_out,
        }

    rows = {skip: row(skip) for skip in sets}

    def decay(skip: frozenset[str]) -> float:
        found = rows[skip]["d_sink_behind"]
        return 0.0 if found is None else float(found)

    driven = decay(everything) > BROKEN
    members = []
    for s in suspects:
        alone, without = decay(frozenset([s])), decay(everything - {s})
        members.append(
            {
                "expert": s,
                "d_sink_skipped_alone": alone,
                "d_sink_kept_alone": without,
                "necessary": alone > BROKEN,
                "sufficient": driven and without < KEPT,
                "confirmed": driven and (alone > BROKEN or without < KEPT),
            }
        )
    return {
        "windows": len(ids),
        "window_tokens": ids.shape[1],
        "layers": [layers.start, layers.stop - 1],
        "driven": driven,
        "base": rows[frozenset()],
        "all": rows[everything],
        "random": rows[frozenset(control)],
        "members": members,
        "maps": {"with": base.maps, "without": runs[everything].maps},
    }


def _within(tell: Progress, i: int, count: int) -> Tell:
    """Progress of the i-th of `count` runs as progress of them all."""
    return lambda done, total: tell("skipping experts", i * total + done, count * total)


def named(layout: Layout, labels: Sequence[str]) -> list[Entry]:
    """The entries of some labels; raises UnsupportedError for one that does not exist."""
    return [layout.find(label) for label in labels]
