"""The CUDA kernels (emulated) on every kind of layer they serve: head dimensions, query heads, RoPE on a part, windows, many exact
rows, cards without the copy engine; against the definition."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.cache.layer import KVSinkLayer
from kvsink.cache.ranges import LARGE_STEPS
from kvsink.codecs import SHARED_NAMES
from kvsink.kernels import layout
from kvsink.kernels.append import append_ref
from kvsink.kernels.attend import attend_ref
from kvsink.kernels.cuda import launch, variants
from kvsink.kernels.read import read_ref
from tests.states import coding

from .emulated import Emulated, scales_behind

SLOTS, KV_HEADS = 512, 2
HELD = ("exact_k", "exact_v", "recent_k", "recent_v")
A100, GEFORCE, HOPPER = variants.Card(80, 166912), variants.Card(89, 101376), variants.Card()
TWELVE, SIXTEEN = (variants.Card(shape=variants.Shape(*s)) for s in ((12, 1, 4, 2), (16, 1, 4, 1)))  # warps that compute


class Kind(NamedTuple):
    """A kind of layer, and what is compiled for it."""

    method: str
    dim: int
    repeats: int
    bits: tuple[float, float] = (2, 2)
    rotary: float = 1.0
    protect: str = "first:1"
    window: int = 0
    card: variants.Card = HOPPER
    fold: bool = True


KINDS = (
    Kind("klt:even", 128, 8),
    Kind("klt:even", 128, 5, (2, 4)),
    Kind("centred:even", 128, 7, fold=False),
    Kind("centred:even", 128, 16, (4, 4)),
    Kind("rtn", 128, 12),
    Kind("centred:even", 128, 32, protect="none"),
    Kind("klt:even", 64, 4),
    Kind("klt:even", 64, 8, (2, 4)),
    Kind("centred:even", 64, 8, fold=False),
    Kind("rtn", 64, 1, (4, 4)),
    Kind("centred:even", 256, 2),
    Kind("centred:even", 256, 8, rotary=0.25, fold=False),
    Kind("klt:even", 256, 4, rotary=0.25),
    Kind("klt:even", 256, 6),
    Kind("centred:even", 128, 4, (8, 8)),
    Kind("rtn", 64, 2, (8, 8)),
    Kind("centred:even", 128, 4, protect="first:40+first:24"),
    Kind("klt:even", 128, 2, window=32, protect="first:4"),
    Kind("centred:even", 128, 8, window=70, protect="first:33+first:2"),
    Kind("centred:even", 64, 1, window=200, protect="none", fold=False),
    Kind("klt:even", 128, 4, card=A100),
    Kind("centred:even", 128, 8, card=GEFORCE),
    Kind("centred:even", 256, 4, (4, 4), card=GEFORCE, rotary=0.25),
    Kind("klt:even", 64, 8, card=GEFORCE, window=20),
    Kind("centred:even", 128, 1, (4, 4), card=GEFORCE),
    Kind("centred:even", 256, 8, rotary=0.25, card=GEFORCE),
    Kind("klt:even", 96, 1),
    Kind("centred:even", 96, 4, (2, 4), fold=False),
    Kind("klt:even", 80, 8, (2, 4), fold=False),
    Kind("centred:even", 80, 2, (4, 2), fold=False, protect="first:20", card=A100),
    Kind("centred:even", 64, 4, (1, 1)),
    Kind("centred:even", 96, 6, (4, 4), window=40),
    Kind("klt", 128, 8),
    Kind("klt", 64, 4, (2, 3)),
    Kind("klt", 256, 4, rotary=0.25, fold=False),
    Kind("klt", 256, 6, (3, 4)),
    Kind("klt", 64, 8, (3, 2), card=GEFORCE, window=20, fold=False),
    Kind("klt", 128, 4, (4, 3), card=A100, rotary=0.25),
    Kind("klt", 128, 1, (3, 4), protect="first:20", window=40),
    Kind("klt", 128, 2, (1.5, 2.5), protect="none"),
    Kind("klt", 128, 4, (2.5, 2.5), fold=False),
    Kind("klt", 64, 2, (3, 4)),
    Kind("klt", 96, 4, fold=False),
    Kind("klt", 80, 8, (2, 4), fold=False),
    Kind("klt", 80, 1, (4, 3)),
    Kind("klt", 96, 8, (3, 4), card=A100),
    Kind("klt", 128, 4, card=TWELVE),
    Kind("klt", 64, 8, card=SIXTEEN, window=20),
    Kind("klt", 256, 2),
    Kind("klt", 256, 1, (4, 4)),
    Kind("klt:even", 256, 3, card=GEFORCE),
    Kind("klt", 256, 8, rotary=0.25, card=GEFORCE, protect="first:20"),
    Kind("klt", 256, 12, card=A100),
    Kind("klt:even", 128, 4, (4, 4)),
    Kind("klt:even", 64, 8, (4, 4)),
    Kind("klt:even", 256, 4, (4, 4), fold=False),
    Kind("klt:even", 96, 1, (4, 2), card=GEFORCE),
    Kind("klt:even", 128, 6, (4.5, 4)),
    Kind("klt", 128, 4, card=GEFORCE),  # one stage of a whole superblock
    Kind("klt:even", 128, 8, card=GEFORCE, window=20),  # of half of one
    Kind("centred:even", 128, 4, card=GEFORCE),  # eight warps
)
NAMES = [
    f"{k.method}-{k.dim}-{k.repeats}-{k.bits[0]}{k.bits[1]}-{k.rotary:g}-{k.protect}-{k.window}-{k.card.target}"
    + (f"-{k.card.shape.warps}" if k.card.shape else "")
    for k in KINDS
]
QUICK = (0, 6, 11, 14, 17, 20, 27, 33, 36, 42, 46, 48, 51, 53, 58)  # the others are slow tests
EVERY = [pytest.param(i, id=NAMES[i], marks=() if i in QUICK else pytest.mark.slow) for i in range(len(KINDS))]


@cache
def model_of(index: int) -> Any:
    """A tiny model with two layers of a kind, rewritten."""
    kind = KINDS[index]
    torch.manual_seed(5)
    shape = dict(
        vocab_size=97,
        hidden_size=8 * KV_HEADS * kind.repeats,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=KV_HEADS * kind.repeats,
        num_key_value_heads=KV_HEADS,
        head_dim=kind.dim,
        max_position_embeddings=1024,
        pad_token_id=0,
    )
    if kind.rotary == 1.0:
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": kind.rotary}
        model = transformers.GlmForCausalLM(transformers.GlmConfig(**shape, rope_parameters=rope, attention_bias=False)).eval()
    for weight in model.parameters():
        weight.data.mul_(3.0).requires_grad_(False)
    ids = torch.randint(3, 97, (4, 256), generator=torch.Generator().manual_seed(1))
    kvsink.rewrite(
        model,
        kind.method,
        calibration=ids,
        key_bits=kind.bits[0],
        value_bits=kind.bits[1],
        protect=kind.protect,
        window=kind.window,
        fold=kind.fold,
        check=False,
    )
    return model


def layer_of(index: int, batch: int, slots: int = SLOTS) -> KVSinkLayer:
    """Its second layer's empty cache, in tiles; what no token has written is NaN."""
    return KVSinkCache.for_model(model_of(index), batch, max_length=slots, tiles=True).packed_layers()[1]


