"""The backend over codes in tiles: kernels in CUDA C++ that read codes as a matrix unit takes them, and what they serve.

Formula    as `kvsink.kernels.append` and `kvsink.kernels.attend`; see `kvsink.kernels.layout` and `kvsink.kernels.cuda.launch`
Source     ours
Differs    in a step, a new row enters the exact rows after attention: the row it drives out is exact one step longer
Shapes     as the ops'
Exact      codes equal the definition's up to ties that the order of sums decides; output: relative error of a 16-bit result
Declines   `declines` holds every limit of these kernels, in words
Cost       one launch for `append_`, one for `attend` of one new row; no copy from the host, no synchronisation
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import layout
from ..append import keep_exact
from ..attend import attend_plain
from ..backends import Call, Device, LayerFormat, Shape, tell_once
from ..prefill import attend_chunk
from ..stages import rope_rows
from ..triton import append as triton_append
from . import launch, module, variants

__all__ = ["append", "attend", "declines", "library", "step"]

DTYPES = (torch.float16, torch.bfloat16)
DIMS = (64, 80, 96, 128, 256)  # channels of a head
REPEATS = 32  # query heads that share a key-value head
EXACT, WINDOW = 64, 512  # rows of the segments, recent rows
SEGMENTS = 4  # of exact rows that a step sees to
WIDTHS = (1, 2, 3, 4, 8)  # bits of a code
TESTED = ((9, 0),)  # compute capabilities on which the tests have run


def declines(f: LayerFormat, s: Shape, d: Device | None) -> str:
    """What keeps a layer from the kernels, in words; empty when they serve it. d: None for any device. Compiles them when nothing
    else speaks against it."""
    if d is not None and d.type != "cuda":
        return "the GPU is not one of NVIDIA's" if d.gpu else f"the device is {d.type}"
    if d is not None and s.dtype not in DTYPES:
        return f"the model computes in {str(s.dtype).removeprefix('torch.')}"
    if f.order != "mma":
        return "codes in rows of bytes"
    if s.dim not in DIMS or s.value_dim != s.dim:
        found = f"{s.dim}" if s.value_dim == s.dim else f"{s.dim} of keys and {s.value_dim} of values"
        return f"head_dim is {found}, not one of {', '.join(map(str, DIMS))}"
    if s.heads > REPEATS * s.kv_heads or s.heads % s.kv_heads:
        return f"{s.heads} query heads share {s.kv_heads} key-value heads: more than {REPEATS} each"
    if s.rotary % 16 or s.rotary > s.dim:
        return f"{s.rotary} of {s.dim} channels carry RoPE"
    if not f.key.packed or not f.value.packed:
        return "keys or values stay in 16 bit"
    if reason := _beyond_rows(f):
        return reason
    if f.exact > EXACT:
        return f"{f.exact} exact rows, more than {EXACT}"
    if reason := _unread(f, s.dim):
        return reason
    return "" if d is None else _compiled(f, s, d)


def _beyond_rows(f: LayerFormat) -> str:
    """What a layer holds beside one code and one scale per row and exact rows of a fixed number."""
    if f.window > WINDOW:
        return f"a window of {f.window} recent rows, more than {WINDOW}"
    if f.anchored:
        return "anchors, whose number grows with the slots"
    for name, side in (("keys", f.key), ("values", f.value)):
        for held, what in (
            (side.norm, f"{name} with a norm of each token"),
            (side.by_token_block, f"{name} with ranges along tokens"),
            (side.flush or side.newest, f"recent {name} that stay exact on one side alone"),
            (side.outliers, f"{name} with sparse outliers"),
            (side.exponent, f"{name} beyond the range of float16"),
            (side.visual_bits, f"{name} of visual rows with levels of their own"),
            (side.kind == "vector", f"{name} in codebooks"),
            (side.kind == "nuq", f"{name} with free code points"),
        ):
            if held:
                return what
    return ""


def _unread(f: LayerFormat, dim: int) -> str:
    """What the kernels do not read of one code and one scale per row."""
    k, v, block = f.key, f.value, layout.BLOCK
    if k.domain == "block" and not (k.block == block and k.transform == "klt" and k.kind == "lloyd-even" and k.gain):
        return f"{k.kind} keys before RoPE, other than klt in blocks of {block} with equally spaced levels and gain (klt-even)"
    if k.domain == "post" and not (k.kind == "uniform" and k.group_size == dim and k.transform in ("none", "hadamard")):
        return f"{k.kind} keys after RoPE in groups of {k.group_size}"
    if k.reorder or k.heads_per_group > 1 or k.folded or (k.transform == "hadamard" and k.order != dim):
        return "keys reordered or rotated across heads"
    if v.kind != "uniform" or v.group_size != dim:
        return f"{v.kind} values in groups of {v.group_size}"
    if v.transform == "klt" or v.heads_per_group > 1 or (v.transform == "hadamard" and not v.folded and v.order != dim):
        return f"values transformed by {v.transform} across heads or by statistics"
    for name, side in (("keys", k), ("values", v)):
        if not set(side.widths) <= set(WIDTHS) or (8 in side.widths and side.kind != "uniform"):
            return f"{name} of {min(side.widths)} to {max(side.widths)} bits, outside 1 to 4 and 8"
        if layout.tile_bytes(side.widths) > 1.2 * sum(side.widths):
            return f"{name} of {sum(side.widths) / len(side.widths):g} bits in {dim} channels do not fill whole words"
    return ""


def _compiled(f: LayerFormat, s: Shape, d: Device) -> str:
    """Why the kernels cannot be had on a GPU; they are compiled and loaded where they can."""
    if reason := variants.too_old(d.capability, d.name):
        return reason
    variant = launch.variant_of(f, s.repeats or 1, s.rotary)
    try:
        if d.place is None:
            variant.shape(variants.Card(10 * d.capability[0] + d.capability[1], d.shared))
        else:
            library(f, s.repeats, s.rotary, d.place)
    except module.NativeError as error:
        return str(error)
    if d.place is not None and d.capability not in TESTED:
        tell_once(f"{d.name}: compute capability {d.capability[0]}.{d.capability[1]} is one on which no test has run")
    return ""


def declines_mask(f: LayerFormat, s: Shape, d: Device | None) -> str:
    """The same for attention."""
    if s.mask == "other" and s.rows == 1:
        return "a mask that is not one of visible slots"
    return declines(f, s, d)


def declines_step(f: LayerFormat, s: Shape, d: Device | None) -> str:
    """The same for `step`."""
    if reason := declines_mask(f, s, d):
        return reason
    if s.rows > 1:
        return "more than one new row"
    if f.strict:
        return "new rows are read back from their codes"
    if len(f.segments) > SEGMENTS:
        return f"{len(f.segments)} protection segments"
    return "" if s.offered else "several new candidates for one exact row"


def library(f: Any, repeats: int, rotary: int, place: torch.device) -> launch.Library:
    """The kernels for a format or codec. repeats: query heads per key-value head, or 0 where any will do: coding rows does not
    depend on them. Raises NativeError."""
    for n in () if repeats else range(REPEATS, 0, -1):
        if (held := module.loaded(launch.variant_of(f, n, rotary), place)) is not None:
            return held
    return module.library(launch.variant_of(f, repeats or 1, rotary), place)


def _library(call: Call) -> launch.Library:
    return library(call.codec, call.shape.repeats, call.shape.rotary, call.k.device)


def append(call: Call, lib: launch.Library | None = None) -> None:
    """`append_`: one launch for one new row; the exact rows of more are chosen by plain operators. lib: kernels, if others."""
    k, v, positions, cos, sin, candidates, _, _ = call.coding()
    k = k if call.roped else rope_rows(k, cos, sin)
    if not launch.append_rows(lib or _library(call), call.codec, k, v, positions, candidates, call.st, call.p):
        keep = triton_append.keep_exact if triton_append.keeps(call.codec, candidates, k.device) else keep_exact
        keep(call.codec, call.st, k, v, candidates)


def attend(call: Call, lib: launch.Library | None = None) -> Tensor:
    """`attend`: one launch for one new row, pieces of the decoded past for more."""
    q, k, v, _, _, mask, scale = call.asking()
    lib, c, st, p = lib or _library(call), call.codec, call.st, call.p
    if q.shape[2] == 1:
        out = launch.attend_one(lib, c, q, k, v, st, p, mask, scale)
        assert out is not None  # masks of another kind are declined
        return out
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return attend_plain(call)  # the length decides what runs, and a graph under capture cannot read it
    first, slots = int(call.state.length), st["k_codes"].shape[2]
    if first + q.shape[2] > slots:
        raise IndexError(f"{q.shape[2]} rows do not fit behind {first} of {slots} slots; make the cache longer")

    def past(start: int, end: int) -> tuple[Tensor, Tensor]:
        return launch.decode_rows(lib, c, st, p, start, end, k.dtype, first + q.shape[2])

    return attend_chunk(past, q, k, v, first, mask, scale, call.causal, c.strict)


def step(call: Call) -> Tensor:
    """Both, of one new row per sequence: in one launch, or side by side in a CUDA graph."""
    q, k, v, _, _, mask, scale = call.asking()
    assert call.positions is not None
    rest = call.positions, call.candidates, call.st, call.p, mask, scale
    out = launch.step(_library(call), call.codec, q, k, v, *rest)
    if out is None:  # more sequences than the kernels see to
        append(call)
        return attend(call)
    return out
