"""Codes in tiles: places, the definition against codes in order, and the CUDA kernels (emulated) against the definition."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import kvsink
from kvsink.cache.cache import KVSinkCache
from kvsink.cache.layer import KVSinkLayer
from kvsink.codecs import Anchors, Codec
from kvsink.errors import UnsupportedError
from kvsink.kernels import layout, prefill
from kvsink.kernels.append import append_ref
from kvsink.kernels.attend import attend_ref
from kvsink.kernels.backends import Shape
from kvsink.kernels.cuda import backend, launch, variants
from kvsink.kernels.read import read_ref
from kvsink.methods import get_method
from kvsink.model.runtime import runtime_of
from tests.states import coding

from .emulated import Emulated, scales_behind

MIXED = (4, 4, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1)
HEADS, KV_HEADS, DIM, SLOTS = 8, 2, 128, 512

CODECS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("klt:even", {"key_bits": 2, "value_bits": 2}),
    ("klt:even", {"key_bits": 2, "value_bits": 4, "fold": False, "protect": "first:2+first:1"}),
    ("centred:even", {"key_bits": 2, "value_bits": 2, "fold": False}),
    ("centred:even", {"key_bits": 4, "value_bits": 4, "protect": "none"}),
    ("centred:even", {"key_bits": 1, "value_bits": 1, "protect": "first:3"}),
    ("rtn", {"key_bits": 2, "value_bits": 2, "protect": "first:2"}),
    ("klt", {"key_bits": 2, "value_bits": 2}),
    ("klt", {"key_bits": 4, "value_bits": 4}),  # runs of 2 to 6 bits
)


def rewritten(method: str, heads: int, **options: Any) -> Any:
    """A tiny Llama with two key-value heads of 128 channels and so many query heads, rewritten."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=1024,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data.mul_(3.0).requires_grad_(False)
    ids = torch.randint(3, 97, (4, 256), generator=torch.Generator().manual_seed(1))
    kvsink.rewrite(model, method, calibration=ids, **options)
    return model


@cache
def model_of(index: int) -> Any:
    method, options = CODECS[index]
    return rewritten(method, HEADS, **options)


def summed(index: int) -> str:
    """Sides whose codes come from sums, of a projection, a gain or an error, whose order may turn a tie."""
    return {"klt:even": "k", "klt": "kv"}.get(CODECS[index][0], "")


def layer_of(index: int, batch: int = 1, tiled: bool = True, strict: bool = False) -> KVSinkLayer:
    cache = KVSinkCache.for_model(model_of(index), batch, max_length=SLOTS - 3, strict=strict, tiles=tiled)
    return cache.packed_layers()[1]


def rows(batch: int, length: int, seed: int, heads: int = KV_HEADS, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, heads, length, DIM, generator=g) * 2 + 0.3).to(torch.float16).to(dtype)


def append(layer: KVSinkLayer, k: Tensor, v: Tensor, positions: Tensor, lib: Emulated | None = None, best: float = 0.0) -> None:
    b, s = k.shape[0], k.shape[2]
    scores = []
    for i, segment in enumerate(layer.segments):
        n = min(segment.count, s)
        score = torch.randn(b, s, generator=torch.Generator().manual_seed(i + s)).add(best).topk(n, dim=1)
        scores += [score[0], score[1]]
    none = torch.empty(1, s, 0)
    if layer.shared.origin_cos is not None and int(layer.length) == 0:
        from kvsink.model.frame import Frame

        layer._set_origins(Frame(), positions)
    if lib is None:
        angles = (none, none) if layer.codec.tiles else layer.shared.runtime.angles(1, positions)
        append_ref(k, v, positions, *angles, scores, layer.state(), layer.params, layer.codec_text, True)
    else:
        launch.append(coding(k, v, positions, none, none, scores, layer.state(), layer.params, layer.codec, True), lib)


