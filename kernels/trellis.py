"""Rows of channels become trellis-coded levels: near the quality of codebooks, read with shifts and without a table of codes.

Formula    b bits a channel choose among 2^(b+1) levels: the lowest bit u drives a shift register along the walk, the upper b - 1
           bits m choose inside the subset that the register selects:
               z1 = u_t ^ u_(t-2),  z0 = u_(t-1),  index = 4 m + 2 z1 + z0,  x^_c = (level_b[index] · sigma_c) · g
           eight circular walks: circle i visits channels 8 r + i for r = 0 .. D/8 - 1 and begins where it ends, so that
           u_(-1), u_(-2) are the bits of its last two steps; in walks of one or two steps u_(t-2) counts as 0
           levels of b bits, with j = index - (2^(b+1) - 1) / 2: of 1 and 2 bits a number of `LEVELS` with the sign of j, of 3 to 6
           a j + c j^3
           writer: the walk of least sum of sigma_c^2 (x_c / sigma_c / g - level)^2, by Viterbi search from every first state; at
           ties the lower of two levels, of two states before, of two first states. There are two searches, with g at 0.9 and
           at 1.1 times the rms of x / sigma, and four where a run has more than 4 bits, at 0.8, 0.95, 1.1 and 1.3; behind each
           g is fitted to the levels found by least squares, and the search with the smallest error counts, the first one at ties
           g is one byte at the end of a row: 4 bits of exponent and 4 of fraction, g = 2^(e - 9) (1 + f / 16), the nearest
           one by half to even: the upper bits of a float16, so that a kernel shifts and adds; 0 is a row of zeros, 255 one
           with an x / sigma that is not finite, which reads as not a number
Source     Marcellin and Fischer 1990; the code (5, 2) with 4 states: Ungerboeck 1987; circles across the channels: ours
Differs    walks are circular and short, the gain is of a row
Shapes     x [..., H, S, D], sigma float32 [H, D], widths 1 to 6 per run of 8 channels [D / 8] →
           codes uint8 [..., H, S, sum(widths) + 1], and back to x^ float32 [..., H, S, D]
Units      sigma in units of x; g has none; widths in bits
Exact      no; the walk is the best one for its gain
Raises     ValueError for widths outside 1 to 6 or that do not cover D
Cost       64·D adds and compares a row for each search; a few operations a channel to decode
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .lasting import kept
from .packing import pack_bits, unpack_bits
from .quantize import rms, segments

__all__ = [
    "CUBIC",
    "DISTORTION",
    "LEVELS",
    "TRELLIS_WIDTHS",
    "gain_bytes",
    "gain_of",
    "odd_polynomial",
    "starts",
    "subsets",
    "trellis_decode",
    "trellis_encode",
    "trellis_levels",
    "walk_unit",
]

TRELLIS_WIDTHS = (1, 2, 3, 4, 5, 6)
DISTORTION = {0: 1.0, 1: 0.3172, 2: 0.0875, 3: 0.0238, 4: 0.0063, 5: 0.00156, 6: 0.0004}
"""Mean squared error by bits on a unit Gaussian, in circles of 16 steps with a gain."""

LEVELS = {1: (0.3, (1.0, 4.0)), 2: (0.135, (1.25, 4.0, 8.0, 14.0))}
"""By bits, a unit and the positive levels in it, each a number of three binary digits: a kernel takes the upper byte of its float16
out of a register, and four times a level is a whole number below 128. On Gaussian rows no worse than a cubic (0.0905 against 0.0907
in 64 channels, 0.0876 against 0.0875 in 128)."""

CUBIC = {3: (0.1674, 0.002607), 4: (0.0840, 0.0003961), 5: (0.0430, 5.63e-5), 6: (0.0220, 7.99e-6)}
"""By bits, a and c of least error on Gaussian rows of 64 and 128 channels with a gain. Free levels take 0.1 dB off at 3 bits and
0.2 at 4 and need a table; equal spacing costs 0.9 and 1.4 dB and saves a fused multiply-add."""

STARTS = (0.9, 1.1)
"""Gains that are searched with, in units of the rms of x / sigma: better than two searches in turn from 1, and side by side."""

WIDE_STARTS = (0.8, 0.95, 1.1, 1.3)
"""The same where a run has more than 4 bits."""

H1, H0, MEMORY = 0o5, 0o2, 2  # taps on u_t, u_(t-1), ..., the lowest bit first; bits of the state
_NO_SELF = 0o1  # H1 of walks so short that u_(t-2) would be u_t itself
_ROWS = 1 << 12  # searched at a time
_TINY, _BIAS = 6.0e-8, (127 - 9) << 4
_NOT_A_NUMBER = 255


@kept
def trellis_levels(width: int, device: str) -> Tensor:
    """Levels float32 [2^(width + 1)], ascending."""
    if width in LEVELS:
        unit, numbers = LEVELS[width]
        upper = unit * torch.tensor(numbers, dtype=torch.float64)
    else:
        a, c = CUBIC[width]
        j = torch.arange(2**width, dtype=torch.float64) + 0.5
        upper = a * j + c * j**3
    return torch.cat([-upper.flip(0), upper]).float().to(device)


def walk_unit(width: int) -> float:
    """The unit in which a kernel reads levels: that of `LEVELS`, else a, as a j + c j^3 = a (j + c/a j^3)."""
    return (LEVELS.get(width) or CUBIC[width])[0]


@cache
def odd_polynomial(width: int) -> tuple[float, float, float, float]:
    """The factors of j, j^3, j^5 and j^7 in a sum that is every level of a width, for backends that look nothing up."""
    if width in CUBIC:
        return *CUBIC[width], 0.0, 0.0
    unit, numbers = LEVELS[width]
    j = torch.arange(len(numbers), dtype=torch.float64)[:, None] + 0.5
    powers = j ** (2 * torch.arange(len(numbers)) + 1)
    found = torch.linalg.solve(powers, unit * torch.tensor(numbers, dtype=torch.float64)).tolist()
    return tuple([*found, 0.0, 0.0][:4])


@kept
def subsets(width: int, device: str) -> tuple[Tensor, Tensor]:
    """Levels [4, 2^(width - 1)] of every subset, and the thresholds between them [4, 2^(width - 1) - 1]."""
    levels = trellis_levels(width, device).unflatten(0, (-1, 4)).mT.contiguous()
    return levels, ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()


def starts(widths: Sequence[int]) -> tuple[float, ...]:
    """The gains that rows of these widths are searched with, in units of the rms of x / sigma."""
    return WIDE_STARTS if max(widths) > 4 else STARTS


def _taps(steps: int) -> tuple[int, int]:
    return (H1 if steps > MEMORY else _NO_SELF), H0


@kept
def _branches(steps: int, device: str) -> Tensor:
    """int64 [2, states]: the subset of the step into a state whose oldest bit before was 0 or 1."""
    states = 1 << MEMORY
    register = torch.arange(states) + states * torch.arange(2)[:, None]  # bit k: u_(t-k); the lowest is the new one

    def tapped(taps: int) -> Tensor:
        bits = (register[..., None] >> torch.arange(MEMORY + 1)) & 1
        return (bits * ((taps >> torch.arange(MEMORY + 1)) & 1)).sum(-1) & 1

    one, zero = map(tapped, _taps(steps))
    return (2 * one + zero).to(device)


# -- gains ----------------------------------------------------------------------------------------------------------------


def gain_bytes(g: Tensor) -> Tensor:
    """The byte uint8 of the nearest gain; the largest one for gains beyond it."""
    bits = g.float().clamp_min(0.0).view(torch.int32)
    code = ((bits + 0x3FFFF + ((bits >> 19) & 1)) >> 19) - _BIAS
    half = gain_of(torch.ones((), dtype=torch.uint8, device=g.device)) / 2
    code = torch.where(g.float() > half, code.clamp(1, _NOT_A_NUMBER - 1), torch.zeros_like(code))
    return code.to(torch.uint8)


def gain_of(code: Tensor) -> Tensor:
    """The gain float32 of a byte."""
    wide = code.to(torch.int32)
    g = ((wide + _BIAS) << 19).view(torch.float32)
    g = torch.where(wide == 0, torch.zeros_like(g), g)
    return torch.where(wide == _NOT_A_NUMBER, torch.full_like(g, float("nan")), g)


# -- writing --------------------------------------------------------------------------------------------------------------


def _check(widths: Sequence[int], dim: int) -> None:
    if not set(widths) <= set(TRELLIS_WIDTHS):
        raise ValueError(f"trellis codes have 1 to 6 bits, not {', '.join(map(str, sorted(set(widths))))}")
    if dim != 8 * len(widths):
        raise ValueError(f"{len(widths)} widths of 8 channels do not cover {dim} channels")


def _choices(y: Tensor, weight: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of every subset its nearest level: index m uint8 and weighted error, both [4, N, T, 8]; y, weight [N, D]."""
    nearest, cost = [], []
    for a, b, _, width in segments(widths):
        levels, edges = subsets(width, str(y.device))
        part = y[:, a:b]
        for level, edge in zip(levels.to(y.dtype), edges.to(y.dtype), strict=True):
            m = torch.bucketize(part.contiguous(), edge)
            nearest.append(m.to(torch.uint8))
            cost.append((part - level[m]).square() * weight[:, a:b])
    index, error = (torch.stack([torch.cat(x[j::4], -1) for j in range(4)]) for x in (nearest, cost))
    return index.unflatten(-1, (-1, 8)), error.unflatten(-1, (-1, 8))


