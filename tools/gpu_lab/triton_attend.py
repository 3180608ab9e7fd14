"""The same attention over the same packed records in Triton: portable, checked against the same definition, slower.

Formula    as layout.py; codes are turned into numbers in place (an fp16 subnormal is code * 2^-24), one field of two runs per dot
Shapes     q [B, Hkv * R, 128], codes and scales as layout.py packs them → partial sums over splits, merged in torch
Declines   value widths other than 2 and 4; more than 16 query heads per KV head
"""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from layout import CENTRED, KLT, PLAIN, Fields, hadamard_matrix, make_case, make_fields, reference, relative_error

D, HEADS = 128, 16


def groups(fields: Fields) -> tuple[tuple[int, int, int, int, int], ...]:
    """Pairs of runs, one from an even and one from the next odd bin: (bin pair, offset, width, offset, width); width 0 when there is none."""
    out = []
    for pair in range(fields.bins // 2):
        a, b = ([(fields.offset[r], fields.width[r]) for r in range(16) if fields.bin[r] == 2 * pair + i] for i in range(2))
        n = max(len(a), len(b))
        a, b = a + [(0, 0)] * (n - len(a)), b + [(0, 0)] * (n - len(b))
        out += [(pair, *x, *y) for x, y in zip(a, b)]
    return tuple(out)


def group_components(fields: Fields) -> torch.Tensor:
    """[groups, 16] component behind column (bin of the pair, hi, t), or -1."""
    rows = []
    for pair in range(fields.bins // 2):
        runs = [[r for r in range(16) if fields.bin[r] == 2 * pair + i] for i in range(2)]
        for k in range(max(map(len, runs))):
            rows.append([8 * runs[i][k] + 2 * t + hi if k < len(runs[i]) else -1 for i in range(2) for hi in range(2) for t in range(4)])
    return torch.tensor(rows)


@triton.jit
def _codes(words, hi, odd, OFF_A: tl.constexpr, W_A: tl.constexpr, OFF_B: tl.constexpr, W_B: tl.constexpr):
    """Field of each word as fp16 with the value code * 2^-24."""
    shift = 16 * hi + tl.where(odd == 1, OFF_B, OFF_A)
    mask = tl.where(odd == 1, (1 << W_B) - 1, (1 << W_A) - 1)
    return ((words >> shift) & mask).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _attend_kernel(k_codes, k_scale, v_codes, v_scale, q_groups, q_raw, mean, cos, sin, basis, centre, excluded, start, length, partial, statistics,
                   HKV, LENGTH, SPLITS, LEAVE_OUT, E: tl.constexpr, MODE: tl.constexpr, KG: tl.constexpr, VG: tl.constexpr, NKG: tl.constexpr,
                   KP: tl.constexpr, VP: tl.constexpr, K_TILE: tl.constexpr, V_TILE: tl.constexpr):
    split, pair = tl.program_id(0), tl.program_id(1)
    b = pair // HKV
    head = pair % HKV
    begin, end = tl.load(start + b), tl.load(length + b) - LEAVE_OUT
    n = tl.arange(0, 64)                                                 # tokens of one block
    part, g, row = n // 16, (n % 16) // 2, n % 2                          # tile pair of the superblock, rows of its tile
    col = tl.arange(0, 16)
    odd, hi, t = col // 8, (col // 4) % 2, col % 4                        # keys: columns (bin of the pair, hi, t)
    heads = tl.arange(0, 16)
    # chunk of 4 words per lane: word = row * 2 KP + bin; a lane's words are split over chunks of 16 bytes
    k_word = row[:, None] * (2 * KP) + odd[None, :]
    k_lane = g[:, None] * 4 + t[None, :]
    # values: rows (bin of the pair, g), columns tokens 4 t + 2 hi + kh
    v_odd, v_g = col // 8, col % 8
    v_t, v_hi, v_kh = (n % 16) // 4, (n // 2) % 2, n % 2
    v_word = v_kh[:, None] * (2 * VP) + v_odd[None, :]
    v_lane = v_g[None, :] * 4 + v_t[:, None]
    half = tl.arange(0, 64)
    if MODE != 0:
        m_lo = tl.load(mean + head * 8192 + n[:, None] * 128 + half[None, :])
        m_hi = tl.load(mean + head * 8192 + n[:, None] * 128 + 64 + half[None, :])
        q_lo = tl.load(q_raw + pair * 2048 + half[:, None] * 16 + heads[None, :]).to(tl.float32)
        q_hi = tl.load(q_raw + pair * 2048 + (64 + half[:, None]) * 16 + heads[None, :]).to(tl.float32)
    top = tl.full([16], -1e30, tl.float32)
    total = tl.zeros([16], tl.float32)
    zero = tl.zeros([16], tl.float32)
    o0 = tl.zeros([16, 16], tl.float32)
    o1 = tl.zeros([16, 16], tl.float32)
    o2 = tl.zeros([16, 16], tl.float32)
    o3 = tl.zeros([16, 16], tl.float32)
    o4 = tl.zeros([16, 16], tl.float32)
    o5 = tl.zeros([16, 16], tl.float32)
    o6 = tl.zeros([16, 16], tl.float32)
    o7 = tl.zeros([16, 16], tl.float32)
    first, last = begin // 64, tl.maximum((end + 63) // 64, begin // 64)
    per = (last - first + SPLITS - 1) // SPLITS
    for block in range(first + split * per, tl.minimum(first + (split + 1) * per, last)):
        token0 = pair.to(tl.int64) * LENGTH + block * 64
        superblock = token0 // 128
        tile = part * 2 + block % 2                                       # [64]
        k_base = k_codes + superblock * (8 * K_TILE)
        v_base = v_codes + superblock * (8 * V_TILE)
        if MODE != 0:
            c = tl.load(cos + block * 64 + half)[:, None]
            s = tl.load(sin + block * 64 + half)[:, None]
            r_lo = (q_lo * c + q_hi * s).to(tl.float16)
            r_hi = (q_hi * c - q_lo * s).to(tl.float16)
            offset = tl.dot(m_lo, r_lo)
            offset = tl.dot(m_hi, r_hi, offset)                          # [64 tokens, 16 heads]
        else:
            offset = tl.zeros([64, 16], tl.float32)
        acc = tl.zeros([64, 16], tl.float32)
        shift = tl.zeros([16], tl.float32)
        for p in tl.static_range(KP):
            word = k_word + 2 * p
            words = tl.load(k_base + tile[:, None] * K_TILE + (word // 4) * 128 + k_lane * 4 + word % 4)
            for i in tl.static_range(NKG):
                if KG[5 * i] == p:
                    if MODE == 2:
                        wl = tl.load(basis + ((head * NKG + i) * 16 + col[:, None]) * 128 + half[None, :])
                        wh = tl.load(basis + ((head * NKG + i) * 16 + col[:, None]) * 128 + 64 + half[None, :])
                        qf = tl.dot(wh, r_hi, tl.dot(wl, r_lo))
                        qi = qf.to(tl.float16)
                        shift += tl.sum(qi.to(tl.float32) * tl.load(centre + i * 16 + col)[:, None], 0)
                    else:
                        qi = tl.load(q_groups + ((pair * NKG + i) * 16 + col[:, None]) * 16 + heads[None, :])
                    codes = _codes(words, hi[None, :], odd[None, :], KG[5 * i + 1], KG[5 * i + 2], KG[5 * i + 3], KG[5 * i + 4])
                    acc = tl.dot(codes, qi, acc)
        acc = acc * 16777216.0
        if MODE == 2:
            gain = tl.load(k_scale + token0 + n).to(tl.float32)
            x = gain[:, None] * (acc - shift[None, :]) + offset
        else:
            sc = tl.load(k_scale + (token0 + n) * 2).to(tl.float32)
            zp = tl.load(k_scale + (token0 + n) * 2 + 1).to(tl.float32)
            sums = tl.load(centre + pair * 16 + heads)
            x = sc[:, None] * acc + zp[:, None] * sums[None, :] + offset
        at_token = block * 64 + n
        seen = (at_token >= begin) & (at_token < end)
        for e in tl.static_range(E):
            seen = seen & (at_token != tl.load(excluded + b * E + e))
        x = tl.where(seen[:, None], x, -1e30)
        new = tl.maximum(top, tl.max(x, 0))
        f = tl.exp2(top - new)
        w = tl.where(seen[:, None], tl.exp2(x - new[None, :]), 0.0)
        top = new
        vs = tl.load(v_scale + (token0 + n) * 2).to(tl.float32)
        vz = tl.load(v_scale + (token0 + n) * 2 + 1).to(tl.float32)
        vs = tl.where(seen, vs, 0.0)
        vz = tl.where(seen, vz, 0.0)
        total = total * f + tl.sum(w, 0)
        zero = zero * f + tl.sum(w * vz[:, None], 0)
        pt = tl.trans((w * vs[:, None]).to(tl.float16))                   # [16 heads, 64 tokens]
        f = f[:, None]
        for p in tl.static_range(VP):
            word = v_word + 2 * p
            vw = tl.load(v_base + tile[:, None] * V_TILE + (word // 4) * 128 + v_lane * 4 + word % 4)    # [64 tokens, 16 (bin, g)]
            for i in tl.static_range(8 // VP):
                codes = _codes(vw, v_hi[:, None], v_odd[None, :], VG[5 * (p * (8 // VP) + i) + 1], VG[5 * (p * (8 // VP) + i) + 2],
                               VG[5 * (p * (8 // VP) + i) + 3], VG[5 * (p * (8 // VP) + i) + 4])
                if p * (8 // VP) + i == 0:
                    o0 = tl.dot(pt, codes, o0 * f)
                elif p * (8 // VP) + i == 1:
                    o1 = tl.dot(pt, codes, o1 * f)
                elif p * (8 // VP) + i == 2:
                    o2 = tl.dot(pt, codes, o2 * f)
                elif p * (8 // VP) + i == 3:
                    o3 = tl.dot(pt, codes, o3 * f)
                elif p * (8 // VP) + i == 4:
                    o4 = tl.dot(pt, codes, o4 * f)
                elif p * (8 // VP) + i == 5:
                    o5 = tl.dot(pt, codes, o5 * f)
                elif p * (8 // VP) + i == 6:
                    o6 = tl.dot(pt, codes, o6 * f)
                else:
                    o7 = tl.dot(pt, codes, o7 * f)
    out = partial + (pair * SPLITS + split) * 2048 + heads[:, None] * 128 + col[None, :]
    tl.store(out, o0 * 16777216.0 + zero[:, None])
    tl.store(out + 16, o1 * 16777216.0 + zero[:, None])
    tl.store(out + 32, o2 * 16777216.0 + zero[:, None])
    tl.store(out + 48, o3 * 16777216.0 + zero[:, None])
    tl.store(out + 64, o4 * 16777216.0 + zero[:, None])
    tl.store(out + 80, o5 * 16777216.0 + zero[:, None])
    tl.store(out + 96, o6 * 16777216.0 + zero[:, None])
    tl.store(out + 112, o7 * 16777216.0 + zero[:, None])
    tl.store(statistics + (pair * SPLITS + split) * 32 + heads, top)
    tl.store(statistics + (pair * SPLITS + split) * 32 + 16 + heads, total)


class TritonAttend:
    """Constant tables of one layer, then calls."""

    def __init__(self, c: dict, splits: int, num_warps: int = 1):
        self.c, self.splits, self.num_warps = c, splits, num_warps
        device = c["q"].device
        kf, vf = c["kf"], c["vf"]
        self.kg, self.vg = groups(kf), groups(vf)
        assert len(self.vg) == 8
        self.components = group_components(kf).to(device)
        f, bins, width = len(self.vg) // (vf.bins // 2), vf.bins, vf.width[0]
        runs = [[(2 * p + i) * (16 // bins) + k for i in range(2)] for p in range(bins // 2) for k in range(f)]
        assert width in (2, 4)
        self.channels = torch.tensor([[8 * r + g for r in pair for g in range(8)] for pair in runs], device=device).flatten()
        self.had = hadamard_matrix(device)
        blocks = c["k_codes"].shape[2] // 64
        angle = torch.arange(blocks, device=device, dtype=torch.float64)[:, None] * 64 * c["inv_freq"].double()
        self.cos, self.sin = angle.cos().float(), angle.sin().float()
        self.mean = c["m"].half().contiguous() if c["mode"] != PLAIN else c["q"]
        there = (self.components >= 0).float()
        if c["mode"] == KLT:
            step = c["w"] / torch.tensor([2.0 ** (8 - p) for p in kf.pos], device=device).repeat_interleave(8)[:, None]    # sigma step U^T
            w = step[:, self.components.clamp(min=0)] * there[None, :, :, None]
            self.basis = w.half().contiguous()                                                         # [Hkv, groups, 16, 128]
            mid = torch.tensor([(2**x - 1) / 2 for x in kf.width], device=device).repeat_interleave(8)
            self.centre = (mid[self.components.clamp(min=0)] * there).contiguous()
        self.there = there

    def __call__(self) -> torch.Tensor:
        c, splits = self.c, self.splits
        b, hkv, capacity = c["k_codes"].shape[:3]
        r, device = c["r"], c["q"].device
        q = c["q"].float().view(b, hkv, r, D) * (c["scale"] * math.log2(math.e))
        pad = torch.zeros(b, hkv, HEADS - r, D, device=device)
        raw = torch.cat([q, pad], 2)
        turned = raw
        if c["mode"] != PLAIN:
            cs, sn = c["turn"][:, None, None, :, 0], c["turn"][:, None, None, :, 1]
            turned = torch.cat([raw[..., :64] * cs - raw[..., 64:] * sn, raw[..., 64:] * cs + raw[..., :64] * sn], -1)
        q_raw = turned.transpose(2, 3).half().contiguous()
        if c["mode"] == KLT:
            q_groups, centre, basis = q_raw, self.centre, self.basis
        else:
            t = (raw @ self.had if c["key_hadamard"] else raw).half()
            q_groups = (t[..., self.components.clamp(min=0)] * self.there.half()).permute(0, 1, 3, 4, 2).contiguous()
            centre, basis = t.float().sum(-1).contiguous(), q_raw
        partial = torch.empty(b, hkv, splits, HEADS, D, device=device)
        stats = torch.empty(b, hkv, splits, 2, HEADS, device=device)
        e = 0 if c.get("exact_slot") is None else c["exact_slot"].shape[1]
        kb, vb = c["kf"].bins, c["vf"].bins
        _attend_kernel[(splits, b * hkv)](
            c["k_codes"].view(torch.int32), c["k_scale"], c["v_codes"].view(torch.int32), c["v_scale"], q_groups, q_raw, self.mean, self.cos, self.sin, basis, centre, c["exact_slot"] if e else c["length"], c["start"], c["length"], partial, stats,
            hkv, capacity, splits, c.get("leave_out", 0), E=e, MODE=c["mode"], KG=tuple(x for g in self.kg for x in g), VG=tuple(x for g in self.vg for x in g),
            NKG=len(self.kg), KP=kb // 2, VP=vb // 2, K_TILE=64 * kb, V_TILE=64 * vb, num_warps=self.num_warps)
        top, total = stats[:, :, :, 0, :r], stats[:, :, :, 1, :r]                        # [B, Hkv, splits, R]
        best = top.amax(2, keepdim=True)
        f = torch.exp2(top - best)
        o = torch.einsum("bhsr,bhsrd->bhrd", f, partial[:, :, :, :r])
        o = torch.empty_like(o).index_copy_(3, self.channels, o)
        l, best = (f * total).sum(2), best[:, :, 0]
        o = o @ self.had if c["value_hadamard"] else o
        o = o + c["value_mean"][None, :, None] * l[..., None]
        ks, vs, there = [], [], []
        if e:
            ks.append(c["exact_k"]), vs.append(c["exact_v"]), there.append(c["exact_slot"] >= 0)
        if c.get("new_k") is not None:
            ks.append(c["new_k"]), vs.append(c["new_v"]), there.append(torch.ones(b, c["new_k"].shape[2], dtype=torch.bool, device=device))
        if ks:
            k, v, seen = torch.cat(ks, 2), torch.cat(vs, 2), torch.cat(there, 1)[:, None, None, :]
            x = torch.einsum("bhrd,bhed->bhre", q, torch.where(seen[:, :, 0, :, None], k, 0).float()).masked_fill(~seen, float("-inf"))
            m = torch.maximum(best, x.amax(-1))
            w, g = torch.exp2(x - m[..., None]), torch.exp2(best - m)
            o = o * g[..., None] + torch.einsum("bhre,bhed->bhrd", w, torch.where(seen[:, :, 0, :, None], v, 0).float())
            l = l * g + w.sum(-1)
        return (o / l[..., None]).reshape(b, hkv * r, D).to(c["q"].dtype)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mixed = (4, 4, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1)
    for mode, kw, vw in [(PLAIN, (2,) * 16, (2,) * 16), (CENTRED, (2,) * 16, (2,) * 16), (KLT, mixed, (2,) * 16), (CENTRED, (4,) * 16, (4,) * 16)]:
        for b, t, ragged, start, splits in [(1, 130, False, False, 1), (2, 600, True, True, 3)]:
            c = make_case(mode, b, 2, 4, t, device=device, seed=t, ragged=ragged, start=start, key_widths=kw, value_widths=vw)
            out = TritonAttend(c, splits)()
            print(f"mode {mode} kw {kw[0]} vw {vw[0]} B{b} T{t} splits {splits}: {relative_error(out, reference(c)):.2e}", flush=True)


if __name__ == "__main__":
    main()
