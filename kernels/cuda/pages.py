"""Rows of many sequences in pages on a GPU: new rows coded into them, attention of one new row a sequence, rows read back.

Formula    as `kvsink.kernels.pages`; codes stand in tiles, see `kvsink.kernels.layout`
Source     ours
Differs    of a sequence the first `EXACT` rows that stand exact are read as they came, later ones from their codes
Shapes     as `kvsink.kernels.pages`; last int64 [sequences], the slot of each one's new row, negative for none
Exact      codes equal the definition's up to ties that the order of sums decides; output: relative error of a 16-bit result
Declines   what `kvsink.kernels.cuda.backend` declines, and more than `PLACES` exact rows of a page
Cost       one launch for new rows, one for attention, two or more where queries are turned ahead (`TURNED`), one for the places
           of a step; nothing is asked of the GPU, so all can be captured in a CUDA graph
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Device, Shape
from ..stages import back_table
from . import backend, module
from .launch import AttendArguments, Library, Params, RowArguments, _rotates

if TYPE_CHECKING:
    from ..pages import Pages

__all__ = ["EXACT", "PLACES", "Places", "PlaceArguments", "attend", "declines", "decode", "in_pages", "list_exact", "write"]

EXACT = 64  # exact rows of a sequence that attention reads as they came
PLACES = 32  # of a page at most
TURNED = 1 << 28  # bytes of queries turned to the basis of every block that one launch may leave for attention

_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong


class PlaceArguments(ctypes.Structure):
    """`PlaceParams` of pages.cuh."""

    _fields_ = (
        *((n, _pointer) for n in ("named", "pages", "length", "exact_slot", "exact_at")),
        *((n, _long) for n in ("page_row", "page_bytes")),
        *((n, _int) for n in ("E", "places", "tiles")),
    )


class Places(NamedTuple):
    """Exact rows of sequences, int32 [sequences, E] both: their slots, -1 for none, and 32 times the page plus the place there."""

    slot: Tensor
    at: Tensor


def in_pages(codec: Any, exact: int) -> Any:
    """A codec as its rows stand in pages of a GPU. exact: rows of a sequence that are read as they came, at most."""
    return replace(codec, tiles=True, segments=(exact,) if exact else (), window=0, strict=True, anchors=None)


def declines(codec: Any, s: Shape, d: Device, places: int) -> str:
    """What keeps a codec's pages from these kernels, in words; they are compiled where nothing else speaks against it."""
    if places > PLACES:
        return f"{places} exact rows of a page, more than {PLACES}"
    return backend.declines(codec.format, s, d)


def _of_pages(a: Any, pages: Pages) -> None:
    """Where the parts of all pages stand."""
    at = module.pointer
    a.k_codes, a.v_codes, a.k_scale, a.v_scale = at(pages.k_codes), at(pages.v_codes), at(pages.k_scale), at(pages.v_scale)
    a.exact_k, a.exact_v = at(pages.exact_k), at(pages.exact_v)
    a.page_bytes, a.unit_bytes = pages.k_codes.stride()[:2]


def _row_arguments(
    codec: Any, p: Params, pages: Pages, slots: Tensor, positions: Tensor, k: Tensor, v: Tensor, back: bool
) -> RowArguments:
    at, (n, heads, _) = module.pointer, k.shape
    basis = p.get("tile_rows" if back else "k_basis")
    sigma, value_sigma = (back_table(p, name, "sigma") if back else p.get(f"{name}_sigma") for name in "kv")
    a = RowArguments(
        k=at(k), v=at(v), k_stride=(_long * 3)(*k.stride()[:2], 0), v_stride=(_long * 3)(*v.stride()[:2], 0),
        table=at(p.get("k_table")), start_cos=at(p.get("start_cos")), start_sin=at(p.get("start_sin")),
        basis=at(basis), sigma=at(sigma), v_mean=at(p.get("v_mean")), v_sigma=at(value_sigma),
        length=at(positions), length_row=1, slots=at(slots), named=at(pages.named), places=pages.named.shape[2],
        B=n, Hkv=heads, S=1, L=1 << 30, bf16=int(k.dtype == torch.bfloat16), per=min(8, n),
        key_hadamard=_rotates(codec.key), value_hadamard=_rotates(codec.value),
        key_clip=codec.key.clip, value_clip=codec.value.clip,
    )  # fmt: skip
    _of_pages(a, pages)
    return a


