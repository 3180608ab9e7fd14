"""Rows by warp (`attend_rows` of kernels/cuda/schedule.cuh), emulated, and their choice: against the definition."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsink.cache.cache import KVSinkCache
from kvsink.cache.layer import KVSinkLayer
from kvsink.kernels.attend import attend_ref
from kvsink.kernels.cuda import launch, variants

from .emulated import Emulated, scales_behind
from .test_tiles import KV_HEADS, append, rewritten, rows

SLOTS = 768
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    "centred-6": ("centred:even", {"key_bits": 2, "value_bits": 2, "fold": False, "protect": "first:6"}),
    "centred-22": ("centred:even", {"key_bits": 2, "value_bits": 2, "fold": False, "protect": "first:20+first:2"}),
    "centred-4-bit": ("centred:even", {"key_bits": 4, "value_bits": 4, "protect": "none"}),
    "akvq": ("akvq-vl:even", {"key_bits": 2, "value_bits": 2, "fold": False, "protect": "first:15"}),
    "klt": ("klt:even", {"key_bits": 2, "value_bits": 2, "fold": False, "protect": "first:6"}),
    "trellis": ("klt", {"key_bits": 2, "value_bits": 2, "fold": False, "protect": "first:6"}),
}


@cache
def model_of(name: str) -> Any:
    """A tiny Llama of two key-value heads of 128 channels, rewritten; the kernel is given as many query heads as a case asks."""
    method, options = CODECS[name]
    return rewritten(method, KV_HEADS, **options)


def filled(name: str, batch: int, length: int, shift: Tensor, dtype: torch.dtype) -> KVSinkLayer:
    """A layer behind `length` tokens; what no token has written is NaN."""
    cache = KVSinkCache.for_model(model_of(name), batch, max_length=SLOTS, tiles=True)
    layer = cache.packed_layers()[1]
    if length:
        append(layer, rows(batch, length, 1), rows(batch, length, 2), torch.arange(length)[None] - shift)
    layer.length.fill_(length)
    scales_behind(layer, length, nan=True)
    for side in ("exact_k", "exact_v"):
        held = getattr(layer, side).to(dtype)
        setattr(layer, side, torch.where((layer.exact_slot < 0)[:, None, :, None], float("nan"), held))
    return layer


def defined(layer: KVSinkLayer, given: tuple[Tensor, ...], mask: Tensor | None, heads: int) -> Tensor:
    scales_behind(layer, int(layer.length), nan=False)
    for side in ("exact_k", "exact_v"):
        setattr(layer, side, getattr(layer, side).float().nan_to_num(0.0))
    return attend_ref(*[x.float() for x in given], layer.state(), layer.params, mask, 0.09, False, layer.codec_text)


@pytest.mark.sample(3)
@pytest.mark.parametrize(("repeats", "whole"), [(1, True), pytest.param(2, True, marks=pytest.mark.slow), (1, False)])
@pytest.mark.parametrize(
    ("name", "batch", "length", "kind", "blocks"),
    [
        ("centred-6", 3, 1, None, 2),
        ("centred-6", 40, 65, "padding", 1),
        ("centred-6", 1, 700, None, 3),
        ("centred-22", 19, 130, None, 1),
        ("centred-22", 9, 257, "random", 1),
        ("centred-4-bit", 18, 129, None, 2),
        ("centred-4-bit", 2, 0, None, 1),
        ("akvq", 17, 512, None, 2),
        ("akvq", 9, 383, "random", 1),
        ("klt", 9, 300, "padding", 1),
        ("klt", 26, 128, None, 1),
        ("trellis", 9, 300, "padding", 1),
        ("centred-4-bit", 9, 300, "padding", 1),
        ("centred-22", 5, 40, "one", 1),
    ],
)
def test_rows_equal_the_definition_whole_and_divided(
    name: str, batch: int, length: int, kind: str | None, blocks: int, repeats: int, whole: bool
) -> None:
    dtype = torch.bfloat16 if name == "centred-22" else torch.float16
    shift = torch.arange(batch)[:, None] % 60 if kind == "padding" else torch.zeros(batch, 1, dtype=torch.int64)
    layer = filled(name, batch, length, shift, dtype)
    q = rows(batch, 1, 5, KV_HEADS * repeats, dtype) * 0.5
    k, v = rows(batch, 1, 6, dtype=dtype), rows(batch, 1, 7, dtype=dtype)
    slots, mask = torch.arange(layer.k_codes.shape[2]), None
    if kind == "padding":
        mask = ((slots >= shift) & (slots <= length))[:, None, None]
    elif kind == "random":
        seen = torch.rand(batch, 1, 1, slots.numel(), generator=torch.Generator().manual_seed(3)) > 0.4
        mask = seen & (slots <= length)
    elif kind == "one":
        mask = (slots <= length)[None, None, None].expand(batch, 1, 1, -1)
    st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
    lib = Emulated(launch.variant_of(layer.codec, repeats), blocks, by_warp=whole)
    got = launch.attend_one(lib, layer.codec, q, k, v, st, p, mask, 0.09)
    wanted = defined(layer, (q, k, v), mask, repeats)
    assert got is not None
    error = (got.float() - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert error.max() <= (4e-3 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.sample(3)
@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(
    ("name", "batch", "length", "best"), [("centred-22", 19, 130, 9.0), ("akvq", 9, 255, 0.0), ("klt", 8, 40, 9.0)]
)
def test_a_step_enters_new_rows_after_every_head_has_read_the_exact_ones(
    name: str, batch: int, length: int, best: float, repeats: int
) -> None:
    shift = torch.zeros(batch, 1, dtype=torch.int64)
    layers = [filled(name, batch, length, shift, torch.float16) for _ in range(3)]
    q = rows(batch, 1, 5, KV_HEADS * repeats, torch.float16) * 0.5
    k, v = rows(batch, 1, 6, dtype=torch.float16), rows(batch, 1, 7, dtype=torch.float16)
    positions = torch.full((batch, 1), length)
    scores: list[Tensor] = []
    for i, _ in enumerate(layers[0].codec.segments):
        score = torch.randn(batch, 1, generator=torch.Generator().manual_seed(i)) + best
        scores += [score, torch.zeros(batch, 1, dtype=torch.int64)]
    before = layers[0].exact_slot.clone()
    outs = []
    for layer, whole in zip(layers, (True, False), strict=False):
        st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
        lib = Emulated(launch.variant_of(layer.codec, repeats), 2, by_warp=whole)
        outs.append(launch.step_one(lib, layer.codec, q, k, v, positions, scores, st, p, None, 0.09))
        assert not lib.arrived.any()
    wanted = defined(layers[2], (q, k, v), None, repeats)
    assert outs[0] is not None and outs[1] is not None
    assert (outs[0].float() - wanted).norm() <= 2e-3 * wanted.norm()
    for a, b in zip(layers[0].state(), layers[1].state(), strict=True):  # all that is stored, to the bit
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert (layers[0].exact_slot != before).any()


def test_whole_rows_are_chosen_where_they_are_many_and_short() -> None:
    assert variants.by_warp(1416, 4, 4, 8) and variants.by_warp(304, 4, 23, 8) and variants.by_warp(248, 4, 4, 8)
    assert not variants.by_warp(1, 16, 8, 8) and not variants.by_warp(1, 4, 1024, 8) and not variants.by_warp(16, 16, 64, 8)
    assert not variants.by_warp(40, 4, 64, 8)  # 40 rows for 32 warps: the second row of eight warps is waited for


@pytest.mark.parametrize("name", list(CODECS))
@pytest.mark.parametrize("repeats", [1, 2])
def test_shared_memory_suffices(name: str, repeats: int) -> None:
    layer = KVSinkCache.for_model(model_of(name), 1, max_length=128, tiles=True).packed_layers()[1]
    size = Emulated(launch.variant_of(layer.codec, repeats)).lib.rows_smem_bytes()
    assert 0 < size <= variants.SHARED_LIMIT
