"""The figures of a profile as SVG text, each drawn once for light and once for dark pages.

Source     ours
Raises     UnsupportedError without matplotlib, with the command that installs it
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from kvsink.errors import UnsupportedError

__all__ = ["Figure", "draw_figures"]

Figure = tuple[str, str, str, str]  # title, caption, light, dark
_COLORS = ("#2563c9", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285")
_ON_DARK = dict(zip(_COLORS, ("#6ea8fe", "#ff922b", "#51cf66", "#da77f2", "#f06595", "#3bc9db"), strict=True))
_SCHEMES = {"light": ("#1b1f24", "#d0d7de"), "dark": ("#e6edf3", "#30363d")}
Draw = Callable[[Any, str], None]


def draw_figures(record: dict[str, Any], arrays: dict[str, Any]) -> list[Figure]:
    """Every figure that the record has data for."""
    try:
        import matplotlib
    except ImportError as error:
        raise UnsupportedError("the page needs matplotlib; pip install 'kvsink[plot]', or pass --no-page") from error
    data = {k: np.asarray(v) for k, v in arrays.items()}
    found: list[tuple[str, str, float, Draw]] = [_curve(record)]
    found += [_snapshot(record, data, i) for i in range(len(record["stages"]))]
    found += [_token_map(record, data, c) for c in dict.fromkeys(s["channels"][0] for s in record["stages"])]
    if record.get("attention"):
        found.append(_first_token(record))
        found += _maps(record, data)
    if record.get("predictor"):
        found.append(_recall(record))
    if record.get("kv"):
        found.append(_norms(record))
        found.append(_crests(record))
    if record.get("experts"):
        found += [_heat(record), _bars(record)]
        if record["experts"].get("causal"):
            found.append(_decay(record))
    out: list[Figure] = []
    with matplotlib.rc_context({"svg.hashsalt": "kvsink", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}):
        for title, caption, height, draw in found:
            light, dark = (_svg(draw, height, *_SCHEMES[s]) for s in ("light", "dark"))
            for color, brighter in _ON_DARK.items():
                dark = dark.replace(color, brighter)
            out.append((title, caption, light, dark))
    return out


def _svg(draw: Draw, height: float, ink: str, line: str) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(6.2, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    draw(axes, ink)
    for part in figure.axes:
        part.set_facecolor("none")
        part.tick_params(colors=ink)
        for text in (part.title, part.xaxis.label, part.yaxis.label):
            text.set_color(ink)
        for spine in part.spines.values():
            spine.set_color(line)
        if legend := part.get_legend():
            legend.get_frame().set_alpha(0)
            for text in legend.get_texts():
                text.set_color(ink)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :]


def _legend_above(axes: Any) -> None:
    """A legend in two columns over the axes, where it covers no line."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def _curve(record: dict[str, Any]) -> tuple[str, str, float, Draw]:
    h = record["hidden"]

    def draw(axes: Any, ink: str) -> None:
        axes.semilogy(h["largest"], color=_COLORS[0], label="largest |H|", marker="o", ms=3)
        axes.semilogy(h["medians"], color=_COLORS[2], label="median |H|")
        for i, s in enumerate(record["stages"]):
            axes.axvline(s["block"], color=_COLORS[1], lw=1, ls="--", label="emergence" if i == 0 else None)
            if s["end"] is not None:
                axes.axvline(s["end"], color=_COLORS[3], lw=1, ls=":", label="end" if i == 0 else None)
        axes.set(xlabel="block", ylabel="size of the hidden state")
        _legend_above(axes)

    return "Life of the massive activations", "Largest and median entry of the hidden state behind each block.", 3.2, draw


def _token_map(record: dict[str, Any], data: dict[str, Any], channel: int) -> tuple[str, str, float, Draw]:
    at = data["token_channels"].tolist().index(channel)
    m = np.abs(data["tokens"][:, :, at])  # [L, T]

    def draw(axes: Any, ink: str) -> None:
        shown = m[:, : min(128, m.shape[1])]
        image = axes.imshow(np.log10(shown + 1), aspect="auto", cmap="viridis", interpolation="nearest", origin="lower")
        for s in record["stages"]:
            axes.axhline(s["block"], color="#ffffff", lw=0.6, ls="--")
        axes.set(xlabel="token of the first window", ylabel="block")
        axes.figure.colorbar(image, ax=axes).set_label("log10(1 + |H|)")

    caption = f"|H| of channel {channel} behind every block; dashed: blocks where a stage emerges."
    return f"Tokens that carry channel {channel}", caption, 3.4, draw


