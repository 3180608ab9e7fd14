"""Physical layout of packed keys and values for the CUDA decode kernel, and the plain definition the kernel must equal.

Formula    K^[j] = H (s_j c_j + z_j 1) + R_{j0} M[delta]            mode "centred" (mode "plain": without M)
           K^[j] = R_{j0} (U (g_j sigma step (c_j - (2^w - 1)/2)) + M[delta])    mode "klt", j = j0 + delta, j0 = 64 * (j // 64)
           V^[j] = H (s_j c_j + z_j 1) + mu_v                        H on values optional
Shapes     codes [B, Hkv, L, 128] integers, L a multiple of 128; packed uint8 [B, Hkv, L, bits * 16] (NOTES.md)
"""
from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch

D = 128
PLAIN, CENTRED, KLT = 0, 1, 2
PART = 132
SUPER = 128
STEP = {1: 1.5958, 2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}   # best uniform step for a unit Gaussian, by width


@dataclass(frozen=True)
class Fields:
    """Where the code of each run of 8 sits inside 16-bit bins; the C++ `make_fields` computes the same."""

    width: tuple[int, ...]
    bin: tuple[int, ...]
    offset: tuple[int, ...]
    pos: tuple[int, ...]
    bins: int


def make_fields(widths: tuple[int, ...]) -> Fields:
    fill, cut = [0] * 16, [-1] * 16
    bins, offset, pos = [], [], []
    for w in widths:
        b = next(i for i in range(16) if fill[i] + w <= 16)
        if fill[b] + w > 11 and cut[b] < 0:
            cut[b] = fill[b]
        bins.append(b)
        offset.append(fill[b])
        pos.append(fill[b] - max(cut[b], 0))
        fill[b] += w
    return Fields(tuple(widths), tuple(bins), tuple(offset), tuple(pos), max(bins) + 1)


def _words(codes: torch.Tensor, fields: Fields) -> torch.Tensor:
    """codes [..., 16 runs, 2 halves] → [..., bins] int32."""
    out = torch.zeros(*codes.shape[:-2], fields.bins, dtype=torch.int64, device=codes.device)
    for r in range(16):
        for h in range(2):
            out[..., fields.bin[r]] |= codes[..., r, h].to(torch.int64) << (16 * h + fields.offset[r])
    return (((out + 2**31) & 0xFFFFFFFF) - 2**31).to(torch.int32)


