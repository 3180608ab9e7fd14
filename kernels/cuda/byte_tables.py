"""Constant tables of the kernel over rows of bytes, each from the plain table of the codec, in the order that codes.cuh reads.

Formula    16-bit numbers in the order of the codes: of a byte that holds `couple` channels, word i of lane t has two (`channels`)
Source     ours
Shapes     as each function says
Cost       made once for each table of a codec, see `kvsink.kernels.lasting`
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..lasting import kept
from ..layout import TileTables
from ..levels import levels_of, levels_of_bytes
from ..triton.attend import derived, per_head, same

__all__ = ["angle_table", "dense_basis", "identity", "level_table", "mean_table", "offset_table", "query_basis"]

DIM, BLOCK = 128, 64


def _channels(couple: int) -> list[int]:
    """Channel of half e of word i of lane t, in the order [i, t, e]: `channel` of codes.cuh."""
    out = []
    for i in range(16):
        for t in range(4):
            for e in range(2):
                wide = {4: 16 * (i // 2) + 4 * t + 2 * (i % 2), 8: 32 * (i // 4) + 8 * t + 2 * (i % 4)}
                out.append(wide.get(couple, 8 * i + 2 * t) + e)
    return out


@kept
def _index(couple: int, device: str) -> Tensor:
    return torch.tensor(_channels(couple), device=device)


def _words(table: Tensor, couple: int) -> Tensor:
    """Rows [..., 128] as fp16 [..., 4 n, 4 t, 4 j, 2 e]: words i = 4 n + j of lane t stand together."""
    x = table[..., _index(couple, str(table.device))].to(torch.float16)
    return x.unflatten(-1, (4, 4, 4, 2)).transpose(-3, -2)  # n, j, t, e -> n, t, j, e


def _swizzled(rows: Tensor) -> Tensor:
    """[.., 64 offsets, 4, 4, 4, 2] with the four parts of rows 4 to 7 of every eight exchanged in pairs, flat per row."""
    swapped = rows.unflatten(-4, (2, 2)).flip(-4).flatten(-5, -4)
    odd = (torch.arange(rows.shape[-5], device=rows.device) // 4 % 2 == 1)[:, None, None, None, None]
    return torch.where(odd, swapped, rows).flatten(-4).contiguous()


def _run_levels(kind: str) -> Tensor:
    """Pairs of levels of 4, 3, 2 and 1 bits: fp16 [1024], 2048 bytes."""
    pairs = []
    for w in (4, 3, 2, 1):
        code = torch.arange(4**w)
        pairs.append(levels_of(kind, w)[torch.stack([code & (2**w - 1), code >> w], -1)].flatten())
    flat = torch.cat(pairs)
    return torch.cat([flat, flat.new_zeros(1024 - flat.numel())]).half()


@kept
def _scalar_levels(kind: str, width: int, runs: bool, device: str) -> Tensor:
    return (_run_levels(kind) if runs else levels_of_bytes(kind, width).half()).to(device)


def level_table(spec: Any, book: Tensor | None, runs: bool, device: torch.device) -> tuple[Tensor, int]:
    """The tables of a side and the bytes from one head's to the next's."""
    if book is not None:
        return derived(book, torch.float16, same), 2 * per_head(book)
    return _scalar_levels(spec.kind, spec.widths[0], runs, str(device)), 0


def angle_table(cos: Tensor, sin: Tensor, every: int, couple: int) -> Tensor:
    """Cosines and sines of every `every`-th row of tables [P, 128]: fp16 [ceil(P / every), 128]."""

    def both(cosines: Tensor) -> Tensor:
        rows = [_words(x[::every], couple)[..., :2, :, :, :] for x in (cosines, sin)]
        return torch.cat(rows, -4).flatten(-4)

    both.__name__ = f"angles-{every}-{couple}"
    return derived(cos, torch.float16, both)


def _unit_angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [64, 128] of the first positions, without attention scaling."""
    unit = cos[:1]
    index = torch.arange(BLOCK, device=cos.device).clamp_max(cos.shape[0] - 1)
    return cos[index] / unit, sin[index] / unit


def offset_table(cos: Tensor, sin: Tensor, couple: int) -> Tensor:
    """Angles of the 64 offsets: cosines, then sines, of half the channels; fp16 [64, 128], swizzled."""

    def table(cosines: Tensor) -> Tensor:
        rows = [_words(x, couple)[..., :2, :, :, :] for x in _unit_angles(cosines, sin)]
        return _swizzled(torch.cat(rows, -4))

    table.__name__ = f"offsets-{couple}"
    return derived(cos, torch.float16, table)


def mean_table(mean: Tensor, angles: tuple[Tensor, Tensor] | None, couple: int) -> Tensor:
    """Means of 64 offsets [H, 64, 128], or one mean [H, 1, 128] to be rotated by them; fp16, swizzled."""

    def table(rows: Tensor) -> Tensor:
        if angles is not None:
            cos, sin = _unit_angles(*angles)
            half = torch.cat([-rows[..., 64:], rows[..., :64]], -1)
            rows = rows * cos + half * sin
        return _swizzled(_words(rows, couple))

    table.__name__ = f"mean-{couple}"
    return derived(mean, torch.float16, table)


def dense_basis(basis: Tensor, sigma: Tensor | None, couple: int) -> Tensor:
    """diag(sigma) U^T [H or 1, 128 components, 128 channels] as `wide_product` takes it; components in the order of the codes."""

    def blocks(u: Tensor) -> Tensor:
        rows = u.expand(max(u.shape[0], 1 if sigma is None else sigma.shape[0]), -1, -1)
        rows = rows if sigma is None else rows * sigma[:, None, :]  # [H, channel n, component k]
        ordered = rows[:, :, _operand_order(couple, str(u.device))].unflatten(2, (16, 8)).unflatten(1, (16, 8))
        return ordered.transpose(2, 3)  # n / 8, k / 8, n % 8, k % 8

    blocks.__name__ = f"dense-{couple}"
    return derived(basis if basis.dim() == 3 else basis[None], torch.float16, blocks)


@kept
def _operand_order(couple: int, device: str) -> Tensor:
    """Component at each place of the product's inner dimension: word i = 2 s + e of lane t stands at 16 s + 8 e + 2 t."""
    order, channels = [0] * DIM, _channels(couple)
    for i in range(16):
        for t in range(4):
            for e in range(2):
                order[16 * (i // 2) + 8 * (i % 2) + 2 * t + e] = channels[8 * i + 2 * t + e]
    return torch.tensor(order, device=device)


def query_basis(basis: Tensor, sigma: Tensor | None, couple: int) -> Tensor:
    """Rows of (U diag(sigma))^T in the order of the codes, as A fragments [H, 8, 8, 32, 4]."""

    def fragments(u: Tensor) -> Tensor:
        rows = u.mT.expand(max(u.shape[0], 1 if sigma is None else sigma.shape[0]), -1, -1)
        rows = rows if sigma is None else rows * sigma[:, :, None]
        return TileTables.basis(rows[:, _index(couple, str(u.device))].contiguous())

    fragments.__name__ = f"query-{couple}"
    return derived(basis if basis.dim() == 3 else basis[None], torch.int32, fragments)


@kept
def identity(device: str) -> Tensor:
    return torch.eye(DIM, device=device)[None]
