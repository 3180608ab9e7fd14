"""Triton code of `attend`: decode attention over packed rows of any scalar, trellis or vector codec, and the merge of its parts.

Formula    as `kvsink.kernels.cpu.attend`: the query goes to the basis and to the start of a block, codes are only looked up
Source     FlashAttention, arXiv 2205.14135 (online softmax over splits); the query that carries the transform: ours
Shapes     one program per (split of the slots, sequence and key-value head); the last split takes exact rows
Exact      logits in float32, products in the dtype of the model (float16 for bfloat16 models)
Cost       every code and scale is read once per key-value head

Imported only where Triton is there. Names in capitals are constants of the compilation. RP, DP: query heads and channels
padded to powers of two; PER_KEY: keys are restored and the query rotated to their tokens, else the query alone moves.
"""

import triton
import triton.language as tl

from .trellis_kernels import byte_gains, walk_levels  # isort: skip


@triton.jit
def _bytes(codes, row, meta, table, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COUPLE: tl.constexpr):
    """Rows whose bytes each stand for COUPLE channels, from a table [groups or 1, 256, COUPLE] → [N, DP]."""
    g, j = tl.arange(0, DP // COUPLE), tl.arange(0, COUPLE)
    if D < DP:
        code = tl.load(codes + row[:, None] + g[None, :], mask=(g < D // COUPLE)[None, :], other=0).to(tl.int32)
    else:
        code = tl.load(codes + row[:, None] + g[None, :]).to(tl.int32)
    place = (tl.load(meta + g)[None, :] + code) * COUPLE
    return tl.reshape(tl.load(table + place[:, :, None] + j[None, None, :]), [N, DP])


@triton.jit
def _plain(codes, row, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WIDTH: tl.constexpr, DT: tl.constexpr):
    """Rows of codes of 1, 2, 4 or 8 bits that are their own levels → [N, DP]."""
    per: tl.constexpr = 8 // WIDTH
    g, i = tl.arange(0, DP // per), tl.arange(0, per)
    if D < DP:
        byte = tl.load(codes + row[:, None] + g[None, :], mask=(g < D // per)[None, :], other=0).to(tl.int32)
    else:
        byte = tl.load(codes + row[:, None] + g[None, :]).to(tl.int32)
    return tl.reshape((byte[:, :, None] >> (WIDTH * i)[None, None, :]) & ((1 << WIDTH) - 1), [N, DP]).to(DT)


@triton.jit
def _runs(codes, row, meta, table, N: tl.constexpr, DP: tl.constexpr, WIDEST: tl.constexpr):
    """Rows whose runs of 8 channels have widths of 0 to 4 bits, from tables of pairs [4^width, 2] → [N, DP]."""
    g, i, j = tl.arange(0, DP // 8), tl.arange(0, 4), tl.arange(0, 2)
    width, base = tl.load(meta + g), tl.load(meta + DP + g)
    word = tl.zeros([N, DP // 8], tl.int32)
    for n in tl.static_range(WIDEST):
        byte = tl.load(meta + (2 + n) * DP + g)  # of byte n of a run, or any byte of the row behind its end
        word = word | (tl.load(codes + row[:, None] + byte[None, :]).to(tl.int32) << (8 * n))
    step = 2 * width[:, None] * i[None, :]
    mask = ((1 << (2 * width)) - 1)[None, :, None]
    place = 2 * (base[None, :, None] + ((word[:, :, None] >> step[None, :, :]) & mask))
    return tl.reshape(tl.load(table + place[:, :, :, None] + j[None, None, None, :]), [N, DP])


@triton.jit
def _fields(codes, row, meta, table, c, D: tl.constexpr, DP: tl.constexpr, WIDE: tl.constexpr, MULTIPLE: tl.constexpr):
    """Rows of any codes of at most 16 bits that begin and end in two neighbouring bytes → [N, DP]."""
    byte, shift = tl.load(meta + c), tl.load(meta + 2 * DP + c)
    mask, base = tl.load(meta + 3 * DP + c), tl.load(meta + 4 * DP + c)
    word = tl.load(codes + row[:, None] + byte[None, :]).to(tl.int32)
    if WIDE:
        after = tl.load(meta + DP + c)
        word = word | (tl.load(codes + row[:, None] + after[None, :]).to(tl.int32) << 8)
    code = (word >> shift[None, :]) & mask[None, :]
    return tl.load(table + base[None, :] + code * MULTIPLE, mask=(c < D)[None, :], other=0.0)


@triton.jit
def _levels(
    codes, row, meta, table, c, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FORM: tl.constexpr, WIDE: tl.constexpr,
    MULTIPLE: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Rows of codes as levels [N, DP]; what stands in padded channels is finite, and nothing reads it."""
    if FORM == 0:
        return _bytes(codes, row, meta, table, N, D, DP, MULTIPLE)
    if FORM == 1:
        return _runs(codes, row, meta, table, N, DP, MULTIPLE)
    if FORM == 2:
        return _fields(codes, row, meta, table, c, D, DP, WIDE, MULTIPLE)
    return _plain(codes, row, N, D, DP, MULTIPLE, DT)


@triton.jit
def _steps(scale, slot, KIND: tl.constexpr, COUNT: tl.constexpr):
    """Factor and offset [N] of rows that have one pair, one gain or nothing."""
    one = tl.full(slot.shape, 1.0, tl.float32)
    zero = tl.zeros(slot.shape, tl.float32)
    if KIND == 0:
        return one, zero
    first = tl.load(scale + slot * COUNT).to(tl.float32)
    if KIND == 1:
        return first, zero
    second = tl.load(scale + slot * COUNT + 1).to(tl.float32)
    if KIND == 3:
        second = -second * first
    return first, second


@triton.jit
def _grouped(x, scale, slot, c, D: tl.constexpr, KIND: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """Rows [N, DP] whose channels have factors and offsets by groups."""
    place = slot[:, None] * COUNT + 2 * (c // GROUP)[None, :]
    first = tl.load(scale + place, mask=(c < D)[None, :], other=0.0).to(tl.float32)
    second = tl.load(scale + place + 1, mask=(c < D)[None, :], other=0.0).to(tl.float32)
    if KIND == 3:
        second = -second * first
    return x.to(tl.float32) * first + second


@triton.jit
def _side(
    codes, scale, slot, meta, table, c, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BYTES: tl.constexpr,
    FORM: tl.constexpr, WIDE: tl.constexpr, MULTIPLE: tl.constexpr, KIND: tl.constexpr, COUNT: tl.constexpr,
    GROUP: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Rows of one side as levels [N, DP], with the factor and the offset [N] that are still to be applied."""
    if FORM == 4:
        x = walk_levels(codes, slot * BYTES, meta, table, N, D, DP, MULTIPLE, BYTES)
        gain, shift = byte_gains(codes, slot * BYTES, BYTES), tl.zeros(slot.shape, tl.float32)
    else:
        x = _levels(codes, slot * BYTES, meta, table, c, N, D, DP, FORM, WIDE, MULTIPLE, DT)
        if GROUP < D:
            x = _grouped(x, scale, slot, c, D, KIND, COUNT, GROUP)
            gain, shift = _steps(scale, slot, 0, COUNT)
        else:
            gain, shift = _steps(scale, slot, KIND, COUNT)
    return x, gain, shift


@triton.jit
def _online_softmax(top, mass, acc, offset, s, seen, y, factor, shift, SHIFTED: tl.constexpr, DT: tl.constexpr):
    """One more tile into the online softmax: logits s [RP, N] in powers of two, rows y [N, DP] = factor · levels + shift."""
    s = tl.where(seen[None, :], s, float("-inf"))
    factor = tl.where(seen, factor, 0.0)  # a row that nobody sees may have a gain that is not a number
    peak = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    fade = tl.exp2(top - safe)
    p = tl.exp2(s - safe[:, None])
    mass = mass * fade + tl.sum(p, 1)
    acc = acc * fade[:, None] + tl.dot((p * factor[None, :]).to(DT), y, input_precision="ieee")
    if SHIFTED:
        offset = offset * fade + tl.sum(p * shift[None, :], 1)
    return peak, mass, acc, offset


@triton.jit
def _query(q_ptr, bh, r, c, scale, R: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr):
    """The query of one key-value head [RP, DP], scaled, and its rotary partners with their signs."""
    inside = (r < R)[:, None] & (c < D)[None, :]
    half: tl.constexpr = ROTARY // 2
    other = tl.where(c < half, c + half, tl.where(c < ROTARY, c - half, c))
    sign = tl.where(c < half, 1.0, tl.where(c < ROTARY, -1.0, 0.0))
    row = q_ptr + (bh * R + r)[:, None] * D
    q = tl.load(row + c[None, :], mask=inside, other=0.0).to(tl.float32) * scale
    side = tl.load(row + other[None, :], mask=inside, other=0.0).to(tl.float32) * scale
    return q, side * sign[None, :]


@triton.jit
def _to_basis(t, basis, sigma, c, D: tl.constexpr, BASIS: tl.constexpr, SIGMA: tl.constexpr, DT: tl.constexpr):
    """Rows [n, DP] through U [D, D] and the deviations of its channels."""
    if BASIS:
        square = (c < D)[:, None] & (c < D)[None, :]
        u = tl.load(basis + c[:, None] * D + c[None, :], mask=square, other=0.0)
        t = tl.dot(t.to(DT), u, input_precision="ieee")
    if SIGMA:
        t = t * tl.load(sigma + c, mask=c < D, other=0.0)[None, :]
    return t


@triton.jit
def _base(positions, length, BLOCK: tl.constexpr):
    """The block of the first position that a row without gaps can hold: 0, or later where its positions begin later."""
    first = tl.load(length).to(tl.int32)
    return tl.maximum(tl.load(positions + first) - first, 0) // BLOCK


@triton.jit
def rotate_query_kernel(
    q_ptr, basis, sigma, mean, start_cos, start_sin, positions, length, rotated, logits, scale, basis_h, last_block, blocks,
    position_b,
    H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROTARY: tl.constexpr,
    DT: tl.constexpr, PER_KEY: tl.constexpr, BLOCK: tl.constexpr, BY_BLOCK: tl.constexpr, BASIS: tl.constexpr,
    SIGMA: tl.constexpr, MEAN: tl.constexpr, M: tl.constexpr, RQ: tl.constexpr,
):  # fmt: skip
    """The query of every block of positions: in the basis of the codec (BY_BLOCK), or with its other half (PER_KEY), and the
    logits of the mean. M blocks a program, from `_base` on; rotated [BH, blocks, R or 2R, D], logits [BH, R, blocks · BLOCK]."""
    bh = tl.program_id(1).to(tl.int64)
    h = bh % H
    x, c = tl.arange(0, M * RQ), tl.arange(0, DP)
    block, r = tl.program_id(0) * M + x // RQ, x % RQ
    inside = ((r < R) & (block < blocks))[:, None] & (c < D)[None, :]
    q, q_side = _query(q_ptr, bh, r, c, scale, R, D, ROTARY)
    base = _base(positions + bh // H * position_b, length, BLOCK)
    angle = tl.minimum((base + block) * (BLOCK if PER_KEY else 1), last_block)[:, None] * ROTARY + c[None, :]
    turns = inside & (c < ROTARY)[None, :]
    a = tl.load(start_cos + angle, mask=turns, other=1.0)
    b = tl.load(start_sin + angle, mask=turns, other=0.0)
    t = q * a + q_side * b
    if PER_KEY:
        out = rotated + ((bh * blocks + block) * 2 * R + r)[:, None] * D + c[None, :]
        tl.store(out, t.to(DT), mask=inside)
        tl.store(out + R * D, (q_side * a - q * b).to(DT), mask=inside)
    else:
        if MEAN:
            d = tl.arange(0, BLOCK)
            table = tl.load(mean + (h * BLOCK + d)[None, :] * D + c[:, None], mask=(c < D)[:, None], other=0.0)
            found = tl.dot(t.to(DT), table, input_precision="ieee")
            place = ((bh * R + r)[:, None] * blocks + block[:, None]) * BLOCK + d[None, :]
            tl.store(logits + place, found, mask=((r < R) & (block < blocks))[:, None])
        if BY_BLOCK:
            w = _to_basis(t, basis + h * basis_h, sigma + h * D, c, D, BASIS, SIGMA, DT)
            tl.store(rotated + ((bh * blocks + block) * R + r)[:, None] * D + c[None, :], w.to(DT), mask=inside)


@triton.jit
def _exact_tile(top, mass, acc, offset, q, keys, values, seen, n, c, D: tl.constexpr, DT: tl.constexpr):
    """Exact rows [N] of one head at `keys`, `values`: protected ones, the window or the new row."""
    inside = seen[:, None] & (c < D)[None, :]
    k = tl.load(keys + n[:, None] * D + c[None, :], mask=inside, other=0.0).to(DT)
    v = tl.load(values + n[:, None] * D + c[None, :], mask=inside, other=0.0).to(DT)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    one = tl.full(n.shape, 1.0, tl.float32)
    return _online_softmax(top, mass, acc, offset, s, seen, v, one, one, False, DT)


@triton.jit
def attend_kernel(
    q_ptr, k_codes, k_scale, v_codes, v_scale, positions, length, mask, exact_k, exact_v, exact_slot, recent_k, recent_v,
    recent_slot, new_k, new_v, k_meta, k_levels, v_meta, v_levels, sigma, basis, mean, unit_cos, unit_sin,
    rotated, logits, part_acc, part_top, part_mass,
    k_codes_b, k_codes_h, k_scale_b, k_scale_h, v_codes_b, v_codes_h, v_scale_b, v_scale_h, position_b, mask_b,
    k_levels_h, v_levels_h, exact_b, exact_h, recent_b, recent_h, basis_h, scale, splits, last_block, blocks,
    H: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    ROTARY: tl.constexpr, EXACT_DT: tl.constexpr, DT: tl.constexpr,
    PER_KEY: tl.constexpr, BLOCK: tl.constexpr, STARTS: tl.constexpr, BY_BLOCK: tl.constexpr, BASIS: tl.constexpr,
    SIGMA: tl.constexpr, MEAN: tl.constexpr,
    K_BYTES: tl.constexpr, K_FORM: tl.constexpr, K_WIDE: tl.constexpr, K_MULTIPLE: tl.constexpr, K_KIND: tl.constexpr,
    K_COUNT: tl.constexpr, K_GROUP: tl.constexpr,
    V_BYTES: tl.constexpr, V_FORM: tl.constexpr, V_WIDE: tl.constexpr, V_MULTIPLE: tl.constexpr, V_KIND: tl.constexpr,
    V_COUNT: tl.constexpr, V_GROUP: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr, STRICT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    split, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    r, c, n = tl.arange(0, RP), tl.arange(0, DP), tl.arange(0, N)
    first = tl.load(length).to(tl.int32)
    past = first
    if STRICT:
        past = first + 1
    exact = tl.full((EP,), -1, tl.int32)
    if E > 0:
        e = tl.arange(0, EP)
        exact = tl.load(exact_slot + b * E + e, mask=e < E, other=-1)
    inside = (r < R)[:, None] & (c < D)[None, :]
    top = tl.full((RP,), float("-inf"), tl.float32)
    mass = tl.zeros((RP,), tl.float32)
    offset = tl.zeros((RP,), tl.float32)
    acc = tl.zeros((RP, DP), tl.float32)
    if split == splits:
        qh = tl.load(q_ptr + (bh * R + r)[:, None] * D + c[None, :], mask=inside, other=0.0).to(tl.float32) * scale
        qh = qh.to(EXACT_DT)
        for at in tl.static_range(0, E, 16):
            row = at + tl.arange(0, 16)
            slot = tl.load(exact_slot + b * E + row, mask=row < E, other=-1)
            seen = slot >= 0
            if MASKED:
                seen = seen & (tl.load(mask + b * mask_b + slot, mask=seen, other=0) != 0)
            top, mass, acc, offset = _exact_tile(
                top, mass, acc, offset, qh, exact_k + b * exact_b + h * exact_h, exact_v + b * exact_b + h * exact_h,
                seen, row, c, D, EXACT_DT,
            )  # fmt: skip
        for at in range(0, RING, 16):
            row = at + tl.arange(0, 16)
            slot = tl.load(recent_slot + row, mask=row < RING, other=-1)
            seen = (slot >= 0) & (slot <= first) & (slot > first - WINDOW)
            if not STRICT:
                seen = seen & (slot < first)
            if E > 0:
                seen = seen & (tl.sum((slot[:, None] == exact[None, :]).to(tl.int32), 1) == 0)
            if MASKED:
                seen = seen & (tl.load(mask + b * mask_b + slot, mask=seen, other=0) != 0)
            top, mass, acc, offset = _exact_tile(
                top, mass, acc, offset, qh, recent_k + b * recent_b + h * recent_h, recent_v + b * recent_b + h * recent_h,
                seen, row, c, D, EXACT_DT,
            )  # fmt: skip
        if not STRICT:
            row = tl.arange(0, 16)
            slot = tl.where(row == 0, first, -1)
            seen = row == 0
            if E > 0:
                seen = seen & (tl.sum((slot[:, None] == exact[None, :]).to(tl.int32), 1) == 0)
            if MASKED:
                seen = seen & (tl.load(mask + b * mask_b + slot, mask=seen, other=0) != 0)
            top, mass, acc, offset = _exact_tile(
                top, mass, acc, offset, qh, new_k + bh * D, new_v + bh * D, seen, row, c, D, EXACT_DT
            )
    else:
        k_codes += b * k_codes_b + h * k_codes_h
        k_scale += b * k_scale_b + h * k_scale_h
        v_codes += b * v_codes_b + h * v_codes_h
        v_scale += b * v_scale_b + h * v_scale_h
        k_levels += h * k_levels_h
        v_levels += h * v_levels_h
        basis += h * basis_h
        w = tl.load(q_ptr + (bh * R + r)[:, None] * D + c[None, :], mask=inside, other=0.0).to(tl.float32) * scale
        if (not PER_KEY) and (not BY_BLOCK):
            w = _to_basis(w, basis, sigma + h * D, c, D, BASIS, SIGMA, DT)
        w = w.to(DT)
        base = 0
        if STARTS:
            base = _base(positions + b * position_b, length, BLOCK)
            rotated += bh * blocks * D * (2 * R if PER_KEY else R)
            logits += bh * R * blocks * BLOCK
        total = tl.cdiv(past, N)
        per = tl.cdiv(total, splits)
        for tile in range(split * per, tl.minimum(split * per + per, total)):
            slot = tile * N + n
            live = slot < past
            if WINDOW > 0:
                live = live & (slot <= first - WINDOW)
            if E > 0:
                live = live & (tl.sum((slot[:, None] == exact[None, :]).to(tl.int32), 1) == 0)
            slot = tl.minimum(slot, first)  # rows behind the last are read from it and then not counted
            if MASKED:
                live = live & (tl.load(mask + b * mask_b + slot) != 0)
            x, gain, shift = _side(
                k_codes, k_scale, slot, k_meta, k_levels, c, N, D, DP, K_BYTES, K_FORM, K_WIDE, K_MULTIPLE, K_KIND,
                K_COUNT, K_GROUP, DT,
            )  # fmt: skip
            y, v_gain, v_shift = _side(
                v_codes, v_scale, slot, v_meta, v_levels, c, N, D, DP, V_BYTES, V_FORM, V_WIDE, V_MULTIPLE, V_KIND,
                V_COUNT, V_GROUP, DT,
            )  # fmt: skip
            if PER_KEY:
                if K_KIND >= 2:
                    x = x.to(tl.float32) * gain[:, None] + shift[:, None]
                if BASIS:  # the inverse transform, deviations included
                    square = (c < D)[:, None] & (c < D)[None, :]
                    u = tl.load(basis + c[:, None] * D + c[None, :], mask=square, other=0.0)
                    x = tl.dot(x.to(DT), u, input_precision="ieee")
                elif SIGMA:
                    x = x.to(tl.float32) * tl.load(sigma + h * D + c, mask=c < D, other=0.0)[None, :]
                x = x.to(tl.float32)
                if K_KIND == 1:
                    x = x * gain[:, None]
                if MEAN:
                    x = x + tl.load(mean + h * D + c, mask=c < D, other=0.0)[None, :]
            if STARTS:
                position = tl.load(positions + b * position_b + slot)
                place = tl.maximum(position - base * BLOCK, 0)
                # No query stands before the first block or behind the last, nor behind the table: there logits stay NaN.
                lost = (position < base * BLOCK) | (position // (1 if PER_KEY else BLOCK) >= last_block)
                block = tl.where(lost, blocks, place // BLOCK)
                low = tl.min(tl.where(live, block, 2147483647), 0)
                high = tl.max(tl.where(live, block, -1), 0)
                if PER_KEY:
                    inner = (place % BLOCK)[:, None] * DP + c[None, :]
                    rotated_x = (x * tl.load(unit_cos + inner)).to(DT)
                    across_x = (x * tl.load(unit_sin + inner)).to(DT)
                s = tl.full((N, RP), float("nan"), tl.float32)
                for at in range(low, tl.minimum(high + 1, blocks)):
                    if PER_KEY:
                        row = rotated + (at * 2 * R + r)[:, None] * D + c[None, :]
                        t = tl.load(row, mask=inside, other=0.0)
                        across = tl.load(row + R * D, mask=inside, other=0.0)
                        found = tl.dot(rotated_x, tl.trans(t), input_precision="ieee")
                        found = tl.dot(across_x, tl.trans(across), found, input_precision="ieee")
                    else:
                        if BY_BLOCK:
                            w = tl.load(rotated + (at * R + r)[:, None] * D + c[None, :], mask=inside, other=0.0)
                        found = tl.dot(x.to(DT), tl.trans(w), input_precision="ieee") * gain[:, None]
                        if K_KIND >= 2:
                            found += tl.sum(w.to(tl.float32), 1)[None, :] * shift[:, None]
                        if MEAN:
                            mine = (block == at)[:, None] & (r < R)[None, :]
                            found += tl.load(logits + r[None, :] * blocks * BLOCK + place[:, None], mask=mine, other=0.0)
                    s = tl.where((block == at)[:, None], found, s)
            else:
                if PER_KEY:
                    s = tl.dot(x.to(DT), tl.trans(w), input_precision="ieee")
                else:
                    s = tl.dot(x.to(DT), tl.trans(w), input_precision="ieee") * gain[:, None]
                    if K_KIND >= 2:
                        s += tl.sum(w.to(tl.float32), 1)[None, :] * shift[:, None]
            top, mass, acc, offset = _online_softmax(
                top, mass, acc, offset, tl.trans(s), live, y.to(DT), v_gain, v_shift, V_KIND >= 2, DT
            )
    acc = acc + offset[:, None]
    out = (bh * (splits + 1) + split) * R + r
    tl.store(part_top + out, top, mask=r < R)
    tl.store(part_mass + out, mass, mask=r < R)
    tl.store(part_acc + out[:, None] * D + c[None, :], acc, mask=inside)


@triton.jit
def merge_kernel(
    part_acc, part_top, part_mass, back, value_sigma, value_mean, out_ptr, splits, back_h,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, BACK: tl.constexpr,
    SIGMA: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """The parts of one query head → its output: decoded rows through the inverse transform of values, exact ones as they are."""
    bh, r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h = bh % H
    c, s = tl.arange(0, DP), tl.arange(0, SP)
    part = (bh * (splits + 1) + s) * R + r
    exact = (bh * (splits + 1) + splits) * R + r
    tops = tl.load(part_top + part, mask=s < splits, other=float("-inf"))
    exact_top = tl.load(part_top + exact)
    peak = tl.maximum(tl.max(tops, 0), exact_top)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2(tops - peak)
    mass = tl.sum(tl.load(part_mass + part, mask=s < splits, other=0.0) * weight, 0)
    inside = (s < splits)[:, None] & (c < D)[None, :]
    x = tl.sum(tl.load(part_acc + part[:, None] * D + c[None, :], mask=inside, other=0.0) * weight[:, None], 0)
    if SIGMA:
        x = x * tl.load(value_sigma + h * D + c, mask=c < D, other=0.0)
    if BACK:
        square = (c < D)[:, None] & (c < D)[None, :]
        u = tl.load(back + h * back_h + c[None, :] * D + c[:, None], mask=square, other=0.0).to(tl.float32)
        x = tl.sum(x[:, None] * u, 0)
    if MEAN:
        x = x + mass * tl.load(value_mean + h * D + c, mask=c < D, other=0.0)
    share = tl.exp2(exact_top - peak)
    x = x + share * tl.load(part_acc + exact * D + c, mask=c < D, other=0.0)
    mass = mass + share * tl.load(part_mass + exact)
    x = x / tl.maximum(mass, 1e-30)
    tl.store(out_ptr + (bh * R + r) * D + c, x.to(out_ptr.dtype.element_ty), mask=c < D)
