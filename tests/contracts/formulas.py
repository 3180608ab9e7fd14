"""What every op of `kvsink.kernels.op_specs()` computes, by the formulas of its docstring, in float64 numpy and nothing of ours.

Each function takes the arguments of an op, tensors as arrays, and gives what it should; `follows` compares. Codes are taken from
the scales that the op gave, since the formulas say that codes use the rounded scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


HALF_MAX = 65504.0  # the largest float16


def close(found: Array, wanted: Array, eps: float = 2.0**-23) -> bool:
    """Equal up to the rounding of a few dozen sums in a dtype of this epsilon; infinities are the same ones."""
    if found.shape != wanted.shape or not np.array_equal(np.isfinite(found), np.isfinite(wanted)):
        return False
    ends = ~np.isfinite(wanted)
    size = np.abs(wanted[~ends]).max(initial=1.0)
    return bool(np.array_equal(found[ends], wanted[ends]) and (np.abs(found[~ends] - wanted[~ends]) <= 16 * eps * size).all())


def rounded(found: Array, wanted: Array) -> bool:
    """float16 numbers within their last bit of what they round, the largest one where that is beyond them."""
    wanted = np.clip(wanted, -HALF_MAX, HALF_MAX)
    step = np.spacing(np.minimum(np.abs(wanted), 65472.0).astype(np.float16)).astype(np.float64)  # that of the largest is infinite
    return found.shape == wanted.shape and bool((np.abs(found - wanted) <= step).all())


# -- rotation ----------------------------------------------------------------------------------------------------------


@cache
def hadamard_matrix(order: int) -> Array:
    """H_{2m} = [[H_m, H_m], [H_m, -H_m]] / sqrt 2 over a core of order 1, 12 or 20; the latter two (I + S) / sqrt n, S Paley's."""
    if order == 1:
        return np.ones((1, 1))
    if order in (12, 20):
        p = order - 1
        squares = {i * i % p for i in range(1, p)}
        s = np.zeros((order, order))
        s[0, 1:], s[1:, 0] = 1, -1
        for i in range(p):
            for j in range(p):
                s[i + 1, j + 1] = 0 if i == j else 1 if (j - i) % p in squares else -1
        return (np.eye(order) + s) / math.sqrt(order)
    half = hadamard_matrix(order // 2)
    return np.block([[half, half], [half, -half]]) / math.sqrt(2)


def hadamard(found: Array, x: Array, order: int, inverse: bool = False) -> bool:
    h = np.kron(np.eye(x.shape[-1] // order), hadamard_matrix(order))
    return close(found.astype(np.float64), x.astype(np.float64) @ (h.T if inverse else h), float(np.finfo(x.dtype).eps))


# -- scalar codes ------------------------------------------------------------------------------------------------------


def _unpacked(packed: Array, width: int, count: int) -> Array:
    """Code i holds the bits [i·w, (i+1)·w) of the little-endian bytes."""
    bits = np.unpackbits(packed, axis=-1, bitorder="little")[..., : count * width]
    return (bits.reshape(*packed.shape[:-1], count, width) * (1 << np.arange(width))).sum(-1)


def _phi(t: Array) -> Array:
    return np.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def _below(t: Array) -> Array:
    return np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in t])


@cache
def lloyd_levels(bits: int) -> Array:
    """y_i = E[x | t_i < x < t_{i+1}], t_i = (y_{i-1} + y_i) / 2, of a unit Gaussian."""
    y = np.linspace(-2, 2, 1 << bits)
    for _ in range(20_000):
        t = np.concatenate(([-40.0], (y[1:] + y[:-1]) / 2, [40.0]))
        new = (_phi(t[:-1]) - _phi(t[1:])) / np.diff(_below(t))
        if np.abs(new - y).max() < 1e-11:
            break
        y = new
    return y


@cache
def even_levels(bits: int) -> Array:
    """step (i - (2^b - 1) / 2) with the step of least mean squared error."""

    def at(step: float) -> Array:
        return step * (np.arange(1 << bits) - (2**bits - 1) / 2)

    def error(step: float) -> float:
        y = at(step)
        t = np.concatenate(([-40.0], (y[1:] + y[:-1]) / 2, [40.0]))
        return float((np.diff(_below(t)) * y * y - 2 * y * (_phi(t[:-1]) - _phi(t[1:]))).sum())

    low, high = 0.01, 3.0
    for _ in range(200):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return at((low + high) / 2)


def _nearest(x: Array, levels: Array) -> Array:
    return np.abs(x[..., None] - levels).argmin(-1)


def _rms(x: Array) -> Array:
    return np.sqrt((x * x).mean(-1, keepdims=True))


def _half(x: Array) -> Array:
    return np.clip(x, -HALF_MAX, HALF_MAX).astype(np.float16).astype(np.float64)


def _runs(widths: list[int]) -> list[tuple[slice, slice, int]]:
    """Channels, bytes and width of every run of eight channels that has codes."""
    out, byte = [], 0
    for i, w in enumerate(widths):
        if w:
            out.append((slice(8 * i, 8 * i + 8), slice(byte, byte + w), w))
        byte += w
    return out


def quantize(
    found: tuple[Array, Array],
    x: Array,
    sigma: Array | None,
    kind: str,
    widths: list[int],
    group_size: int,
    clip: float,
    gain: bool,
) -> bool:
    codes, scale = found[0], found[1].astype(np.float64)
    x = x.astype(np.float64)
    if sigma is not None:
        return _lloyd(codes, scale, x, sigma.astype(np.float64)[:, None], kind, widths, gain)
    w, d = widths[0], x.shape[-1]
    groups = x.reshape(*x.shape[:-1], d // group_size, group_size)
    got = _unpacked(codes, w, d).reshape(groups.shape)
    first, second = (scale.reshape(*groups.shape[:-1], 2)[..., i : i + 1] for i in (0, 1))
    if kind == "gauss":
        mean = groups.mean(-1, keepdims=True)
        right = rounded(second, mean) and rounded(first, _rms(groups - second))
        return right and np.array_equal(got, _nearest((groups - second) / first, lloyd_levels(w)))
    top = 2**w - 1
    if kind == "uniform-quantile":  # the entry with int(clip · n) smaller magnitudes bounds its group
        t = np.sort(np.abs(groups), -1)[..., min(int(clip * group_size), group_size - 1), None]
        groups, clip, kind = np.clip(groups, -t, t), 1.0, "uniform"
    low, high = clip * groups.min(-1, keepdims=True), clip * groups.max(-1, keepdims=True)
    right = rounded(first, (high - low) / top)
    if kind == "uniform":
        return right and rounded(second, low) and np.array_equal(got, np.clip(np.rint((groups - second) / first), 0, top))
    right = right and np.array_equal(second, _half(np.rint(-low / first)))
    return right and np.array_equal(got, np.clip(np.rint(groups / first) + second, 0, top))


def _lloyd(codes: Array, scale: Array, x: Array, sigma: Array, kind: str, widths: list[int], gain: bool) -> bool:
    levels = even_levels if kind == "lloyd-even" else lloyd_levels

    def encoded(g: Array) -> list[Array]:
        return [_nearest((x / sigma)[..., at] / g, levels(w)) for at, _, w in _runs(widths)]

    def fitted(chosen: list[Array]) -> Array:
        """The g for which g·sigma·level comes closest to x."""
        pairs = [(x[..., at], levels(w)[c] * sigma[..., at]) for (at, _, w), c in zip(_runs(widths), chosen, strict=True)]
        dot = sum((a * b).sum(-1, keepdims=True) for a, b in pairs)
        return np.asarray(dot / sum((b * b).sum(-1, keepdims=True) for _, b in pairs))

    got = [_unpacked(codes[..., at], w, 8) for _, at, w in _runs(widths)]
    wanted = encoded(_half(fitted(encoded(_rms(x / sigma)))) if gain else np.ones_like(x[..., :1]))
    right = all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
    return right and (rounded(scale, fitted(got)) if gain else scale.size == 0)


def dequantize(
    found: Array, codes: Array, scale: Array, sigma: Array | None, kind: str, widths: list[int], group_size: int, gain: bool
) -> bool:
    scale, d = scale.astype(np.float64), 8 * len(widths)
    if sigma is not None:
        wanted = np.zeros((*codes.shape[:-1], d))
        for at, held, w in _runs(widths):
            wanted[..., at] = (even_levels if kind == "lloyd-even" else lloyd_levels)(w)[_unpacked(codes[..., held], w, 8)]
        return close(found, wanted * sigma.astype(np.float64)[:, None] * (scale if gain else 1.0))
    q = _unpacked(codes, widths[0], d).reshape(*codes.shape[:-1], d // group_size, group_size)
    first, second = (scale.reshape(*q.shape[:-1], 2)[..., i : i + 1] for i in (0, 1))
    if kind == "gauss":
        wanted = lloyd_levels(widths[0])[q] * first + second
    else:
        wanted = (q - second) * first if kind == "uniform-int" else q * first + second
    return close(found, wanted.reshape(found.shape))


# -- codes with tables -------------------------------------------------------------------------------------------------


def _side(codec: str, side: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(codec)["key" if side == "k" else "value"]
    return found


UPPER = {1: (0.3, 1.2), 2: (0.16875, 0.54, 1.08, 1.89)}
CUBIC = {3: (0.1674, 0.002607), 4: (0.0840, 0.0003961), 5: (0.0430, 5.63e-5)}
GAINS = np.array([0.0, *(2.0 ** (b // 16 - 9) * (1 + b % 16 / 16) for b in range(1, 255))])


def _gain(g: Array) -> Array:
    """The byte of the nearest gain, an even one half way."""
    apart = np.abs(GAINS - g[..., None])
    apart[..., 1::2] *= 1 + 1e-12
    return apart.argmin(-1)


def _circles(codes: Array, widths: list[int]) -> Array:
    """Levels of codes [..., steps] of one circle: index 4 m + 2 (u_t ^ u_(t-2)) + u_(t-1), j of them from the middle one: one of
    `UPPER` with the sign of j, or a j + c j^3."""
    u = codes & 1
    index = 4 * (codes >> 1) + 2 * (u ^ np.roll(u, 2, -1)) + np.roll(u, 1, -1)
    j = index - (2.0 ** (np.array(widths) + 1) - 1) / 2
    a, c = np.array([CUBIC.get(w, (0, 0)) for w in widths]).T
    out = a * j + c * j**3
    for t, w in enumerate(widths):
        if w in UPPER:
            out[..., t] = np.sign(j[..., t]) * np.array(UPPER[w])[np.abs(j[..., t]).astype(int)]
    return out


def _walked(row: Array, widths: list[int]) -> tuple[Array, Array]:
    """Codes [..., steps, 8] of stored rows, and the byte behind them."""
    ends = np.cumsum([0, *widths])
    parts = [_unpacked(row[..., a:b], w, 8) for a, b, w in zip(ends, ends[1:], widths, strict=False)]
    return np.stack(parts, -2), row[..., -1]


def _trellis(codes: Array, x: Array, sigma: Array, widths: list[int]) -> bool:
    """Of all words of every circle the nearest ones, with the gain among two or four times the rms that errs least once fitted."""
    words = np.stack(np.meshgrid(*(np.arange(2**w) for w in widths), indexing="ij"), -1).reshape(-1, len(widths))
    levels = _circles(words, widths)  # [words, steps]
    got, byte = _walked(codes, widths)
    for at in np.ndindex(x.shape[:-1]):
        s = sigma[at[1]].reshape(-1, 8)
        y, w, best = x[at].reshape(-1, 8) / s, s * s, (np.inf, None, -1)
        for start in (0.9, 1.1) if max(widths) <= 4 else (0.8, 0.95, 1.1, 1.3):
            z = y / GAINS[_gain(start * np.sqrt(np.array((y * y).mean())))]
            chosen = np.einsum("tc,wtc->wc", w, (z - levels[:, :, None]) ** 2).argmin(0)
            near = levels[chosen].T
            gain = int(_gain(np.array((w * near * y).sum() / (w * near * near).sum())))
            error = (w * (y - GAINS[gain] * near) ** 2).sum()
            best = (error, words[chosen].T, gain) if error < best[0] else best
        if not np.array_equal(got[at], best[1]) or byte[at] != best[2]:
            return False
    return True


def encode(found: tuple[Array, Array], x: Array, params: list[Array], codec: str, side: str) -> bool:
    codes, scale, spec = found[0], found[1].astype(np.float64), _side(codec, side)
    x, tables = x.astype(np.float64), [t.astype(np.float64) for t in params]
    if spec["kind"] == "trellis":
        return scale.size == 0 and _trellis(codes, x, tables[0], spec["widths"])
    if spec["kind"] == "nuq":  # keys: o, r, Q, Q'; values: Q, Q'
        w = spec["widths"][0]
        got = _unpacked(codes, w, x.shape[-1])
        if side == "k":
            o, r, right = tables[0][:, None], tables[1][:, None], True
        else:
            rows = x.transpose(0, 2, 1, 3).reshape(x.shape[0], 1, x.shape[2], -1)
            up, low = rows.max(-1, keepdims=True), rows.min(-1, keepdims=True)
            r, o = scale[..., :1], scale[..., 1:]
            right = rounded(r, (up - low) / 2) and rounded(o, (up + low) / 2)
        return right and np.array_equal(got, _nearest(np.clip((x - o) / r, -1, 1), tables[-2]))
    (book,), c = tables, spec["couple"]
    if spec["kind"] == "vector-normed":
        right = rounded(scale, np.sqrt((x * x).mean((1, 3), keepdims=True)))
        x, scale = x / scale, scale[..., :0]
        if not right:
            return False
    runs = x.reshape(*x.shape[:-1], -1, c)

    def nearest(g: Array) -> Array:
        apart = (runs[..., None, :] / g[..., None, None] - book[:, None]) ** 2
        return apart.sum(-1).argmin(-1)  # [B, H, S, D / c]

    def fitted(chosen: Array) -> Array:
        rows = _chosen(book, chosen)
        return (runs * rows).sum((-2, -1))[..., None] / (rows * rows).sum((-2, -1))[..., None]

    got = _unpacked(codes, spec["code_bits"], runs.shape[-2])
    if not spec["gain"]:
        return scale.size == 0 and np.array_equal(got, nearest(np.ones_like(x[..., :1])))
    return np.array_equal(got, nearest(_half(fitted(nearest(_rms(x)))))) and rounded(scale, fitted(got))


def _chosen(book: Array, codes: Array) -> Array:
    """C_g,code of a book [H, D / c, 2^b, c] for codes [B, H, S, D / c]."""
    heads, runs = np.arange(book.shape[0])[:, None, None], np.arange(book.shape[1])
    return book[heads, runs, codes]


def decode(found: Array, codes: Array, scale: Array, params: list[Array], codec: str, side: str) -> bool:
    spec, scale, tables = _side(codec, side), scale.astype(np.float64), [t.astype(np.float64) for t in params]
    if spec["kind"] == "nuq":
        q = tables[-1][_unpacked(codes, spec["widths"][0], 8 * len(spec["widths"]))]
        o, r = (tables[0][:, None], tables[1][:, None]) if side == "k" else (scale[..., 1:], scale[..., :1])
        return close(found, q * r + o)
    if spec["kind"] == "trellis":
        walks, byte = _walked(codes, spec["widths"])
        levels = np.swapaxes(_circles(np.swapaxes(walks, -1, -2), spec["widths"]), -1, -2)
        return close(found, levels.reshape(found.shape) * tables[0][:, None] * GAINS[byte][..., None])
    rows = _chosen(tables[0], _unpacked(codes, spec["code_bits"], tables[0].shape[1]))
    return close(found, rows.reshape(found.shape) * (scale if spec["gain"] or spec["kind"] == "vector-normed" else 1.0))


# -- choosing rows -----------------------------------------------------------------------------------------------------


def select_sinks(
    found: tuple[Array, Array], hidden: Array, valid: Array, channels: Array, weights: Array, count: int, entries: bool
) -> bool:
    score, index = found
    size = np.where(valid[..., None], np.abs(hidden.astype(np.float64)), -np.inf)
    for b in range(len(hidden)):
        if entries:
            every = [(-size[b, t, c], t) for t in range(size.shape[1]) for c in range(size.shape[2])]
        else:
            marked = (size[b][:, channels] * weights).max(-1)
            every = [(-marked[t], t) for t in range(size.shape[1])]
        best = sorted(every)[: min(count, len(every))]
        if not close(score[b].astype(np.float64), -np.array([s for s, _ in best])):
            return False
        if [t for s, t in best if s < np.inf] != index[b][: sum(s < np.inf for s, _ in best)].tolist():
            return False
    return True


def observe(
    found: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    mask: Array | None,
    first: Array,
    valid: Array | None,
    scale: float,
    score: str,
) -> bool:
    q, k, v, out = (t.astype(np.float64) for t in (q, k, v, out))
    batch, heads, new, _ = q.shape
    wanted = np.zeros((batch, k.shape[2]))
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h * k.shape[1] // heads], v[b, h * k.shape[1] // heads]
            for i in range(new):
                if valid is not None and not valid[b, i]:
                    continue
                last = int(first) + (i if mask is None else new - 1)
                logits = scale * keys @ q[b, h, i]
                if mask is not None:
                    row = mask[min(b, len(mask) - 1), min(h, mask.shape[1] - 1), i, : len(keys)]
                    logits = logits + (np.where(row, 0.0, -np.inf) if row.dtype == bool else row)
                logits[last + 1 :] = -np.inf
                a = np.exp(logits - logits.max())
                a /= a.sum()
                if score == "exact":
                    a = a * scale * np.abs(values - out[b, h, i]).sum(-1)
                wanted[b] += a * (1.0 if score == "mass" else np.sqrt(q[b, h, i] @ q[b, h, i]))
    return close(found.astype(np.float64), wanted)


FORMULAS: dict[str, Callable[..., bool]] = {
    "decode": decode,
    "dequantize": dequantize,
    "encode": encode,
    "hadamard": hadamard,
    "observe": observe,
    "quantize": quantize,
    "select_sinks": select_sinks,
}
"""By op: whether its result, the first argument, is what the formula says of the others."""
