"""Triton code of `append`: one new row per sequence through every stage of its codec, and into the exact rows.

Formula    as `kvsink.kernels.append`; a rotary channel and its partner are carried together, so no stage needs a shuffle
Source     ours
Shapes     one program per sequence and key-value head and side; one per sequence for the exact rows, window and positions
Exact      codes equal the definition's up to ties that the order of float32 sums in the transform decides

Imported only where Triton is there. Names in capitals are constants of the compilation.
"""

import triton
import triton.language as tl

from .trellis_kernels import _TINY, _divided, _search, walk_codes  # isort: skip

_HALF_MAX = tl.constexpr(65504.0)
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and taking it away rounds half to even
_LARGE = tl.constexpr(4.0e6)


@triton.jit
def _rounded(x):
    x = tl.minimum(tl.maximum(x, -_LARGE), _LARGE)
    return (x + _ROUND) - _ROUND


@triton.jit
def _half(x):
    """Rounded to float16 and back."""
    return tl.minimum(tl.maximum(x, -_HALF_MAX), _HALF_MAX).to(tl.float16).to(tl.float32)


@triton.jit
def _channels(
    row, c, mean, cos, sin, offset_cos, offset_sin, D: tl.constexpr, ROTARY: tl.constexpr, BLOCKED: tl.constexpr,
    OFFSET: tl.constexpr, ROPED: tl.constexpr, CENTER: tl.constexpr, KEY: tl.constexpr,
):  # fmt: skip
    """Channels c of rows after the stages before the basis, float32. Angles are those of the row, or of its block."""
    inside = c < D
    x = tl.load(row + c, mask=inside, other=0.0).to(tl.float32)
    if not KEY:
        if CENTER:
            x = x - tl.load(mean + c, mask=inside, other=0.0)
        return x
    half: tl.constexpr = ROTARY // 2
    turns = c < ROTARY
    other = tl.where(c < half, c + half, tl.where(turns, c - half, c))
    sign = tl.where(c < half, 1.0, tl.where(turns, -1.0, 0.0))
    y = tl.load(row + other, mask=inside, other=0.0).to(tl.float32)
    if ROTARY > 0:
        a = tl.load(cos + c, mask=turns, other=1.0).to(tl.float32)
        b = tl.load(sin + c, mask=turns, other=0.0).to(tl.float32) * sign
    else:
        a, b = x * 0.0 + 1.0, x * 0.0
    mu = x * 0.0
    mu_other = mu
    if CENTER:
        mu = tl.load(mean + c, mask=inside, other=0.0)
        mu_other = tl.load(mean + other, mask=inside, other=0.0)
    if BLOCKED:
        if ROPED:  # undone: the inverse divides by the squared attention scaling
            norm = tl.maximum(a * a + b * b, 1e-12)
            a = _divided(a, norm)
            b = _divided(b, norm)
            turned = x * a + y * b
            y = y * a - x * b
            x = turned
        x, y = x - mu, y - mu_other
        if OFFSET:
            d = tl.load(offset_cos + c, mask=turns, other=1.0)
            e = tl.load(offset_sin + c, mask=turns, other=0.0) * sign
            x = x * d - y * e
    elif ROPED:
        x = x - (mu * a - mu_other * b)
    else:
        x = (x - mu) * a - (y - mu_other) * b
    return x


@triton.jit
def _fitted(x, level, live, AXIS: tl.constexpr):
    """The gain of least squares of x over levels, rounded to float16: of all of them, or of those along an axis."""
    dot = tl.sum(tl.where(live, x * level, 0.0).to(tl.float64), AXIS)
    square = tl.sum(tl.where(live, level * level, 0.0).to(tl.float64), AXIS)
    return _half(_divided(dot.to(tl.float32), tl.maximum(square.to(tl.float32), 1e-30)))


@triton.jit
def _spread(x, ROWS: tl.constexpr):
    """A number of one row, or numbers [R] of several, beside their channels."""
    return x[:, None] if ROWS else x


