"""Decode attention over codes in rows of bytes, in CUDA C++: what Triton serves of 128 channels in 16 bit, faster.

Formula    as `kvsink.kernels.triton.attend`: the query goes to the basis and to the start of a block, or keys are restored one by
           one (dense); codes are looked up in tables of 16-bit levels that stand in shared memory
Source     FlashAttention, arXiv 2205.14135 (online softmax); split over slots as in Flash-Decoding; the rest ours
Shapes     as `kvsink::attend` with S = 1
Exact      products in float16, sums in float32: relative error of the output below 2e-3
Declines   `declines` says in words: other widths, block sizes, head dimensions than 128, more than four query heads per key-value
           head; Triton serves those, and GPUs other than Hopper
Cost       reads codes and scales once per key-value head; a launch that rotates queries to blocks (not for dense keys), one that
           attends, one that merges
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends import Call as Question
from ..backends import Device, LayerFormat, Shape, SideFormat, unread
from ..quantize import SIGMA_KINDS
from ..stages import back_table
from ..triton import attend as triton_attend
from ..triton.attend import transform
from . import byte_tables
from .module import Module, NativeError, module_of
from .variants import SHARED_LIMIT

__all__ = ["Beside", "Call", "CodesVariant", "attend", "attend_one", "declines", "kernels_for", "misplaced", "variant_of"]

DIM, WINDOW, BLOCK = 128, 64, 64
CAPABILITY = 9  # compute capability, before the point
REPEATS = 4  # query heads that share a key-value head
DTYPES = (torch.float16, torch.bfloat16)
_KINDS = ("lloyd", "lloyd-even", "gauss", "uniform", "uniform-int", "vector", "static")
_COUPLES = (2, 4, 8)
_ROTATED = 16  # blocks that a launched block of `rotate_queries` rotates to at a time: ROTATE_BLOCKS of codes.cuh
_MERGE_WARPS = 8  # of a launched block of `merge_codes`
_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong


class Call(ctypes.Structure):
    """`Codes` of codes.cuh."""

    _fields_ = (
        *((n, _pointer) for n in (
            "q", "k_codes", "k_scale", "v_codes", "v_scale", "positions", "new_positions", "length", "mask", "exact_k", "exact_v",
            "exact_slot", "recent_k", "recent_v", "recent_slot", "new_k", "new_v", "k_levels", "v_levels", "basis", "mean",
            "offsets", "angles", "rotated", "part_acc", "part_top", "part_mass", "value_mean", "out",
        )),
        *((n, _long) for n in (
            "k_codes_b", "k_codes_h", "k_scale_b", "k_scale_h", "v_codes_b", "v_codes_h", "v_scale_b", "v_scale_h", "position_row",
            "mask_row", "k_levels_h", "v_levels_h", "basis_h", "new_row",
        )),
        *((n, _int) for n in (
            "Hkv", "slots", "splits", "blocks", "angle_rows", "E", "ring", "window", "strict", "by_block", "q_bf16", "heads",
            "value_hadamard", "merge_warps",
        )),
        ("scale", ctypes.c_float),
    )  # fmt: skip


@dataclass(frozen=True)
class CodesVariant:
    """What is compiled in, as the macros of codes.cuh name it. key_runs: widths of runs, empty for bytes of channels."""

    repeats: int
    key_runs: tuple[int, ...]
    key_couple: int
    key_books: bool
    key_scales: int
    value_couple: int
    value_books: bool
    value_scales: int
    dense: bool
    basis: bool
    mean: bool
    starts: bool
    warps: int = 12
    stages: int = 1

    def shared_bytes(self) -> int:
        """SHARED_BYTES of codes.cuh, rounded up a little."""
        key, value = self.row_bytes()
        tables = 32768 * (self.dense and self.basis) + 16384 * self.mean + 16384 * self.dense
        tables += 2048 if self.key_runs else 512 * self.key_couple * (DIM // self.key_couple if self.key_books else 1)
        tables += 512 * self.value_couple * (DIM // self.value_couple if self.value_books else 32 if self.value_couple == 2 else 1)
        stage = WINDOW * (key + value + 2 * min(2, self.key_scales) + 2 * min(2, self.value_scales))
        return tables + 1344 + max(self.warps * self.stages * stage, self.warps * self.repeats * 130 * 4) + 8 * 64

    def row_bytes(self) -> tuple[int, int]:
        return sum(self.key_runs) or DIM // self.key_couple, DIM // self.value_couple

    def defines(self) -> dict[str, str]:
        """Macros of the source."""
        return {
            "HEADS_PER_KV": str(self.repeats), "KEY_RUNS": str(int(bool(self.key_runs))),
            "KW": ", ".join(map(str, self.key_runs or (1,) * 16)), "KEY_COUPLE": str(self.key_couple),
            "KEY_BOOKS": str(int(self.key_books)), "KEY_SCALES": str(self.key_scales), "VALUE_COUPLE": str(self.value_couple),
            "VALUE_BOOKS": str(int(self.value_books)), "VALUE_SCALES": str(self.value_scales),
            "DENSE": str(int(self.dense)), "BASIS": str(int(self.basis)), "MEAN": str(int(self.mean)),
            "STARTS": str(int(self.starts)), "WARPS": str(self.warps), "STAGES": str(self.stages),
        }  # fmt: skip


def declines(f: LayerFormat, s: Shape, d: Device) -> str:
    """What keeps a call from the kernels, in words; empty when they serve it. Compiles them when nothing else speaks against it."""
    if d.type == "hip":
        return "the GPU is not one of NVIDIA's"
    if reason := triton_attend.declines(f, s, d):
        return reason
    made = variant_of(f, s)
    if isinstance(made, str):
        return made
    if d.capability[0] != CAPABILITY:
        return f"{d.name} has compute capability {d.capability[0]}.{d.capability[1]}; these kernels are for {CAPABILITY}.0"
    if d.place is not None:
        try:
            kernels_for(made, d.place)
        except NativeError as error:
            return str(error)
    return ""


def _bytes_of(spec: SideFormat) -> tuple[int, bool] | str:
    """Channels that share a byte and whether groups have tables of their own, or why a byte is not that."""
    if spec.kind == "vector":
        if spec.code_bits != 8 or spec.couple not in _COUPLES:
            return f"{spec.couple} channels in {spec.code_bits} bits"
        return spec.couple, True
    width = spec.widths[0]
    if len(set(spec.widths)) > 1 or width not in (1, 2, 4):
        return f"widths {sorted(set(spec.widths))} outside runs"
    return 8 // width, False


@cache
def variant_of(f: LayerFormat, s: Shape) -> CodesVariant | str:
    """The kernel for a format that `kvsink.kernels.triton.attend` serves, or why there is none."""
    key, value = f.key, f.value
    if reason := unread(f, _KINDS):
        return reason
    if s.dim != DIM:
        return f"{s.dim} channels, not {DIM}"
    if s.repeats > REPEATS:
        return f"{s.repeats} query heads per key-value head, more than {REPEATS}"
    if s.dtype not in DTYPES:
        return f"the model computes in {str(s.dtype).removeprefix('torch.')}"
    dense = key.domain == "block" and key.block == 1
    rotary = s.rotary if key.domain == "block" or key.center else 0
    if (rotary not in (0, DIM)) or (rotary == 0 and (dense or key.center)):
        return f"{rotary} rotary channels"
    if rotary and not dense and f.tokens != BLOCK:
        return f"blocks of {f.tokens} tokens"
    kinds = key.numbers, value.numbers
    for side, kind in zip((key, value), kinds, strict=True):
        if kind > 1 and side.group_size != DIM:
            return "groups within a head"
    if dense and (kinds[0] > 1 or (key.transform == "none" and key.kind in (*SIGMA_KINDS, "static"))):
        return f"keys before RoPE of kind {key.kind}"
    if value.kind in (*SIGMA_KINDS, "static") or not (
        value.transform == "none" or (value.transform == "hadamard" and (value.folded or value.order == DIM))
    ):
        return f"values of kind {value.kind}, transform {value.transform} {value.order}"
    runs: tuple[int, ...] = ()
    if key.kind in SIGMA_KINDS:
        runs = tuple(key.widths)
        if max(runs) > 4 or sum(runs) % 4:
            return f"widths {sorted(set(runs))} in rows of {sum(runs)} bytes"
    key_bytes: Any = (2, False) if runs else _bytes_of(key)
    value_bytes: Any = _bytes_of(value)
    for reason in (key_bytes, value_bytes):
        if isinstance(reason, str):
            return reason
    basis = dense and (key.transform == "klt" or (key.transform == "hadamard" and not key.folded))
    made = CodesVariant(
        repeats=s.repeats, key_runs=runs, key_couple=key_bytes[0], key_books=key_bytes[1], key_scales=kinds[0],
        value_couple=value_bytes[0], value_books=value_bytes[1], value_scales=kinds[1], dense=dense, basis=basis,
        mean=key.center, starts=rotary > 0,
    )  # fmt: skip
    if made.shared_bytes() > SHARED_LIMIT:
        return f"{made.shared_bytes()} bytes of shared memory"
    return made


class Kernels(Protocol):
    """Who launches: the GPU's driver, or the emulation of the tests."""

    def rotate(self, call: Call, groups: int) -> None: ...
    def attend(self, call: Call, heads: int) -> None: ...
    def merge(self, call: Call, groups: int) -> None: ...


