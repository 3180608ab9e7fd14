"""Triton code of trellis-coded rows: levels from their codes, and the search for the codes of a row.

Formula    as `kvsink.kernels.trellis`. A walk is known by its lowest bits u, at most 32 of them: the search carries, for every
           first state and state, the sum and the bits of the best walk so far, and chooses all upper bits m behind it
Source     Viterbi search with exchange of registers; the rest as `kvsink.kernels.trellis`
Shapes     rows [N, DP] or [R, DP] of one head, channels padded to a power of two; runs of 8 channels, one channel for every circle
Exact      codes equal the definition's for the same rows, where nothing contracts products and sums (`enable_fp_fusion=False`);
           levels up to the rounding of their polynomial in float32

Imported only where Triton is there. Names in capitals are constants of the compilation.
"""

import triton
import triton.language as tl

_TINY = tl.constexpr(6.0e-8)
_BIAS = tl.constexpr((127 - 9) << 4)
_NOT_A_NUMBER = tl.constexpr(255)


@triton.jit
def gain_of(code):
    """The gain float32 of a byte."""
    g = ((code + _BIAS) << 19).to(tl.float32, bitcast=True)
    return tl.where(code == 0, 0.0, tl.where(code == _NOT_A_NUMBER, float("nan"), g))


@triton.jit
def _gain_byte(g):
    """The byte of the nearest gain, half to even; the largest one for gains beyond it."""
    bits = tl.maximum(g, 0.0).to(tl.int32, bitcast=True)
    code = ((bits + 0x3FFFF + ((bits >> 19) & 1)) >> 19) - _BIAS
    return tl.where(g > gain_of(1 + code * 0) * 0.5, tl.minimum(tl.maximum(code, 1), _NOT_A_NUMBER - 1), 0)


# -- reading --------------------------------------------------------------------------------------------------------------


@triton.jit
def _nibbles(word, width):
    """Words [N, GP] whose lower bits are 8 codes of `width` [GP] bits → the same codes, 4 bits apart: halves, quarters, eighths."""
    gap = (4 - width)[None, :]
    low = (1 << width).to(tl.uint32)[None, :] - 1  # of one code, below of two and of four
    low_2 = low | (low << width[None, :])
    low_4 = low_2 | (low_2 << (2 * width)[None, :])
    x = (word & low_4) | ((word << (4 * gap)) & 0xFFFF0000)
    x = (x & (low_2 * 0x00010001)) | ((x << (2 * gap)) & 0xFF00FF00)
    x = (x & (low * 0x01010101)) | ((x << gap) & 0xF0F0F0F0)
    return x & (low * 0x11111111)


@triton.jit
def _before(x, g, N: tl.constexpr, GP: tl.constexpr):
    """The words [N, GP] of runs g [GP]."""
    return tl.gather(x, tl.broadcast_to(g[None, :], [N, GP]), 1)


@triton.jit
def _bytes_of(word):
    """Bytes of words [N, GP] → [N, GP, 2, 2], above them what stands there: a thread keeps the bytes of its words."""
    x = tl.join(word, word >> 16)
    return tl.join(x, x >> 8)


@triton.jit
def _narrow_indices(
    codes, row, width, first, g, N: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, WIDEST: tl.constexpr, BYTES: tl.constexpr
):
    """Indices of levels [N, GP, 8] of runs of at most four bits, eight codes a word."""
    word = tl.zeros([N, GP], tl.uint32)
    for n in tl.static_range(WIDEST):
        byte = tl.minimum(first + n, BYTES - 1)  # behind the run it is masked below
        word = word | (tl.load(codes + row[:, None] + byte[None, :]).to(tl.uint32) << (8 * n))
    walk = _nibbles(word, width)
    newer = _before(walk, (g + G - 1) % G, N, GP)
    if G > 2:  # in shorter walks u_(t-2) counts as 0
        walk = walk ^ (_before(walk, (g + G - 2) % G, N, GP) & 0x11111111)
    even = ((walk << 1) & 0x1E1E1E1E) | (newer & 0x01010101)  # indices of even channels, one a byte
    odd = ((walk >> 3) & 0x1E1E1E1E) | ((newer >> 4) & 0x01010101)
    return tl.reshape(tl.join(_bytes_of(even), _bytes_of(odd)), [N, GP, 8]) & 255


