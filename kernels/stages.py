"""The exact steps of a codec, one small function each: what stands between a projection and the quantizer.

Formula    see each function; all are linear maps with an inverse, permutations or shifts
Source     ours (`klt`), RotateKV (arXiv 2501.16383) for grouped heads and reordering
Shapes     x [B, H, S, D]; positions int [B or 1, S]; mean [H, D]; basis [H, D, D]; tables [H, n, D]
Exact      yes
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .hadamard import hadamard_ref
from .rope import rope, unrope

__all__ = [
    "add",
    "back_table",
    "center",
    "center_roped",
    "hadamard_heads",
    "negated",
    "project",
    "reorder_heads",
    "rope_offset",
    "rope_rows",
    "rope_start",
    "row_of",
    "table_rows",
    "unproject",
    "unrope_rows",
]


def center(x: Tensor, mean: Tensor) -> Tensor:
    """x - mean, per head and channel."""
    return x - mean[:, None, :]


def add(x: Tensor, rows: Tensor) -> Tensor:
    """x + rows."""
    return x + rows


def row_of(mean: Tensor) -> Tensor:
    """[H, D] → [H, 1, D]: the same row for all tokens."""
    return mean[:, None]


def negated(angles: Tensor) -> Tensor:
    """Sines of the opposite angles."""
    return -angles


def center_roped(x: Tensor, mean: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R_j k - R_j mu for keys that already carry RoPE: cos, sin [B or 1, S, R]."""
    return x - rope(mean[:, None, :], cos[:, None].float(), sin[:, None].float())


def rope_rows(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R_j x with the angles [B or 1, S, R] of the rows themselves, in the dtype of x."""
    return rope(x, cos[:, None].to(x.dtype), sin[:, None].to(x.dtype))


def unrope_rows(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R_j^-1 x with the angles [B or 1, S, R] of the rows themselves."""
    return unrope(x, cos[:, None].to(x.dtype), sin[:, None].to(x.dtype))


def rope_offset(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, block: int) -> Tensor:
    """R_d x with d = position mod block; cos, sin [block, R] are the angles of d without attention scaling."""
    d = positions % block  # floor modulus: also right for the negative positions of padding
    return rope(x, cos[d][:, None], sin[d][:, None])


def rope_start(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, block: int) -> Tensor:
    """R_{j0} x with j0 = position - position mod block; cos, sin [P / block, R] hold the angles of block starts."""
    m = (positions.clamp_min(0) // block).clamp_max(cos.shape[0] - 1)
    return rope(x, cos[m][:, None], sin[m][:, None])


def table_rows(table: Tensor, positions: Tensor) -> Tensor:
    """Rows of a [H, n, D] table at position mod n → [B, H, S, D]."""
    d = positions % table.shape[1]
    return table[:, d].movedim(0, 1)


def project(x: Tensor, basis: Tensor) -> Tensor:
    """x U, one basis [D, D] per head."""
    return x @ basis.to(x.dtype)


def unproject(x: Tensor, basis: Tensor) -> Tensor:
    """x U^T: the inverse of `project` where U is orthogonal; else U is the transposed inverse of what `project` was given."""
    return x @ basis.mT.to(x.dtype)


def back_table(tables: Mapping[str, Tensor], prefix: str, name: str) -> Any:
    """The table that rows are taken back with: `prefix`_basis or _sigma, or one of its own beside it; None without."""
    return tables.get(f"{prefix}_un{name}", tables.get(f"{prefix}_{name}"))


def hadamard_heads(x: Tensor, order: int, heads_per_group: int = 1, inverse: bool = False) -> Tensor:
    """Hadamard rotation in runs of `order` channels, across `heads_per_group` neighbouring heads when that is above 1."""
    if heads_per_group == 1:
        return hadamard_ref(x, order, inverse)
    b, h, s, d = x.shape
    flat = x.transpose(1, 2).reshape(b, s, h * d)
    return hadamard_ref(flat, order, inverse).reshape(b, s, h, d).transpose(1, 2)


def reorder_heads(x: Tensor, permutation: Tensor) -> Tensor:
    """Permute the H·D channels of all heads together: y[..., i] = x[..., permutation[i]]."""
    b, h, s, d = x.shape
    flat = x.transpose(1, 2).reshape(b, s, h * d)
    return flat[..., permutation].reshape(b, s, h, d).transpose(1, 2)