def _lanes(words: torch.Tensor) -> torch.Tensor:
    """[B, H, S, pair, half, g, t, n] → uint8 [B, H, 128 S, bytes]: 16-byte (or 8-byte) chunks, all lanes of a chunk together."""
    b, h, s, pair, half, g, t, n = words.shape
    c = 4 if n % 4 == 0 else 2
    w = words.reshape(b, h, s, pair * half, g * t, n // c, c).transpose(-3, -2)
    return w.reshape(b, h, s * SUPER, -1).contiguous().view(torch.uint8)


def pack_keys(codes: torch.Tensor, fields: Fields) -> torch.Tensor:
    b, h, n, _ = codes.shape
    c = codes.view(b, h, n // SUPER, 2, 4, 8, 2, 16, 4, 2)             # half, pair, g, row, run, t, hi
    return _lanes(_words(c.permute(0, 1, 2, 4, 3, 5, 8, 6, 7, 9), fields).flatten(-2))


def pack_values(codes: torch.Tensor, fields: Fields) -> torch.Tensor:
    b, h, n, _ = codes.shape
    c = codes.view(b, h, n // SUPER, 2, 4, 4, 2, 2, 16, 8)             # half, pair, t, hi, kh, run, g
    return _lanes(_words(c.permute(0, 1, 2, 4, 3, 9, 5, 7, 8, 6), fields).flatten(-2))


def key_address(token: int, fields: Fields) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Where one token's key goes: (byte offset in the row of one head, 4 bytes wide, [(component, bit offset in that word)])."""
    tile, r, n = _tile(token), token % 16, 2 * fields.bins
    out = []
    for t in range(4):
        for b in range(fields.bins):
            word, lane = (r % 2) * fields.bins + b, (r // 2) * 4 + t
            at = tile * 128 * n + (word // 4 * 512 + lane * 16 + word % 4 * 4 if n % 4 == 0 else word // 2 * 256 + lane * 8 + word % 2 * 4)
            bits = [(8 * k + 2 * t + hi, 16 * hi + fields.offset[k]) for k in range(16) if fields.bin[k] == b for hi in range(2)]
            out.append((at, 4, bits))
    return out


def value_address(token: int, fields: Fields) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """The same for a value; words are shared by two tokens, their halves are not: 2 bytes wide."""
    tile, r, n = _tile(token), token % 16, 2 * fields.bins
    t, hi, kh = r // 4, r // 2 % 2, r % 2
    out = []
    for g in range(8):
        for b in range(fields.bins):
            word, lane = kh * fields.bins + b, g * 4 + t
            at = tile * 128 * n + (word // 4 * 512 + lane * 16 + word % 4 * 4 if n % 4 == 0 else word // 2 * 256 + lane * 8 + word % 2 * 4)
            out.append((at + 2 * hi, 2, [(8 * k + g, fields.offset[k]) for k in range(16) if fields.bin[k] == b]))
    return out


def _tile(token: int) -> int:
    """Number of the 16-token tile in storage order: superblock, pair (16 offsets inside a block), block of the two."""
    return token // SUPER * 8 + token % 64 // 16 * 2 + token // 64 % 2


def unpack(packed: torch.Tensor, fields: Fields, address) -> torch.Tensor:  # noqa: ANN001 - key_address or value_address
    """[B, Hkv, L, bytes] → codes [B, Hkv, L, 128]; slow, for tests and for a reader that wants plain codes."""
    b, h, n, _ = packed.shape
    flat, out = packed.reshape(b, h, -1).long(), torch.zeros(b, h, n, D, dtype=torch.uint8, device=packed.device)
    for token in range(n):
        for at, size, bits in address(token, fields):
            word = sum(flat[..., at + i] << 8 * i for i in range(size))
            for component, offset in bits:
                width = fields.width[component // 8]
                out[..., token, component] = (word >> offset & (1 << width) - 1).to(torch.uint8)
    return out


def _pairs(x: torch.Tensor) -> torch.Tensor:
    """fp16 [..., 2] → int32 [...]."""
    return x.to(torch.float16).contiguous().view(torch.int32).squeeze(-1)


def mean_table(m: torch.Tensor) -> torch.Tensor:
    """[Hkv, 64, 128] → A fragments [Hkv, 4, 8, 32, 4]; rows g and g + 8 of a tile are its tokens 2 g and 2 g + 1."""
    x = m.view(-1, 4, 8, 2, 8, 2, 4, 2).permute(0, 1, 4, 2, 6, 5, 3, 7)  # pr, ks, g, t, kh, row, hi
    return _pairs(x).reshape(m.shape[0], 4, 8, 32, 4)


def basis_table(w: torch.Tensor) -> torch.Tensor:
    """[Hkv, 128 components, 128 channels] → A fragments [Hkv, 8, 8, 32, 4]."""
    x = w.view(-1, 8, 2, 8, 8, 2, 4, 2).permute(0, 1, 4, 3, 6, 5, 2, 7)  # m, ks, g, t, kh, row, hi
    return _pairs(x).reshape(w.shape[0], 8, 8, 32, 4)


def klt_weights(u: torch.Tensor, sigma: torch.Tensor, fields: Fields) -> torch.Tensor:
    """diag(sigma * step * 2^(8 - pos)) U^T in fp32; u [Hkv, 128 channels, 128 components], sigma [Hkv, 128]."""
    step = torch.tensor([STEP[w] * 2.0 ** (8 - p) for w, p in zip(fields.width, fields.pos)], device=u.device)
    return (sigma * step.repeat_interleave(8)).unsqueeze(-1) * u.transpose(1, 2)


def rotation_table(blocks: int, inv_freq: torch.Tensor) -> torch.Tensor:
    angle = torch.arange(blocks, device=inv_freq.device, dtype=torch.float64)[:, None] * 64 * inv_freq.double()
    both = torch.stack([angle.cos(), angle.sin()], 1).view(blocks, 2, 2, 4, 4, 2)  # cos|sin, run / 4, run % 4, t, hi
    return _pairs(both.permute(0, 1, 2, 4, 3, 5)).reshape(blocks, 4, 4, 4)


def hadamard_matrix(device: torch.device | str = "cpu") -> torch.Tensor:
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < D:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / math.sqrt(D)


def rope(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """x [..., n, 128] at positions [n] (half-split pairs)."""
    angle = positions.double()[:, None] * inv_freq.double()
    c, s = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :64], x[..., 64:]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


class Params(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in (
        "q", "k_codes", "k_scale", "v_codes", "v_scale", "mean", "rotation", "basis", "turn", "start", "length", "exact_k", "exact_v", "exact_slot", "new_k", "new_v",
        "value_mean", "out", "partial")] + [
        (n, ctypes.c_int) for n in ("B", "Hkv", "tiles", "E", "N", "leave_out", "q_bf16", "key_hadamard", "value_hadamard")] + [
        ("scale", ctypes.c_float), ("trace", ctypes.c_void_p)]


def bind(c: dict, grid_x: int) -> tuple[Params, list]:
    """Argument block for one case, and the tensors it points to (keep them alive)."""
    keep = []

    def ptr(x: torch.Tensor | None) -> int:
        if x is None:
            return 0
        assert x.is_contiguous()
        keep.append(x)
        return x.data_ptr()

    b, hkv, supers = c["k_codes"].shape[0], c["k_codes"].shape[1], c["k_codes"].shape[2] // SUPER
    partial = torch.full((hkv * grid_x * 4 * PART,), -1, dtype=torch.int32, device=c["q"].device)
    p = Params(*(ptr(c.get(n)) for n, _ in Params._fields_[:18]), ptr(partial), b, hkv, supers,
               0 if c.get("exact_slot") is None else c["exact_slot"].shape[1], 0 if c.get("new_k") is None else c["new_k"].shape[2],
               c.get("leave_out", 0), int(c["q"].dtype == torch.bfloat16), int(c["key_hadamard"]), int(c["value_hadamard"]),
               c["scale"] * math.log2(math.e))
    return p, keep


def make_case(mode: int, b: int, hkv: int, r: int, length: int, *, device="cpu", seed=0, dtype=torch.float16, exact=8, new=1,
              ragged=False, start=False, key_widths=(2,) * 16, value_widths=(2,) * 16, capacity=None) -> dict:
    """Random inputs; codes are random bits, so they are written straight into packed form by the caller's widths."""
    gen = torch.Generator(device=device).manual_seed(seed)

    def rand(*s):
        return torch.randn(*s, generator=gen, device=device)

    n = -(-(capacity or length) // SUPER) * SUPER
    kf, vf = make_fields(tuple(key_widths)), make_fields(tuple(value_widths))

    def codes(f):
        x = torch.randint(0, 256, (b, hkv, n, D), generator=gen, device=device, dtype=torch.uint8)
        limit = torch.tensor([2**w - 1 for w in f.width], device=device, dtype=torch.uint8).repeat_interleave(8)
        return x & limit

    kc, vc = codes(kf), codes(vf)
    q = (rand(b, hkv * r, D) * 1.5).to(dtype)
    inv_freq = 1.0 / (500000.0 ** (torch.arange(0, D, 2, device=device, dtype=torch.float32) / D))
    lengths = torch.full((b,), length, dtype=torch.int32, device=device)
    starts = torch.zeros(b, dtype=torch.int32, device=device)
    if ragged:
        lengths = torch.randint(1, length + 1, (b,), generator=gen, device=device, dtype=torch.int32)
        lengths[0] = length
    if start:
        starts = (torch.rand(b, generator=gen, device=device) * 0.6 * lengths).to(torch.int32)
    angle = starts.double()[:, None] * inv_freq.double()
    turn = torch.stack([angle.cos(), angle.sin()], -1).float().contiguous()
    m = rand(hkv, 64, D) * 0.7
    c = dict(mode=mode, q=q, kc=kc, vc=vc, kf=kf, vf=vf, inv_freq=inv_freq, turn=turn,
             start=starts, length=lengths, scale=1 / math.sqrt(D), key_hadamard=mode != KLT, value_hadamard=True,
             value_mean=rand(hkv, D) * 0.3, leave_out=1 if new else 0)
    ks = torch.stack([rand(b, hkv, n).abs() * 0.3 + 0.2, rand(b, hkv, n) * 0.1 - 0.7], -1)
    c["k_scale"] = ks.half().contiguous()
    c["v_scale"] = torch.stack([rand(b, hkv, n).abs() * 0.3 + 0.3, rand(b, hkv, n) * 0.2 - 0.6], -1).half().contiguous()
    if mode != PLAIN:
        c["m"] = m
        c["mean"] = mean_table(m)
        c["rotation"] = rotation_table(n // 64, inv_freq)
    if mode == KLT:
        c["u"] = torch.linalg.qr(rand(hkv, D, D))[0]
        c["sigma"] = (torch.logspace(0.4, -0.8, D, device=device)).expand(hkv, D).contiguous()
        c["w"] = klt_weights(c["u"], c["sigma"], kf)
        c["basis"] = basis_table(c["w"])
        c["k_scale"] = (rand(b, hkv, n).abs() * 0.2 + 0.8).half()
    if exact:
        c["exact_k"] = rand(b, hkv, exact, D).to(dtype)
        c["exact_v"] = rand(b, hkv, exact, D).to(dtype)
        slots = torch.randint(0, max(length, 1), (b, exact), generator=gen, device=device, dtype=torch.int32)
        slots[:, -1] = -1
        c["exact_slot"] = slots
        c["exact_k"][:, :, -1] = float("nan")
        c["exact_v"][:, :, -1] = float("nan")
    if new:
        c["new_k"], c["new_v"] = rand(b, hkv, new, D).to(dtype), rand(b, hkv, new, D).to(dtype)
    c["r"] = r
    for i in range(b):                                   # what lies outside a row must not matter
        for name in ("k_scale", "v_scale"):
            c[name][i, :, : int(starts[i])] = float("nan")
            c[name][i, :, int(lengths[i]) - c["leave_out"]:] = float("nan")
    c["k_codes"], c["v_codes"] = pack_keys(kc, kf), pack_values(vc, vf)
    return c


def reference(c: dict) -> torch.Tensor:
    """fp32, one row at a time."""
    b, hkv, n, _ = c["kc"].shape
    device, out = c["q"].device, []
    had = hadamard_matrix(device)
    for i in range(b):
        s, e = int(c["start"][i]), int(c["length"][i]) - c["leave_out"]
        keep = torch.ones(n, dtype=torch.bool, device=device)
        keep[:s] = False
        keep[max(e, 0):] = False
        if c.get("exact_slot") is not None:
            for slot in c["exact_slot"][i].tolist():
                if slot >= 0:
                    keep[slot] = False
        at = keep.nonzero()[:, 0]
        kc, vc, vs = c["kc"][i][:, at].float(), c["vc"][i][:, at].float(), c["v_scale"][i][:, at].float()
        if c["mode"] == KLT:
            step = torch.tensor([STEP[w] for w in c["kf"].width], device=device).repeat_interleave(8)
            centre = torch.tensor([(2**w - 1) / 2 for w in c["kf"].width], device=device).repeat_interleave(8)
            z = (kc - centre) * step * c["sigma"][:, None] * c["k_scale"][i][:, at].float()[..., None]
            k = rope(z @ c["u"].transpose(1, 2) + c["m"][:, at % 64], at - at % 64 - s, c["inv_freq"])
        else:
            ks = c["k_scale"][i][:, at].float()
            k = ks[..., :1] * kc + ks[..., 1:]
            k = k @ had if c["key_hadamard"] else k
            if c["mode"] == CENTRED:
                k = k + rope(c["m"][:, at % 64], at - at % 64 - s, c["inv_freq"])
        v = vs[..., :1] * vc + vs[..., 1:]
        v = v @ had if c["value_hadamard"] else v
        v = v + c["value_mean"][:, None]
        if c.get("exact_slot") is not None:
            there = c["exact_slot"][i] >= 0
            k, v = torch.cat([k, c["exact_k"][i][:, there].float()], 1), torch.cat([v, c["exact_v"][i][:, there].float()], 1)
        if c.get("new_k") is not None:
            k, v = torch.cat([k, c["new_k"][i].float()], 1), torch.cat([v, c["new_v"][i].float()], 1)
        q = c["q"][i].float().view(hkv, c["r"], D)
        p = torch.softmax(torch.einsum("hrd,hnd->hrn", q, k) * c["scale"], -1)
        out.append(torch.einsum("hrn,hnd->hrd", p, v).reshape(hkv * c["r"], D))
    return torch.stack(out)


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out.float() - ref).norm() / ref.norm())


def main() -> None:
    for widths in [(2,) * 16, (4,) * 16, (4, 4, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1), (1,) * 16]:
        f = make_fields(widths)
        limit = torch.tensor([2**w for w in widths]).repeat_interleave(8)
        codes = (torch.rand(2, 2, 256, D) * limit).to(torch.uint8)
        assert torch.equal(unpack(pack_keys(codes, f), f, key_address), codes)
        assert torch.equal(unpack(pack_values(codes, f), f, value_address), codes)
    print("layout: keys and values come back from the stated addresses")


if __name__ == "__main__":
    main()