@triton.jit
def _wide_indices(codes, row, meta, g, N: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BYTES: tl.constexpr):
    """The same of runs of any width, code by code: each lies in two bytes at most, and so do the lowest bits before it."""
    c = tl.arange(0, 8)[None, None, :]
    word = _codes_at(codes, row, meta, g, c, N, G, GP, BYTES)
    newer = _codes_at(codes, row, meta, (g + G - 1) % G, c, N, G, GP, BYTES) & 1
    if G > 2:
        word = word ^ (_codes_at(codes, row, meta, (g + G - 2) % G, c, N, G, GP, BYTES) & 1)
    return word * 2 + newer


@triton.jit
def _codes_at(codes, row, meta, g, c, N: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BYTES: tl.constexpr):
    """Codes [N, GP, 8] of runs g [GP]."""
    width = tl.load(meta + g)[None, :, None]
    bit = tl.load(meta + G + g)[None, :, None] * 8 + width * c
    at = codes + row[:, None, None] + (bit >> 3)
    low = tl.load(at).to(tl.int32)
    high = tl.load(at + 1).to(tl.int32)  # a row ends with a byte more
    return ((low | (high << 8)) >> (bit & 7)) & ((1 << width) - 1)


@triton.jit
def walk_levels(
    codes, row, meta, odd, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WIDEST: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    """Rows of codes as levels [N, DP]. meta int32 [2, D / 8]: bits and first byte of a run; odd float32 [4, D / 8]: its
    `odd_polynomial`."""
    G: tl.constexpr = D // 8
    GP: tl.constexpr = DP // 8
    g = tl.arange(0, GP) % G  # padded channels repeat others
    width = tl.load(meta + g)
    if WIDEST <= 4:
        index = _narrow_indices(codes, row, width, tl.load(meta + G + g), g, N, G, GP, WIDEST, BYTES)
    else:
        index = _wide_indices(codes, row, meta, g, N, G, GP, BYTES)
    j = index.to(tl.float32) - ((1 << width).to(tl.float32) - 0.5)[None, :, None]
    square = j * j
    factor = tl.load(odd + 3 * G + g)[None, :, None]
    for k in tl.static_range(2, -1, -1):
        factor = factor * square + tl.load(odd + k * G + g)[None, :, None]
    level = j * factor
    return tl.reshape(level, [N, DP])


@triton.jit
def byte_gains(codes, row, BYTES: tl.constexpr):
    """The gains [N] that stand in the last bytes of rows."""
    return gain_of(tl.load(codes + row + BYTES - 1).to(tl.int32))


# -- writing --------------------------------------------------------------------------------------------------------------


@triton.jit
def _divided(a, b):
    a, b = tl.broadcast(a, b)
    return tl.div_rn(a, b)


@triton.jit
def _search(t, width, at, edges, STEPS: tl.constexpr):
    """Number of thresholds below t, by bisection; those of one width begin at `at` in `edges`."""
    code = tl.zeros(t.shape, tl.int32)
    top = (1 << width) - 1
    for i in tl.static_range(STEPS):
        bit = 1 << (STEPS - 1 - i)
        tried = code + bit
        edge = tl.load(edges + at + tried - 1, mask=tried <= top, other=float("inf"))
        code = tl.where(edge < t, tried, code)
    return code


@triton.jit
def _error(v, weight, width, edge, level, levels, edges, WIDEST: tl.constexpr):
    """Weighted error of v against the nearest level of one subset, whose thresholds and levels begin at `edge` and `level`."""
    off = v - tl.load(levels + level + _search(v, width - 1, edge, edges, WIDEST - 1))
    return off * off * weight


@triton.jit
def _step(one_metric, one_walk, other_metric, other_walk, one_error, other_error, bit):
    """The better of two walks into a state, the first one at ties; bit: the new lowest one, at its place."""
    one, other = one_metric + one_error, other_metric + other_error
    less = other < one
    return tl.where(less, other, one), tl.where(less, other_walk, one_walk) | bit


@triton.jit
def _best_walks(
    y, weight_of, g, meta, levels, edges, SEARCHES: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    WIDEST: tl.constexpr,
):  # fmt: skip
    """Lowest bits of the best circular walks, int32 [SEARCHES, R, 8], bit t that of step t: of y [R, DP] / g [SEARCHES, R]."""
    G: tl.constexpr = D // 8
    s = tl.arange(0, DP // 8)[None, :, None]
    rows = tl.reshape(y, [R, DP // 8, 8])
    weights = tl.reshape(weight_of, [DP // 8, 8])
    first = tl.arange(0, 4)[None, :, None, None]
    m0 = tl.where(first == 0, 0.0, float("inf")) + tl.zeros([SEARCHES, 4, R, 8], tl.float32)
    m1 = tl.where(first == 1, 0.0, float("inf")) + tl.zeros([SEARCHES, 4, R, 8], tl.float32)
    m2 = tl.where(first == 2, 0.0, float("inf")) + tl.zeros([SEARCHES, 4, R, 8], tl.float32)
    m3 = tl.where(first == 3, 0.0, float("inf")) + tl.zeros([SEARCHES, 4, R, 8], tl.float32)
    w0 = tl.zeros([SEARCHES, 4, R, 8], tl.int32)
    w1, w2, w3 = w0, w0, w0
    for t in range(G):
        width, edge, level = tl.load(meta + 8 * t), tl.load(meta + DP + 8 * t), tl.load(meta + 3 * DP + 8 * t)
        half = 1 << (width - 1)
        weight = tl.sum(tl.where(tl.arange(0, DP // 8)[:, None] == t, weights, 0.0), 0)[None, None, :]
        v = _divided(tl.sum(tl.where(s == t, rows, 0.0), 1)[None, :, :], g[:, :, None])
        e0 = _error(v, weight, width, edge, level, levels, edges, WIDEST)[:, None, :, :]
        e1 = _error(v, weight, width, edge + half - 1, level + half, levels, edges, WIDEST)[:, None, :, :]
        e2 = _error(v, weight, width, edge + 2 * half - 2, level + 2 * half, levels, edges, WIDEST)[:, None, :, :]
        e3 = _error(v, weight, width, edge + 3 * half - 3, level + 3 * half, levels, edges, WIDEST)[:, None, :, :]
        u = 1 << t
        if G > 2:
            n0, p0 = _step(m0, w0, m2, w2, e0, e2, 0)
            n1, p1 = _step(m0, w0, m2, w2, e2, e0, u)
            n2, p2 = _step(m1, w1, m3, w3, e1, e3, 0)
            n3, p3 = _step(m1, w1, m3, w3, e3, e1, u)
        else:  # in shorter walks u_(t-2) counts as 0
            n0, p0 = _step(m0, w0, m2, w2, e0, e0, 0)
            n1, p1 = _step(m0, w0, m2, w2, e2, e2, u)
            n2, p2 = _step(m1, w1, m3, w3, e1, e1, 0)
            n3, p3 = _step(m1, w1, m3, w3, e3, e3, u)
        m0, m1, m2, m3, w0, w1, w2, w3 = n0, n1, n2, n3, p0, p1, p2, p3
    metric = tl.where(first == 0, m0, tl.where(first == 1, m1, tl.where(first == 2, m2, m3)))  # of circles that close
    walk = tl.where(first == 0, w0, tl.where(first == 1, w1, tl.where(first == 2, w2, w3)))
    lowest = tl.min(tl.where(metric == tl.min(metric, 1)[:, None, :, :], first, 4), 1)
    return tl.sum(tl.where(first == lowest[:, None, :, :], walk, 0), 1)


@triton.jit
def walk_codes(
    x, sigma, meta, levels, edges, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WIDEST: tl.constexpr
):  # fmt: skip
    """Codes int32 [R, DP] of rows x [R, DP], and the bytes [R] of their gains. meta int32 [4, DP]: bits, first threshold, first bit
    and first level of a channel; levels [4, 2^(bits - 1)] and the thresholds between them are by subset."""
    G: tl.constexpr = D // 8
    GP: tl.constexpr = DP // 8
    c = tl.arange(0, DP)
    inside = (c < D)[None, :]
    deviation = tl.maximum(tl.load(sigma + c, mask=c < D, other=0.0), _TINY)
    share = _divided(deviation, tl.max(deviation, 0))
    weight = share * share
    y = _divided(x, deviation[None, :])
    finite = tl.min((tl.abs(y) < float("inf")).to(tl.int32), 1) > 0
    y = tl.where(inside & finite[:, None], y, 0.0)
    size = tl.sqrt(tl.sum((y * y).to(tl.float64), 1) / D).to(tl.float32)
    SEARCHES: tl.constexpr = 4 if WIDEST > 4 else 2
    which = tl.arange(0, SEARCHES)[:, None]
    if WIDEST > 4:
        start = tl.where(which == 0, 0.8, tl.where(which == 1, 0.95, tl.where(which == 2, 1.1, 1.3)))
    else:
        start = tl.where(which == 0, 0.9, 1.1)
    g = tl.maximum(gain_of(_gain_byte(start * size[None, :])), gain_of(1 + which * 0))
    u = _best_walks(y, weight, g, meta, levels, edges, SEARCHES, R, D, DP, WIDEST)[:, :, None, :]
    t = (tl.arange(0, GP) % G)[None, None, :, None]
    newer, older = (u >> ((t + G - 1) % G)) & 1, (u >> ((t + G - 2) % G)) & 1
    u = (u >> t) & 1
    if G > 2:
        subset = tl.reshape(2 * (u ^ older) + newer, [SEARCHES, R, DP])
    else:
        subset = tl.reshape(2 * u + newer, [SEARCHES, R, DP])
    width, edge, level = (
        tl.load(meta + c)[None, None, :],
        tl.load(meta + DP + c)[None, None, :],
        tl.load(meta + 3 * DP + c)[None, None, :],
    )
    live = width > 0
    half = tl.where(live, 1 << tl.maximum(width - 1, 0), 0)
    z = y[None, :, :]
    m = _search(_divided(z, g[:, :, None]), tl.maximum(width - 1, 0), edge + subset * (half - 1), edges, WIDEST - 1)
    value = tl.load(levels + level + subset * half + m, mask=live, other=0.0)
    part = weight[None, None, :] * value
    dot = tl.sum((part * z).to(tl.float64), 2)
    square = tl.sum((part * value).to(tl.float64), 2)
    byte = _gain_byte((dot / square).to(tl.float32))
    gain = gain_of(byte).to(tl.float64)
    error = square * gain * gain - 2 * gain * dot
    best, least = tl.zeros([R], tl.int32), tl.sum(tl.where(which == 0, error, 0.0), 0)
    for n in tl.static_range(1, SEARCHES):
        other = tl.sum(tl.where(which == n, error, 0.0), 0)
        best, least = tl.where(other < least, n, best), tl.where(other < least, other, least)
    taken = which == best[None, :]
    code = tl.sum(tl.where(taken[:, :, None], 2 * m + tl.reshape(u, [SEARCHES, R, DP]), 0), 0)
    byte = tl.where(finite, tl.sum(tl.where(taken, byte, 0), 0), _NOT_A_NUMBER)
    return code, byte