def _search(y: Tensor, weight: Tensor, widths: Sequence[int]) -> Tensor:
    """Codes uint8 [N, D] of the best circular walks for y, weight [N, D]."""
    index, error = _choices(y, weight, widths)
    states, (_, rows, steps, lanes) = 1 << MEMORY, index.shape
    before = torch.arange(states, device=y.device) >> 1  # the state before but for its oldest bit
    old = states >> 1
    branch = _branches(min(steps, MEMORY + 1), str(y.device))
    metric = torch.full((states, states, rows, lanes), float("inf"), dtype=y.dtype, device=y.device)  # [first, now, N, 8]
    metric.diagonal().fill_(0.0)
    taken = []
    for t in range(steps):
        step = error[:, :, t]  # [4, N, 8]
        zero, one = metric[:, before] + step[branch[0]], metric[:, before + old] + step[branch[1]]
        taken.append(one < zero)
        metric = torch.where(taken[-1], one, zero)
    state = metric.diagonal().argmin(-1)  # [N, 8], the lowest first state at ties
    first, codes = state, []
    row, lane = torch.arange(rows, device=y.device)[:, None], torch.arange(lanes, device=y.device)
    for t in range(steps - 1, -1, -1):
        bit = taken[t][first, state, row, lane].long()
        m = index[branch[bit, state], row, t, lane]
        codes.append(2 * m + (state & 1).to(torch.uint8))
        state = (state >> 1) + old * bit
    return torch.stack(codes[::-1], 1).flatten(1)