class Beside(Protocol):
    """What stores the new rows meanwhile: their codes at any time, and exact rows when attention has read the old ones."""

    positions: Tensor  # int64 [B or 1, 1] of the new rows

    def code(self) -> None: ...
    def enter(self) -> None: ...
    def join(self) -> None: ...


class CodesKernels:
    """The three kernels of a variant on a GPU."""

    def __init__(self, variant: CodesVariant, module: Module) -> None:
        self.variant, self._module = variant, module
        names = ("attend_codes", "rotate_queries", "merge_codes")
        self._attend, self._rotate, self._merge = (module.function(name) for name in names)
        self._threads, self._shared = module.numbers("kvsink_launch", 2)
        module.allow_shared(self._attend, self._shared)
        self.blocks = module.multiprocessors

    def rotate(self, call: Call, groups: int) -> None:
        self._module.launch(self._rotate, groups, 1, 256, 0, call)

    def attend(self, call: Call, heads: int) -> None:
        self._module.launch(self._attend, call.splits, heads, self._threads, self._shared, call)

    def merge(self, call: Call, groups: int) -> None:
        self._module.launch(self._merge, groups, 1, 32 * _MERGE_WARPS, 0, call)


_LOADED: dict[tuple[CodesVariant, str], CodesKernels | NativeError] = {}