def _snapshot(record: dict[str, Any], data: dict[str, Any], i: int) -> tuple[str, str, float, Draw]:
    s = record["stages"][i]
    m = data[f"snap.{s['block']}"][:128]  # [T, E]
    wide = max(1, m.shape[1] // 144)
    pooled = m[:, : m.shape[1] // wide * wide].reshape(len(m), -1, wide).max(-1)

    def draw(axes: Any, ink: str) -> None:
        extent = (-0.5, len(m) - 0.5, 0, m.shape[1])
        image = axes.imshow(
            np.log10(pooled.T + 1), aspect="auto", cmap="viridis", interpolation="nearest", origin="lower", extent=extent
        )
        axes.set(xlabel="token of the first window", ylabel="channel")
        axes.figure.colorbar(image, ax=axes).set_label("log10(1 + |H|)")

    caption = f"|H| behind block {s['block']}" + (f", the largest of {wide} neighbouring channels." if wide > 1 else ".")
    return f"Stage {i + 1}: tokens and channels where it emerges", caption, 3.2, draw


def _first_token(record: dict[str, Any]) -> tuple[str, str, float, Draw]:
    rows = record["attention"]["layers"]
    m = np.array([r["first_token"] for r in rows]).T

    def draw(axes: Any, ink: str) -> None:
        image = axes.imshow(m, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xlabel="layer", ylabel="head")
        axes.figure.colorbar(image, ax=axes).set_label("attention")

    return "Attention to the first token", "Mean over queries from position 32 on, per layer and head.", 2.6, draw


def _maps(record: dict[str, Any], data: dict[str, Any]) -> list[tuple[str, str, float, Draw]]:
    """One layer behind each stage: as it is, and without its sinks (or with the experts skipped)."""
    causal = any(k.startswith("map.without.") for k in data)
    kinds = ("map.with", "map.without") if causal else ("map", "map")
    out: list[tuple[str, str, float, Draw]] = []
    for p in record["predictor"]:
        layer = (p["layers"][0] + p["layers"][1]) // 2
        if f"{kinds[0]}.{layer}" not in data:
            continue
        left, right = data[f"{kinds[0]}.{layer}"], np.array(data[f"{kinds[1]}.{layer}"])
        if not causal:
            sinks = left.sum(0).argsort()[::-1][:5]
            right[:, sinks] = 0
            right /= np.maximum(right.sum(1, keepdims=True), 1e-6)

        def draw(axes: Any, ink: str, left: Any = left, right: Any = right) -> None:
            from matplotlib import colormaps

            gap = np.full((len(left), 3), np.nan)
            both = np.concatenate([gap, left, gap, right], 1)
            seen = np.log10(np.where(both > 0, both, np.nan) + 1e-4)  # grey: what a query cannot see
            colors = colormaps["magma"].with_extremes(bad="#8b949e")
            image = axes.imshow(seen, aspect="auto", cmap=colors, interpolation="nearest", vmin=-4, vmax=0)
            ticks = range(0, left.shape[1], 20)
            places = [*(t + 3 for t in ticks), *(t + left.shape[1] + 6 for t in ticks)]
            axes.set_xticks(places, [str(t) for t in (*ticks, *ticks)])
            axes.set(xlabel=f"key (left: as it is; right: {'experts skipped' if causal else 'without sinks'})", ylabel="query")
            axes.figure.colorbar(image, ax=axes).set_label("log10 of attention")

        how = "the suspected experts are skipped" if causal else "its five sinks are taken out and the rest rescaled"
        out.append((f"Attention of layer {layer}", f"Mean of all heads, first 64 tokens. Right: {how}.", 3.4, draw))
    return out


def _recall(record: dict[str, Any]) -> tuple[str, str, float, Draw]:
    def draw(axes: Any, ink: str) -> None:
        for i, p in enumerate(record["predictor"]):
            for name, style in (("kvsink", "-"), ("first", ":")):
                ks = [r["k"] for r in p["rows"]]
                label = f"{'KVSink' if name == 'kvsink' else 'first N'}, layers {p['layers'][0]}-{p['layers'][1]}"
                axes.plot(ks, [r[name]["recall"] for r in p["rows"]], style, color=_COLORS[i], marker="o", ms=4, label=label)
        axes.set(xlabel="rows kept", ylabel="recall of the five largest sinks", ylim=(0, 1.05))
        axes.set_xticks(sorted({r["k"] for p in record["predictor"] for r in p["rows"]}))
        _legend_above(axes)

    return "Predictor against attention", "Share of the five tokens with the most attention that are kept.", 3.0, draw


def _norms(record: dict[str, Any]) -> tuple[str, str, float, Draw]:
    layers = [r["layer"] for r in record["kv"]]

    def draw(axes: Any, ink: str) -> None:
        for i, name in enumerate(("key", "value")):
            axes.plot(layers, [r["norms"][f"{name} rest"] for r in record["kv"]], color=_COLORS[i], label=f"{name}s, other tokens")
            axes.plot(layers, [r["norms"][f"{name} sinks"] for r in record["kv"]], ":", color=_COLORS[i], label=f"{name}s, sinks")
        axes.set(xlabel="layer", ylabel="mean norm", ylim=(0, None))
        _legend_above(axes)

    return "Norms of sinks", "Keys and values of the five largest sinks of a layer against all other tokens.", 3.0, draw


def _crests(record: dict[str, Any]) -> tuple[str, str, float, Draw]:
    names = list(record["kv"][0]["ranges"])

    def draw(axes: Any, ink: str) -> None:
        for name in names:
            rows = [(r["layer"], r["ranges"][name]["crest"]) for r in record["kv"] if name in r["ranges"]]
            plain = names.index(name.removesuffix(", Hadamard"))
            axes.plot(*zip(*rows, strict=True), ":" if "Hadamard" in name else "-", color=_COLORS[plain], label=name)
        axes.set(xlabel="layer", ylabel="largest / rms", ylim=(0, None))
        _legend_above(axes)

    return "Ranges before and after rotation", "Largest magnitude over rms; lower is easier to quantize.", 3.2, draw


def _heat(record: dict[str, Any]) -> tuple[str, str, float, Draw]:
    entries = record["entries"]
    names = sorted({k.partition(":")[2] for k in entries}, key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n))
    m = np.full((record["layers"], len(names)), np.nan)
    for key, e in entries.items():
        layer, _, name = key.partition(":")
        m[int(layer), names.index(name)] = np.log10(e["largest"] + 1)

    def draw(axes: Any, ink: str) -> None:
        image = axes.imshow(m.T, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set(xlabel="layer", ylabel="expert")
        if len(names) <= 24:
            axes.set_yticks(range(len(names)), names)
        axes.figure.colorbar(image, ax=axes).set_label("log10(1 + a)")

    return "Largest output per expert", "a: the largest magnitude that an expert's down projection has put out.", 3.2, draw


def _bars(record: dict[str, Any]) -> tuple[str, str, float, Draw]:
    e = record["experts"]
    names = e["ranking"][:16]
    values = [record["entries"].get(n, {"largest": 0.0})["largest"] for n in names]
    colors = [_COLORS[1] if n in e["super_experts"] else _COLORS[3] if n in e["candidates"] else "#868e96" for n in names]

    def draw(axes: Any, ink: str) -> None:
        axes.bar(names, values, color=colors)
        limit = e["threshold_percentile"]
        axes.axhline(limit, color=_COLORS[0], ls="--", lw=1, label=f"percentile {e['percentile']}")
        axes.axhline(e["threshold_share"], color=_COLORS[2], ls=":", lw=1, label="a tenth of the largest")
        axes.set(ylabel="a", yscale="log" if min(values) > 0 else "linear")
        axes.tick_params(axis="x", rotation=60)
        _legend_above(axes)

    return "The largest experts", "Orange: Super Expert; violet: candidate; grey: neither.", 3.2, draw


def _decay(record: dict[str, Any]) -> tuple[str, str, float, Draw]:
    c = record["experts"]["causal"]

    def draw(axes: Any, ink: str) -> None:
        for i, (name, label) in enumerate((("all", "suspects skipped"), ("random", "as many others skipped"))):
            values = [np.nan if d is None else d for d in c[name]["d_sink"]]
            axes.plot(values, color=_COLORS[1 - i], marker="o", ms=3, label=label)
        axes.axhline(0.8, color=_COLORS[2], ls=":", lw=1)
        axes.set(xlabel="layer", ylabel="D_sink")
        _legend_above(axes)

    return "Sink decay", "0: the sinks are as before; 1: they are gone.", 3.0, draw
