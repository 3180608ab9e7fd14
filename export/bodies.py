"""What each node of domain com.kvsink does, written in standard ONNX operators (opset 24): the body of a model-local function.

A body is specialised to its node: attributes and static sizes are numbers in it; `dtype` says in which type it computes, and
tables, which are float32, are widened to it. Thresholds are searched by halving.

Formula    as in `kvsink.kernels`, step for step, so that codes agree up to the order of sums
Shapes     x [B, H, S, D]; every dimension but H and D is dynamic and may be 0
Declines   kinds without a body: KeyError names them; `kvsink.export.flavours` says so before anything is exported
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kvsink.export import trellis_body
from kvsink.export.body import HALF_MAX, Body, look_up, pack, pack_any, unpack
from kvsink.kernels.hadamard import hadamard_matrix
from kvsink.kernels.levels import even_levels, even_thresholds, lloyd_max, thresholds
from kvsink.kernels.quantize import segments

__all__ = ["BODIES", "DOMAIN", "OPSET", "QUANTIZER_BODIES", "function_proto"]

DOMAIN, OPSET = "com.kvsink", 24  # the first with TensorScatter
_HALF_TINY = 6.0e-8


def _codes(b: Body, x: str, width: int, even: bool = False) -> str:
    """Number of thresholds below x, int32."""
    t = (even_thresholds if even else thresholds)(width).numpy()
    if width <= 2:
        over = [b.cast(b.Greater(x, b.const(v)), "INT32") for v in t]
        for other in over[1:]:
            over[0] = b.Add(over[0], other)
        return over[0]
    table = b.const(t)
    half = 1 << (width - 1)
    code = b.Mul(b.cast(b.Greater(x, b.const(t[half - 1])), "INT32"), b.const(half, np.int32))
    for bit in range(width - 2, -1, -1):
        at = b.Gather(table, b.Add(code, b.const((1 << bit) - 1, np.int32)))
        more = b.cast(b.Greater(x, at), "INT32")
        code = b.Add(code, b.Mul(more, b.const(1 << bit, np.int32)) if bit else more)
    return str(code)


# -- quantizers: (body, attributes, inputs) -> outputs -------------------------------------------------------------------


def _quantize_uniform(b: Body, a: Mapping[str, Any], x: str) -> tuple[str, str]:
    width, size, clip = a["widths"][0], a["group_size"], a["clip"]
    dim, top = 8 * len(a["widths"]), float(2**width - 1)
    groups = b.reshape(x, 0, 0, 0, dim // size, size)
    hi, lo = b.reduce("ReduceMax", groups), b.reduce("ReduceMin", groups)
    if clip != 1:
        hi, lo = b.Mul(hi, b.const(clip)), b.Mul(lo, b.const(clip))
    s = b.half(b.Div(b.Sub(hi, lo), b.const(top)))
    step = b.number(s)
    if a["kind"] == "uniform-int":
        step = b.Where(b.Greater(step, b.const(0)), step, b.const(1))
        base = b.half(b.Round(b.Div(b.Neg(lo), step)))
        codes = b.Add(b.Round(b.Div(groups, step)), b.number(base))
        s = b.half(step)
    else:
        base = b.half(lo)
        codes = b.Round(b.Div(b.Sub(groups, b.number(base)), b.Max(step, b.const(_HALF_TINY))))
    codes = b.reshape(b.Clip(codes, b.const(0), b.const(top)), 0, 0, 0, dim)
    scale = b.reshape(b.Concat(s, base, axis=-1), 0, 0, 0, 2 * dim // size)
    return pack(b, codes, width, dim), scale


def _quantize_quantile(b: Body, a: Mapping[str, Any], x: str) -> tuple[str, str]:
    size, dim = a["group_size"], 8 * len(a["widths"])
    above = max(size - int(a["clip"] * size), 1)
    groups = b.reshape(x, 0, 0, 0, dim // size, size)
    largest, _ = b.TopK(b.Abs(groups), b.ints(above), axis=-1, outputs=2)
    t = b.slice(largest, above - 1, above, -1)
    rows = b.reshape(b.Max(b.Min(groups, t), b.Neg(t)), 0, 0, 0, dim)
    return _quantize_uniform(b, {**a, "kind": "uniform", "clip": 1}, rows)


def _quantize_gauss(b: Body, a: Mapping[str, Any], x: str) -> tuple[str, str]:
    width, size, dim = a["widths"][0], a["group_size"], 8 * len(a["widths"])
    groups = b.reshape(x, 0, 0, 0, dim // size, size)
    m = b.half(b.reduce("ReduceMean", groups))
    centred = b.Sub(groups, b.number(m))
    d = b.half(b.Sqrt(b.reduce("ReduceMean", b.Mul(centred, centred))))
    codes = _codes(b, b.Div(centred, b.Max(b.number(d), b.const(_HALF_TINY))), width)
    scale = b.reshape(b.Concat(d, m, axis=-1), 0, 0, 0, 2 * dim // size)
    return pack(b, b.reshape(codes, 0, 0, 0, dim), width, dim), scale


def _quantize_lloyd(b: Body, a: Mapping[str, Any], x: str, sigma: str) -> tuple[str, str]:
    parts, even = segments(a["widths"]), a["kind"] == "lloyd-even"
    levels = even_levels if even else lloyd_max
    deviation = b.Max(b.Unsqueeze(sigma, b.ints(1)), b.const(_HALF_TINY, np.float32))
    y = b.Div(x, b.widened(deviation))
    whole = len(parts) == 1 and parts[0][1] == 8 * len(a["widths"])

    def cut(t: str, start: int, stop: int) -> str:
        return t if whole else b.slice(t, start, stop, -1)

    def encode(rows: str) -> list[str]:
        return [_codes(b, cut(rows, s, e), w, even) for s, e, _, w in parts]

    def fit(codes: list[str]) -> str:
        dot, square = "", ""
        for (s, e, _, w), code in zip(parts, codes, strict=True):
            level = b.Mul(b.Gather(b.const(levels(w).numpy(), np.float32), code), cut(deviation, s, e))
            one = b.reduce("ReduceSum", b.Mul(cut(x, s, e), b.widened(level)))
            two = b.reduce("ReduceSum", b.widened(b.Mul(level, level)))
            dot, square = (b.Add(dot, one), b.Add(square, two)) if dot else (one, two)
        return b.half(b.Div(dot, b.Max(square, b.const(1e-30))))

    if a["gain"]:
        rms = b.Max(b.Sqrt(b.reduce("ReduceMean", b.Mul(y, y))), b.const(_HALF_TINY))
        first = b.Max(b.number(fit(encode(b.Div(y, rms)))), b.const(_HALF_TINY))
        codes = encode(b.Div(y, first))
        scale = fit(codes)
    else:
        codes, scale = encode(y), ""
    packed = [pack(b, c, w, e - s) for c, (s, e, _, w) in zip(codes, parts, strict=True)]
    out = packed[0] if len(packed) == 1 else b.Concat(*packed, axis=-1)
    return out, scale or b.empty_scale(out)


def _vector_rows(b: Body, a: Mapping[str, Any], codes: str, book: str) -> str:
    heads, groups, size, c = a["book"]
    first = b.const((np.arange(heads * groups) * size).reshape(heads, 1, groups), np.int64)
    rows = b.Gather(b.reshape(book, -1, c), b.Add(codes, first))
    return b.reshape(rows, 0, 0, 0, groups * c)


def _quantize_vector(b: Body, a: Mapping[str, Any], x: str, book: str) -> tuple[str, str]:
    _, groups, _, c = a["book"]
    book = b.widened(book)
    half = b.Mul(b.reduce("ReduceSum", b.Mul(book, book)), b.const(-0.5))
    half = b.Transpose(half, perm=[0, 1, 3, 2])  # [H, G, 1, K]
    turned = b.Transpose(book, perm=[0, 1, 3, 2])

    def nearest(rows: str) -> str:
        rows = b.Transpose(b.reshape(rows, 0, 0, 0, groups, c), perm=[0, 1, 3, 2, 4])  # [B, H, G, S, c]
        best = b.ArgMax(b.Add(b.MatMul(rows, turned), half), axis=-1, keepdims=0)
        return str(b.Transpose(best, perm=[0, 1, 3, 2]))

    def fit(codes: str) -> str:
        y = _vector_rows(b, a, codes, book)
        dot, square = b.reduce("ReduceSum", b.Mul(x, y)), b.reduce("ReduceSum", b.Mul(y, y))
        g = b.Clip(b.Div(dot, b.Max(square, b.const(1e-30))), b.const(0), b.const(HALF_MAX))
        return b.cast(g, "FLOAT16")

    if not a["gain"]:
        out = pack_any(b, nearest(x), a["code_bits"], groups)
        return out, b.empty_scale(out)
    rms = b.Max(b.Sqrt(b.reduce("ReduceMean", b.Mul(x, x))), b.const(_HALF_TINY))
    first = b.Max(b.number(fit(nearest(b.Div(x, rms)))), b.const(_HALF_TINY))
    codes = nearest(b.Div(x, first))
    return pack_any(b, codes, a["code_bits"], groups), fit(codes)


def _quantize_normed(b: Body, a: Mapping[str, Any], x: str, book: str) -> tuple[str, str]:
    square = b.Sqrt(b.ReduceMean(b.Mul(x, x), b.ints(1, 3), keepdims=1))
    n = b.cast(b.Clip(square, b.const(_HALF_TINY), b.const(HALF_MAX)), "FLOAT16")
    return _quantize_vector(b, {**a, "gain": 0}, b.Div(x, b.number(n)), book)[0], n


def _dequantize_normed(b: Body, a: Mapping[str, Any], codes: str, scale: str, book: str) -> str:
    return _dequantize_vector(b, {**a, "gain": 1}, codes, scale, book)


def _quantize_static(b: Body, a: Mapping[str, Any], x: str, step: str) -> tuple[str, str]:
    width, half = a["widths"][0], float(1 << (a["widths"][0] - 1))
    codes = b.Clip(b.Round(b.Div(x, b.widened(b.Unsqueeze(step, b.ints(1))))), b.const(-half), b.const(half - 1))
    out = pack(b, b.Add(codes, b.const(half)), width, 8 * len(a["widths"]))
    return out, b.empty_scale(out)


def _dequantize_vector(b: Body, a: Mapping[str, Any], codes: str, scale: str, book: str) -> str:
    _, groups, _, _ = a["book"]
    index = b.cast(unpack(b, codes, a["code_bits"], groups), "INT64")
    out = _vector_rows(b, a, index, book)
    return str(b.Mul(out, b.cast(scale, "FLOAT"))) if a["gain"] else out


def _dequantize_static(b: Body, a: Mapping[str, Any], codes: str, scale: str, step: str) -> str:
    width = a["widths"][0]
    levels = np.arange(2**width, dtype=np.float32) - 2 ** (width - 1)
    return str(b.Mul(look_up(b, codes, width, 8 * len(a["widths"]), levels), b.Unsqueeze(step, b.ints(1))))


def _dequantize_lloyd(b: Body, a: Mapping[str, Any], codes: str, scale: str, sigma: str) -> str:
    widths, dim = a["widths"], 8 * len(a["widths"])
    levels_of = even_levels if a["kind"] == "lloyd-even" else lloyd_max
    parts, at, rows = segments(widths), 0, []
    for start, end, byte, w in [*parts, (dim, dim, 0, 0)]:
        if start > at:  # channels of 0 bits
            shape = b.Concat(b.Shape(codes, start=0, end=3), b.ints(start - at), axis=0)
            rows.append(b.Expand(b.const(0), shape))
        if end > start:
            packed = codes if len(parts) == 1 else b.slice(codes, byte, byte + (end - start) * w // 8, 3)
            rows.append(look_up(b, packed, w, end - start, levels_of(w).numpy()))
        at = end
    out = rows[0] if len(rows) == 1 else b.Concat(*rows, axis=-1)
    out = b.Mul(out, b.Unsqueeze(sigma, b.ints(1)))
    return str(b.Mul(out, b.cast(scale, "FLOAT")) if a["gain"] else out)


def _dequantize_groups(b: Body, a: Mapping[str, Any], codes: str, scale: str, table: str) -> str:
    kind, size, width, dim = a["kind"], a["group_size"], a["widths"][0], 8 * len(a["widths"])
    levels = lloyd_max(width).numpy() if kind == "gauss" else np.arange(2**width)
    values = b.reshape(look_up(b, codes, width, dim, levels), 0, 0, 0, dim // size, size)
    pairs = b.reshape(b.cast(scale, "FLOAT"), 0, 0, 0, dim // size, 2)
    step, base = b.slice(pairs, 0, 1, -1), b.slice(pairs, 1, 2, -1)
    out = b.Mul(b.Sub(values, base), step) if kind == "uniform-int" else b.Add(b.Mul(values, step), base)
    return b.reshape(out, 0, 0, 0, dim)


QUANTIZER_BODIES: dict[str, tuple[Callable[..., tuple[str, str]], Callable[..., str]]] = {
    "uniform": (_quantize_uniform, _dequantize_groups),
    "uniform-int": (_quantize_uniform, _dequantize_groups),
    "uniform-quantile": (_quantize_quantile, _dequantize_groups),
    "gauss": (_quantize_gauss, _dequantize_groups),
    "lloyd": (_quantize_lloyd, _dequantize_lloyd),
    "lloyd-even": (_quantize_lloyd, _dequantize_lloyd),
    "vector": (_quantize_vector, _dequantize_vector),
    "vector-normed": (_quantize_normed, _dequantize_normed),
    "static": (_quantize_static, _dequantize_static),
    "trellis": (trellis_body.quantize, trellis_body.dequantize),
}
"""By kind: (body, attributes, x, *tables) → codes and scale; (body, attributes, codes, scale or "", first table or "") → rows."""


def _quantize(b: Body, a: Mapping[str, Any], *inputs: str) -> tuple[str, ...]:
    return QUANTIZER_BODIES[a["kind"]][0](b, a, *inputs)


def _dequantize(b: Body, a: Mapping[str, Any], codes: str, scale: str = "", table: str = "") -> tuple[str, ...]:
    return (QUANTIZER_BODIES[a["kind"]][1](b, a, codes, scale, table),)


# -- rotations, sinks, attention -----------------------------------------------------------------------------------------


def _hadamard(b: Body, a: Mapping[str, Any], x: str) -> tuple[str, ...]:
    order, runs = a["order"], a["channels"] // a["order"]
    h = hadamard_matrix(order).numpy()
    matrix = b.const(h.T if a["inverse"] else h)
    if runs == 1:
        return (b.MatMul(x, matrix),)
    lead = (0,) * (a["rank"] - 1)
    return (b.reshape(b.MatMul(b.reshape(x, *lead, runs, order), matrix), *lead, runs * order),)


def _rope(b: Body, x: str, cos: str, sin: str, rotary: int, dim: int) -> str:
    """`kvsink.kernels.rope`; cos and sin [.., S, R] stand beside x [.., S, D]."""
    half = rotary // 2
    one, two = b.slice(x, 0, half, -1), b.slice(x, half, rotary, -1)
    c1, s1 = b.slice(cos, 0, half, -1), b.slice(sin, 0, half, -1)
    c2, s2 = b.slice(cos, half, rotary, -1), b.slice(sin, half, rotary, -1)
    parts = [b.Sub(b.Mul(one, c1), b.Mul(two, s1)), b.Add(b.Mul(two, c2), b.Mul(one, s2))]
    if rotary < dim:
        parts.append(b.slice(x, rotary, dim, -1))
    return str(b.Concat(*parts, axis=-1))


def _rotate_block(b: Body, a: Mapping[str, Any], x: str, cos: str, sin: str, positions: str) -> tuple[str, ...]:
    positions, block = b.cast(positions, "INT64"), b.ints(a["block"])
    if a["start"]:
        at = b.Min(b.Div(b.Max(positions, b.ints(0)), block), b.ints(a["rows"] - 1))
    else:
        at = b.Mod(positions, block)
    cos, sin = (b.widened(b.Unsqueeze(b.Gather(t, at, axis=0), b.ints(1))) for t in (cos, sin))
    return (_rope(b, x, cos, sin, a["rotary"], a["head_dim"]),)


def _undo_rope(b: Body, a: Mapping[str, Any], x: str, cos: str, sin: str) -> tuple[str, ...]:
    norm = b.Max(b.Add(b.Mul(cos, cos), b.Mul(sin, sin)), b.const(1e-12))
    cos, sin = (b.Unsqueeze(t, b.ints(1)) for t in (b.Div(cos, norm), b.Neg(b.Div(sin, norm))))
    return (_rope(b, x, cos, sin, a["rotary"], a["head_dim"]),)


def _mean_rows(b: Body, a: Mapping[str, Any], table: str, positions: str) -> tuple[str, ...]:
    at = b.Mod(b.cast(positions, "INT64"), b.ints(a["block"]))
    return (b.Transpose(b.Gather(table, at, axis=1), perm=[1, 0, 2, 3]),)


def _center_roped(b: Body, a: Mapping[str, Any], x: str, mean: str, cos: str, sin: str) -> tuple[str, ...]:
    dim, rotary = a["head_dim"], a["rotary"]
    cos, sin = (b.Unsqueeze(b.cast(t, "FLOAT") if b.kind == np.float64 else t, b.ints(1)) for t in (cos, sin))
    mean = b.Unsqueeze(mean, b.ints(1))  # [H, 1, D]
    turned = b.widened(_rope(b, mean, cos, sin, rotary, rotary))
    if rotary == dim:
        return (b.Sub(x, turned),)
    rest = b.Sub(b.slice(x, rotary, dim, -1), b.widened(b.slice(mean, rotary, dim, -1)))
    return (b.Concat(b.Sub(b.slice(x, 0, rotary, -1), turned), rest, axis=-1),)


def _reorder(b: Body, a: Mapping[str, Any], x: str, permutation: str) -> tuple[str, ...]:
    heads, dim = a["heads"], a["head_dim"]
    flat = b.reshape(b.Transpose(x, perm=[0, 2, 1, 3]), 0, 0, heads * dim)
    moved = b.Gather(flat, permutation, axis=2)
    return (b.Transpose(b.reshape(moved, 0, 0, heads, dim), perm=[0, 2, 1, 3]),)


def _top(b: Body, score: str, count: int) -> tuple[str, str]:
    k = b.Min(b.ints(count), b.size(score, 1))
    best, index = b.TopK(score, k, axis=1, outputs=2)
    return best, index


def _select_sinks(b: Body, a: Mapping[str, Any], hidden: str, valid: str, channels: str, weights: str) -> tuple[str, ...]:
    lowest = b.const(-np.inf)
    if not a["entries"]:
        size = b.Mul(b.Abs(b.cast(b.Gather(hidden, channels, axis=2), "FLOAT")), weights)
        return _top(b, b.Where(valid, b.reduce("ReduceMax", size, keep=False), lowest), a["count"])
    size = b.Where(b.Unsqueeze(valid, b.ints(-1)), b.Abs(b.cast(hidden, "FLOAT")), lowest)
    best, flat = _top(b, b.reshape(size, 0, -1), a["count"])
    return best, b.Div(flat, b.ints(a["width"]))


def _select_first(b: Body, a: Mapping[str, Any], positions: str, valid: str) -> tuple[str, ...]:
    below = b.And(b.GreaterOrEqual(positions, b.ints(0)), b.Less(positions, b.ints(a["count"])))
    score = b.Sub(b.const(1), b.Mul(b.cast(positions, "FLOAT"), b.const(1e-6)))
    score = b.Where(b.And(below, valid), b.Mul(score, b.const(1e30)), b.const(-np.inf))
    return _top(b, score, a["count"])


def _preserve_sinks(
    b: Body, a: Mapping[str, Any], slot: str, score: str, exact_k: str, exact_v: str, k: str, v: str, first: str, *candidates: str
) -> tuple[str, ...]:
    first = b.Unsqueeze(first, b.ints(1))
    slot = b.cast(slot, "INT64")
    held = b.Where(b.Less(slot, b.ints(-1)), b.Sub(b.Neg(slot), b.ints(2)), slot)  # a place marked as a repeat
    out: dict[str, list[str]] = {"slot": [], "score": [], "k": [], "v": []}
    at, lowest = 0, b.const(-np.inf)
    for i, capacity in enumerate(a["segments"]):
        new_score, new_index = candidates[2 * i], candidates[2 * i + 1]
        every_score = b.Concat(b.slice(score, at, at + capacity, 1), new_score, axis=1)
        every_score = b.Where(b.Greater(every_score, lowest), every_score, lowest)  # what is no number never enters
        every_slot = b.Concat(b.slice(held, at, at + capacity, 1), b.Add(new_index, first), axis=1)
        # TopK gives equal scores in the order they come in: that of their slots.
        every_slot, by_slot = b.TopK(every_slot, b.size(every_slot, 1), axis=1, largest=0, outputs=2)
        best, order = b.TopK(b.GatherElements(every_score, by_slot, axis=1), b.ints(capacity), axis=1, outputs=2)
        chosen = b.GatherElements(every_slot, order, axis=1)
        order = b.GatherElements(by_slot, order, axis=1)
        out["slot"].append(b.Where(b.Equal(best, lowest), b.ints(-1), chosen))
        out["score"].append(best)
        places = b.Expand(b.ints(*range(capacity)), b.Concat(b.size(score, 0), b.ints(capacity), axis=0))
        row = b.GatherElements(b.Concat(places, b.Add(new_index, b.ints(capacity)), axis=1), order, axis=1)
        row = b.Unsqueeze(row, b.ints(1, 3))  # [B, 1, capacity, 1]
        for name, stored, new in (("k", exact_k, k), ("v", exact_v, v)):
            pool = b.Concat(b.slice(stored, at, at + capacity, 2), new, axis=2)
            shape = b.Concat(b.Shape(new, start=0, end=2), b.ints(capacity), b.size(new, 3), axis=0)
            out[name].append(b.GatherElements(pool, b.Expand(row, shape), axis=2))
        at += capacity
    joined = {name: parts[0] if len(parts) == 1 else b.Concat(*parts, axis=2 if name in "kv" else 1) for name, parts in out.items()}
    merged = joined["slot"]
    same = b.Equal(b.Unsqueeze(merged, b.ints(2)), b.Unsqueeze(merged, b.ints(1)))
    earlier = b.const(np.tril(np.ones((at, at), dtype=bool), -1), np.bool_)
    twice = b.Greater(b.reduce("ReduceSum", b.cast(b.And(same, earlier), "INT32"), keep=False), b.const(0, np.int32))
    repeat = b.And(twice, b.GreaterOrEqual(merged, b.ints(0)))
    merged = b.Where(repeat, b.Sub(b.Neg(merged), b.ints(2)), merged)
    return b.cast(merged, "INT32"), joined["score"], joined["k"], joined["v"]


def _lay_rows(b: Body, a: Mapping[str, Any], rows: str, new: str, first: str, kept: str = "", slot: str = "") -> tuple[str, ...]:
    full = b.TensorScatter(rows, new, first)
    if not slot:
        return (full,)
    slot, begin = b.cast(slot, "INT64"), b.Unsqueeze(first, b.ints(1))
    old = b.And(b.GreaterOrEqual(slot, b.ints(0)), b.Less(slot, begin))
    index = b.Expand(b.Unsqueeze(b.Where(old, slot, begin), b.ints(1, 3)), b.Shape(kept))
    kept = b.Where(b.Unsqueeze(old, b.ints(1, 3)), kept, b.slice(new, 0, 1, 2))
    return (b.ScatterElements(full, index, kept, axis=2),)


def _attend(b: Body, a: Mapping[str, Any], q: str, k: str, v: str, mask: str) -> tuple[str, ...]:
    heads, kv_heads, dim, value_dim = a["heads"], a["kv_heads"], a["head_dim"], a["value_dim"]
    q = b.Mul(q, b.const(a["scale"]))
    columns, never = b.size(mask, 3), b.const(-np.inf)
    room = b.Sub(b.size(k, 2), columns)

    def padded(x: str, axes: int, value: str) -> str:
        """With columns for the rows of k and v behind the last that the mask knows."""
        return str(b.Pad(x, b.Concat(b.ints(*[0] * (2 * axes - 1)), room, axis=0), value))

    grouped = heads != kv_heads
    rows = b.reshape(q, 0, kv_heads, -1, dim) if grouped else q
    scores = b.MatMul(rows, b.Transpose(k, perm=[0, 1, 3, 2]))
    if grouped:
        scores = b.Reshape(scores, b.Concat(b.Shape(q, start=0, end=3), b.size(k, 2), axis=0))
    if a["mask"] == "bool":  # who sees nothing sees all columns alike, and no room
        unseen = padded(b.Expand(b.const(np.finfo(b.kind).min), columns), 1, never)
        scores = b.Where(padded(mask, 4, b.const(False, np.bool_)), scores, unseen)
    else:
        scores = b.Add(scores, padded(mask, 4, never))
    share = b.Softmax(scores, axis=-1)
    if not grouped:
        return (b.MatMul(share, v),)
    group = b.Reshape(share, b.Concat(b.size(q, 0), b.ints(kv_heads), b.ints(-1), b.size(k, 2), axis=0))
    out = b.MatMul(group, v)
    return (b.Reshape(out, b.Concat(b.Shape(q, start=0, end=3), b.ints(value_dim), axis=0)),)


_PACKED_INPUTS = (
    "k_codes",
    "k_scale",
    "v_codes",
    "v_scale",
    "exact_k",
    "exact_v",
    "slot",
    "start_cos",
    "start_sin",
    "k_table",
    "k_basis",
    "k_params",
    "v_mean",
    "v_basis",
    "v_params",
)


def _attend_packed(b: Body, a: Mapping[str, Any], q: str, k: str, v: str, mask: str, positions: str, *rest: str) -> tuple[str, ...]:
    """Rows out of their codes, new and exact ones laid over them, and attention: what the single nodes do in turn."""
    given = dict(zip(_PACKED_INPUTS, (*rest, *("",) * (len(_PACKED_INPUTS) - len(rest))), strict=True))
    rows = {}
    for side, width in (("k", a["head_dim"]), ("v", a["value_dim"])):
        own = {name[2:]: value for name, value in a.items() if name.startswith(f"{side}_")}
        (x,) = _dequantize(b, own, given[f"{side}_codes"], given[f"{side}_scale"], given[f"{side}_params"])
        if own["transform"] == "klt":
            x = b.MatMul(x, b.Transpose(given[f"{side}_basis"], perm=[0, 2, 1]))
        elif own["transform"] == "hadamard":
            (x,) = _hadamard(b, {"order": own["order"], "inverse": 1, "channels": width, "rank": 4}, x)
        rows[side] = x

    def turn(x: str) -> str:
        sizes = {"block": a["span"], "start": 1, "rows": a["turns"], "rotary": a["rotary"], "head_dim": a["head_dim"]}
        return _rotate_block(b, sizes, x, given["start_cos"], given["start_sin"], positions)[0] if a["rotary"] else x

    mean = _mean_rows(b, {"block": a["span"]}, given["k_table"], positions)[0] if a["k_center"] else ""
    keys = b.Add(rows["k"], mean if a["in_block"] else turn(mean)) if mean else rows["k"]
    keys = turn(keys) if a["in_block"] else keys
    values = b.Add(rows["v"], b.Unsqueeze(given["v_mean"], b.ints(1))) if a["v_center"] else rows["v"]
    first = b.Expand(b.Sub(b.size(mask, 3), b.size(k, 2)), b.size(q, 0))
    keys, values = (
        _lay_rows(b, {}, rows, new, first, exact, given["slot"])[0]
        for rows, new, exact in ((keys, k, given["exact_k"]), (values, v, given["exact_v"]))
    )
    return _attend(b, a, q, keys, values, mask)


BODIES: dict[str, Callable[..., tuple[str, ...]]] = {
    "Attend": _attend,
    "AttendPacked": _attend_packed,
    "CenterRoped": _center_roped,
    "ChannelReorder": _reorder,
    "DequantizeKV": _dequantize,
    "HadamardRotate": _hadamard,
    "LayRows": _lay_rows,
    "MeanRows": _mean_rows,
    "PreserveSinks": _preserve_sinks,
    "QuantizeKV": _quantize,
    "RotateBlock": _rotate_block,
    "SelectFirst": _select_first,
    "SelectSinks": _select_sinks,
    "UndoRope": _undo_rope,
}


def function_proto(op: str, overload: str, attributes: Mapping[str, Any], inputs: tuple[bool, ...], opset: int) -> Any:
    """The FunctionProto of one kind of node; `inputs` says which of its inputs are given."""
    from onnx import helper

    b = Body(attributes.get("dtype", "float32"))
    names = [f"in_{i}" for i in range(len(inputs))]
    results = BODIES[op](b, attributes, *(n if given else "" for n, given in zip(names, inputs, strict=True)))
    proto = helper.make_function(
        DOMAIN, op, names, list(results), b.nodes, [helper.make_opsetid("", opset)], attributes=sorted(attributes)
    )
    proto.overload = overload
    return proto
