"""Decode attention over packed rows on any GPU that Triton serves: one new query row per sequence, codes only looked up.

Formula    keys coded after RoPE or by blocks of tokens: logit = a_t (w · level_t) + b_t sum(w) + t · mean_d, with t the query
           rotated back to the start of the block and w = t U for rows that are read as z^ U^T (U `k_unbasis` where that is
           given, else the basis of the codec); keys coded before RoPE: the row is restored, and the query rotated to its
           token;  out = restore(sum p_t (a_t level_t + b_t)) + exact rows
Source     FlashAttention, arXiv 2205.14135 (online softmax); split over slots as in Flash-Decoding; the rest ours
Shapes     as `kvsink::attend` with S = 1
Exact      products in float16 for 16-bit models (relative error of the output below 2e-3), in float32 for float32 models
Declines   `declines` says in words what it does not serve
Cost       reads codes and scales once per key-value head; three launches, two for codes after RoPE without a mean
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..backends import GROWS, Call, Device, LayerFormat, Shape, SideFormat, unread
from ..hadamard import hadamard_ref
from ..lasting import kept, lasting
from ..levels import levels_of, levels_of_bytes
from ..quantize import segments
from ..stages import back_table
from ..trellis import odd_polynomial

__all__ = ["attend", "declines", "power", "transform"]

_KINDS = ("lloyd", "lloyd-even", "gauss", "uniform", "uniform-int", "vector", "static", "trellis")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DIMS = 16, 256
_MOST_EXACT = 64  # exact rows that every tile is compared with
_SMALLEST_BLOCK = 16  # tokens; below it a query per block costs more than restoring keys
_OFFSETS = 64  # positions whose angles stand in a table of their own, where the query is rotated to every key
_BY_QUERY, _BY_KEY = (32, 2, 16), (64, 4, 8)  # slots of a step, warps, programs per multiprocessor; best of 12 on an H100
_MOST_SPLITS = 128
_ROTATED = 64  # rows that one program of the first launch rotates


@dataclass(frozen=True)
class _Side:
    """How a kernel reads one side's codes.

    form 0: a byte is a row of a table; 1: runs of 8 channels, by pairs; 2: single codes; 3: codes that are levels; 4: walks
    through a trellis, whose levels are the factors of their polynomial.
    """

    form: int
    meta: Tensor  # int32; see the readers in `attend_kernels`
    levels: Tensor
    wide: bool
    multiple: int  # form 0: channels of a byte; 1, 4: the widest run in bits; 2: channels coupled; 3: bits of a code
    kind: int  # numbers of a row: 0 none, 1 a gain, 2 step and lowest, 3 step and zero
    row_bytes: int
    scales: int


def declines(f: LayerFormat, s: Shape, d: Device) -> str:
    """What keeps a call from the kernel, in words; empty when it serves it."""
    if not d.gpu:
        return f"the device is {d.type}"
    if not d.triton:
        return "Triton is not installed"
    if s.rows > 1:
        return "more than one new row"
    if s.mask == "other":
        return "a mask that is not one of visible slots"
    if s.dtype not in _DTYPES:
        return f"{s.dtype} is not float32 or a 16-bit type"
    if reason := unread(f, _KINDS):
        return reason
    for side in (f.key, f.value):
        if side.kind == "vector" and any(_bit(g, side.code_bits) + side.code_bits > 16 for g in range(8)):
            return f"codes of {side.code_bits} bits"
    if f.uneven:
        return "positions that run ahead of their slots unevenly"
    if f.key.domain == "block" and 1 < f.key.block < _SMALLEST_BLOCK:
        return f"blocks of {f.key.block} tokens"
    if s.exact == GROWS:
        return "exact rows whose number grows with the slots"
    if s.exact > _MOST_EXACT:
        return f"{s.exact} exact rows, more than {_MOST_EXACT}"
    if s.value_dim != s.dim:
        return f"keys of {s.dim} channels and values of {s.value_dim}"
    return "" if _DIMS[0] <= s.dim <= _DIMS[1] else f"{s.dim} channels, not {_DIMS[0]} to {_DIMS[1]}"


def _bit(group: int, bits: int) -> int:
    return group * bits % 8


@kept
def _scalar(kind: str, widths: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[int, Tensor, Tensor, bool, int]:
    """form, meta, levels, wide and multiple of a scalar quantizer."""
    padded, width = power(8 * len(widths)), widths[0]
    if len(set(widths)) == 1 and width and 8 % width == 0:
        levels = levels_of_bytes(kind, width).to(device, dtype)
        none = torch.zeros(padded, dtype=torch.int32, device=device)
        return (3, none, levels, False, width) if kind.startswith("uniform") else (0, none, levels, False, 8 // width)
    tables, at = [torch.zeros(2)], 2  # the first levels stand for channels without bits
    first, wide = {0: 0}, False
    for w in sorted(set(widths) - {0}):
        code = torch.arange(4**w if max(widths) <= 4 else 2**w)
        pairs = torch.stack([code & (2**w - 1), code >> w], dim=-1).flatten()
        tables.append(levels_of(kind, w)[pairs if max(widths) <= 4 else code])
        first[w], at = at, at + tables[-1].numel()
    levels = torch.cat(tables).to(device, dtype)
    if max(widths) <= 4:
        meta, runs = torch.zeros(6, padded, dtype=torch.int32), len(widths)
        meta[0, :runs], meta[1, :runs] = torch.tensor(widths), torch.tensor([first[w] // 2 for w in widths])
        for n in range(4):
            meta[2 + n, :runs] = (torch.tensor([0, *widths]).cumsum(0)[:-1] + n).clamp_max(sum(widths) - 1)
        return 1, meta.to(device), levels, False, max(widths)
    meta = torch.zeros(5, padded, dtype=torch.int32)
    for a, b, start, w in segments(widths):
        bit = torch.arange(b - a) * w
        meta[0, a:b], meta[2, a:b], meta[3, a:b], meta[4, a:b] = start + bit // 8, bit % 8, 2**w - 1, first[w]
        wide = wide or bool((bit % 8 + w > 8).any())
    meta[1] = (meta[0] + 1).clamp_max(sum(widths) - 1)
    return 2, meta.to(device), levels, wide, 1


@kept
def _vector(dim: int, couple: int, bits: int, row_bytes: int, device: str) -> tuple[int, Tensor, bool]:
    """form, meta and wide of coupled codes."""
    if bits == 8 and couple & (couple - 1) == 0:
        meta = torch.zeros(power(dim), dtype=torch.int32)
        meta[: dim // couple] = torch.arange(dim // couple) * 256
        return 0, meta.to(device), False
    c = torch.arange(dim)
    group, meta = c // couple, torch.zeros(5, power(dim), dtype=torch.int32)
    bit = group * bits
    meta[0, :dim] = bit // 8
    meta[1] = (meta[0] + 1).clamp_max(row_bytes - 1)
    meta[2, :dim] = bit % 8
    meta[3, :dim] = 2**bits - 1
    meta[4, :dim] = group * 2**bits * couple + c % couple
    return 2, meta.to(device), bool((bit % 8 + bits > 8).any())


@kept
def _walks(widths: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """meta int32 [2, D / 8], bits and first byte of a run, and the `odd_polynomial` of its levels, float32 [4, D / 8]."""
    first = [sum(widths[:g]) for g in range(len(widths))]
    return torch.tensor([widths, first], dtype=torch.int32, device=device), torch.tensor(
        [odd_polynomial(w) for w in widths]
    ).T.contiguous().to(device)


def _side(spec: SideFormat, codes: Tensor, scale: Tensor, dim: int, book: Tensor | None, dtype: torch.dtype) -> _Side:
    row_bytes, scales, device = codes.shape[-1], scale.shape[-1], str(codes.device)
    if book is not None:
        form, meta, wide = _vector(dim, spec.couple, spec.code_bits, row_bytes, device)
        return _Side(form, meta, derived(book, dtype, same), wide, spec.couple, spec.numbers, row_bytes, scales)
    if spec.kind == "trellis":
        return _Side(4, *_walks(spec.widths, device), False, max(spec.widths), 1, row_bytes, scales)
    form, meta, levels, wide, multiple = _scalar(spec.kind, spec.widths, device, dtype)
    return _Side(form, meta, levels, wide, multiple, spec.numbers, row_bytes, scales)


_made: dict[tuple[int, torch.dtype, str], tuple[weakref.ref[Tensor], Tensor]] = {}


def derived(table: Tensor, dtype: torch.dtype, how: Callable[[Tensor], Tensor]) -> Tensor:
    """how(table) in another dtype, kept as long as the table lives. Under the capture of a graph it is made anew."""
    key = id(table), dtype, how.__name__
    held = _made.get(key)
    if held is not None and held[0]() is table:
        return held[1]
    new = lasting(table.device, lambda: how(table).to(dtype).contiguous())
    if not (new.is_cuda and torch.cuda.is_current_stream_capturing()):
        _made[key] = weakref.ref(table, partial(_forget, _made, key)), new
    return new


def _forget(made: dict[Any, Any], key: Any, _: Any) -> None:
    made.pop(key, None)


def same(table: Tensor) -> Tensor:
    return table


def _offsets(angles: tuple[Tensor, Tensor], dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [_OFFSETS, DP] of the first positions, without attention scaling; channels without rotation stay."""
    cos, sin = angles

    def cosines(table: Tensor) -> Tensor:
        return _first_rows(table, table[:1], dim, 1.0)

    def sines(table: Tensor) -> Tensor:
        return _first_rows(table, cos[:1], dim, 0.0)

    return derived(cos, dtype, cosines), derived(sin, dtype, sines)