def _levels_of(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Codes uint8 [..., D] → levels float32 [..., D]."""
    walk = codes.unflatten(-1, (-1, 8)).int()
    u, z = walk & 1, [torch.zeros_like(walk), torch.zeros_like(walk)]
    for k in range(MEMORY + 1):
        back = u.roll(k, -2)
        z = [z[i] ^ back if taps >> k & 1 else z[i] for i, taps in enumerate(_taps(len(widths)))]
    index = (4 * (walk >> 1) + 2 * z[0] + z[1]).flatten(-2)
    return torch.cat([trellis_levels(w, str(codes.device))[index[..., a:b]] for a, b, _, w in segments(widths)], -1)


def trellis_encode(x: Tensor, sigma: Tensor, widths: Sequence[int]) -> Tensor:
    """Rows → codes with the byte of the gain behind them."""
    _check(widths, x.shape[-1])
    x = x if x.dtype == torch.float64 else x.float()
    deviation = sigma[:, None].to(x.dtype).clamp_min(_TINY)  # [H, 1, D]
    flat = x.flatten(0, -2)
    wide = deviation.expand(x.shape).flatten(0, -2)
    weight = (deviation / deviation.amax(-1, keepdim=True)).square().expand(x.shape).flatten(0, -2)
    parts = zip(flat.split(_ROWS), wide.split(_ROWS), weight.split(_ROWS), strict=True)
    codes = [_encode(rows, sigmas, weights, widths) for rows, sigmas, weights in parts]
    out = torch.cat(codes) if codes else torch.empty((0, sum(widths) + 1), dtype=torch.uint8, device=x.device)
    return out.unflatten(0, x.shape[:-1])


def _encode(x: Tensor, deviation: Tensor, weight: Tensor, widths: Sequence[int]) -> Tensor:
    y = x / deviation
    finite = y.isfinite().all(-1, keepdim=True)
    y = torch.where(finite, y, torch.zeros_like(y))
    least = gain_of(torch.ones((), dtype=torch.uint8, device=x.device))

    def found(start: float) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, gain and error but for what does not depend on them."""
        codes = _search(y / gain_of(gain_bytes(start * size)).clamp_min(least).to(x.dtype), weight, widths)
        level = _levels_of(codes, widths).to(x.dtype)
        dot, square = ((weight * level * z).sum(-1, keepdim=True, dtype=torch.float64) for z in (y, level))
        gain = gain_bytes((dot / square).to(x.dtype))
        g = gain_of(gain).double()
        return codes, gain, square * g * g - 2 * g * dot

    size = rms(y)
    codes, gain, error = found(starts(widths)[0])
    for start in starts(widths)[1:]:
        better = (other := found(start))[2] < error
        codes, gain, error = (torch.where(better, new, old) for new, old in zip(other, (codes, gain, error), strict=True))
    gain = torch.where(finite, gain, torch.full_like(gain, _NOT_A_NUMBER))
    return torch.cat([*(pack_bits(codes[:, a:b], w) for a, b, _, w in segments(widths)), gain], -1)


# -- reading --------------------------------------------------------------------------------------------------------------


def trellis_decode(codes: Tensor, sigma: Tensor, widths: Sequence[int]) -> Tensor:
    """Codes → rows float32."""
    _check(widths, sigma.shape[-1])
    parts = [unpack_bits(codes[..., byte : byte + (b - a) * w // 8], w, b - a) for a, b, byte, w in segments(widths)]
    return _levels_of(torch.cat(parts, -1), widths) * sigma[:, None].float() * gain_of(codes[..., -1:])
