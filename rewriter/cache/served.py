"""Which backend serves every layer of a rewritten model, and why nobody faster does: what a cache stores by, and reports print."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import torch

from kvsink.kernels.backends import GROWS, Choice, Device, LayerFormat, Shape, choose, device_of, plan, table, tell_once
from kvsink.model.runtime import Runtime

__all__ = ["apart", "in_tiles", "served", "served_lines", "tiles_serve"]


def _asked(runtime: Runtime, layer: int, dtype: torch.dtype) -> tuple[LayerFormat, Shape]:
    codec = runtime.plans[layer].codec
    assert codec is not None
    exact = codec.exact_rows if codec.anchors is None else GROWS
    return codec.format, Shape(*runtime.anatomy.layers[layer], runtime.rotary_channels(layer), dtype, exact)


def apart(runtime: Runtime, layer: int) -> str:
    """What in a model keeps a layer's codes from tiles, whatever the kernels serve."""
    a = runtime.anatomy
    first = next(t for t, p in zip(a.turnings, runtime.plans, strict=True) if p.codec is not None)
    if a.turnings[layer] != first:
        return "the layer turns its keys otherwise than the first, whose origins all share"
    if layer in a.apart:
        return "its keys and values are read by more than one call of its own attention"
    codec = runtime.plans[layer].codec
    assert codec is not None
    return "its keys deviate beyond what the kernels' basis holds in float16" if runtime.beyond_half(layer, codec) else ""


def in_tiles(runtime: Runtime, layer: int, what: str = "attend") -> str:
    """Why the codes of a packed layer cannot stand in tiles on any device; empty when they can. what: of `choose`."""
    f, s = _asked(runtime, layer, torch.float16)
    part = getattr(table()[0], what)
    assert part is not None
    return apart(runtime, layer) or str(part.refuses(f.in_tiles(), s, None))


def served(runtime: Runtime, dtype: torch.dtype, device: Device) -> dict[int, tuple[Choice, Choice]]:
    """Who attends and who appends for one new row, by packed layer."""
    found = {}
    for layer, layer_plan in enumerate(runtime.plans):
        if layer_plan.codec is None:
            continue
        f, s = _asked(runtime, layer, dtype)
        if reason := apart(runtime, layer):
            pair = [choose(what, f, s, device) for what in ("attend", "append")]
            pair = [c._replace(why=((c.why[0][0], reason), *c.why[1:])) for c in pair]
        else:
            pair = [plan(what, f, s, device) for what in ("attend", "append")]
        found[layer] = pair[0], pair[1]
    return found


def tiles_serve(runtime: Runtime, dtype: torch.dtype, place: torch.device) -> bool:
    """Whether codes should stand in tiles: on a GPU whose kernels serve a layer. Says once what runs on plain operators there."""
    if place.type != "cuda":
        return False
    found = [attend for attend, _ in served(runtime, dtype, device_of(place)).values()]
    for choice in found:
        if choice.name == "torch":
            reasons = "; ".join(dict.fromkeys(f"{name}: {reason}" for name, reason in choice.why if not name.startswith("cpu")))
            tell_once(f"attention over packed codes runs on the plain operators ({reasons})")
    return any(choice.name == "cuda (tiles)" for choice in found)


def served_lines(runtime: Runtime, dtype: torch.dtype, place: torch.device, compiled: bool = True) -> list[str]:
    """The table as text: one line for every run of layers that are served alike, without the backends of other devices. compiled:
    kernels are compiled to see whether they can be."""
    device, lines = device_of(place), []
    found = served(runtime, dtype, device if compiled else replace(device, place=None))
    elsewhere = f"the device is {device.type}"

    def said(choice: Choice) -> str:
        return str(choice._replace(why=tuple(w for w in choice.why if w[1] != elsewhere)))

    for (attends, codes), run in groupby(found.items(), lambda row: (said(row[1][0]), row[1][1].name)):
        layers = [layer for layer, _ in run]
        which = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        lines.append(f"{which} on {place.type}: rows coded by {codes}, attention by {attends}")
    return lines
