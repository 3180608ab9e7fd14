"""What runs where: `served.txt` names, for every kind of codec, head shape and device, the backend that appends, attends and
takes a whole step, and the reason of every faster one that does not. `python -m tests.contracts.test_backends` writes it anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvsink.codecs import Anchors, Codec, SideSpec
from kvsink.errors import UnsupportedError
from kvsink.kernels.backends import Device, Shape, plan
from kvsink.methods import get_method

SERVED = Path(__file__).with_name("served.txt")
KV_HEADS, SLOTS = 8, 8192
WHATS = ("attend", "append", "step")
DIMS, REPEATS = (64, 80, 96, 128, 256), (1, 2, 4, 5, 8, 16)
SHARED = {"8.0": 166912, "8.6": 101376, "8.9": 101376, "9.0": 232448, "10.0": 232448, "12.0": 101376}
"""Bytes of shared memory that a block can have, by compute capability: CUDA's programming guide, table of technical data."""
DEVICES = ("cpu", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0", "hip")

RECIPES: tuple[tuple[str, str, float, float, dict[str, Any]], ...] = (
    ("klt 2/2", "klt", 2, 2, {}),
    ("klt 2/2 strict", "klt", 2, 2, {"strict": True}),
    ("klt 2/2 before RoPE", "klt", 2, 2, {"block": 1}),
    ("klt 3/3", "klt", 3, 3, {}),
    ("klt 4/4", "klt", 4, 4, {}),
    ("klt 2/2, 64 first and 256 recent rows", "klt", 2, 2, {"segments": (64,), "window": 256}),
    ("klt 1.25/1", "klt", 1.25, 1, {}),
    ("klt 8/8", "klt", 8, 8, {}),
    ("klt:best 2/4", "klt:best", 2, 4, {}),
    ("klt:best 2/4 strict", "klt:best", 2, 4, {"strict": True}),
    ("klt:best 2/4 before RoPE", "klt:best", 2, 4, {"block": 1}),
    ("klt:codebooks 2/2", "klt:codebooks", 2, 2, {}),
    ("klt:even 1/1", "klt:even", 1, 1, {}),
    ("klt:even 2/2", "klt:even", 2, 2, {}),
    ("klt:even 2/4", "klt:even", 2, 4, {}),
    ("klt:even 4/4", "klt:even", 4, 4, {}),
    ("klt:even 2/2, 64 first and 256 recent rows", "klt:even", 2, 2, {"segments": (64,), "window": 256}),
    ("centred:even 2/2", "centred:even", 2, 2, {}),
    ("centred:even 4/4", "centred:even", 4, 4, {}),
    ("centred:even 3/3", "centred:even", 3, 3, {}),
    ("centred:even 2/2 strict", "centred:even", 2, 2, {"strict": True}),
    ("centred:even 2/2, 5 segments", "centred:even", 2, 2, {"segments": (1, 1, 1, 1, 1)}),
    ("centred 2/2", "centred", 2, 2, {}),
    ("centred 4/4", "centred", 4, 4, {}),
    ("rtn 2/2", "rtn", 2, 2, {}),
    ("rtn 8/8", "rtn", 8, 8, {}),
    ("rtn 16/2", "rtn", 16, 2, {}),
    ("rtn 2/2, 128 recent rows", "rtn", 2, 2, {"window": 128}),
    ("rtn 2/2, beyond float16", "rtn", 2, 2, {"exponent": 4}),
    ("static:rotated 4/4", "static:rotated", 4, 4, {}),
    ("kivi 2/2", "kivi", 2, 2, {"segments": ()}),
    ("oscar 2/2", "oscar", 2, 2, {"segments": ()}),
    ("wush 2/2, 128 recent rows", "wush", 2, 2, {"segments": (16,), "window": 128}),
    ("oscar-int2 2/2, 64 first and 256 recent rows", "oscar-int2", 2, 2, {"segments": (64,), "window": 256}),
    ("nova 2/2, 64 first and 256 recent rows", "nova", 2, 2, {"segments": (64,), "window": 256}),
    ("tasq 1.25/1.25, 64 recent rows", "tasq", 1.25, 1.25, {"segments": (), "window": 64}),
    ("kvarn 2/2", "kvarn", 2, 2, {"segments": (128,)}),
    ("rotated 4/4", "rotated", 4, 4, {"segments": (4,)}),
    ("kvquant 3/3", "kvquant", 3, 3, {}),
    ("kvquant-1% 2/2", "kvquant-1%", 2, 2, {}),
    ("cq 2/2", "cq", 2, 2, {"segments": ()}),
    ("antkv 1/1", "antkv", 1, 1, {"segments": (), "anchors": Anchors(ppm=10_000)}),
    ("rotatekv 2/2", "rotatekv", 2, 2, {"segments": (20,)}),
    ("akvq-vl 2/2, text-salient", "akvq-vl", 2, 2, {"modal": True}),
)


def _side(name: str, which: str, bits: float, dim: int, more: dict[str, Any]) -> SideSpec:
    method = get_method(name)
    side = method.modal_side(which, bits) if "modal" in more else method.side(which, bits)
    if which == "key" and "block" in more:
        side = replace(side, block=more["block"])
    side = replace(side.resolved(KV_HEADS, dim), exponent=more.get("exponent", 0))
    if side.packed and not side.widths and not side.couple:  # what calibration spreads: half of the runs one bit more or fewer
        low, runs = int(bits), dim // 8
        side = replace(side, widths=(low + 1,) * (runs // 2) + (low - 1,) * (runs - runs // 2))
    return replace(side, folded=which == "value" and side.transform == "hadamard")


@cache
def codec_of(recipe: str, dim: int) -> Codec | str:
    """A recipe's codec for heads of `dim` channels, or why there is none."""
    _, name, key_bits, value_bits, more = next(r for r in RECIPES if r[0] == recipe)
    try:
        key, value = (_side(name, w, b, dim, more) for w, b in (("key", key_bits), ("value", value_bits)))
    except UnsupportedError as error:
        return str(error).split("; ")[0]
    window = more.get("window", get_method(name).window)
    return Codec(key, value, more.get("segments", (5, 1)), window, more.get("strict", False), more.get("anchors"))


@cache
def device_of(name: str) -> Device:
    """A machine that is only asked about, with Triton and compilers."""
    if name in ("cpu", "hip"):
        return Device(name, (9, 4) if name == "hip" else (0, 0), triton=True)
    major, _, minor = name.partition(".")
    return Device("cuda", (int(major), int(minor)), triton=True, shared=SHARED[name])


def cell(recipe: str, dim: int, repeats: int, device: str) -> dict[str, str]:
    """Who attends, appends and steps, and the reason of everybody faster."""
    codec = codec_of(recipe, dim)
    if isinstance(codec, str):
        return dict.fromkeys(WHATS, f"nothing | codec: {codec}")
    dtype = torch.float32 if device == "cpu" else torch.float16
    shape = Shape(repeats * KV_HEADS, KV_HEADS, dim, dim, dim, dtype, codec.exact_places(SLOTS))
    return {what: str(plan(what, codec.format, shape, device_of(device))) for what in WHATS}


def _cells(found: dict[tuple[int, str], tuple[int, ...]]) -> Iterator[str]:
    """Sets of cells as products: dims · devices · repeats."""
    by: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for (dim, device), repeats in found.items():
        by.setdefault((repeats, dim), []).append(device)
    merged: dict[tuple[tuple[int, ...], tuple[str, ...]], list[int]] = {}
    for (repeats, dim), devices in by.items():
        merged.setdefault((repeats, tuple(devices)), []).append(dim)
    for (repeats, devices), dims in merged.items():
        named = (
            "every width" if tuple(dims) == DIMS else "D " + " ".join(map(str, dims)),
            "every device" if devices == DEVICES else " ".join(devices),
            "" if repeats == REPEATS else "R " + " ".join(map(str, repeats)),
        )
        yield " · ".join(n for n in named if n)


def text() -> str:
    """The whole table. D: channels of a head; R: query heads that share a key-value head."""
    lines = [f"# D: channels of a head; R: query heads that share one of {KV_HEADS} key-value heads; {SLOTS} slots"]
    for recipe, *_ in RECIPES:
        lines.append(f"\n{recipe}")
        cells = {(d, v, r): cell(recipe, d, r, v) for d in DIMS for v in DEVICES for r in REPEATS}
        for what in WHATS:
            groups: dict[str, dict[tuple[int, str], tuple[int, ...]]] = {}
            for (dim, device, repeats), found in cells.items():
                at = groups.setdefault(found[what], {})
                at[dim, device] = (*at.get((dim, device), ()), repeats)
            lines += [f"  {what:6} {where}: {served}" for served, at in groups.items() for where in _cells(at)]
    return "\n".join(lines) + "\n"


def test_what_runs_where_is_as_written() -> None:
    assert SERVED.read_text(encoding="utf-8") == text()


def test_nobody_declines_without_a_reason() -> None:
    for line in SERVED.read_text(encoding="utf-8").splitlines():
        for part in line.split(" | ")[1:]:
            assert part.partition(": ")[2].strip(), line


if __name__ == "__main__":
    SERVED.write_text(text(), encoding="utf-8")