@triton.jit
def _gain(x, inside, D: tl.constexpr, ROWS: tl.constexpr):
    """The root of the mean square of one row [DP], or of several [R, DP]."""
    mean_square = tl.sum(tl.where(inside, x * x, 0.0).to(tl.float64), ROWS) / D
    return _spread(tl.maximum(tl.sqrt(mean_square).to(tl.float32), _TINY), ROWS)


@triton.jit
def _level_codes(
    x, deviation, inside, width, at, levels, edges, D: tl.constexpr, GAIN: tl.constexpr, WIDEST: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Codes of the levels nearest to one row x [DP], or to several [R, DP], in units of their deviations; and the gain to store."""
    y = _divided(x, x * 0.0 + deviation)
    gain = 1.0
    if GAIN:
        live = width > 0
        gain = _gain(y, inside, D, ROWS)
        code = _search(_divided(y, y * 0.0 + gain), width, at, edges, WIDEST)
        level = tl.load(levels + code, mask=live, other=0.0) * deviation
        gain = tl.maximum(_spread(_fitted(x, level, live, ROWS), ROWS), _TINY)
        code = _search(_divided(y, y * 0.0 + gain), width, at, edges, WIDEST)
        level = tl.load(levels + code, mask=live, other=0.0) * deviation
        gain = _spread(_fitted(x, level, live, ROWS), ROWS)
    else:
        code = _search(y, width, at, edges, WIDEST)
    return code, gain


@triton.jit
def _static_codes(x, step, WIDEST: tl.constexpr):
    """Codes of fixed steps, the smallest as 0."""
    half: tl.constexpr = 1 << (WIDEST - 1)
    code = tl.minimum(tl.maximum(_rounded(_divided(x, x * 0.0 + step)), -half), half - 1) + half
    return code.to(tl.int32)


@triton.jit
def _step_codes(
    x, inside, shape: tl.constexpr, groups: tl.constexpr, width, at, edges, clip, KIND: tl.constexpr, GROUP: tl.constexpr,
    WIDEST: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Codes of x in `shape` [DP] or [R, DP], and of every group (their shape is `groups`) its step and its lowest, or zero."""
    top: tl.constexpr = (1 << WIDEST) - 1
    z, inside = tl.reshape(x, groups), tl.reshape(tl.broadcast_to(inside, shape), groups)
    if KIND == 2:
        low = _half((tl.sum(tl.where(inside, z, 0.0).to(tl.float64), AXIS) / GROUP).to(tl.float32))
        z = z - tl.expand_dims(low, -1)
        step = _half(tl.sqrt(tl.sum(tl.where(inside, z * z, 0.0).to(tl.float64), AXIS) / GROUP).to(tl.float32))
        t = _divided(z, tl.expand_dims(tl.maximum(step, _TINY), -1) + z * 0.0)
        code = _search(tl.reshape(t, shape), width, at, edges, WIDEST)
    else:
        high = clip * tl.max(tl.where(inside, z, float("-inf")), AXIS)
        low = clip * tl.min(tl.where(inside, z, float("inf")), AXIS)
        step = _half(_divided(high - low, high * 0.0 + top))
        if KIND == 4:
            step = tl.where(step > 0, step, 1.0)
            low = _half(_rounded(_divided(-low, step)))
            t = _rounded(_divided(z, tl.expand_dims(step, -1) + z * 0.0)) + tl.expand_dims(low, -1)
        else:
            low = _half(low)
            t = _rounded(_divided(z - tl.expand_dims(low, -1), tl.expand_dims(tl.maximum(step, _TINY), -1) + z * 0.0))
        code = tl.reshape(tl.minimum(tl.maximum(t, 0.0), top), shape).to(tl.int32)
    return code, step, low


@triton.jit
def _repeats(slot, e):
    """Slots [E] of the places e, those that an earlier place names too marked as repeats."""
    again = (slot[:, None] == slot[None, :]) & (e[:, None] > e[None, :]) & (slot >= 0)[:, None]
    return tl.where(tl.sum(again.to(tl.int32), 1) > 0, -slot - 2, slot)


@triton.jit
def _nearest(x, book, g, K: tl.constexpr, GP: tl.constexpr, G: tl.constexpr, COUPLE: tl.constexpr, STEP: tl.constexpr):
    """Index of the code vector nearest to each run of channels x [GP, COUPLE] in book [G, K, COUPLE], the lower one at ties."""
    j, n = tl.arange(0, COUPLE), tl.arange(0, STEP)
    best = tl.full((GP,), float("-inf"), tl.float32)
    code = tl.zeros((GP,), tl.int32)
    for at in range(0, K, STEP):
        place = (g[:, None, None] * K + (at + n)[None, :, None]) * COUPLE + j[None, None, :]
        c = tl.load(book + place, mask=(g < G)[:, None, None], other=0.0).to(tl.float32)
        score = tl.sum(c * x[:, None, :], 2) - 0.5 * tl.sum(c * c, 2)
        peak = tl.max(score, 1)
        first = tl.min(tl.where(score == peak[:, None], (at + n)[None, :], K), 1)
        code = tl.where(peak > best, first, code)
        best = tl.maximum(peak, best)
    return code


@triton.jit
def _vectors(code, book, g, K: tl.constexpr, G: tl.constexpr, COUPLE: tl.constexpr):
    j = tl.arange(0, COUPLE)
    place = (g * K + code)[:, None] * COUPLE + j[None, :]
    return tl.load(book + place, mask=(g < G)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _stored(out, code, bit, width, BYTES: tl.constexpr, BYTES_P: tl.constexpr):
    """Codes [n] of `width` bits at their places `bit` of a row, as bytes."""
    i = tl.arange(0, BYTES_P)
    up = bit[None, :] - 8 * i[:, None]  # how far a code lies above the byte
    left, right = tl.minimum(tl.maximum(up, 0), 31), tl.minimum(tl.maximum(-up, 0), 31)
    part = tl.where(up >= 0, code[None, :] << left, code[None, :] >> right)
    part = tl.where((up < 8) & (up > -width[None, :]), part & 255, 0)
    tl.store(out + i, tl.sum(part, 1).to(tl.uint8), mask=i < BYTES)


@triton.jit
def code_kernel(
    rows, positions, length, cos, sin, mean, offset_cos, offset_sin, mean2, basis, sigma, book, levels, edges, meta,
    codes, scale,
    row_b, row_h, position_b, cos_b, codes_b, codes_h, scale_b, scale_h, basis_h, book_h, clip,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr, KEY: tl.constexpr, ROPED: tl.constexpr,
    ROTARY: tl.constexpr, BLOCKED: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr, CENTER: tl.constexpr,
    CENTER2: tl.constexpr, BASIS: tl.constexpr, KIND: tl.constexpr, GAIN: tl.constexpr, WIDEST: tl.constexpr,
    GROUP: tl.constexpr, COUPLE: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, BYTES_P: tl.constexpr,
    SCALES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One row of one side. KIND 0 levels with deviations, 1 codebook, 2 gauss, 3 uniform, 4 uniform with integer zero, 5 static,
    6 trellis."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    first = tl.load(length)
    row = rows + b * row_b + h * row_h
    codes += b * codes_b + h * codes_h + first * BYTES
    scale += b * scale_b + h * scale_h + first * SCALES
    c = tl.arange(0, DP)
    place = tl.load(positions + b * position_b)
    place = ((place % BLOCK) + BLOCK) % BLOCK  # the floor modulus
    offset_cos += place * ROTARY
    offset_sin += place * ROTARY
    cos += b * cos_b
    sin += b * cos_b
    mean += h * D
    if BASIS:
        x = tl.zeros((DP,), tl.float32)
        for at in range(0, DP, CHUNK):
            part = at + tl.arange(0, CHUNK)
            y = _channels(row, part, mean, cos, sin, offset_cos, offset_sin, D, ROTARY, BLOCKED, OFFSET, ROPED, CENTER, KEY)
            if CENTER2:
                y = y - tl.load(mean2 + h * D + part, mask=part < D, other=0.0)
            inside = (part < D)[:, None] & (c < D)[None, :]
            u = tl.load(basis + h * basis_h + part[:, None] * D + c[None, :], mask=inside, other=0.0)
            x += tl.sum(tl.where(part < D, y, 0.0)[:, None] * u, 0)
    else:
        x = _channels(row, c, mean, cos, sin, offset_cos, offset_sin, D, ROTARY, BLOCKED, OFFSET, ROPED, CENTER, KEY)
    x = tl.where(c < D, x, 0.0)
    if KIND == 1:
        G: tl.constexpr = D // COUPLE
        GP: tl.constexpr = DP // COUPLE
        K: tl.constexpr = 1 << BITS
        g = tl.arange(0, GP)
        book += h * book_h
        z = tl.reshape(x, [GP, COUPLE])
        if GAIN:
            gain = _gain(x, c < D, D, 0)
            level = _vectors(_nearest(_divided(z, z * 0.0 + gain), book, g, K, GP, G, COUPLE, STEP), book, g, K, G, COUPLE)
            live = (g < G)[:, None] & (level == level)
            gain = tl.maximum(tl.maximum(_fitted(z, level, live, None), 0.0), _TINY)
            code = _nearest(_divided(z, z * 0.0 + gain), book, g, K, GP, G, COUPLE, STEP)
            gain = tl.maximum(_fitted(z, _vectors(code, book, g, K, G, COUPLE), live, None), 0.0)
            tl.store(scale, gain.to(tl.float16))
        else:
            code = _nearest(z, book, g, K, GP, G, COUPLE, STEP)
        _stored(codes, code, tl.where(g < G, g * BITS, 1 << 20), g * 0 + BITS, BYTES, BYTES_P)
    else:
        width, at, bit = tl.load(meta + c), tl.load(meta + DP + c), tl.load(meta + 2 * DP + c)
        live = width > 0
        coded: tl.constexpr = BYTES - 1 if KIND == 6 else BYTES  # bytes of codes
        if KIND == 6:
            code, gain = walk_codes(x[None, :], sigma + h * D, meta, levels, edges, 1, D, DP, WIDEST)
            code = tl.reshape(code, [DP])
            tl.store(codes + coded + tl.arange(0, 1), gain.to(tl.uint8))
        elif KIND == 0:
            levels += tl.load(meta + 3 * DP + c)
            deviation = tl.maximum(tl.load(sigma + h * D + c, mask=c < D, other=1.0), _TINY)
            code, gain = _level_codes(x, deviation, c < D, width, at, levels, edges, D, GAIN, WIDEST, 0)
            if GAIN:
                tl.store(scale, gain.to(tl.float16))
        elif KIND == 5:
            code = _static_codes(x, tl.load(sigma + h * D + c, mask=c < D, other=1.0), WIDEST)
        else:
            padded: tl.constexpr = DP // GROUP if D == DP else 1
            n = tl.arange(0, padded)
            groups: tl.constexpr = [padded, DP // padded]
            code, step, low = _step_codes(x, c < D, [DP], groups, width, at, edges, clip, KIND, GROUP, WIDEST, 1)
            tl.store(scale + 2 * n, step.to(tl.float16), mask=n < D // GROUP)
            tl.store(scale + 2 * n + 1, low.to(tl.float16), mask=n < D // GROUP)
        _stored(codes, tl.where(live, code, 0), bit, width, coded, BYTES_P)


@triton.jit
def _moved(
    rows, out, place, b, row_b, row_h, out_b, out_h, cos, sin, H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """The new row of all heads of one sequence, rotated to its position, to a place of exact rows; as PyTorch rounds it."""
    h, c = tl.arange(0, HP), tl.arange(0, DP)
    inside = (h < H)[:, None] & (c < D)[None, :]
    row = rows + b * row_b + h[:, None] * row_h
    x = tl.load(row + c[None, :], mask=inside, other=0.0)
    if ROTARY > 0:
        half: tl.constexpr = ROTARY // 2
        turns = c < ROTARY
        other = tl.where(c < half, c + half, tl.where(turns, c - half, c))
        sign = tl.where(c < half, -1.0, 1.0)[None, :]
        y = tl.load(row + other[None, :], mask=inside, other=0.0)
        p = (x.to(tl.float32) * tl.load(cos + c, mask=turns, other=1.0).to(x.dtype).to(tl.float32)[None, :]).to(x.dtype)
        q = (y.to(tl.float32) * tl.load(sin + c, mask=turns, other=0.0).to(x.dtype).to(tl.float32)[None, :]).to(x.dtype)
        x = tl.where(turns[None, :], (p.to(tl.float32) + sign * q.to(tl.float32)).to(x.dtype), x)
    tl.store(out + b * out_b + h[:, None] * out_h + place * D + c[None, :], x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def enter_kernel(
    k, v, positions, length, cos, sin, score_0, score_1, score_2, score_3, stored_positions, exact_k, exact_v,
    exact_slot, exact_score, recent_k, recent_v, recent_slot,
    k_b, k_h, v_b, v_h, position_b, cos_b, score_b0, score_b1, score_b2, score_b3, stored_b, exact_b, exact_h, recent_b, recent_h,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, W: tl.constexpr,
    N: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """The new row of one sequence into the exact rows (segments end at places A, B, C and E), the window and the positions."""
    b = tl.program_id(0).to(tl.int64)
    first = tl.load(length)
    cos += b * cos_b
    sin += b * cos_b
    tl.store(stored_positions + b * stored_b + first, tl.load(positions + b * position_b).to(tl.int32))
    if W > 0:
        ring = first % W
        _moved(k, recent_k, ring, b, k_b, k_h, recent_b, recent_h, cos, sin, H, HP, D, DP, ROTARY)
        _moved(v, recent_v, ring, b, v_b, v_h, recent_b, recent_h, cos, sin, H, HP, D, DP, 0)
        if b == 0:
            tl.store(recent_slot + ring, first.to(tl.int32))
    if N > 0:
        e = tl.arange(0, EP)
        slot = tl.load(exact_slot + b * E + e, mask=e < E, other=-1)
        slot = tl.where(slot < -1, -slot - 2, slot)  # a place marked as a repeat still names its row
        score = tl.load(exact_score + b * E + e, mask=e < E, other=float("inf"))
        for i in tl.static_range(N):
            low = 0 if i == 0 else (A if i == 1 else (B if i == 2 else C))
            end = E if i == N - 1 else (A if i == 0 else (B if i == 1 else C))
            if i == 0:
                new = tl.load(score_0 + b * score_b0).to(tl.float32)
            elif i == 1:
                new = tl.load(score_1 + b * score_b1).to(tl.float32)
            elif i == 2:
                new = tl.load(score_2 + b * score_b2).to(tl.float32)
            else:
                new = tl.load(score_3 + b * score_b3).to(tl.float32)
            mine = (e >= low) & (e < end)
            least = tl.min(tl.where(mine, score, float("inf")), 0)
            worst = mine & (score == least)  # of them the row of the latest slot leaves, as in selection.py
            last = tl.max(tl.where(worst, slot, -1), 0)
            place = tl.max(tl.where(worst & (slot == last), e, -1), 0)
            if (new > least) & (place >= 0):
                score = tl.where(e == place, new, score)
                slot = tl.where(e == place, first.to(tl.int32), slot)
                _moved(k, exact_k, place, b, k_b, k_h, exact_b, exact_h, cos, sin, H, HP, D, DP, ROTARY)
                _moved(v, exact_v, place, b, v_b, v_h, exact_b, exact_h, cos, sin, H, HP, D, DP, 0)
        tl.store(exact_slot + b * E + e, tl.where(score == float("-inf"), -1, _repeats(slot, e)), mask=e < E)
        tl.store(exact_score + b * E + e, score, mask=e < E)
