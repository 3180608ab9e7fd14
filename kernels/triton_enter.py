"""Triton code of `append_triton`: several new rows into the exact rows of every segment, the window and the positions.

Formula    see `kvsink.kernels.selection`: every row, held or offered, counts those that go before it; the first `capacity` stay.
           Rows that stay keep their places, new ones take those of the rows that leave
Source     ours
Shapes     program (b, 0) chooses and copies the exact rows of all heads of a sequence, program (b, 1 + h) the window of a head
Exact      yes: the same rows as the definition, in places of their own order

Imported only where Triton is there. Names in capitals are constants of the compilation.
"""

import triton
import triton.language as tl


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
    "k_s", "v_s", "position_b", "position_s", "cos_b", "n0", "n1", "n2", "n3", "score_b0", "score_b1", "score_b2", "score_b3",
    "index_b0", "index_b1", "index_b2", "index_b3", "stored_b", "exact_n", "S", "L",
])  # fmt: skip
def enter_rows_kernel(
    k, v, positions, length, cos, sin, score_0, score_1, score_2, score_3, index_0, index_1, index_2, index_3, stored_positions,
    exact_k, exact_v, exact_slot, exact_score, recent_k, recent_v, recent_slot,
    k_b, k_h, k_s, v_b, v_h, v_s, position_b, position_s, cos_b, cos_s, n0, n1, n2, n3, score_b0, score_b1, score_b2, score_b3,
    index_b0, index_b1, index_b2, index_b3, stored_b, exact_n, exact_b, exact_h, recent_b, recent_h, S, L,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, NP: tl.constexpr, W: tl.constexpr, N: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, E: tl.constexpr, ROTARY: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """S new rows; segments end at places A, B, C and E of exact_n. score_b and index_b: 1 where every sequence has its own."""
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
                    scores, index, n = score_0 + b * score_b0 * n0, index_0 + b * index_b0 * n0, n0
                elif i == 1:
                    scores, index, n = score_1 + b * score_b1 * n1, index_1 + b * index_b1 * n1, n1
                elif i == 2:
                    scores, index, n = score_2 + b * score_b2 * n2, index_2 + b * index_b2 * n2, n2
                else:
                    scores, index, n = score_3 + b * score_b3 * n3, index_3 + b * index_b3 * n3, n3
                slot, score, source = _chosen(slot, score, source, mine, end - low, scores, index, n, first, S, EP, NP)
            again = (slot[:, None] == slot[None, :]) & (e[:, None] > e[None, :]) & (slot >= 0)[:, None]
            repeat = tl.sum(again.to(tl.int32), 1) > 0
            tl.store(exact_slot + b * exact_n + e, tl.where(repeat, -slot - 2, slot), mask=e < E)
            tl.store(exact_score + b * exact_n + e, score, mask=e < E)
            for h in range(0, H):
                _copied(k + h * far_k, exact_k + h * far_exact, source, e, source >= 0, k_s, cos, sin, cos_s, D, DP, ROTARY)
                _copied(v + h * far_v, exact_v + h * far_exact, source, e, source >= 0, v_s, cos, sin, cos_s, D, DP, 0)
