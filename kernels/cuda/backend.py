"""What the backend over codes in tiles serves: kernels in CUDA C++ that read codes as a matrix unit takes them.

Formula    as `kvsink.kernels.append` and `kvsink.kernels.attend`; see `kvsink.kernels.layout` and `kvsink.kernels.cuda.launch`
Source     ours
Differs    in a step, a new row enters the exact rows after attention: the row it drives out is exact one step longer
Shapes     as the ops'
Exact      codes equal the definition's up to ties that the order of sums decides; output: relative error of a 16-bit result
Declines   `declines` holds every limit of these kernels, in words
Cost       one launch for `append_`, one for `attend` of one new row; no copy from the host, no synchronisation
"""

from __future__ import annotations

import torch

from .. import layout
from ..backends import Device, LayerFormat, Shape, tell_once
from ..trellis import TRELLIS_WIDTHS
from . import launch, module, variants

__all__ = ["declines", "declines_mask", "declines_step"]

DTYPES = (torch.float16, torch.bfloat16)
DIMS = (64, 80, 96, 128, 256)  # channels of a head
EXACT, WINDOW = 64, 512  # rows of the segments, recent rows
SEGMENTS = 4  # of exact rows that a step sees to
WIDTHS = {"trellis": TRELLIS_WIDTHS, "lloyd-even": (1, 2, 3, 4, 5, 6), "uniform": (1, 2, 3, 4, 5, 6, 8)}  # bits of a code
TESTED = ((9, 0),)  # compute capabilities on which the tests have run
WALKED = ((9, 0),)  # the same of codes of a trellis


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
    if s.heads > launch.REPEATS * s.kv_heads or s.heads % s.kv_heads:
        return f"{s.heads} query heads share {s.kv_heads} key-value heads: more than {launch.REPEATS} each"
    if s.rotary % 16 or s.rotary > s.dim or (f.key.center and not s.rotary):
        return f"{s.rotary or 'none'} of {s.dim} channels carry RoPE"
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
    read = (k.kind == "lloyd-even" and k.gain) or k.kind == "trellis"
    if k.domain == "block" and not (k.block == block and k.transform == "klt" and read):
        served = "with a trellis or equally spaced levels and gain (klt, klt:even)"
        return f"{k.kind} keys before RoPE, other than klt in blocks of {block} {served}"
    if k.domain == "post" and not (k.kind == "uniform" and k.group_size == dim and k.transform in ("none", "hadamard")):
        return f"{k.kind} keys after RoPE in groups of {k.group_size}"
    if k.reorder or k.heads_per_group > 1 or k.folded or (k.transform == "hadamard" and k.order != dim):
        return "keys reordered or rotated across heads"
    if v.kind != "trellis" and (v.kind != "uniform" or v.group_size != dim):
        return f"{v.kind} values in groups of {v.group_size}"
    if v.transform == "klt" or v.heads_per_group > 1 or (v.transform == "hadamard" and not v.folded and v.order != dim):
        return f"values transformed by {v.transform} across heads or by statistics"
    for name, side in (("keys", k), ("values", v)):
        if not set(side.widths) <= set(WIDTHS[side.kind]):
            few, most = min(side.widths), max(side.widths)
            found, known = f"{few}" if few == most else f"{few} to {most}", "1 to 6 and 8" if 8 in WIDTHS[side.kind] else "1 to 6"
            return f"{side.kind} {name} of {found} bits, not of {known}"
        if layout.tile_bytes(side.widths, side.kind) - (side.kind == "trellis") > 1.2 * sum(side.widths):
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
            launch.library(f, s.repeats, s.rotary, d.place)
    except module.NativeError as error:
        return str(error)
    walks = "trellis" in (f.key.kind, f.value.kind)
    if d.place is not None and d.capability not in (WALKED if walks else TESTED):
        what = " of codes of a trellis" if walks else ""
        tell_once(f"{d.name}: compute capability {d.capability[0]}.{d.capability[1]} is one on which no test{what} has run")
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
