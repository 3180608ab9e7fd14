"""The findings of a profile in plain words, for the page and the terminal."""

from __future__ import annotations

from typing import Any

__all__ = ["findings"]


def findings(record: dict[str, Any]) -> list[str]:
    """One sentence per finding, most important first."""
    out: list[str] = []
    if not record["stages"]:
        out.append(
            f"No massive activations: the largest |H| behind any block is {max(record['hidden']['largest']):.4g}. There is no "
            "stable outlier channel to predict sinks from; protect rows by position (first:N) or by attention (anchors)."
        )
    for i, s in enumerate(record["stages"]):
        tokens = (
            "the first token alone"
            if s["first_token_only"]
            else f"{_count(s['carriers_first'], 'first token')} and {_count(s['carriers_total'] - s['carriers_first'], 'token')} "
            f"inside the text ({_count(record['windows'], 'window')})"
        )
        how = (
            "stays to the last block"
            if s["end"] is None
            else (f"is cancelled in block {s['end']}" if s["ended_at_once"] else f"has faded to less than half by block {s['end']}")
        )
        out.append(
            f"Stage {i + 1}: block {s['block']} raises channel {s['channels'][0]} to {_size(s['size'])} on {tokens}; it {how}."
        )
        for n in s["neurons"][:2]:
            out.append(
                f"It is written by {_part(n['entry'])}, neuron {n['neuron']} of its down projection: weight {n['weight']:.3g} "
                f"(rank {n['rank_by_weight']} of that row), {n['share']:.0%} of the value."
            )
    for p in record["predictor"]:
        five = next((r for r in p["rows"] if r["k"] == 5), None)
        if five:
            out.append(
                f"In layers {p['layers'][0]}-{p['layers'][1]} the KVSink predictor finds {five['kvsink']['recall']:.0%} of the "
                f"five tokens with the most attention; the first five tokens are {five['first']['recall']:.0%} of them."
            )
    experts = record.get("experts")
    if experts:
        out += _experts(experts)
    return out


def _size(x: float) -> str:
    return format(x, ",.0f" if x >= 1000 else ".4g")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _part(entry: str) -> str:
    layer, _, name = entry.partition(":")
    return f"the feed-forward of block {layer}" if name == "dense" else f"expert {name} of block {layer}"


def _experts(e: dict[str, Any]) -> list[str]:
    out = []
    if e["super_experts"]:
        out.append(f"Super Experts by the published criterion: {', '.join(e['super_experts'])}, of {e['entries']} entries.")
    else:
        out.append(f"No Super Expert passes the published criterion among {e['entries']} entries.")
    if e["candidates"]:
        out.append(f"Further candidates above a twentieth of the largest output: {', '.join(e['candidates'])}.")
    if e["outside"]:
        out.append(f"Large outputs that form no massive activation, and are not reported: {', '.join(e['outside'][:6])}.")
    c = e["causal"]
    if c:
        behind = c["all"]["d_sink_behind"]
        span = range(c["layers"][0], c["layers"][1] + 1)
        known = [(d, l) for l in span if (d := c["all"]["d_sink"][l]) is not None]
        mean = "unknown" if behind is None else format(behind, ".2f")
        spread = f" ({min(known)[0]:.2f} in layer {min(known)[1]} to {max(known)[0]:.2f} in layer {max(known)[1]})" if known else ""
        out.append(
            f"Skipping {', '.join(c['all']['skipped'])}: perplexity {c['base']['perplexity']:.4g} to {c['all']['perplexity']:.4g}, "
            f"mean D_sink of layers {c['layers'][0]}-{c['layers'][1]} {mean}{spread}; "
            f"skipping {', '.join(c['random']['skipped']) or 'no other expert'} instead: {c['random']['perplexity']:.4g}, "
            f"{format(c['random']['d_sink_behind'] or 0.0, '.2f')}."
        )
        confirmed = [m["expert"] for m in c["members"] if m["confirmed"]]
        out.append(
            f"Confirmed as makers of the sinks: {', '.join(confirmed)}."
            if confirmed
            else "The check does not confirm them: the sinks of this model are not made by these experts alone."
        )
    return out