def write(
    lib: Library, codec: Any, p: Params, pages: Pages, slots: Tensor, positions: Tensor, k: Tensor, v: Tensor, asks: Tensor
) -> None:
    """Rows k, v [n, H, D] at positions int64 [n] to their slots int64 [n]. asks: bool [n], those that ask for a place."""
    k, v = (x if _aligned(x) else x.contiguous() for x in (k, v))
    a = _row_arguments(codec, p, pages, slots, positions, k, v, back=False)
    a.asks = module.pointer(asks)
    lib.append(a)


def _aligned(x: Tensor) -> bool:
    return x.stride(-1) == 1 and all(n % 8 == 0 for n in x.stride()[:-1]) and x.data_ptr() % 16 == 0


def decode(
    lib: Library, codec: Any, p: Params, pages: Pages, slots: Tensor, positions: Tensor, dims: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows at `slots` int64 [n] as keys after RoPE and values [n, H, D]; exact ones as they came."""
    heads = pages.k_codes.shape[1]
    k, v = (torch.empty(len(slots), heads, dim, dtype=dtype, device=slots.device) for dim in dims)
    a = _row_arguments(codec, p, pages, slots, positions, k, v, back=True)
    lib.decode(a, len(slots), heads)
    return k, v


def list_exact(lib: Library, codec: Any, pages: Pages, tables: Tensor, last: Tensor) -> Places:
    """The exact rows of sequences, which all layers whose rows ask alike share."""
    at, n = module.pointer, last.shape[0]
    found = Places(*(torch.empty(n, codec.exact_rows, dtype=torch.int32, device=last.device) for _ in range(2)))
    a = PlaceArguments(
        named=at(pages.named), pages=at(tables), length=at(last), exact_slot=at(found.slot), exact_at=at(found.at),
        page_row=tables.stride(0), page_bytes=pages.named.stride(0), E=codec.exact_rows, places=pages.named.shape[2],
        tiles=tables.shape[1],
    )  # fmt: skip
    lib.list_exact(a, n)
    return found


def attend(
    lib: Library, codec: Any, p: Params, pages: Pages, q: Tensor, tables: Tensor, last: Tensor, exact: Places | None, scale: float,
    out: Tensor,
) -> None:  # fmt: skip
    """Attention of q [sequences, Hq, D] over the slots up to `last` of each, in place of `out`. tables: int32 [., pages].

    Where queries are turned ahead, as many sequences at a time as `TURNED` holds pages of: tables are as wide as the longest that
    a sequence may ever become.
    """
    at, n, kv, tiles = module.pointer, q.shape[0], pages.k_codes.shape[1], tables.shape[1]
    if n > (most := max(1, TURNED // max(1, kv * lib.groups * tiles * lib.turned))):
        for i in range(0, n, most):
            part = slice(i, i + most)
            some = None if exact is None else Places(exact.slot[part], exact.at[part])
            attend(lib, codec, p, pages, q[part], tables[part], last[part], some, scale, out[part])
        return
    q = q.contiguous()
    made = out if out.is_contiguous() and out.dtype == q.dtype else torch.empty_like(q)
    a = AttendArguments(
        q=at(q), mean=at(p.get("tile_mean")), rotation=at(p.get("tile_turn")), basis=at(p.get("tile_basis")),
        length=at(last), length_row=1, pages=at(tables), page_row=tables.stride(0),
        value_mean=at(p.get("v_mean")), value_sigma=at(back_table(p, "v", "sigma")), out=at(made), partial=at(lib.partial),
        B=n, Hkv=kv, share=min(lib.share(kv * lib.groups), n * tiles), tiles=tiles, extra=1,
        q_bf16=int(q.dtype == torch.bfloat16), key_hadamard=_rotates(codec.key), value_hadamard=_rotates(codec.value),
        scale=scale * math.log2(math.e),
    )  # fmt: skip
    _of_pages(a, pages)
    if exact is not None:
        a.E, a.exact_slot, a.exact_at = exact.slot.shape[1], at(exact.slot), at(exact.at)
    lib.attend(a, RowArguments(), kv * lib.groups)
    if made is not out:
        out.copy_(made)