def _first_rows(table: Tensor, unit: Tensor, dim: int, rest: float) -> Tensor:
    out = torch.full((_OFFSETS, power(dim)), rest, dtype=torch.float32, device=table.device)
    rows = table[:_OFFSETS] / unit
    out[: len(rows), : rows.shape[1]] = rows
    return out


@kept
def _hadamard(order: int, dim: int, device: str) -> Tensor:
    """U float32 [D, D] with z = x U."""
    return hadamard_ref(torch.eye(dim), order).contiguous().to(device)


def power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def transform(side: Any, dim: int, basis: Tensor | None, device: torch.device) -> tuple[Tensor | None, int]:
    """The matrix U [H or 1, D, D] of a side's transform with z = x U, and the numbers from one head's to the next's."""
    if side.transform == "klt":
        assert basis is not None
        return basis, basis.stride(0)
    if side.transform == "hadamard" and not side.folded:
        return _hadamard(side.order, dim, str(device)), 0
    return None, 0


def _matrix(basis: Tensor, sigma: Tensor | None, dtype: torch.dtype) -> Tensor:
    """diag(sigma) U^T [H or 1, D, D]: what takes rows of levels back; U that of the reader."""

    def inverse(u: Tensor) -> Tensor:
        return u.mT if sigma is None else u.mT * sigma[:, :, None]

    return derived(basis, dtype, inverse)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def splits_of(heads: int, slots: int, tile: int, waves: int, device: torch.device) -> int:
    """Programs that share the slots of one head: enough to fill the GPU some times over, of at least two tiles each."""
    wanted = -(-waves * _multiprocessors(device) // heads)
    return max(1, min(wanted, -(-slots // (2 * tile)), _MOST_SPLITS))


def attend(call: Call) -> Tensor:
    """`kvsink::attend` for S = 1 where `declines` is silent."""
    from . import attend_kernels as kernels

    q, k, v, _, _, mask, scale = call.asking()
    c, st, p, tl = call.codec, call.st, call.p, kernels.tl
    b, h, _, d = k.shape
    r, slots, device = q.shape[1] // h, st["k_codes"].shape[2], q.device
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    half = torch.float32 if q.dtype == torch.float32 else torch.float16
    key = _side(c.format.key, st["k_codes"], st["k_scale"], d, p.get("k_book"), half)
    value = _side(c.format.value, st["v_codes"], st["v_scale"], d, p.get("v_book"), half)
    basis, basis_h = transform(c.key, d, back_table(p, "k", "basis"), device)
    per_key = c.key.domain == "block" and c.key.block == 1
    block = _OFFSETS if per_key else c.table_tokens
    tile, warps, waves = _BY_KEY if per_key else _BY_QUERY
    cos, sin = p.get("start_cos"), p.get("start_sin")
    rotary = 0 if cos is None else cos.shape[-1]
    mean = p.get("k_table") if c.key.center else None
    starts = cos is not None and (not per_key or rotary > 0)
    sigma = p.get("k_step", back_table(p, "k", "sigma"))
    dt = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    by_block = c.key.domain == "block" and not per_key
    if basis is not None:
        basis = _matrix(basis, sigma, half) if per_key else derived(basis, half, same)
        basis_h = basis.stride(0) if basis.dim() == 3 and basis.shape[0] > 1 else 0

    def held(x: Tensor | None) -> Tensor:
        return q if x is None else x  # a pointer that is not followed

    scale *= math.log2(math.e)
    blocks = -(-slots // block) + 1
    rotated = logits = unit_cos = unit_sin = None
    shape = dict(H=h, R=r, RP=power(r), D=d, DP=power(d), ROTARY=rotary, DT=dt[half], PER_KEY=per_key, BLOCK=block,
                 BY_BLOCK=by_block, BASIS=basis is not None, SIGMA=sigma is not None, MEAN=mean is not None)  # fmt: skip
    if starts:
        assert cos is not None and sin is not None
        if per_key:
            unit_cos, unit_sin = _offsets((cos, sin), d, half)
        if per_key or by_block:
            rotated = torch.empty(b * h, blocks, r * (2 if per_key else 1), d, dtype=half, device=device)
        if mean is not None and not per_key:
            logits = torch.empty(b * h, r, blocks * block, dtype=torch.float32, device=device)
        together = 1 << (r - 1).bit_length()
        m = max(1, _ROTATED // together)
        kernels.rotate_query_kernel[(-(-blocks // m), b * h)](
            q, held(basis), held(sigma), held(None if mean is None else derived(mean, half, same)), cos, sin, st["positions"],
            st["length"], held(rotated), held(logits), scale, basis_h, cos.shape[0] - 1, blocks, st["positions"].stride(0), M=m,
            RQ=together, **shape,
        )  # fmt: skip
    splits = splits_of(b * h, slots, tile, waves, device)
    acc = torch.empty(b * h, splits + 1, r, d, dtype=torch.float32, device=device)
    top, mass = (torch.empty(b * h, splits + 1, r, dtype=torch.float32, device=device) for _ in range(2))
    visible = None if mask is None else mask[:, 0, 0]
    if visible is not None:
        visible = (visible if visible.stride(1) == 1 else visible.contiguous()).view(torch.uint8)
    exact, recent = st["exact_k"], st["recent_k"]
    kernels.attend_kernel[(splits + 1, b * h)](
        q, st["k_codes"], st["k_scale"], st["v_codes"], st["v_scale"], st["positions"], st["length"], held(visible),
        exact, st["exact_v"], st["exact_slot"], recent, st["recent_v"], st["recent_slot"], k, v,
        key.meta, key.levels, value.meta, value.levels, held(sigma), held(basis), held(mean),
        held(unit_cos), held(unit_sin), held(rotated), held(logits), acc, top, mass,
        *st["k_codes"].stride()[:2], *st["k_scale"].stride()[:2], *st["v_codes"].stride()[:2], *st["v_scale"].stride()[:2],
        st["positions"].stride(0), 0 if visible is None or visible.shape[0] == 1 else visible.stride(0),
        per_head(p.get("k_book")), per_head(p.get("v_book")), *exact.stride()[:2], *recent.stride()[:2], basis_h,
        scale, splits, 0 if cos is None else cos.shape[0] - 1, blocks, N=tile, EXACT_DT=dt[q.dtype], STARTS=starts,
        K_BYTES=key.row_bytes, K_FORM=key.form, K_WIDE=key.wide, K_MULTIPLE=key.multiple, K_KIND=key.kind,
        K_COUNT=key.scales, K_GROUP=c.key.group_size if key.kind >= 2 else d,
        V_BYTES=value.row_bytes, V_FORM=value.form, V_WIDE=value.wide, V_MULTIPLE=value.multiple, V_KIND=value.kind,
        V_COUNT=value.scales, V_GROUP=c.value.group_size if value.kind >= 2 else d,
        E=exact.shape[2], EP=power(exact.shape[2] or 1), WINDOW=c.window, RING=recent.shape[2], STRICT=c.strict,
        MASKED=visible is not None, num_warps=warps, num_stages=2, **shape,
    )  # fmt: skip
    return _merged(acc, top, mass, splits, q, c, p)


def _merged(acc: Tensor, top: Tensor, mass: Tensor, splits: int, q: Tensor, c: Any, p: dict[str, Tensor]) -> Tensor:
    """The output of parts [B·H, splits + 1, R, D], the last of which is that of exact rows."""
    from . import attend_kernels as kernels

    heads, _, r, d = acc.shape
    b = q.shape[0]
    back, back_h = transform(c.value, d, p.get("v_basis"), q.device)
    sigma, mean = p.get("v_step", back_table(p, "v", "sigma")), p.get("v_mean") if c.value.center else None

    def held(x: Tensor | None) -> Tensor:
        return q if x is None else x  # a pointer that is not followed

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kernels.merge_kernel[(heads, r)](
        acc, top, mass, held(back), held(sigma), held(mean), out, splits, back_h,
        H=heads // b, R=r, D=d, DP=power(d), SP=power(splits), BACK=back is not None, SIGMA=sigma is not None,
        MEAN=mean is not None, num_warps=8,
    )  # fmt: skip
    return out


def per_head(book: Tensor | None) -> int:
    return 0 if book is None or book.shape[0] == 1 else book.stride(0)
