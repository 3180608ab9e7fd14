"""Variance normalisation of a tile of tokens: a scale for every token and one for every channel, so that all have one deviation
before their ranges are taken; no calibration.

Formula    X a tile of G tokens and D channels of a head; logs of scales, a of lines that have a range, c across them, begin at 0;
           n times: c <- clamp(c + log std_c(X / e^c / e^a), -0.3, 10), then a in the same way, std within [1e-3, 1e3] and unbiased;
           the pair of the smallest imbalance, max / min of all std_c + max / min of all std_a, is kept, the start among them, the
           last of equals
           X / e^c is coded by ranges: e^a, one number for all of a range, leaves codes alone and sits in step and minimum
           axis "channel"  c of tokens, ranges of a channel over its G tokens;  axis "token"  c of channels, ranges of a token
           e^c, steps and minima are rounded to float16 first
Source     KVarN, arXiv 2606.03458 section 3 and algorithm 1 of appendix H, as its released code has it
Differs    sums in float64; rows that are not valid take part in nothing and have scale 1; a line of fewer than two keeps its scale;
           step and minimum come from X / e^c, equal in real arithmetic to those of the normalised tile times e^a
Shapes     x [B, H, N, D], valid bool [B, N], N divisible by G → codes uint8 [B, H, N, D·w/8], scale float16 [B, H, N / G, n]:
           axis "channel": D steps, D minima, G scales of tokens;  "token": steps and minima of G tokens, D scales of channels
Exact      no; |x^ - x| <= s·e^c / 2 for valid rows
Cost       about 8·n flops per entry of a tile
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dequantize import dequantize_ref
from .quantize import quantize_ref
from .tokens import dequantize_tokens, quantize_tokens

__all__ = ["varn_decode", "varn_encode", "varn_numbers", "varn_scales"]

_LEAST, _MOST = 1e-3, 1e3  # of a deviation
_LOW, _HIGH = -0.3, 10.0  # of the log of a scale


def _deviation(total: Tensor, square: Tensor, n: Tensor) -> Tensor:
    """Unbiased deviation of lines of n numbers with these sums of them and of their squares."""
    return ((square - total.square() / n.clamp_min(1)).clamp_min(0.0) / (n - 1).clamp_min(1)).sqrt()


def _spread(deviation: Tensor, n: Tensor, dim: int) -> Tensor:
    """max / min along `dim` of the lines that have one."""
    most = torch.where(n > 1, deviation, 0.0).amax(dim, keepdim=True)
    least = torch.where(n > 1, deviation, float("inf")).amin(dim, keepdim=True)
    return most / least.clamp_min(1e-8)


def _next(scale: Tensor, deviation: Tensor, n: Tensor) -> Tensor:
    return torch.where(n > 1, (scale + deviation.clamp(_LEAST, _MOST).log()).clamp(_LOW, _HIGH), scale)


def varn_scales(x: Tensor, seen: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Scales float64 of columns [..., 1, C] and of rows [..., R, 1] of tiles x [..., R, C]; seen: bool, as x, what counts.

    A line's own scale divides its deviation, and the others weigh what it sums: two products of a matrix and a vector.
    """
    seen = seen.expand(x.shape)
    x = torch.where(seen, x, 0.0).double()
    square, n_column, n_row = x.square(), seen.sum(-2, keepdim=True), seen.sum(-1, keepdim=True)

    def columns(row: Tensor) -> Tensor:
        w = (-row).exp().mT
        return _deviation(w @ x, w.square() @ square, n_column)

    def rows(column: Tensor) -> Tensor:
        w = (-column).exp().mT
        return _deviation(x @ w, square @ w.square(), n_row)

    column, row = torch.zeros_like(x[..., :1, :]), torch.zeros_like(x[..., :1])
    of_column, of_row = columns(row), rows(column)
    best, least = (column, row), _spread(of_column, n_column, -1) + _spread(of_row, n_row, -2)
    for _ in range(steps):
        column = _next(column, of_column, n_column)
        of_row = rows(column)
        row = _next(row, of_row / row.exp(), n_row)
        of_column = columns(row) / column.exp()
        imbalance = _spread(of_column, n_column, -1) + _spread(of_row / row.exp(), n_row, -2)
        better = imbalance <= least
        least = torch.where(better, imbalance, least)
        best = torch.where(better, column, best[0]), torch.where(better, row, best[1])
    return best[0].exp(), best[1].exp()


def varn_numbers(axis: str, dim: int, group: int, group_size: int) -> int:
    """float16 numbers beside the codes of one tile."""
    return 2 * dim + group if axis == "channel" else 2 * group * (dim // group_size) + dim


def varn_encode(x: Tensor, valid: Tensor, axis: str, width: int, group: int, group_size: int, steps: int) -> tuple[Tensor, Tensor]:
    """Codes and scales; group: tokens of a tile; group_size: channels of a token that share a range."""
    x = x.float()
    tiles = x.unflatten(2, (-1, group))  # [B, H, N / G, G, D]
    seen = valid.unflatten(1, (-1, group))[:, None, :, :, None]
    if axis == "channel":
        scale = varn_scales(tiles.mT, seen.mT, steps)[0].half()  # [B, H, N / G, 1, G]
        codes, ranges = quantize_tokens((tiles / scale.mT.float()).flatten(2, 3), valid, width, group)
        return codes, torch.cat([ranges, scale.squeeze(3)], -1)
    scale = varn_scales(tiles, seen, steps)[0].half()  # [B, H, N / G, 1, D]
    rows = (tiles / scale.float()).flatten(2, 3)
    codes, ranges = quantize_ref(rows, None, "uniform", (width,) * (x.shape[-1] // 8), group_size, 1.0, False)
    return codes, torch.cat([ranges.unflatten(2, (-1, group)).flatten(3), scale.squeeze(3)], -1)


def varn_decode(codes: Tensor, scale: Tensor, axis: str, width: int, group: int, group_size: int, skip: int = 0) -> Tensor:
    """Rows float32 of codes [B, H, N, bytes] whose first row is row `skip` of the first tile in `scale`."""
    dim, rows = codes.shape[-1] * 8 // width, codes.shape[2]
    if axis == "channel":
        ranges, token = scale.split([2 * dim, group], -1)
        return dequantize_tokens(codes, ranges, width, group, skip) * token.flatten(2)[:, :, skip : skip + rows, None].float()
    ranges, channel = scale.split([scale.shape[-1] - dim, dim], -1)
    own = ranges.unflatten(3, (group, -1)).flatten(2, 3)[:, :, skip : skip + rows]
    x = dequantize_ref(codes, own, None, "uniform", (width,) * (dim // 8), group_size, False)
    return x * channel.repeat_interleave(group, dim=2)[:, :, skip : skip + rows].float()
