"""Profile a model: one record of plain data (profile.json) and a few arrays for the figures.

Source     KVSink, arXiv 2508.04257; Super Experts, arXiv 2507.23279; massive activations, arXiv 2402.17762
Shapes     ids int64 [N, T]; arrays: mass [N, L, Hq, T], first [N, L, Hq, T], token_peak and channel maps as named below
Raises     CalibrationError, UnsupportedError; `record` then holds what was measured before, with status "partial"
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvsink.calibrate.calibration import find_stages
from kvsink.errors import CalibrationError, KvsinkError, UnsupportedError
from kvsink.evaluate.evaluation import device_name, is_rewritten, versions
from kvsink.model.anatomy import anatomy
from kvsink.model.runtime import Runtime
from kvsink.profiling.attention import START, AttentionSums, watching_attention
from kvsink.profiling.causal import causal_check, negative_log_likelihood
from kvsink.profiling.findings import findings
from kvsink.profiling.hidden import Hidden, StageLife, life_of, watching_hidden
from kvsink.profiling.ignore import ignore_lists
from kvsink.profiling.layout import Entry, Layout, find_layout
from kvsink.profiling.passes import Passes, passes_of
from kvsink.profiling.reading import FORMAT
from kvsink.profiling.rows import Seen, attention_row, entry_rows, hidden_row, layers_of, stage_row
from kvsink.profiling.sinks import KVRanges, predictor_rows, truth
from kvsink.profiling.superexperts import PERCENTILE, SHARE, forming_layers, judge, robustness
from kvsink.profiling.watch import Stats, watching_experts

__all__ = ["ProfileOptions", "profile", "windows_of"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ProfileOptions:
    """experts: None where there are any, True to insist, False to leave them out; causal_windows 0 skips the check."""

    windows: int = 8
    window_tokens: int = 512
    attention: bool = True
    experts: bool | None = None
    causal_windows: int = 4


def windows_of(text: str, tokenizer: Any, windows: int, window_tokens: int) -> Tensor:
    """Windows [N, T] spread evenly over the text. Raises CalibrationError for a text without one whole window."""
    least = 2 * START
    if window_tokens < least:
        raise CalibrationError(f"windows of {window_tokens} tokens are too short for sinks; give --window-tokens {least} or more")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < window_tokens:
        raise CalibrationError(
            f"the text holds {len(ids)} tokens, too few for one window of {window_tokens} from a sequence start; give a longer "
            f"text" + (f" or --window-tokens {len(ids)}" if len(ids) >= least else "")
        )
    count = min(windows, len(ids) // window_tokens)
    spare = len(ids) - count * window_tokens
    starts = [k * window_tokens + (k * spare // (count - 1) if count > 1 else 0) for k in range(count)]
    return torch.stack([ids[s : s + window_tokens] for s in starts])


def profile(
    model: Any,
    ids: Tensor,
    options: ProfileOptions | None = None,
    *,
    tokenizer: Any = None,
    record: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure `model` over `ids` [N, T]: the record and the arrays for figures.

    model: one in memory, or a `kvsink.calibrate.streaming.Stream`, whose layers are read one at a time; the record is the same.
    Give `record` to keep what was measured when an error ends the run.
    """
    options = options or ProfileOptions()
    record = {} if record is None else record
    tell = progress or (lambda what, done, total: None)
    started = time.perf_counter()
    if is_rewritten(model):
        raise UnsupportedError("this model has been rewritten by kvsink; profile the 16-bit model it was made from")
    passes = passes_of(model)
    model, where = passes.model, passes.where
    record |= {
        "format": FORMAT,
        "status": "partial",
        "architecture": type(model).__name__,
        "layers": len(where.blocks),
        "heads": where.heads,
        "kv_heads": where.kv_heads,
        "head_dim": where.head_dim,
        "windows": ids.shape[0],
        "window_tokens": ids.shape[1],
        "device": device_name(passes.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "read": passes.how,
        "versions": versions(),
        "fingerprint": passes.fingerprint().tolist(),
    }
    layout = find_layout(model, where)
    if options.experts and not layout.is_moe:
        raise UnsupportedError(f"{type(model).__name__} is dense: it has no experts to profile; leave --experts out")
    arrays: dict[str, Any] = {}

    with torch.no_grad():
        hidden = Hidden()
        try:
            _first_look(passes, layout, ids[:2], hidden, tell)
        finally:
            record["hidden"] = hidden_row(hidden)
        stages = find_stages(hidden.largest(), hidden.median(), hidden.top())
        record["stages"] = [asdict(s) for s in stages]
        channels = {c for s in stages for c in s.channels[:4]} or {hidden.top(1)[-1][0]}
        hidden = Hidden(tuple(sorted(channels)), snap={s.block: None for s in stages})
        stats = Stats()
        try:
            seen = _second_look(passes, layout, ids, hidden, stats, options, tell)
        finally:
            record["entries"] = entry_rows(layout, stats, tokenizer, ids)
    record["hidden"] = hidden_row(hidden)
    record["perplexity"] = seen.perplexity
    lives = [life_of(s, hidden) for s in stages]
    record["stages"] = [stage_row(passes, layout, life, stats, ids, tokenizer, i, lives) for i, life in enumerate(lives)]
    arrays["curves"] = torch.tensor([life.curve for life in lives])
    arrays["largest"], arrays["medians"] = torch.tensor(hidden.largest()), torch.tensor(hidden.median())
    if seen.mass is not None and seen.first is not None:
        record["attention"] = attention_row(seen, ids, tokenizer)
        record["predictor"] = [
            {
                "stage": i,
                "block": life.stage.block,
                "layers": [span.start, span.stop - 1],
                "true_tokens": truth(seen.mass, span).shape[1],
                "rows": predictor_rows(life, hidden, seen.mass, span),
            }
            for i, life in enumerate(lives)
            if len(span := layers_of(i, lives, len(where.blocks)))
        ]
        arrays["mass"] = seen.mass.sum(2)
        arrays["first"] = seen.first[..., START:].mean((0, 3))
        arrays |= {f"map.{i}": m for i, m in seen.maps.items()}
    else:
        record["attention"], record["predictor"] = None, []
    record["kv"] = [{"layer": i, "ranges": r.rows(), "norms": r.mean_norms()} for i, r in sorted(seen.ranges.items())]
    if stages:
        arrays["tokens"] = seen.token_map
        arrays |= {f"snap.{i}": x for i, x in hidden.snap.items() if x is not None}
        arrays["token_channels"] = torch.tensor(seen.token_channels)
    record["experts"] = None
    if layout.is_moe and options.experts is not False:
        record["experts"] = _experts(passes, layout, stats, hidden, lives, ids, options, tell, arrays)
    record["seconds"] = time.perf_counter() - started
    record["findings"] = findings(record)
    record["status"] = "complete"
    return record, arrays


# -- looks -------------------------------------------------------------------------------------------------------------


def _first_look(passes: Passes, layout: Layout, ids: Tensor, hidden: Hidden, tell: Progress) -> None:
    with watching_experts(passes.model, layout), watching_hidden(passes.model, passes.where, hidden):
        passes.run(ids, tell=partial(tell, "finding stages"))


def _second_look(
    passes: Passes, layout: Layout, ids: Tensor, hidden: Hidden, stats: Stats, options: ProfileOptions, tell: Progress
) -> Seen:
    model, where, sums = passes.model, passes.where, AttentionSums(64)
    nll: list[float] = []
    masses: dict[tuple[int, int], Tensor] = {}
    firsts: dict[tuple[int, int], Tensor] = {}
    ranges: dict[int, KVRanges] = {}
    runtime = Runtime(model, (), {}, (), "profile")
    watched: Any = watching_attention(model, where, sums) if options.attention else nullcontext("not looked at")

    def window(w: int) -> None:
        stats.window = w

    def layer(w: int, l: int, held: Any) -> None:
        if options.attention:
            masses[w, l], firsts[w, l] = sums.take_layer(l)
        _ranges(runtime, l, held, ids.shape[1], masses.get((w, l)), ranges)

    def logits(w: int, out: Tensor) -> None:
        nll.append(negative_log_likelihood(out, ids[w : w + 1]))

    with watching_experts(model, layout, stats), watching_hidden(model, where, hidden), watched as how:
        passes.run(ids, window=window, layer=layer, logits=logits, cache=True, tell=partial(tell, "profiling"))
    perplexity = float(torch.tensor(sum(nll) / (ids.shape[0] * (ids.shape[1] - 1))).exp())
    size = (len(ids), len(where.blocks))
    return Seen(
        perplexity,
        _stacked(masses, *size),
        _stacked(firsts, *size),
        how,
        sums.maps,
        ranges,
        torch.stack([hidden.kept[i][0] for i in range(len(where.blocks))]),
        list(hidden.channels),
    )


def _stacked(parts: dict[tuple[int, int], Tensor], windows: int, layers: int) -> Tensor | None:
    """[N, L, …] from its parts by window and layer; None when there are none."""
    if not parts:
        return None
    return torch.stack([torch.stack([parts.pop((w, l)) for l in range(layers)]) for w in range(windows)])


def _ranges(runtime: Runtime, i: int, held: Any, tokens: int, mass: Tensor | None, into: dict[int, KVRanges]) -> None:
    """Keys and values of one window and layer, where the cache has kept all of them."""
    k, v = getattr(held, "keys", None), getattr(held, "values", None)
    if k is None or v is None or k.dim() != 4 or k.shape[2] != tokens:
        return  # a sliding window has let rows go
    sinks = torch.tensor([0]) if mass is None else mass.sum(0).topk(min(5, tokens // 2)).indices
    whole = not hasattr(runtime.config.get_text_config(decoder=True), "qk_rope_head_dim")  # else RoPE turns a part at the end
    positions = torch.arange(tokens, device=k.device)[None]
    cos, sin = runtime.angles(i, positions) if whole else (torch.empty(1, tokens, 0), torch.empty(1, tokens, 0))
    into.setdefault(i, KVRanges()).add(k[0], v[0], cos.to(k.device), sin.to(k.device), sinks)


# -- rows --------------------------------------------------------------------------------------------------------------


def _experts(
    passes: Passes,
    layout: Layout,
    stats: Stats,
    hidden: Hidden,
    lives: Sequence[StageLife],
    ids: Tensor,
    options: ProfileOptions,
    tell: Progress,
    arrays: dict[str, Any],
) -> dict[str, Any]:
    a = {e.label: stats.entries[e.label].largest if e.label in stats.entries else 0.0 for e in layout.entries}
    layers = forming_layers(hidden.largest(), hidden.median(), hidden.entering)
    verdict = judge(a, layers)
    out: dict[str, Any] = {
        "entries": verdict.entries,
        "per_layer": [len(layout.of_layer(i)) for i in range(layout.layers)],
        "forming_layers": list(layers),
        "percentile": PERCENTILE,
        "threshold_percentile": verdict.percentile,
        "share": SHARE,
        "largest": verdict.largest,
        "threshold_share": SHARE * verdict.largest,
        "super_experts": list(verdict.super_experts),
        "candidates": list(verdict.candidates),
        "robustness": robustness(a, layers),
        "ranking": sorted(a, key=lambda x: -a[x])[:32],
        "outside": [
            x
            for x in sorted(a, key=lambda x: -a[x])
            if a[x] > max(100.0, SHARE * verdict.largest) and int(x.partition(":")[0]) not in layers
        ],
        "causal": None,
    }
    suspects = [*verdict.super_experts, *verdict.candidates]
    confirmed = list(verdict.super_experts)
    if suspects and options.causal_windows and options.attention:
        top = max(int(x.partition(":")[0]) for x in suspects)
        ends = [s.end for s in lives if s.stage.block >= min(layers) and s.end is not None and s.end > top + 1]
        behind = range(top + 1, min([layout.layers, *ends]))
        check = causal_check(passes, layout, ids[: options.causal_windows], suspects, suspects, behind, tell)
        maps = check.pop("maps")
        arrays |= {f"map.{kind}.{i}": m for kind, found in maps.items() for i, m in found.items()}
        out["causal"] = check
        confirmed += [m["expert"] for m in check["members"] if m["confirmed"] and m["expert"] not in confirmed]
    out["protected"] = confirmed
    out["ignore"] = ignore_lists(passes.model, [layout.find(x) for x in confirmed])
    return out


# -- reading -----------------------------------------------------------------------------------------------------------


def prune(model: Any, labels: Sequence[str]) -> list[Entry]:
    """Zero the down projection (and its bias) of the named entries in place. Raises UnsupportedError for unknown ones."""
    layout = find_layout(model, anatomy(model))
    entries = [layout.find(label) for label in labels]
    if not entries:
        raise KvsinkError("no expert was named to prune; write for example --prune 1:68,2:92")
    with torch.no_grad():
        for entry in entries:
            module = model.get_submodule(entry.module)
            weights = (module.down_proj, getattr(module, "down_proj_bias", None)) if entry.stacked else (module.weight, module.bias)
            for weight in weights:
                if weight is not None:
                    (weight[int(entry.name)] if entry.stacked else weight).zero_()
    return entries
