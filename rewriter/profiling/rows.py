"""The rows of a profile, as JSON holds them: hidden states, stages, their writers, attention and entries.

Source     ours
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from kvsink.profiling.attention import START
from kvsink.profiling.hidden import Hidden, StageLife
from kvsink.profiling.layout import Layout
from kvsink.profiling.passes import Passes
from kvsink.profiling.sinks import KVRanges
from kvsink.profiling.watch import Stats

_CARRIERS = 24


@dataclass
class Seen:
    """What the second look found; arrays by window, layer and token."""

    perplexity: float
    mass: Tensor | None  # [N, L, Hq, T]
    first: Tensor | None
    how: str
    maps: dict[int, Tensor]
    ranges: dict[int, KVRanges]
    token_map: Tensor
    token_channels: list[int]


def hidden_row(hidden: Hidden) -> dict[str, Any]:
    """Largest and median |h| of every block, and where they stand."""
    return {
        "largest": hidden.largest(),
        "medians": hidden.median(),
        "channels": [t[0] for t in hidden.top(1)],
        "entering": hidden.entering,
    }


def layers_of(i: int, lives: Sequence[StageLife], count: int) -> range:
    """The layers whose sinks a stage makes: behind its block, up to its end, the next stage or the last layer."""
    life = lives[i]
    stop = count if life.end is None else min(count, life.end + 1)
    if i + 1 < len(lives):
        stop = min(stop, lives[i + 1].stage.block + 1)
    return range(life.stage.block + 1, stop)


def _said(tokenizer: Any, ids: Tensor, window: int, position: int) -> str | None:
    if tokenizer is None or position < 0:
        return None
    return str(tokenizer.decode([int(ids[window, position])]))


def stage_row(
    passes: Passes, layout: Layout, life: StageLife, stats: Stats, ids: Tensor, tokenizer: Any, i: int, lives: Sequence[StageLife]
) -> dict[str, Any]:
    stage, span = life.stage, layers_of(i, lives, layout.layers)
    main = stage.channels[0]
    carriers = [{"window": w, "position": p, "value": v, "text": _said(tokenizer, ids, w, p)} for w, p, v in life.carriers]
    ends = [] if life.end is None else _writers(passes, layout, stats, life.end, main)
    return {
        **asdict(stage),
        "channels": list(stage.channels),
        "stable_channels": list(life.stable),
        "end": life.end,
        "ended_at_once": life.at_once,
        "layers": [span.start, span.stop - 1],
        "curve": list(life.curve),
        "carriers_total": len(carriers),
        "carriers": carriers[:_CARRIERS],
        "carriers_first": sum(c["position"] == 0 for c in carriers),
        "first_token_only": bool(carriers) and all(c["position"] == 0 for c in carriers),
        "windows_with_carriers": len({c["window"] for c in carriers}),
        "neurons": _writers(passes, layout, stats, stage.block, main),
        "ended_by": ends,
    }


def _writers(passes: Passes, layout: Layout, stats: Stats, layer: int, channel: int) -> list[dict[str, Any]]:
    """The parts of a layer whose largest output is in `channel`, with the neuron behind it and the weight view beside it."""
    rows: list[dict[str, Any]] = []
    for entry in layout.of_layer(layer):
        held = stats.entries.get(entry.label)
        if held is None or held.channel != channel:
            continue
        weight = passes.down_row(entry, channel).abs()
        top = weight.topk(min(3, len(weight)))
        rows.append(
            {
                "entry": entry.label,
                "channel": channel,
                "neuron": held.neuron,
                "value": held.value,
                "weight": held.weight,
                "activation": held.activation,
                "share": held.share,
                "rank_by_weight": int((weight > weight[held.neuron]).sum()) + 1,
                "weight_view": [{"neuron": int(n), "weight": float(w)} for w, n in zip(top.values, top.indices, strict=True)],
            }
        )
    return sorted(rows, key=lambda r: -abs(r["value"]))[:4]


def attention_row(seen: Seen, ids: Tensor, tokenizer: Any) -> dict[str, Any]:
    assert seen.mass is not None and seen.first is not None
    n, layers, _, t = seen.mass.shape
    share = seen.mass / t  # of all attention of a head
    rows = []
    for l in range(layers):
        whole = share[:, l].mean(1)  # [N, T]
        best = whole.flatten().topk(min(5, n * t))
        at = [divmod(int(i), t) for i in best.indices]
        sinks = [
            {"window": w, "position": p, "share": float(x), "text": _said(tokenizer, ids, w, p)}
            for x, (w, p) in zip(best.values, at, strict=True)
        ]
        other = share[:, l, :, 1:].permute(1, 0, 2).flatten(1).max(1)  # over windows and tokens, by head
        rows.append(
            {
                "layer": l,
                "sinks": sinks,
                "first_token": seen.first[:, l, :, START:].mean((0, 2)).tolist(),
                "elsewhere": [
                    {"share": float(x), "window": int(i) // (t - 1), "position": int(i) % (t - 1) + 1}
                    for x, i in zip(other.values, other.indices, strict=True)
                ],
            }
        )
    return {"how": seen.how, "layers": rows}


def entry_rows(layout: Layout, stats: Stats, tokenizer: Any, ids: Tensor) -> dict[str, Any]:
    held = stats.entries
    return {e.label: _entry_row(held[e.label], tokenizer, ids) for e in layout.entries if e.label in held}


def _entry_row(e: Any, tokenizer: Any, ids: Tensor) -> dict[str, Any]:
    row = dict(asdict(e))
    total = row.pop("routing_total")
    row["routing_mean"] = total / e.rows if e.routing is not None and e.rows else None
    row["text"] = _said(tokenizer, ids, e.window, e.position) if e.window >= 0 else None
    return row