def library(layer: KVSinkLayer, blocks: int = 3, single_rows: int = 0) -> Emulated:
    return Emulated(launch.variant_of(layer.codec, HEADS // KV_HEADS), blocks, single_rows=single_rows)


WALKED = (
    (1,) * 8,
    (4, 3, 2, 2, 2, 1, 1, 1),
    (3,) * 8,
    (4, 4, 4, 3, 3, 3, 3, *(2,) * 7, *(1,) * 18),
    (2,) * 32,
    (2,) * 12,
    (4,) * 12,
    (6, 5, 4, 4, 4, 3, 3, 3),
    (5, 4, 3, 3, 3, 2, 2, 2),
)


@pytest.mark.parametrize(
    ("widths", "kind"),
    [(w, kind) for kind in ("lloyd-even", "trellis") for w in ((1,) * 16, (2,) * 16, (4,) * 16, MIXED)]
    + [(w, "trellis") for w in WALKED]
    + [(w, "lloyd-even") for w in ((5, 5, 5, *(4,) * 10, 3, 3, 3), (6, 5, 4, 4, 4, 4, 3, 2), (5, 3, 5, 3))],
)
@pytest.mark.parametrize("side", ["k", "v"])
def test_rows_come_back_from_their_places(widths: tuple[int, ...], kind: str, side: str) -> None:
    g = torch.Generator().manual_seed(0)
    gain = kind == "trellis"
    natural = torch.randint(0, 256, (2, 3, 256, sum(widths) + gain), generator=g, dtype=torch.uint8)
    codes = torch.zeros(2, 3, 256, layout.tile_bytes(widths, kind), dtype=torch.uint8)
    assert codes.shape[3] == sum(widths) + gain  # nothing is wasted
    order = torch.randperm(256, generator=g)
    layout.store(codes, natural[:, :, order], order, widths, side, kind)
    assert torch.equal(layout.fetch(codes, widths, side, kind), natural)
    assert torch.equal(layout.fetch(codes, widths, side, kind, 37, 150), natural[:, :, 37:187])
    assert codes.float().mean() > 100  # nothing is left empty


def test_a_code_of_a_known_slot_stands_where_the_matrix_unit_reads_it() -> None:
    # Slot 5 is row 2 (+ 8: odd) of fragment lane 4 * 2 + t; channel 2 t + 1 of run 0 is the high half of its second register.
    natural = torch.zeros(1, 1, 128, 32, dtype=torch.uint8)
    natural[0, 0, 5, 0] = 3 << 2 * 3  # channel 3: t = 1
    codes = torch.zeros_like(natural)
    layout.store(codes, natural, torch.arange(128), (2,) * 16, "k", "lloyd-even")
    words = codes.flatten().view(torch.int32).reshape(8, 32, 4)
    assert words.nonzero().tolist() == [[0, 2 * 4 + 1, 2]] and int(words[0, 9, 2]) == 3 << 16


def test_bits_of_a_walk_stand_by_the_order_of_its_steps() -> None:
    # The same slot and channel, 3 at step 9, gain 77: the lowest bit in the first of the row's two words, the next in the second.
    natural = torch.zeros(1, 1, 128, 33, dtype=torch.uint8)
    natural[0, 0, 5, 2 * 9], natural[0, 0, 5, 32] = 3 << 2 * 3, 77
    codes = torch.zeros_like(natural)
    layout.store(codes, natural, torch.arange(128), (2,) * 16, "k", "trellis")
    words, gains = codes.flatten()[: 128 * 32].view(torch.int32).reshape(8, 32, 4), codes.flatten()[128 * 32 :]
    assert words.nonzero().tolist() == [[0, 9, 2], [0, 9, 3]] and words[0, 9, 2:].tolist() == [1 << 16 + 9] * 2
    assert gains.nonzero().tolist() == [[5]] and int(gains[5]) == 77


def refusal(codec: Codec, heads: int = HEADS, kv_heads: int = KV_HEADS, dim: int = DIM, rotary: int = DIM) -> str:
    """Why the kernels do not serve a codec on any device."""
    return backend.declines(codec.format.in_tiles(), Shape(heads, kv_heads, dim, dim, rotary, torch.float16), None)


def test_refusals_name_the_reason() -> None:
    codec = layer_of(0).codec
    assert refusal(codec) == ""
    assert refusal(codec, dim=48, rotary=48) == "head_dim is 48, not one of 64, 80, 96, 128, 256"
    assert "more than 32 each" in refusal(codec, 64, 1)
    assert "24 of 128 channels" in refusal(codec, rotary=24)
    wide = replace(codec, value=replace(codec.value, bits=7, widths=(7,) * 16))
    assert refusal(wide) == "uniform values of 7 bits, not of 1 to 6 and 8"
    for widths, found in (((8,) * 16, "8"), ((3, 2, *(1,) * 12, 0, 0), "0 to 3"), ((7, *(4,) * 15), "4 to 7")):
        keys = replace(codec, key=replace(codec.key, bits=float(sum(widths)) / 16, widths=widths))
        assert refusal(keys) == f"lloyd-even keys of {found} bits, not of 1 to 6"
    odd = replace(codec, key=replace(codec.key, bits=1.0625, widths=(2, *(1,) * 15)))
    assert refusal(odd) == "keys of 1.0625 bits in 128 channels do not fill whole words"
    assert refusal(replace(codec, window=513)) == "a window of 513 recent rows, more than 512"
    assert refusal(replace(codec, segments=(65,))) == "65 exact rows, more than 64"
    in_rows = replace(codec, tiles=False).format
    assert backend.declines(in_rows, Shape(8, 2, 128, 128, 128, torch.float16), None) == "codes in rows of bytes"


def test_codes_of_one_width_are_refused_where_they_do_not_fill_words() -> None:
    refused = set()
    for dim in backend.DIMS:
        for bits in (1, 2, 3, 4, 5, 6, 8):
            sides = [get_method("centred:even").side(name, bits).resolved(KV_HEADS, dim) for name in ("key", "value")]
            if reason := refusal(Codec(*sides), dim=dim, rotary=dim):
                assert reason == f"keys of {bits} bits in {dim} channels do not fill whole words"
                refused.add((dim, bits))
    assert refused == {(64, 3), (80, 1), (96, 1), *((dim, 6) for dim in backend.DIMS)}


@pytest.mark.parametrize(
    ("method", "bits", "reason"),
    [
        ("klt:best", (2, 4), "lloyd keys before RoPE"),
        ("klt:codebooks", (1, 4), "keys in codebooks"),
        ("klt:codebooks", (2, 2), "values in codebooks"),
        ("centred", (2, 4), "gauss values"),
        ("kivi", (2, 2), "keys with ranges along tokens"),
        ("kvquant", (3, 3), "keys with free code points"),
        ("kvquant-1%", (3, 3), "keys with sparse outliers"),
        ("rotatekv", (2, 2), "uniform-int keys before RoPE"),
        ("akvq-vl", (2, 2), "uniform-int keys after RoPE"),
    ],
)
def test_what_holds_more_than_codes_per_row_is_refused(method: str, bits: tuple[int, int], reason: str) -> None:
    declared = get_method(method)
    sides = [declared.side(name, b).resolved(KV_HEADS, DIM) for name, b in zip(("key", "value"), bits, strict=True)]
    assert refusal(Codec(*sides, window=declared.window)).startswith(reason)


def test_rows_beside_the_codes_are_refused() -> None:
    codec = layer_of(3).codec
    assert refusal(codec) == ""
    normed = replace(codec, key=replace(codec.key, axis="channel", center=False, group_tokens=32, flush=32, norm=True))
    for other, reason in (
        (replace(codec, anchors=Anchors(rows=2)), "anchors"),
        (replace(codec, window=600), "a window"),
        (replace(codec, value=replace(codec.value, newest=8)), "recent values"),
        (normed, "keys with a norm of each token"),
    ):
        assert refusal(other).startswith(reason)


@pytest.mark.parametrize("new", [1, 4])
def test_the_one_op_passes_opcheck(new: int) -> None:
    layer = layer_of(2, 2)
    append(layer, rows(2, 9, 1), rows(2, 9, 2), torch.arange(9)[None])
    layer.length.fill_(9)
    scores: list[Tensor] = []
    for i, segment in enumerate(layer.segments):
        scores += list(torch.randn(2, new, generator=torch.Generator().manual_seed(i)).topk(min(segment.count, new), dim=1))
    mask = torch.ones(2, 1, new, SLOTS, dtype=torch.bool).tril(9)
    given = (
        rows(2, new, 5, HEADS),
        rows(2, new, 6),
        rows(2, new, 7),
        torch.arange(9, 9 + new)[None],
        scores,
        layer.state(),
        layer.params,
        mask,
        0.09,
        False,
        layer.codec_text,
        [],
    )
    results = torch.library.opcheck(torch.ops.kvsink.append_attend_.default, given)
    assert set(results.values()) == {"SUCCESS"}


def test_a_cache_in_tiles_is_rounded_up_and_says_so_in_its_codec() -> None:
    layer = layer_of(0)
    assert layer.max_length == SLOTS and Codec.parse(layer.codec_text).tiles
    assert not layer_of(0, tiled=False).codec.tiles and layer_of(0, tiled=False).max_length == SLOTS - 3


@pytest.mark.parametrize("index", range(len(CODECS)))
def test_tiles_hold_the_rows_that_codes_in_order_hold(index: int) -> None:
    tiled, plain = layer_of(index, 2), layer_of(index, 2, tiled=False)
    for layer in (tiled, plain):
        for start, n in ((0, 150), (150, 1), (151, 70)):
            k, v = rows(2, n, start), rows(2, n, start + 7)
            append(layer, k, v, torch.arange(start, start + n)[None])
            layer.length.fill_(start + n)
    nothing = rows(2, 0, 0)
    held = [read_ref(nothing, nothing, x.state(), x.params, x.codec_text) for x in (tiled, plain)]
    for a, b in zip(held[0], held[1], strict=True):
        close = (a[:, :, :221] - b[:, :, :221]).abs() <= 1e-3
        assert close.float().mean() >= 0.999  # a tie may fall to the other side


def test_rows_with_left_padding_are_coded_like_rows_without() -> None:
    padded, plain = layer_of(0, 1), layer_of(0, 1)
    k, v = rows(1, 100, 3), rows(1, 100, 4)
    append(plain, k, v, torch.arange(100)[None])
    shift = 37
    wide_k, wide_v = (torch.cat([torch.zeros(1, KV_HEADS, shift, DIM), x], 2) for x in (k, v))
    positions = torch.cat([torch.zeros(1, shift, dtype=torch.int64), torch.arange(100)[None]], 1)
    from kvsink.model.frame import Frame

    padded._set_origins(Frame(valid=torch.arange(shift + 100)[None] >= shift), positions)
    none = torch.empty(1, shift + 100, 0)
    score = [torch.full((1, 1), float("-inf")), torch.zeros(1, 1, dtype=torch.int64)] * len(padded.segments)
    append_ref(wide_k, wide_v, positions, none, none, score, padded.state(), padded.params, padded.codec_text, True)
    st = [x.codec.named(x.state()) for x in (padded, plain)]
    p = [dict(zip(x.codec.param_names(), x.params, strict=True)) for x in (padded, plain)]
    a, b = (x.codec.read_keys(s, q, 0, SLOTS) for x, s, q in zip((padded, plain), st, p, strict=True))
    error = [((x - k).square().sum() / k.square().sum()).sqrt() for x in (a[:, :, shift : shift + 100], b[:, :, :100])]
    assert error[0] <= 1.1 * error[1]


# -- kernels, emulated ----------------------------------------------------------------------------------------------------


def decoded(layer: KVSinkLayer, end: int) -> tuple[Tensor, Tensor]:
    st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
    return layer.codec.read_keys(st, p, 0, end), layer.codec.read_values(st, p, 0, end)


def decoded_by(lib: Emulated, layer: KVSinkLayer, end: int) -> tuple[Tensor, Tensor]:
    """The same by the kernel, in float32's place float16; exact rows are left aside."""
    st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
    st = {**st, "exact_slot": torch.full_like(st["exact_slot"], -1)}
    return launch.decode_rows(lib, layer.codec, st, p, 0, end, torch.float16, end)


@pytest.mark.sample(3)
@pytest.mark.parametrize("single_rows", [0, 2])
@pytest.mark.parametrize("index", range(len(CODECS)))
def test_the_append_kernels_store_what_the_definition_stores(index: int, single_rows: int) -> None:
    mine, wanted = layer_of(index, 2), layer_of(index, 2)
    for layer in (mine, wanted):  # the kernel takes 16-bit rows only; the numbers are the same in both
        layer.exact_k, layer.exact_v = layer.exact_k.half(), layer.exact_v.half()
    lib, end = library(mine, single_rows=single_rows), 0
    for n, best in ((70, 0.0), (1, 3.0), (1, -9.0), (1, 9.0)):
        k, v = rows(2, n, end, dtype=torch.float16), rows(2, n, end + 7, dtype=torch.float16)
        v = v.transpose(1, 2).contiguous().transpose(1, 2)  # as a projection leaves it
        positions = torch.arange(end, end + n)[None]
        append(mine, k, v, positions, lib, best)
        append(wanted, k, v, positions, None, best)
        end += n
        for layer in (mine, wanted):
            layer.length.fill_(end)
    for name in ("k_codes", "k_scale", "v_codes", "v_scale"):
        a, b = getattr(mine, name), getattr(wanted, name)
        assert torch.equal(a, b) or (name[0] in summed(index) and (a == b).float().mean() >= 0.999), name
    assert torch.equal(mine.shared.positions, wanted.shared.positions)
    for a, b in zip(decoded(mine, end), decoded(wanted, end), strict=True):
        assert ((a - b).abs() <= 2e-3).float().mean() >= 0.999
    at = 0
    for count in mine.codec.segments:  # the same rows with the same scores, in any order
        part = slice(at, at + count)
        for b in range(2):
            order = [x.exact_score[b, part].argsort() for x in (mine, wanted)]
            scores = [x.exact_score[b, part][o] for x, o in zip((mine, wanted), order, strict=True)]
            assert torch.equal(*scores)
            named = [
                torch.where(x.exact_slot < -1, -x.exact_slot - 2, x.exact_slot)[b, part][o]
                for x, o in zip((mine, wanted), order, strict=True)
            ]
            assert torch.equal(*named)
            keys = [x.exact_k[b, :, part][:, o] for x, o in zip((mine, wanted), order, strict=True)]
            assert torch.equal(*keys)
        at += count
    seen = [sorted(x.exact_slot[b][x.exact_slot[b] >= 0].tolist()) for x in (mine, wanted) for b in range(2)]
    assert seen[:2] == seen[2:] and all(len(set(s)) == len(s) for s in seen)


@pytest.mark.parametrize("index", range(len(CODECS)))
def test_rows_of_any_size_are_coded_one_by_one_as_by_the_definition(index: int) -> None:
    mine, wanted = layer_of(index, 2), layer_of(index, 2)
    sizes = (0.0, 1e-7, 1e-3, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 30.0, 1e3, 6e3)
    lib = library(mine, single_rows=2)
    for end, size in enumerate(sizes):
        k, v = (rows(2, 1, seed, dtype=torch.float16) * size for seed in (end, end + 50))
        k[1, :, :, 3:90] = 0  # ties and thresholds
        for layer, by in ((mine, lib), (wanted, None)):
            layer.exact_k, layer.exact_v = layer.exact_k.half(), layer.exact_v.half()
            append(layer, k, v, torch.tensor([[end]]), by)
            layer.length.fill_(end + 1)
    for side, spec in (("k", mine.codec.key), ("v", mine.codec.value)):
        close, held = side in summed(index), (getattr(x, f"{side}_codes") for x in (mine, wanted))
        a, b = (layout.fetch(x, spec.widths, side, spec.kind, 0, len(sizes)) for x in held)
        assert (a == b).float().mean() >= (0.999 if close else 1.0)
        a, b = (getattr(x, f"{side}_scale")[:, :, : len(sizes)].float() for x in (mine, wanted))
        assert ((a - b).abs() <= (2**-10 * b.abs() if close else 0)).all()
    assert torch.equal(mine.shared.positions, wanted.shared.positions)


@pytest.mark.parametrize("single_rows", [0, 1])
@pytest.mark.parametrize("index", [6, 7])
def test_a_row_of_a_trellis_that_is_not_finite_reads_as_not_a_number(index: int, single_rows: int) -> None:
    mine, wanted = layer_of(index, 1), layer_of(index, 1)
    k, v = rows(1, 3, 1, dtype=torch.float16), rows(1, 3, 2, dtype=torch.float16)
    k[0, 1, 1, 7], v[0, 0, 2, 9], v[0, 1, 0] = float("inf"), float("nan"), 0.0
    mean = dict(zip(mine.codec.param_names(), mine.params, strict=True))["v_mean"]
    v[0, 1, 0] = mean[1]  # a row of zeros, but for its rounding
    for layer, by in ((mine, library(mine, single_rows=single_rows)), (wanted, None)):
        layer.exact_k, layer.exact_v = layer.exact_k.half(), layer.exact_v.half()
        for i in range(3):
            append(layer, k[:, :, i : i + 1], v[:, :, i : i + 1], torch.tensor([[i]]), by)
            layer.length.fill_(i + 1)
    assert library(mine).variant.single_row
    for side, spec, at in (("k", mine.codec.key, (1, 1)), ("v", mine.codec.value, (0, 2))):
        a, b = (layout.fetch(getattr(x, f"{side}_codes"), spec.widths, side, spec.kind, 0, 3)[0, ..., -1] for x in (mine, wanted))
        assert torch.equal(a, b) and (a == 255).nonzero().tolist() == [list(at)]
    got = decoded_by(library(mine), mine, 3)
    for x, head, row in ((got[0], 1, 1), (got[1], 0, 2)):
        assert x[0, head, row].isnan().all() and x.isnan().sum() == DIM


@pytest.mark.parametrize("single_rows", [0, 1])
@pytest.mark.parametrize("index", [0, 2, 5, 6])
def test_a_row_behind_the_last_slot_is_dropped(index: int, single_rows: int) -> None:
    layer = layer_of(index, 1)
    append(layer, rows(1, 9, 1), rows(1, 9, 2), torch.arange(9)[None])
    layer.length.fill_(SLOTS)
    before = [t.clone() for t in layer.state()]
    new = rows(1, 1, 3, dtype=torch.float16)
    append(layer, new, new, torch.tensor([[SLOTS]]), library(layer, single_rows=single_rows), best=9.0)
    assert all(torch.equal(a, b) for a, b in zip(layer.state(), before, strict=True))


@pytest.mark.parametrize("index", range(len(CODECS)))
def test_the_decode_kernel_reads_what_the_definition_reads(index: int) -> None:
    layer = layer_of(index, 2)
    k, v = rows(2, 200, 1), rows(2, 200, 2)
    append(layer, k, v, torch.arange(200)[None] - torch.tensor([[0], [9]]))
    layer.length.fill_(200)
    layer.exact_k, layer.exact_v = layer.exact_k.half(), layer.exact_v.half()
    st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
    got = launch.decode_rows(library(layer), layer.codec, st, p, 37, 199, torch.float16, 300)
    nothing = rows(2, 0, 0)
    wanted = read_ref(nothing, nothing, layer.state(), layer.params, layer.codec_text)
    for a, b in zip(got, wanted, strict=True):
        b = b[:, :, 37:199]
        assert (a.float() - b).abs().max() <= 2e-3 * b.abs().max()


CASES = [
    (0, 1, 300, None, 3),
    (0, 3, 130, "padding", 2),
    (1, 2, 257, "padding", 4),
    (2, 2, 300, "random", 3),
    (3, 1, 128, "one", 2),
    (4, 2, 200, None, 1),
    (5, 2, 383, "padding", 5),
    (2, 1, 0, None, 2),
    (2, 1, 300, None, 7),
    # a block for each superblock of one sequence: those behind its last token have nothing to do
    (0, 1, 0, None, 4),
    (1, 1, 511, "random", 9),
    (2, 1, 40, None, 4),
    (3, 1, 128, "one", 4),
    (5, 1, 256, "padding", 4),
    (6, 2, 300, "padding", 3),
    (6, 1, 383, None, 4),
    (6, 1, 511, "random", 9),
    (7, 2, 300, "padding", 3),
    (7, 1, 383, None, 4),
]


@pytest.mark.parametrize("widths", [(6,) * 8 + (2,) * 8, (5,) * 8 + (3,) * 8, (6, 2) * 8])
def test_wide_runs_are_read_wherever_they_stand(widths: tuple[int, ...]) -> None:
    """Runs of 5 and 6 bits in both halves of a byte of indices, as models with flat spectra have them."""
    model = rewritten("klt", HEADS, key_bits=4, value_bits=4)
    runtime = runtime_of(model)
    runtime.plans = tuple(
        replace(plan, codec=replace(plan.codec, key=replace(plan.codec.key, widths=widths))) for plan in runtime.plans
    )
    layer = KVSinkCache.for_model(model, 1, max_length=SLOTS - 3, tiles=True).packed_layers()[1]
    append(layer, rows(1, 200, 1), rows(1, 200, 2), torch.arange(200)[None])
    layer.length.fill_(200)
    layer.exact_k, layer.exact_v = layer.exact_k.half(), layer.exact_v.half()
    q, k, v = rows(1, 1, 5, HEADS, torch.float16) * 0.5, rows(1, 1, 6, dtype=torch.float16), rows(1, 1, 7, dtype=torch.float16)
    st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
    got = launch.attend_one(library(layer), layer.codec, q, k, v, st, p, None, 0.09)
    assert got is not None
    layer.exact_k, layer.exact_v = layer.exact_k.float(), layer.exact_v.float()
    wanted = attend_ref(q.float(), k.float(), v.float(), layer.state(), layer.params, None, 0.09, False, layer.codec_text)
    assert (got.float() - wanted).norm() <= 2e-3 * wanted.norm()


@pytest.mark.parametrize(("index", "batch", "length", "kind", "blocks"), CASES)
def test_the_attend_kernel_equals_the_definition(index: int, batch: int, length: int, kind: str | None, blocks: int) -> None:
    layer = layer_of(index, batch)
    dtype = torch.bfloat16 if index == 3 else torch.float16
    shift = torch.arange(batch)[:, None] * 11 if kind == "padding" else torch.zeros(batch, 1, dtype=torch.int64)
    if length:
        append(layer, rows(batch, length, 1), rows(batch, length, 2), torch.arange(length)[None] - shift)
    layer.length.fill_(length)
    scales_behind(layer, length, nan=True)
    for name in ("exact_k", "exact_v"):
        held = getattr(layer, name).to(dtype)
        setattr(layer, name, torch.where((layer.exact_slot < 0)[:, None, :, None], float("nan"), held))
    q = rows(batch, 1, 5, HEADS, dtype) * 0.5
    k, v = rows(batch, 1, 6, dtype=dtype), rows(batch, 1, 7, dtype=dtype)
    if index == 0 and batch == 1:  # the new row has entered the exact ones: it counts once
        layer.exact_slot[:, 0], layer.exact_k[:, :, 0], layer.exact_v[:, :, 0] = length, k[:, :, 0], v[:, :, 0]
    slots, mask = torch.arange(SLOTS), None
    if kind == "padding":
        mask = ((slots >= shift) & (slots <= length))[:, None, None]
    elif kind == "random":
        mask = (torch.rand(batch, 1, 1, SLOTS, generator=torch.Generator().manual_seed(3)) > 0.4) & (slots <= length)
    elif kind == "one":
        mask = (slots <= length)[None, None, None].expand(batch, 1, 1, SLOTS)
    st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
    lib = library(layer, blocks)
    got = launch.attend_one(lib, layer.codec, q, k, v, st, p, mask, 0.09)
    assert got is not None and (lib.partial == -1).all()  # as the next launch expects it
    scales_behind(layer, length, nan=False)
    for name in ("exact_k", "exact_v"):
        setattr(layer, name, getattr(layer, name).float().nan_to_num(0.0))
    wide = [x.float() for x in (q, k, v)]
    wanted = attend_ref(*wide, layer.state(), layer.params, mask, 0.09, False, layer.codec_text)
    if index == 0 and batch == 1:
        assert (layer.exact_slot == length).any()
    error = (got.float() - wanted).norm() / wanted.norm()
    assert error <= (4e-3 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("method", ["klt:even", "klt"])
def test_keys_coded_in_a_basis_that_is_not_orthogonal_are_read_in_their_own(method: str) -> None:
    model = rewritten(method, HEADS, key_bits=2, value_bits=2, protect="none")
    runtime = runtime_of(model)
    turned = runtime.tables["layers.1.k_basis"]
    bent = turned @ (torch.eye(DIM) + 0.05 * torch.randn(KV_HEADS, DIM, DIM, generator=torch.Generator().manual_seed(4)))
    back = torch.linalg.inv(bent.double()).mT.float()
    runtime.tables.update({"layers.1.k_basis": bent, "layers.1.k_unbasis": back})
    layer = KVSinkCache.for_model(model, 1, max_length=SLOTS, tiles=True).packed_layers()[1]
    c, length = layer.codec, 200
    append(layer, rows(1, length, 1), rows(1, length, 2), torch.arange(length)[None])
    layer.length.fill_(length)
    for name in ("exact_k", "exact_v"):
        setattr(layer, name, getattr(layer, name).half())
    st, p = c.named(layer.state()), dict(zip(c.param_names(), layer.params, strict=True)) | {"k_unbasis": back}
    slots, wide = torch.arange(length), rows(1, length, 1).double()
    exact = layout.restore_keys(layout.transform_keys(wide, slots, c.key, p, None), slots, c.key, p, None)
    assert (exact - wide).norm() <= 1e-5 * wide.norm()  # `back` is rounded to float32
    z = c._stored(st, c.key, p, "k", 0, length)
    mean = p["k_table"][:, slots % 64].double()
    y = torch.linalg.solve(bent.double(), z.double(), left=False) + mean  # z = y bent, in units of the block's rotation
    held = [layout._rotated(y, slots, p, back=False), c.read_values(st, p, 0, length)]
    lib = library(layer)
    got = launch.decode_rows(lib, c, st, p, 0, length, torch.float16, length)
    for a, b in zip(got, held, strict=True):
        assert (a.double() - b).abs().max() <= 2e-3 * b.abs().max()
    q = rows(1, 1, 5, HEADS, torch.float16) * 0.5
    k, v = rows(1, 1, 6, dtype=torch.float16), rows(1, 1, 7, dtype=torch.float16)
    out = launch.attend_one(lib, c, q, k, v, st, p, None, 0.09)
    pairs = zip(held, (k, v), strict=True)
    full_k, full_v = (torch.cat([a.double(), b.double()], 2).repeat_interleave(HEADS // KV_HEADS, 1) for a, b in pairs)
    wanted = (0.09 * q.double() @ full_k.mT).softmax(-1) @ full_v
    assert out is not None and (out - wanted).norm() <= 2e-3 * wanted.norm()


def test_another_mask_is_left_to_the_definition() -> None:
    layer = layer_of(3)
    st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
    q, k = rows(1, 1, 1, HEADS, torch.float16), rows(1, 1, 2, dtype=torch.float16)
    bias = torch.zeros(1, 1, 1, SLOTS)
    assert launch.attend_one(library(layer), layer.codec, q, k, k, st, p, bias, 1.0) is None


@pytest.mark.parametrize(("strict", "masked"), [(False, False), (False, True), (True, False)])
def test_a_chunk_attends_over_past_and_new_rows(strict: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(0, 2, strict=strict)
    append(layer, rows(2, 200, 1), rows(2, 200, 2), torch.arange(200)[None])
    layer.length.fill_(200)
    k, v, q = rows(2, 33, 3), rows(2, 33, 4), rows(2, 33, 5, HEADS)
    append(layer, k, v, torch.arange(200, 233)[None])
    mask = None
    if masked:
        slots = torch.arange(SLOTS)
        mask = ((slots <= torch.arange(200, 233)[:, None]) & (slots >= 9))[None, None].expand(2, -1, -1, -1)
    monkeypatch.setattr(prefill, "_DECODED_BYTES", 1)

    def past(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        full_k, full_v = read_ref(k, v, layer.state(), layer.params, layer.codec_text)
        return full_k[:, :, start:end], full_v[:, :, start:end]

    got = prefill.attend_chunk(past, q, k, v, 200, mask, 0.09, False, strict)
    wanted = attend_ref(q, k, v, layer.state(), layer.params, mask, 0.09, False, layer.codec_text)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("index", range(len(CODECS)))
def test_shared_memory_is_what_the_source_takes(index: int) -> None:
    variant = launch.variant_of(layer_of(index).codec, 4)
    shape = variant.shape(variants.Card())
    assert library(layer_of(index)).lib.smem_bytes() == variant.shared_bytes(shape) <= variants.SHARED_LIMIT


@pytest.mark.parametrize("index", [0, 6])
def test_a_tiled_cache_is_saved_and_read_again(index: int, tmp_path: Any) -> None:
    model = model_of(index)
    cache = KVSinkCache.for_model(model, 2, max_length=300, tiles=True)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.save(tmp_path / "c.safetensors")
        again = KVSinkCache.load(tmp_path / "c.safetensors", model, max_length=300)
        mask = torch.cat([mask, mask[:, -1:]], 1)
        a, b = (model(ids[:, :1], attention_mask=mask, past_key_values=c).logits for c in (cache, again))
    assert torch.equal(a, b)


@pytest.mark.parametrize("index", [0, 6])
def test_beams_move_codes_and_anchors_alike(index: int) -> None:
    model = model_of(index)
    cache = KVSinkCache.for_model(model, 2, max_length=300, tiles=True)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        one = torch.cat([mask, mask[:, -1:]], 1)
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = model(ids[[1, 0], :1], attention_mask=one[[1, 0]], past_key_values=cache).logits
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0]))
        straight = model(ids[:, :1], attention_mask=one, past_key_values=cache).logits
    assert (swapped[[1, 0]] - straight).abs().max() <= 1e-4 * straight.abs().max()


@pytest.mark.parametrize("index", [0, 6])
@torch.no_grad()
def test_joined_rows_move_by_whole_tiles(index: int) -> None:
    """Codes move with their tiles and the anchors with their rows: every row says what it says alone."""
    model = model_of(index)
    ids = torch.randint(3, 97, (2, 170), generator=torch.Generator().manual_seed(8))
    caches = [KVSinkCache.for_model(model, 1, max_length=300, tiles=True) for _ in range(3)]
    padded = torch.ones(1, 40, dtype=torch.int64)
    padded[0, :7] = 0
    model(ids[:1, :168], past_key_values=caches[0])
    model(ids[1:, :40], attention_mask=padded, position_ids=(padded.cumsum(1) - 1).clamp_min(0), past_key_values=caches[1])
    model(ids[1:, :45], past_key_values=caches[2])
    with pytest.raises(UnsupportedError, match="differ by 123, and 128 tokens are coded or stored together"):
        caches[0].batch_join(caches[2])
    alone = []
    for i, (start, mask) in enumerate(((168, torch.ones(1, 169)), (33, F.pad(padded, (0, 1), value=1)))):
        said = []
        for _ in range(2):  # the second time after a crop: the caches are as they were
            place = torch.tensor([[start]])
            out = model(ids[i : i + 1, 168:169], attention_mask=mask, position_ids=place, past_key_values=caches[i])
            said.append(out.logits)
            caches[i].crop(-1)
        assert torch.equal(*said)
        alone.append(said[0])
    assert caches[0].batch_join(caches[1]) == (0, 128)
    mask = torch.ones(2, 169)
    mask[1, :135] = 0
    out = model(ids[:, 168:169], attention_mask=mask, position_ids=torch.tensor([[168], [33]]), past_key_values=caches[0])
    for row, wanted in zip(out.logits, alone, strict=True):
        assert (row - wanted[0]).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(
    ("index", "batch", "length", "blocks", "best"),
    [
        (0, 1, 300, 3, 9.0),
        (0, 3, 255, 2, -9.0),
        (1, 7, 130, 2, 9.0),
        (2, 2, 300, 4, 9.0),
        (3, 9, 128, 1, 0.0),
        (4, 2, 0, 2, 9.0),
        (6, 3, 255, 2, 9.0),
        (7, 3, 255, 2, 9.0),
    ],
)
def test_a_step_stores_the_new_row_and_attends_in_one_launch(index: int, batch: int, length: int, blocks: int, best: float) -> None:
    mine, wanted = layer_of(index, batch), layer_of(index, batch)
    for layer in (mine, wanted):
        layer.exact_k, layer.exact_v = layer.exact_k.half(), layer.exact_v.half()
        if length:
            append(layer, rows(batch, length, 1), rows(batch, length, 2), torch.arange(length)[None])
        layer.length.fill_(length)
    q = rows(batch, 1, 5, HEADS, torch.float16) * 0.5
    k, v = rows(batch, 1, 6, dtype=torch.float16), rows(batch, 1, 7, dtype=torch.float16)
    positions = torch.full((batch, 1), length)
    scores: list[Tensor] = []
    for i, _ in enumerate(mine.codec.segments):
        score = torch.randn(batch, 1, generator=torch.Generator().manual_seed(i)) + best
        scores += [score, torch.zeros(batch, 1, dtype=torch.int64)]
    mask = (torch.arange(SLOTS) <= length)[None, None, None]
    wide = [x.float() for x in (q, k, v)]
    expected = attend_ref(*wide, wanted.state(), wanted.params, mask, 0.09, False, wanted.codec_text)
    none = torch.empty(1, 1, 0)
    append_ref(k, v, positions, none, none, scores, wanted.state(), wanted.params, wanted.codec_text, True)
    st, p = mine.codec.named(mine.state()), dict(zip(mine.codec.param_names(), mine.params, strict=True))
    lib = library(mine, blocks)
    got = launch.step_one(lib, mine.codec, q, k, v, positions, scores, st, p, mask, 0.09)
    assert got is not None and (got.float() - expected).norm() <= 2e-3 * expected.norm()
    assert (lib.partial == -1).all() and not lib.arrived.any()
    for a, b in zip(decoded(mine, length + 1), decoded(wanted, length + 1), strict=True):
        assert ((a - b).abs() <= 2e-3).float().mean() >= 0.999
    for name in ("v_codes", "v_scale"):
        assert torch.equal(getattr(mine, name), getattr(wanted, name))
    assert torch.equal(mine.shared.positions, wanted.shared.positions)
    assert torch.equal(mine.exact_slot.sort(1)[0], wanted.exact_slot.sort(1)[0])
    assert torch.equal(mine.exact_score.sort(1)[0], wanted.exact_score.sort(1)[0])
    order = [x.exact_score.argsort(1)[:, None, :, None].expand_as(x.exact_k) for x in (mine, wanted)]
    assert torch.equal(mine.exact_k.gather(2, order[0]), wanted.exact_k.gather(2, order[1]))


def test_a_step_whose_rows_are_read_from_their_codes_is_left_to_two_launches() -> None:
    layer = layer_of(2, 2)
    st, p = layer.codec.named(layer.state()), dict(zip(layer.codec.param_names(), layer.params, strict=True))
    q, k = rows(2, 1, 1, HEADS, torch.float16), rows(2, 1, 2, dtype=torch.float16)
    scores = [torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64)] * len(layer.codec.segments)
    call = (q, k, k, torch.zeros(2, 1, dtype=torch.int64), scores, st, p, None, 1.0)
    assert launch.step_one(library(layer), replace(layer.codec, strict=True), *call) is None
    assert launch.step_one(library(layer), layer.codec, *call) is not None


def test_gains_of_two_bytes_are_those_of_the_formula() -> None:
    """g = 2^(e - 9) (1 + f / 16) of 4 and 4 bits; 0 is no gain, 255 not a number."""
    read, out = library(layer_of(6, 1)).lib.read_gains, (ctypes.c_float * 2)()

    def wanted(byte: int) -> float:
        return math.nan if byte == 255 else 0.0 if byte == 0 else 2.0 ** (byte // 16 - 9) * (1 + byte % 16 / 16)

    for byte in range(256):
        read(out, byte | (byte * 7 + 3) % 256 << 8)
        for got, known in zip(out, (wanted(byte), wanted((byte * 7 + 3) % 256)), strict=True):
            assert got == known or (math.isnan(got) and math.isnan(known))