def rows(batch: int, length: int, seed: int, heads: int, dim: int, dtype: torch.dtype = torch.float16) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, heads, length, dim, generator=g) * 2 + 0.3).to(torch.float16).to(dtype)


def scores_of(layer: KVSinkLayer, batch: int, length: int, seed: int, better: float = 0.0) -> list[Tensor]:
    out: list[Tensor] = []
    for i, segment in enumerate(layer.segments):
        g = torch.Generator().manual_seed(seed + i)
        out += list((torch.randn(batch, length, generator=g) + better).topk(min(segment.count, length), dim=1))
    return out


def fill(layer: KVSinkLayer, index: int, batch: int, length: int, shift: Tensor) -> None:
    """`length` tokens by the definition; positions of row b begin at -shift[b]."""
    kind = KINDS[index]
    layer.lazy_initialization(*[rows(batch, 0, 0, KV_HEADS, kind.dim, torch.float32)] * 2) if not layer.is_initialized else None
    positions = torch.arange(length)[None] - shift
    if layer.shared.origin_cos is not None:
        from kvsink.model.frame import Frame

        layer._set_origins(Frame(), positions)
    if length:
        k, v = (rows(batch, length, s, KV_HEADS, kind.dim, torch.float32) for s in (1, 2))
        none = torch.empty(1, length, 0)
        append_ref(
            k, v, positions, none, none, scores_of(layer, batch, length, 9), layer.state(), layer.params, layer.codec_text, True
        )
    layer.length.fill_(length)


