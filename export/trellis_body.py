"""The bodies of quantizer `trellis`: all searches for the best walks side by side, step by step, and the way back from codes.

Formula    as in `kvsink.kernels.trellis`, in the same order of sums, so that codes are the same, ties included
           writer: a state carries its walk as a whole number whose bit t is u_t, so that nothing has to be traced back; the axes of
           the two bits of a state change places with every step, since the new bit stands where the oldest one was
           reader: with v = 2 (1 - 2 u), 4 j = 4 (4 m + 3/2 - (2^(w+1) - 1) / 2) - v_t v_(t-2) - v_(t-1), and levels are an
           odd polynomial of j: arithmetic, since onnxruntime takes longer over one look-up for every channel than over twenty sums
Shapes     x [B, H, S, D], sigma [H, D] → codes uint8 [B, H, S, sum(widths) + 1], and back to rows float32; the searches hold
           [u or u_(t-2), u_(t-1), first state, search, B, H, S, 8]
Exact      codes; what is read within eight roundings of float32, and with dtype float64 to the last bit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from kvsink.export.body import Body, look_up, pack, unpack
from kvsink.kernels.quantize import segments
from kvsink.kernels.trellis import TRELLIS_WIDTHS, gain_of, odd_polynomial, starts, subsets, trellis_levels

__all__ = ["dequantize", "quantize"]

_TINY, _NOT_A_NUMBER = 6.0e-8, 255
_FIRST = {
    w: sum(2 ** (v + 1) for v in TRELLIS_WIDTHS if v < w) for w in TRELLIS_WIDTHS
}  # where levels of a width begin in `_levels`


@cache
def _gains() -> Any:
    """float32 [256]."""
    return gain_of(torch.arange(256, dtype=torch.uint8)).numpy()


@cache
def _halfway() -> Any:
    """float32 [254]: a gain above so many of them has that byte. Half way between two gains the even byte wins."""
    gains = _gains()[:_NOT_A_NUMBER]
    middle = (gains[1:] + gains[:-1]) / 2  # exact
    return np.where(np.arange(len(middle)) % 2, np.nextafter(middle, np.float32(0)), middle)


@cache
def _levels() -> Any:
    """float32: the levels of every width, one after another."""
    return torch.cat([trellis_levels(w, "cpu") for w in TRELLIS_WIDTHS]).numpy()


def _of_channels(widths: Sequence[int], table: Mapping[int, Any]) -> Any:
    """[D, ...]: of every channel what the table has for its width."""
    return np.repeat([table[w] for w in widths], 8, axis=0)


def _gain_byte(b: Body, g: str) -> str:
    """Gains [.., 1] → bytes int32."""
    above = b.Greater(b.cast(g, "FLOAT"), b.const(_halfway(), np.float32))
    return b.reduce("ReduceSum", b.cast(above, "INT32"))


def _gain_of(b: Body, byte: str) -> str:
    """Bytes int32 or int64 → gains float32."""
    return str(b.Gather(b.const(_gains(), np.float32), byte))


def _split(b: Body, x: str, axis: int, parts: int) -> list[str]:
    return list(b.Split(x, axis=axis, num_outputs=parts, outputs=parts)) if parts > 1 else [x]


def _total(b: Body, x: str) -> str:
    return b.reduce("ReduceSum", b.cast(x, "DOUBLE"))


def _before(b: Body, x: str, axis: int, dim: int) -> tuple[str, str]:
    """Of walks [.., D] what stands one step before, and two; nothing in walks of one or two steps, where u_(t-2) counts as 0."""
    back = 8 if dim <= 16 else 16
    around = b.Concat(b.slice(x, dim - back, dim, axis), x, axis=axis)
    return b.slice(around, back - 8, back - 8 + dim, axis), b.slice(around, 0, dim, axis) if dim > 16 else ""


def _choices(b: Body, z: str, weight: str, widths: Sequence[int]) -> tuple[str, str]:
    """Of every subset its nearest level: index m int32 and weighted error, both [z1, z0, 1, search, B, H, S, D]."""
    known = {w: subsets(w, "cpu")[1].numpy() for w in set(widths)}  # thresholds [4, 2^(w - 1) - 1]
    count = max(1, max(t.shape[1] for t in known.values()))
    shape = (2, 2, 1, 1, 1, 1, 1, 8 * len(widths))
    over = []
    for e in range(count):
        at = {w: t[:, e] if e < t.shape[1] else np.full(4, np.inf) for w, t in known.items()}
        over.append(b.cast(b.Greater(z, b.const(_of_channels(widths, at).T.reshape(shape))), "INT32"))
    m = over[0]
    for other in over[1:]:
        m = b.Add(m, other)
    first = np.arange(4)[:, None] + _of_channels(widths, _FIRST)
    level = b.Gather(b.const(_levels()), b.Add(b.Mul(m, b.const(4, np.int32)), b.const(first.reshape(shape), np.int32)))
    off = b.Sub(z, level)
    return m, b.Mul(b.Mul(off, off), weight)


def _whole(steps: int) -> Any:
    """A type that holds whole numbers of so many bits."""
    return np.float32 if steps <= 24 else np.float64


def _walks(b: Body, error: str, dim: int) -> str:
    """Errors of `_choices` → the best walk of every circle [1, search, B, H, S, 8], a whole number whose bit t is u_t."""
    steps = dim // 8
    costs: list[list[tuple[str, str]]] = [[], []]  # of even and odd steps, whose axis of u is 0 or 1: after a last bit of 0, of 1
    parts = _split(b, error, 7, steps)
    for parity in range(min(steps, 2)):
        zero = b.Concat(*parts[parity::2], axis=7)
        zero = b.Transpose(zero, perm=[1, 0, 2, 3, 4, 5, 6, 7]) if parity else zero
        one = b.Gather(zero, b.ints(1, 0), axis=parity) if steps > 2 else zero  # u_(t-2) of shorter walks counts as 0
        costs[parity] = list(zip(*(_split(b, x, 7, len(parts[parity::2])) for x in (zero, one)), strict=True))
    at = np.arange(4).reshape(2, 2, 1) == np.arange(4)  # a state is u_t + 2 u_(t-1)
    metric = b.const(np.where(at, 0, np.inf).reshape(2, 2, 4, 1, 1, 1, 1, 1))
    word = b.const(np.zeros((2, 2, 1, 1, 1, 1, 1, 1)), _whole(steps))
    for t in range(steps):
        axis = t % 2
        (zero, one), (zero_word, one_word) = (_split(b, x, axis, 2) for x in (metric, word))
        after_zero, after_one = costs[axis][t // 2]
        zero, one = b.Add(zero, after_zero), b.Add(one, after_one)
        less = b.CastLike(b.Less(one, zero), word)
        metric = b.Min(zero, one)
        bit = np.array([0, 1 << t]).reshape([2 if i == axis else 1 for i in range(8)])
        word = b.Add(b.Add(b.Mul(less, b.Sub(one_word, zero_word)), zero_word), b.const(bit, _whole(steps)))
    if steps % 2:
        at = at.transpose(1, 0, 2)
    closed = b.const(at.reshape(2, 2, 4, 1, 1, 1, 1, 1), np.bool_)  # walks that end where they begin
    metric = b.ReduceMin(b.Where(closed, metric, b.const(np.inf)), b.ints(0, 1), keepdims=0)
    word = b.ReduceSum(b.Where(closed, word, b.const(0, _whole(steps))), b.ints(0, 1), keepdims=0)
    return str(b.GatherElements(word, b.ArgMin(metric, axis=0, keepdims=1), axis=0))


def _search(b: Body, z: str, weight: str, widths: Sequence[int]) -> tuple[str, str]:
    """Rows [search, B, H, S, D] → codes int32 of the best circular walks, and their levels float32, [1, search, B, H, S, D]."""
    dim = 8 * len(widths)
    m, error = _choices(b, z, weight, widths)
    shift, whole = 0.5 ** (np.arange(dim) // 8), _whole(dim // 8)
    word = b.Concat(*[_walks(b, error, dim)] * (dim // 8), axis=-1)
    above = b.Floor(b.Mul(word, b.const(shift / 2, whole)))
    u = b.cast(b.Sub(b.Floor(b.Mul(word, b.const(shift, whole))), b.Mul(above, b.const(2, whole))), "INT32")
    newer, older = _before(b, u, 5, dim)
    two = b.const(2, np.int32)
    z1 = b.Abs(b.Sub(u, older)) if older else u
    subset = b.Add(b.Mul(z1, two), newer)
    every = b.Reshape(m, b.Concat(b.ints(4), b.Shape(z), axis=0), allowzero=1)
    m = b.GatherElements(every, subset, axis=0)
    index = b.Add(b.Add(b.Mul(m, b.const(4, np.int32)), subset), b.const(_of_channels(widths, _FIRST), np.int32))
    return b.Add(b.Mul(m, two), u), b.Gather(b.const(_levels(), np.float32), index)


def quantize(b: Body, a: Mapping[str, Any], x: str, sigma: str) -> tuple[str, str]:
    widths = a["widths"]
    deviation = b.Max(b.Unsqueeze(b.widened(sigma), b.ints(1)), b.const(_TINY))  # [H, 1, D]
    share = b.Div(deviation, b.reduce("ReduceMax", deviation))
    weight = b.Mul(share, share)
    y = b.Div(x, deviation)
    finite = b.cast(b.reduce("ReduceMin", b.cast(b.Less(b.Abs(y), b.const(np.inf)), "INT32")), "BOOL")
    y = b.Where(finite, y, b.const(0))
    size = b.number(b.Sqrt(b.reduce("ReduceMean", b.cast(b.Mul(y, y), "DOUBLE"))))
    searches = len(starts(widths))
    start = b.Mul(size, b.const(np.reshape(starts(widths), (searches, 1, 1, 1, 1))))
    g = b.widened(b.Max(_gain_of(b, _gain_byte(b, start)), b.const(_gains()[1], np.float32)))
    codes, level = _search(b, b.Div(y, g), weight, widths)
    weighted = b.Mul(weight, b.widened(level))
    dot, square = _total(b, b.Mul(weighted, y)), _total(b, b.Mul(weighted, b.widened(level)))
    gain = _gain_byte(b, b.number(b.Div(dot, square)))
    g = b.cast(_gain_of(b, gain), "DOUBLE")
    error = b.Sub(b.Mul(b.Mul(square, g), g), b.Mul(b.Mul(g, b.const(2, np.float64)), dot))
    found = list(zip(*(_split(b, t, 1, searches) for t in (error, codes, gain)), strict=True))
    error, codes, gain = found[0]
    for other in found[1:]:
        better = b.Less(other[0], error)
        error, codes, gain = (b.Where(better, new, old) for new, old in zip(other, (error, codes, gain), strict=True))
    codes, gain = (b.Squeeze(t, b.ints(0, 1)) for t in (codes, gain))
    gain = b.cast(b.Where(finite, gain, b.const(_NOT_A_NUMBER, np.int32)), "UINT8")
    packed = [pack(b, b.slice(codes, start, end, 3), w, end - start) for start, end, _, w in segments(widths)]
    out = b.Concat(*packed, gain, axis=-1)
    return out, b.empty_scale(out)


def dequantize(b: Body, a: Mapping[str, Any], codes: str, scale: str, sigma: str) -> str:
    widths = a["widths"]
    dim = 8 * len(widths)
    rows: list[str] = []
    signs: list[str] = []
    for start, end, byte, w in segments(widths):
        packed = b.slice(codes, byte, byte + (end - start) * w // 8, 3)
        least = 6 - 2 * (2 ** (w + 1) - 1)  # of 4 (4 m + 3/2 - middle)
        if 8 % w:
            code = b.number(unpack(b, packed, w, end - start))
            m = b.Floor(b.Mul(code, b.const(0.5)))
            u = b.Sub(code, b.Mul(m, b.const(2)))
            row, sign = b.Add(b.Mul(m, b.const(16)), b.const(least)), b.Sub(b.const(2), b.Mul(u, b.const(4)))
        else:
            of = np.arange(1 << w)
            row, sign = (look_up(b, packed, w, end - start, t) for t in (16 * (of >> 1) + least, 2 - 4 * (of & 1)))
        rows.append(row)
        signs.append(sign)
    row, sign = (t[0] if len(t) == 1 else b.Concat(*t, axis=3) for t in (rows, signs))
    newer, older = _before(b, sign, 3, dim)
    j = b.Sub(b.Sub(row, b.Mul(sign, older or b.const(2))), newer)  # four times as large
    sigma, gain = b.Unsqueeze(sigma, b.ints(1)), _gain_of(b, b.cast(b.slice(codes, sum(widths), sum(widths) + 1, 3), "INT32"))
    if b.kind == np.float64:  # levels as `trellis_levels` makes them
        level = b.cast(_odd(b, b.Mul(j, b.const(0.25)), [b.const(t) for t in _factors(widths, 1)]), "FLOAT")
        return str(b.Mul(b.Mul(level, sigma), gain))
    return str(b.Mul(_odd(b, j, [b.Mul(sigma, b.const(t)) for t in _factors(widths, 4)]), gain))


def _factors(widths: Sequence[int], scale: int) -> list[Any]:
    """[D] each: the factors of x, x^3, … of every channel's level, x = scale j, without the last powers that none has."""
    table = {w: [f / scale ** (2 * i + 1) for i, f in enumerate(odd_polynomial(w))] for w in set(widths)}
    powers = 1 + max(i for factors in table.values() for i, f in enumerate(factors) if f)
    return list(_of_channels(widths, table).T[:powers])


def _odd(b: Body, x: str, factors: Sequence[str]) -> str:
    """The sum of factors times x, x^3, …."""
    square, total = b.Mul(x, x), factors[-1]
    for factor in reversed(factors[:-1]):
        total = b.Add(b.Mul(total, square), factor)
    return str(b.Mul(x, total))