def kernels_for(variant: CodesVariant, place: torch.device) -> CodesKernels:
    """The kernels of a variant on a device, compiled and loaded once. Raises NativeError, the same one every time."""
    at = (variant, str(place))
    if at not in _LOADED:
        try:
            _LOADED[at] = CodesKernels(variant, module_of(variant.defines(), ("arch.cuh", "channels.cuh", "codes.cuh"), place))
        except NativeError as error:
            _LOADED[at] = error
    held = _LOADED[at]
    if isinstance(held, NativeError):
        raise held
    return held


# -- the call ---------------------------------------------------------------------------------------------------------------


def misplaced(st: Mapping[str, Tensor]) -> str:
    """What keeps rows from being copied as they stand, in words."""
    for name in ("k_codes", "k_scale", "v_codes", "v_scale"):
        x = st[name]
        row, apart = x.shape[3], [n * x.itemsize for n in x.stride()[:2]]
        if row and (x.stride(3) != 1 or x.stride(2) != row or any(n % 16 for n in (x.data_ptr(), *apart))):
            return f"rows of {name} with strides {x.stride()}"
    return "" if st["k_codes"].shape[2] % 8 == 0 else f"{st['k_codes'].shape[2]} slots, not a multiple of 8"


def splits_of(heads: int, slots: int, multiprocessors: int) -> int:
    """Blocks that share the slots of a head: they fill the GPU once, or its last round at least to seven eighths."""
    windows = -(-slots // WINDOW)
    most = max(1, min(windows // 4, 128))
    best, found = 1, 0.0
    for n in range(1, most + 1):
        blocks = heads * n
        used = blocks / (-(-blocks // multiprocessors) * multiprocessors)
        if used > found + 0.02:
            best, found = n, used
        if blocks >= 2 * multiprocessors:
            break
    return best


def attend(call: Question, beside: Beside | None = None) -> Tensor:
    """`kvsink::attend` for S = 1 where `declines` is silent; `beside` stores the new rows meanwhile."""
    if misplaced(call.st):
        return triton_attend.attend(call)
    q, k, v, *_ = call.asking()
    variant = variant_of(call.codec.format, call.shape)
    assert not isinstance(variant, str)
    kernels = kernels_for(variant, k.device)
    return attend_one(kernels, variant, call.codec, q, k, v, call.st, call.p, call.mask, call.scale, kernels.blocks, beside)


def attend_one(
    kernels: Kernels, variant: CodesVariant, c: Any, q: Tensor, k: Tensor, v: Tensor, st: Mapping[str, Tensor],
    p: Mapping[str, Tensor], mask: Tensor | None, scale: float, multiprocessors: int, beside: Beside | None = None,
) -> Tensor:  # fmt: skip
    """`kvsink::attend` for S = 1 by the kernels of a variant; `beside` stores the new rows meanwhile."""
    b, h, _, d = k.shape
    r, device, slots = q.shape[1] // h, q.device, st["k_codes"].shape[2]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    couple = variant.key_couple
    raw = couple if variant.dense and not variant.basis else 2
    cos, sin = p.get("start_cos"), p.get("start_sin")
    sigma = p.get("k_sigma", p.get("k_step"))
    basis = transform(c.key, d, back_table(p, "k", "basis"), device)[0]
    keep: list[Tensor] = []  # alive until the launches are queued

    def at(x: Tensor | None) -> int | None:
        if x is None or not x.numel():
            return None
        keep.append(x)
        return x.data_ptr()

    call = Call(scale=scale * math.log2(math.e), Hkv=h, slots=slots, blocks=-(-slots // BLOCK) + 1 if variant.starts else 1)
    call.splits = splits_of(b * h, slots, multiprocessors)
    call.E, call.ring, call.window, call.strict = st["exact_k"].shape[2], st["recent_k"].shape[2], c.window, int(c.strict)
    call.by_block, call.q_bf16 = int(c.key.domain == "block"), int(q.dtype == torch.bfloat16)
    for name in ("positions", "length", "exact_k", "exact_v", "exact_slot", "recent_k", "recent_v", "recent_slot"):
        setattr(call, name, at(st[name]))
    call.q, call.new_k, call.new_v, call.position_row = at(q), at(k), at(v), st["positions"].stride(0)
    for name in ("k_codes", "k_scale", "v_codes", "v_scale"):
        setattr(call, name, at(st[name]))
        setattr(call, f"{name}_b", st[name].stride(0))
        setattr(call, f"{name}_h", st[name].stride(1))
    if mask is not None:
        visible = mask[:, 0, 0]
        visible = (visible if visible.stride(1) == 1 else visible.contiguous()).view(torch.uint8)
        call.mask, call.mask_row = at(visible), 0 if visible.shape[0] == 1 else visible.stride(0)
    for name, spec, runs in (("k", c.key, bool(variant.key_runs)), ("v", c.value, False)):
        table, stride = byte_tables.level_table(spec, p.get(f"{name}_book"), runs, device)
        setattr(call, f"{name}_levels", at(table))
        setattr(call, f"{name}_levels_h", stride)
    if cos is not None and sin is not None and variant.starts:
        table = byte_tables.angle_table(cos, sin, BLOCK if variant.dense else 1, raw)
        call.angles, call.angle_rows = at(table), table.shape[0]
        if variant.dense:
            call.offsets = at(byte_tables.offset_table(cos, sin, raw))
        if variant.mean:
            call.mean = at(byte_tables.mean_table(p["k_table"], (cos, sin) if variant.dense else None, raw))
    if variant.dense and basis is not None:
        table = byte_tables.dense_basis(basis, sigma, couple if not variant.key_runs else 2)
        call.basis, call.basis_h = at(table), 0 if table.shape[0] == 1 else 8192
    if beside is not None:
        call.new_positions, call.new_row = at(beside.positions), beside.positions.stride(0) if beside.positions.shape[0] > 1 else 0
        beside.code()
    heads, splits = b * h, call.splits
    call.heads = heads
    acc = torch.empty(heads, splits + 1, r, d, dtype=torch.float32, device=device)
    top, mass = (torch.empty(heads, splits + 1, r, dtype=torch.float32, device=device) for _ in range(2))
    call.part_acc, call.part_top, call.part_mass = at(acc), at(top), at(mass)
    if not variant.dense:
        basis = byte_tables.identity(str(device)) if basis is None else basis
        table = byte_tables.query_basis(basis, sigma, couple if not variant.key_runs else 2)
        call.basis, call.basis_h = at(table), 0 if table.shape[0] == 1 else 8192
        call.rotated = at(torch.empty(heads, call.blocks, 256, dtype=torch.int32, device=device))
        kernels.rotate(call, min(-(-call.blocks // _ROTATED) * heads, 3 * multiprocessors))
    kernels.attend(call, heads)
    if beside is not None:
        beside.enter()
    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    call.out, call.value_hadamard = at(out), int(c.value.transform == "hadamard" and not c.value.folded)
    call.value_mean = at(p["v_mean"] if c.value.center else None)
    call.merge_warps = next(n for n in (8, 4, 2, 1) if splits >= 4 * n or n == 1)
    kernels.merge(call, -(-heads * r * call.merge_warps // _MERGE_WARPS))
    if beside is not None:
        beside.join()
    return out