def defined(layer: KVSinkLayer, length: int, given: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    """Attention of new rows q, k, v behind `length` others, by the definition in float32."""
    for name in HELD:
        setattr(layer, name, getattr(layer, name).float())
    q, k, v = (x.float() for x in given)
    if layer.codec.ring:  # it reads the new row from the window, where `append_` has put it before
        at = length % layer.codec.ring
        layer.recent_k[:, :, at], layer.recent_v[:, :, at] = k[:, :, 0], v[:, :, 0]
        layer.recent_slot[at] = length
    return attend_ref(q, k, v, layer.state(), layer.params, mask, 0.09, False, layer.codec_text)


def kernels(layer: KVSinkLayer, index: int, blocks: int, single_rows: int = 0) -> Emulated:
    kind = KINDS[index]
    variant = launch.variant_of(layer.codec, kind.repeats, layer.codec.rotary(layer.params))
    return Emulated(variant, blocks, single_rows=single_rows, card=kind.card)


@pytest.mark.parametrize("index", EVERY)
@pytest.mark.parametrize(("batch", "length", "padded", "blocks"), [(2, 383, True, 3), (1, 300, False, 4), (1, 200, True, 2)])
def test_attention_equals_the_definition(index: int, batch: int, length: int, padded: bool, blocks: int) -> None:
    kind, layer = KINDS[index], layer_of(index, batch)
    shift = torch.arange(1, batch + 1)[:, None] * 11 if padded else torch.zeros(batch, 1, dtype=torch.int64)
    fill(layer, index, batch, length, shift)
    assert layer.codec.tiles
    scales_behind(layer, length, nan=True)
    for name in HELD:
        setattr(layer, name, getattr(layer, name).to(torch.float16))
    q = rows(batch, 1, 5, KV_HEADS * kind.repeats, kind.dim) * 0.5
    k, v = (rows(batch, 1, s, KV_HEADS, kind.dim) for s in (6, 7))
    slots = torch.arange(SLOTS)
    mask = ((slots >= shift) & (slots <= length))[:, None, None] if padded else None
    st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
    lib = kernels(layer, index, blocks)
    got = launch.attend_one(lib, layer.codec, q, k, v, st, p, mask, 0.09)
    assert got is not None and (lib.partial == -1).all()  # as the next launch expects it
    scales_behind(layer, length, nan=False)
    wanted = defined(layer, length, (q, k, v), mask)
    assert (got.float() - wanted).norm() <= 2e-3 * wanted.norm()


@pytest.mark.parametrize(("index", "length"), [(6, 2500), (7, 2000), (33, 2100), (1, 1700), (48, 1500), (51, 1300)])
def test_long_rows_equal_the_definition(index: int, length: int) -> None:
    """More superblocks than warps, two rows to a block: every warp fills its stages again and again."""
    kind, layer = KINDS[index], layer_of(index, 2, 2560)
    fill(layer, index, 2, length, torch.zeros(2, 1, dtype=torch.int64))
    for name in HELD:
        setattr(layer, name, getattr(layer, name).to(torch.float16))
    q = rows(2, 1, 5, KV_HEADS * kind.repeats, kind.dim) * 0.5
    k, v = (rows(2, 1, s, KV_HEADS, kind.dim) for s in (6, 7))
    st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
    lib = kernels(layer, index, 1)
    got = launch.attend_one(lib, layer.codec, q, k, v, st, p, None, 0.09)
    assert got is not None
    wanted = defined(layer, length, (q, k, v), None)
    assert (got.float() - wanted).norm() <= 2e-3 * wanted.norm()


@pytest.mark.parametrize("index", [48, pytest.param(49, marks=pytest.mark.slow)])
def test_whole_rows_by_warp_take_the_query_that_was_turned_ahead(index: int) -> None:
    kind, layer = KINDS[index], layer_of(index, 9)
    shift = torch.arange(9)[:, None] * 7
    fill(layer, index, 9, 300, shift)
    for name in HELD:
        setattr(layer, name, getattr(layer, name).to(torch.float16))
    q = rows(9, 1, 5, KV_HEADS * kind.repeats, kind.dim) * 0.5
    k, v = (rows(9, 1, s, KV_HEADS, kind.dim) for s in (6, 7))
    slots = torch.arange(SLOTS)
    mask = ((slots >= shift) & (slots <= 300))[:, None, None]
    st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
    variant = launch.variant_of(layer.codec, kind.repeats, layer.codec.rotary(layer.params))
    got = launch.attend_one(Emulated(variant, 1, by_warp=True), layer.codec, q, k, v, st, p, mask, 0.09)
    assert variant.ahead and got is not None
    wanted = defined(layer, 300, (q, k, v), mask)
    assert (got.float() - wanted).norm() <= 2e-3 * wanted.norm()


@pytest.mark.parametrize("index", EVERY)
@pytest.mark.parametrize(
    ("batch", "length", "new", "single_rows"), [(2, 130, 1, 0), (1, 127, 1, 0), (2, 130, 1, 2), (1, 127, 1, 1), (2, 40, 9, 2)]
)
def test_new_rows_are_stored_as_the_definition_stores_them(index: int, batch: int, length: int, new: int, single_rows: int) -> None:
    kind, layer, other = KINDS[index], layer_of(index, batch), layer_of(index, batch)
    shift = torch.arange(batch)[:, None] * 5
    for x in (layer, other):
        fill(x, index, batch, length, shift)
    k, v = (rows(batch, new, s, KV_HEADS, kind.dim, torch.float32) for s in (6, 7))
    positions, none = torch.arange(length, length + new)[None] - shift, torch.empty(1, new, 0)
    scores = scores_of(layer, batch, new, 3, better=0.5)
    append_ref(k, v, positions, none, none, scores, layer.state(), layer.params, layer.codec_text, True)
    halves = {n: getattr(other, n).to(torch.float16) for n in HELD}
    for name, t in halves.items():
        setattr(other, name, t)
    given = k.half(), v.half(), positions, none, none, scores, other.state(), other.params, other.codec, True
    launch.append(coding(*given), kernels(other, index, 2, single_rows))
    for name, mine in other.codec.named(other.state()).items():
        wanted = getattr(layer.shared if name in SHARED_NAMES else layer, name)
        sums = {"klt:even": "k", "klt": "kv"}.get(kind.method, "kv" if kind.dim in (80, 96) else "")
        if name in ("k_codes", "k_scale", "v_codes", "v_scale") and name[0] in sums:  # in another order than the definition's
            assert mine.numel() == 0 or (mine == wanted).float().mean() >= 0.998, name
            if name.endswith("codes"):  # of the new rows alone, of which a tie may turn a walk
                side = other.codec.key if name[0] == "k" else other.codec.value
                a, b = (layout.fetch(x, side.widths, name[0], side.kind, length, new) for x in (mine, wanted))
                assert (a == b).float().mean() >= 0.9, name
        elif name in ("exact_slot", "exact_score"):
            assert torch.equal(mine.sort(1)[0], wanted.sort(1)[0]), name
        elif name not in ("exact_k", "exact_v"):
            assert torch.equal(mine.float(), wanted.float()), name
    st, p = other.codec.named(other.state()), dict(zip(other.codec.param_names(), other.params, strict=True))
    other.length.fill_(length + new)
    total = length + new
    nothing = rows(batch, 0, 0, KV_HEADS, kind.dim, torch.float32)
    full = read_ref(nothing, nothing, other.state(), other.params, other.codec_text)
    got = launch.decode_rows(kernels(other, index, 2), other.codec, st, p, 3, total, torch.float16, total)
    for a, b in zip(got, full, strict=True):
        assert (a.float() - b[:, :, 3:total].float()).abs().max() <= 4e-3 * b.abs().max()


@pytest.mark.parametrize("index", [0, 13, 18])
def test_a_step_enters_the_new_row_when_every_group_has_read_the_exact_ones(index: int) -> None:
    index = {13: 3}.get(index, index)
    kind, layer = KINDS[index], layer_of(index, 2)
    fill(layer, index, 2, 140, torch.zeros(2, 1, dtype=torch.int64))
    for name in HELD:
        setattr(layer, name, getattr(layer, name).to(torch.float16))
    q = rows(2, 1, 5, KV_HEADS * kind.repeats, kind.dim) * 0.5
    k, v = (rows(2, 1, s, KV_HEADS, kind.dim) for s in (6, 7))
    zero = torch.zeros(2, 1, dtype=torch.int64)
    scores = [t for _ in layer.segments for t in (torch.full((2, 1), 1e30), zero)]
    st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
    lib = kernels(layer, index, 3)
    alone = launch.attend_one(lib, layer.codec, q, k, v, st, p, None, 0.09)
    got = launch.step_one(lib, layer.codec, q, k, v, torch.full((1, 1), 140), scores, st, p, None, 0.09)
    assert got is not None and alone is not None and torch.equal(got, alone)
    assert (layer.exact_slot == 140).any(1).all() and not lib.arrived.any()
    place = (layer.exact_slot == 140).int().argmax(1)
    for b in range(2):
        assert torch.equal(layer.exact_k[b, :, place[b]], k[b, :, 0]) and torch.equal(layer.exact_v[b, :, place[b]], v[b, :, 0])


@pytest.mark.parametrize("index", [0, 2])
def test_values_of_the_largest_size_without_an_exponent_stay_finite(index: int) -> None:
    """A logit that comes up to 2^8 above the softmax's reference weighs a step of values of this size in float16."""
    kind, layer = KINDS[index], layer_of(index, 1)
    layer.lazy_initialization(*[rows(1, 0, 0, KV_HEADS, kind.dim, torch.float32)] * 2)
    k, v = (rows(1, 200, s, KV_HEADS, kind.dim, torch.float32) for s in (1, 2))
    v = v / v.square().mean().sqrt() * LARGE_STEPS
    none, positions = torch.empty(1, 200, 0), torch.arange(200)[None]
    append_ref(k, v, positions, none, none, scores_of(layer, 1, 200, 9), layer.state(), layer.params, layer.codec_text, True)
    layer.length.fill_(200)
    for name in ("exact_k", "exact_v"):
        setattr(layer, name, getattr(layer, name).to(torch.float16))
    q = rows(1, 1, 5, KV_HEADS * kind.repeats, kind.dim) * 2
    new_k, new_v = (rows(1, 1, s, KV_HEADS, kind.dim) for s in (6, 7))
    st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
    got = launch.attend_one(kernels(layer, index, 2), layer.codec, q, new_k, new_v, st, p, None, 0.09)
    assert got is not None
    wide = [x.float() for x in (q, new_k, new_v)]
    wanted = attend_ref(*wide, layer.state(), layer.params, None, 0.09, False, layer.codec_text)
    assert (got.float() - wanted).norm() <= 2e-3 * wanted.norm()


@pytest.mark.parametrize("index", [17, 18])
@pytest.mark.parametrize("cropped", [1, 5, 31, 100])
def test_a_window_is_whole_again_behind_a_crop(index: int, cropped: int) -> None:
    kind, layer = KINDS[index], layer_of(index, 2)
    fill(layer, index, 2, 150, torch.zeros(2, 1, dtype=torch.int64))
    layer._held = 150
    layer.crop(-cropped)
    length = 150 - cropped
    for name in HELD:
        setattr(layer, name, getattr(layer, name).to(torch.float16))
    q = rows(2, 1, 5, KV_HEADS * kind.repeats, kind.dim) * 0.5
    k, v = (rows(2, 1, s, KV_HEADS, kind.dim) for s in (6, 7))
    st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
    got = launch.attend_one(kernels(layer, index, 3), layer.codec, q, k, v, st, p, None, 0.09)
    assert got is not None
    # The definition, told that nothing is in the ring: codes with exact rows laid over them, and what the window still holds.
    again = layer_of(index, 2)
    fill(again, index, 2, 150, torch.zeros(2, 1, dtype=torch.int64))
    again.recent_slot.masked_fill_(again.recent_slot >= length, -1)
    again.exact_slot.copy_(layer.exact_slot)
    again.length.fill_(length)
    wanted = attend_ref(*(x.float() for x in (q, k, v)), again.state(), again.params, None, 0.09, False, again.codec_text)
    assert (got.float() - wanted).norm() <= 2e-3 * wanted.norm()


@pytest.mark.parametrize("index", EVERY)
def test_shared_memory_is_what_the_source_takes(index: int) -> None:
    kind, layer = KINDS[index], layer_of(index, 1)
    layer.lazy_initialization(*[rows(1, 0, 0, KV_HEADS, kind.dim, torch.float32)] * 2)
    lib = kernels(layer, index, 1)
    assert lib.lib.smem_bytes() == lib.variant.shared_bytes(lib.variant.shape(kind.card)) <= kind.card.shared


@pytest.mark.parametrize("index", [27, 28, 29, 30])
def test_tiles_of_odd_widths_hold_the_rows_that_codes_in_order_hold(index: int) -> None:
    kind = KINDS[index]
    k, v = (rows(2, 150, s, KV_HEADS, kind.dim, torch.float32) for s in (1, 2))
    found = []
    for tiled in (True, False):
        cache = KVSinkCache.for_model(model_of(index), 2, max_length=SLOTS, tiles=tiled)
        layer = cache.packed_layers()[1]
        layer.lazy_initialization(*[rows(2, 0, 0, KV_HEADS, kind.dim, torch.float32)] * 2)
        positions = torch.arange(150)[None]
        none = torch.empty(1, 150, 0)
        angles = (none, none) if tiled else layer.shared.runtime.angles(1, positions)
        append_ref(k, v, positions, *angles, scores_of(layer, 2, 150, 9), layer.state(), layer.params, layer.codec_text, True)
        layer.length.fill_(150)
        nothing = rows(2, 0, 0, KV_HEADS, kind.dim, torch.float32)
        found.append([x[:, :, :150] for x in read_ref(nothing, nothing, layer.state(), layer.params, layer.codec_text)])
        assert layer.codec.tiles == tiled
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()  # a code may fall to the other side of a tie
