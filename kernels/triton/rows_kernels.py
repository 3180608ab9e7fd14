"""Triton code of `append` for several new rows: through every stage of their codec, and into the exact rows.

Formula    as `kvsink.kernels.append`: what `append_kernels` does to one row, for R of them at a time. Exact rows as in
           `kvsink.kernels.selection`: every row, held or offered, counts those that go before it, and the first `capacity` stay;
           they keep their places, new ones take those of the rows that leave
Source     ours
Shapes     `code_rows_kernel`: one program per R rows, key-value head and side. `enter_rows_kernel`: program (b, 0) chooses and
           copies the exact rows of all heads of a sequence, program (b, 1 + h) the window of a head
Exact      codes equal the definition's up to ties that the order of float32 sums in the transform decides; exact rows are the same,
           in places of their own order

Imported only where Triton is there. Names in capitals are constants of the compilation.
"""

import triton
import triton.language as tl

from .append_kernels import _TINY, _channels, _divided, _fitted, _gain, _level_codes, _repeats, _static_codes, _step_codes  # isort: skip
from .trellis_kernels import walk_codes  # isort: skip


@triton.jit
def _nearest(
    x, book, g, K: tl.constexpr, R: tl.constexpr, GP: tl.constexpr, G: tl.constexpr, COUPLE: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Index of the code vector nearest to each run of channels x [R, GP, COUPLE] in book [G, K, COUPLE], the lower one at ties."""
    j, n = tl.arange(0, COUPLE), tl.arange(0, STEP)
    best = tl.full((R, GP), float("-inf"), tl.float32)
    code = tl.zeros((R, GP), tl.int32)
    for at in range(0, K, STEP):
        place = (g[:, None, None] * K + (at + n)[None, :, None]) * COUPLE + j[None, None, :]
        c = tl.load(book + place, mask=(g < G)[:, None, None], other=0.0).to(tl.float32)
        score = tl.sum(c[None, :, :, :] * x[:, :, None, :], 3) - (0.5 * tl.sum(c * c, 2))[None, :, :]
        peak = tl.max(score, 2)
        first = tl.min(tl.where(score == peak[:, :, None], (at + n)[None, None, :], K), 2)
        code = tl.where(peak > best, first, code)
        best = tl.maximum(peak, best)
    return code


@triton.jit
def _vectors(code, book, g, K: tl.constexpr, R: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, COUPLE: tl.constexpr):
    """The code vectors of codes [R, GP] as rows [R, DP]."""
    j = tl.arange(0, COUPLE)
    place = (g[None, :] * K + code)[:, :, None] * COUPLE + j[None, None, :]
    x = tl.load(book + place, mask=(g < G)[None, :, None], other=0.0).to(tl.float32)
    return tl.reshape(x, [R, DP])


@triton.jit
def _stored(
    out, code, held, first, width, R: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr, MOST: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    """Codes [R, RUNS · RUN] as bytes at out [R, 1]: those of a run have `width` [RUNS] <= MOST bits and begin at byte `first`."""
    i = tl.arange(0, RUN)
    bit = (i[None, :] * width[:, None])[None, :, :]
    z = tl.reshape(code, [R, RUNS, RUN]).to(tl.int64)
    low = tl.sum(tl.where(bit < 64, z << tl.minimum(bit, 63), 0), 2)
    full = (width * RUN)[None, :]  # bits of a run
    place = out + first[None, :]
    for j in tl.static_range(8 if MOST > 8 else MOST):
        inside = held & (8 * j < full) & (first[None, :] + j < BYTES)
        tl.store(place + j, ((low >> (8 * j)) & 255).to(tl.uint8), mask=inside)
    if MOST > 8:
        across = tl.where(bit + width[None, :, None] > 64, z >> tl.minimum(tl.maximum(64 - bit, 0), 63), 0)
        high = tl.sum(tl.where(bit >= 64, z << tl.maximum(bit - 64, 0), across), 2)
        for j in tl.static_range(8, MOST):
            inside = held & (8 * j < full) & (first[None, :] + j < BYTES)
            tl.store(place + j, ((high >> (8 * j - 64)) & 255).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["row_s", "position_b", "position_s", "cos_b", "S", "L", "tiles"])
def code_rows_kernel(
    rows, positions, length, cos, sin, mean, offset_cos, offset_sin, mean2, basis, sigma, book, levels, edges, meta,
    codes, scale,
    row_b, row_h, row_s, position_b, position_s, cos_b, cos_s, codes_b, codes_h, scale_b, scale_h, basis_h, book_h, S, L, tiles,
    clip,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, KEY: tl.constexpr,
    ROPED: tl.constexpr, ROTARY: tl.constexpr, BLOCKED: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
    CENTER: tl.constexpr, CENTER2: tl.constexpr, BASIS: tl.constexpr, KIND: tl.constexpr, GAIN: tl.constexpr,
    WIDEST: tl.constexpr, GROUP: tl.constexpr, COUPLE: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr,
    SCALES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """R of S rows of one side of one head. KIND 0 levels with deviations, 1 codebook, 2 gauss, 3 uniform, 4 uniform with integer
    zero, 5 static, 6 trellis."""
    tile = tl.program_id(0) % tiles
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    r = tile * R + tl.arange(0, R)
    slot = tl.load(length) + r
    held = (r < S) & (slot < L)
    r = tl.minimum(r, S - 1).to(tl.int64)
    row = (rows + b * row_b + h * row_h + r * row_s)[:, None]
    codes = (codes + b * codes_b + h * codes_h + slot * BYTES)[:, None]
    scale += b * scale_b + h * scale_h + slot * SCALES
    n = tl.arange(0, DP)
    c = n[None, :]
    place = tl.load(positions + b * position_b + r * position_s)
    place = ((place % BLOCK) + BLOCK) % BLOCK  # the floor modulus
    offset_cos = (offset_cos + place * ROTARY)[:, None]
    offset_sin = (offset_sin + place * ROTARY)[:, None]
    cos = (cos + b * cos_b + r * cos_s)[:, None]
    sin = (sin + b * cos_b + r * cos_s)[:, None]
    mean += h * D
    if BASIS:
        x = tl.zeros((R, DP), tl.float32)
        for at in range(0, DP, CHUNK):
            part = at + tl.arange(0, CHUNK)
            inside = (part < D)[:, None] & (c < D)
            u = tl.load(basis + h * basis_h + part[:, None] * D + c, mask=inside, other=0.0)
            p = part[None, :]
            y = _channels(row, p, mean, cos, sin, offset_cos, offset_sin, D, ROTARY, BLOCKED, OFFSET, ROPED, CENTER, KEY)
            if CENTER2:
                y = y - tl.load(mean2 + h * D + p, mask=p < D, other=0.0)
            x = tl.dot(tl.where(p < D, y, 0.0), u, x, input_precision="ieee")
    else:
        x = _channels(row, c, mean, cos, sin, offset_cos, offset_sin, D, ROTARY, BLOCKED, OFFSET, ROPED, CENTER, KEY)
    x = tl.where(c < D, x, 0.0)
    if KIND == 1:
        G: tl.constexpr = D // COUPLE
        GP: tl.constexpr = DP // COUPLE
        K: tl.constexpr = 1 << BITS
        RUN: tl.constexpr = 8 if GP > 8 else GP
        g = tl.arange(0, GP)
        book += h * book_h
        if GAIN:
            live = c < D
            gain = _gain(x, live, D, 1)
            z = tl.reshape(_divided(x, x * 0.0 + gain), [R, GP, COUPLE])
            level = _vectors(_nearest(z, book, g, K, R, GP, G, COUPLE, STEP), book, g, K, R, DP, G, COUPLE)
            gain = tl.maximum(tl.maximum(_fitted(x, level, live, 1), 0.0), _TINY)[:, None]
            z = tl.reshape(_divided(x, x * 0.0 + gain), [R, GP, COUPLE])
            code = _nearest(z, book, g, K, R, GP, G, COUPLE, STEP)
            gain = tl.maximum(_fitted(x, _vectors(code, book, g, K, R, DP, G, COUPLE), live, 1), 0.0)
            tl.store(scale, gain.to(tl.float16), mask=held)
        else:
            code = _nearest(tl.reshape(x, [R, GP, COUPLE]), book, g, K, R, GP, G, COUPLE, STEP)
        run = tl.arange(0, GP // RUN)
        code = tl.where((g < G)[None, :], code, 0)
        _stored(codes, code, held[:, None], run * BITS, run * 0 + BITS, R, GP // RUN, RUN, BITS, BYTES)
    else:
        width, at = tl.load(meta + n)[None, :], tl.load(meta + DP + n)[None, :]
        live = width > 0
        coded: tl.constexpr = BYTES - 1 if KIND == 6 else BYTES  # bytes of codes
        if KIND == 6:
            code, gain = walk_codes(x, sigma + h * D, meta, levels, edges, R, D, DP, WIDEST)
            tl.store(codes + coded, gain[:, None].to(tl.uint8), mask=held[:, None])
        elif KIND == 0:
            levels += tl.load(meta + 3 * DP + n)[None, :]
            deviation = tl.maximum(tl.load(sigma + h * D + c, mask=c < D, other=1.0), _TINY)
            code, gain = _level_codes(x, deviation, c < D, width, at, levels, edges, D, GAIN, WIDEST, 1)
            if GAIN:
                tl.store(scale[:, None], gain.to(tl.float16), mask=held[:, None])
        elif KIND == 5:
            code = _static_codes(x, tl.load(sigma + h * D + c, mask=c < D, other=1.0), WIDEST)
        else:
            padded: tl.constexpr = DP // GROUP if D == DP else 1
            m = tl.arange(0, padded)[None, :]
            groups: tl.constexpr = [R, padded, DP // padded]
            code, step, low = _step_codes(x, c < D, [R, DP], groups, width, at, edges, clip, KIND, GROUP, WIDEST, 2)
            stored = held[:, None] & (m < D // GROUP)
            tl.store(scale[:, None] + 2 * m, step.to(tl.float16), mask=stored)
            tl.store(scale[:, None] + 2 * m + 1, low.to(tl.float16), mask=stored)
        run = 8 * tl.arange(0, DP // 8)
        first, bits = tl.load(meta + 2 * DP + run) // 8, tl.load(meta + run)
        _stored(codes, tl.where(live, code, 0), held[:, None], first, bits, R, DP // 8, 8, WIDEST, coded)


@triton.jit
def _before(score, slot, place, other_score, other_slot, other_place):
    """Whether the others [M] go before rows [N], [N, M]: by score, then slot, then place."""
    a, b = other_score[None, :], score[:, None]
    s, t = other_slot[None, :], slot[:, None]
    earlier = (s < t) | ((s == t) & (other_place[None, :] < place[:, None]))
    return (a > b) | ((a == b) & earlier)


@triton.jit
def _counted(yes, NP: tl.constexpr):
    """How many places before each of [NP] are marked."""
    n = tl.arange(0, NP)
    return tl.sum(((n[None, :] < n[:, None]) & yes[None, :]).to(tl.int32), 1)


@triton.jit
def _chosen(
    slot, score, source, mine, capacity, scores, index, count, first, S, EP: tl.constexpr, NP: tl.constexpr
):  # fmt: skip
    """One segment: places [E] that are `mine` against `count` offered rows → slots, scores and rows of the chunk (-1: held)."""
    e, j = tl.arange(0, EP), tl.arange(0, NP)
    new = tl.load(scores + j, mask=j < count, other=float("-inf"))
    row = tl.minimum(tl.maximum(tl.load(index + j, mask=j < count, other=0), 0), S - 1).to(tl.int32)
    offered = new > float("-inf")  # no number is not
    new = tl.where(offered, new, float("-inf"))
    new_slot = first + row
    live = mine & (score > float("-inf"))
    ahead = tl.sum((_before(score, slot, e, score, slot, e) & live[None, :]).to(tl.int32), 1)
    ahead += tl.sum((_before(score, slot, e, new, new_slot, j + EP) & offered[None, :]).to(tl.int32), 1)
    stays = live & (ahead < capacity)
    behind = tl.sum((_before(new, new_slot, j + EP, score, slot, e) & live[None, :]).to(tl.int32), 1)
    behind += tl.sum((_before(new, new_slot, j, new, new_slot, j) & offered[None, :]).to(tl.int32), 1)
    enters = offered & (behind < capacity)
    free = mine & (stays == 0)
    match = (free[:, None] & enters[None, :]) & (_counted(free, EP)[:, None] == _counted(enters, NP)[None, :])
    taken = tl.max(tl.where(match, row[None, :], -1), 1)
    filled = taken >= 0
    slot = tl.where(filled, first + taken, tl.where(free, -1, slot))
    score = tl.where(filled, tl.max(tl.where(match, new[None, :], float("-inf")), 1), tl.where(free, float("-inf"), score))
    return slot, score, tl.where(filled, taken, source)


@triton.jit
def _copied(
    rows, out, source, place, inside, row_s, cos, sin, cos_s, D: tl.constexpr, DP: tl.constexpr, ROTARY: tl.constexpr
):  # fmt: skip
    """Rows `source` [N] of a chunk, rotated to their positions, to places [N]; as PyTorch rounds it."""
    n = tl.arange(0, DP)
    c = n[None, :]
    source = tl.maximum(source, 0).to(tl.int64)[:, None]
    held = inside[:, None] & (c < D)
    x = tl.load(rows + source * row_s + c, mask=held, other=0.0)
    if ROTARY > 0:
        half: tl.constexpr = ROTARY // 2
        turns = c < ROTARY
        other = tl.where(c < half, c + half, tl.where(turns, c - half, c))
        sign = tl.where(c < half, -1.0, 1.0)
        y = tl.load(rows + source * row_s + other, mask=held, other=0.0)
        a = tl.load(cos + source * cos_s + c, mask=held & turns, other=1.0).to(x.dtype).to(tl.float32)
        b = tl.load(sin + source * cos_s + c, mask=held & turns, other=0.0).to(x.dtype).to(tl.float32)
        p, q = (x.to(tl.float32) * a).to(x.dtype), (y.to(tl.float32) * b).to(x.dtype)
        x = tl.where(turns, (p.to(tl.float32) + sign * q.to(tl.float32)).to(x.dtype), x)
    tl.store(out + place.to(tl.int64)[:, None] * D + c, x.to(out.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=[
    "k_s", "v_s", "position_b", "position_s", "cos_b", "n0", "n1", "n2", "n3", "stored_b", "exact_n", "S", "L",
])  # fmt: skip
def enter_rows_kernel(
    k, v, positions, length, cos, sin, score_0, score_1, score_2, score_3, index_0, index_1, index_2, index_3, stored_positions,
    exact_k, exact_v, exact_slot, exact_score, recent_k, recent_v, recent_slot,
    k_b, k_h, k_s, v_b, v_h, v_s, position_b, position_s, cos_b, cos_s, n0, n1, n2, n3, stored_b, exact_n,
    exact_b, exact_h, recent_b, recent_h, S, L,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, NP: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, E: tl.constexpr, ROTARY: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """S new rows; segments end at places A, B, C and E of exact_n. n: rows offered to each."""
    b = tl.program_id(0).to(tl.int64)
    first = tl.load(length).to(tl.int32)
    cos += b * cos_b
    sin += b * cos_b
    k += b * k_b
    v += b * v_b
    exact_k += b * exact_b
    exact_v += b * exact_b
    recent_k += b * recent_b
    recent_v += b * recent_b
    far_k, far_v, far_exact, far_recent = b * 0 + k_h, b * 0 + v_h, b * 0 + exact_h, b * 0 + recent_h  # as 64-bit numbers
    if tl.program_id(1) > 0:
        h = tl.program_id(1) - 1
        for at in range(0, W, 16):
            row = S - W + at + tl.arange(0, 16)
            inside = (row >= 0) & (row < S)
            ring = (first + tl.maximum(row, 0)) % W
            _copied(k + h * far_k, recent_k + h * far_recent, row, ring, inside, k_s, cos, sin, cos_s, D, DP, ROTARY)
            _copied(v + h * far_v, recent_v + h * far_recent, row, ring, inside, v_s, cos, sin, cos_s, D, DP, 0)
            if (b == 0) & (h == 0):
                tl.store(recent_slot + ring, first + row, mask=inside)
    else:
        if PLACES:
            for at in range(0, S, 1024):
                row = at + tl.arange(0, 1024)
                found = tl.load(positions + b * position_b + row.to(tl.int64) * position_s, mask=row < S, other=0)
                tl.store(stored_positions + b * stored_b + first + row, found.to(tl.int32), mask=(row < S) & (first + row < L))
        if N > 0:
            e = tl.arange(0, EP)
            slot = tl.load(exact_slot + b * exact_n + e, mask=e < E, other=-1)
            slot = tl.where(slot < -1, -slot - 2, slot)  # a place marked as a repeat still names its row
            score = tl.load(exact_score + b * exact_n + e, mask=e < E, other=float("-inf"))
            source = tl.full((EP,), -1, tl.int32)
            for i in tl.static_range(N):
                low = 0 if i == 0 else (A if i == 1 else (B if i == 2 else C))
                end = E if i == N - 1 else (A if i == 0 else (B if i == 1 else C))
                mine = (e >= low) & (e < end)
                if i == 0:
                    scores, index, n = score_0 + b * n0, index_0 + b * n0, n0
                elif i == 1:
                    scores, index, n = score_1 + b * n1, index_1 + b * n1, n1
                elif i == 2:
                    scores, index, n = score_2 + b * n2, index_2 + b * n2, n2
                else:
                    scores, index, n = score_3 + b * n3, index_3 + b * n3, n3
                slot, score, source = _chosen(slot, score, source, mine, end - low, scores, index, n, first, S, EP, NP)
            tl.store(exact_slot + b * exact_n + e, _repeats(slot, e), mask=e < E)
            tl.store(exact_score + b * exact_n + e, score, mask=e < E)
            for h in range(H):
                _copied(k + h * far_k, exact_k + h * far_exact, source, e, source >= 0, k_s, cos, sin, cos_s, D, DP, ROTARY)
                _copied(v + h * far_v, exact_v + h * far_exact, source, e, source >= 0, v_s, cos, sin, cos_s, D, DP, 0)
