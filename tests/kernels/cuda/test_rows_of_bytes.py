"""The CUDA kernel for codes in rows of bytes equals the definition: emulated on a CPU (see emulated.py), natively on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsink.cache.cache import KVSinkCache
from kvsink.codecs import Codec
from kvsink.kernels import append_attend, backends
from kvsink.kernels.attend import attend_ref
from kvsink.kernels.cuda import rows_of_bytes
from kvsink.tools.bench_model import Shape, llama, rewritten
from tests import states

from .emulated import EmulatedCodes

SLOTS, KV, SCALE = 320, 2, 0.09
BOUND = {torch.float16: 2e-3, torch.bfloat16: 5e-3}  # relative error of an output: the rounding of its products and its own
KLT = ("klt:best-2/4", "klt:codebooks-2", "klt:codebooks-dense-2", "klt:best-dense-2/4", "klt:codebooks-1/2")
SIDES = (*KLT, "klt:even-1", "cq-2", "cq-1", "centred-2", "rtn-4", "centred-1/4")


@cache
def decoder(repeats: int) -> Any:
    torch.manual_seed(0)
    return llama(1, torch.float32, 64, 2048, Shape(64, 64, 2, 1e4, 64 * repeats, KV * repeats, 128), "cpu")


@cache
def codes_of(side: str, repeats: int) -> Any:
    return rewritten(decoder(repeats), side, "first:3")


def filled(side: str, repeats: int, batch: int, length: int, pad: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """A layer behind `length` rows and a new one; rows of the batch are padded on the left by `pad`."""
    layer = KVSinkCache.for_model(codes_of(side, repeats)(), batch, SLOTS).packed_layers()[0]
    g = torch.Generator().manual_seed(length)
    k, v = (torch.randn(batch, KV, length + 1, 128, generator=g) for _ in range(2))
    shift = torch.tensor(pad)[:, None]
    for a, b in ((0, length), (length, length + 1)):
        positions = (torch.arange(a, b)[None] - shift).clamp_min(0)
        cos, sin = layer.shared.runtime.angles(0, positions)
        rows = torch.arange(max(0, b - a - 3), b - a).expand(batch, -1)
        scores = [torch.randn(batch, rows.shape[1], generator=g), rows]
        states.append_(k[:, :, a:b], v[:, :, a:b], positions, cos, sin, scores, layer.state(), layer.params, layer.codec_text, True)
        if a == 0:
            layer.length.fill_(length)
    q = torch.randn(batch, KV * repeats, 1, 128, generator=g).to(dtype)
    return layer, q, k[:, :, -1:].to(dtype), v[:, :, -1:].to(dtype)


def compared(layer: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, blocks: int = 3) -> float:
    codec = Codec.parse(layer.codec_text)
    held = ("exact_k", "exact_v", "recent_k", "recent_v")
    st = {n: x.to(q.dtype) if n in held else x.clone() for n, x in codec.named(layer.state()).items()}
    p = dict(zip(codec.param_names(), layer.params, strict=True))
    made = rows_of_bytes.variant_of(codec.format, states.shape_of(k, q.shape[1]))
    assert not isinstance(made, str), made
    assert rows_of_bytes.misplaced(st) == ""
    wide = [x.float() for x in (q, k, v)]
    wanted = attend_ref(*wide, list(st.values()), layer.params, mask, SCALE, mask is None, layer.codec_text)
    first = int(layer.length)
    for name in ("k_scale", "v_scale"):  # what lies behind the rows must not matter
        st[name][:, :, first + 1 :] = float("nan")
    kernels = EmulatedCodes(made)
    got = rows_of_bytes.attend_one(kernels, made, codec, q, k, v, st, p, mask, SCALE, blocks)
    assert torch.isfinite(got).all() and got.dtype == q.dtype
    return float((got.float() - wanted).norm() / wanted.norm())


@pytest.mark.sample(3)
@pytest.mark.parametrize("side", SIDES)
def test_equals_the_definition(side: str) -> None:
    layer, q, k, v = filled(side, 4, 1, 150, (0,), torch.float16)
    assert compared(layer, q, k, v, None) <= BOUND[torch.float16]


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("repeats", "pad", "length", "dtype"),
    [(1, (0, 37), 200, torch.float16), (3, (5, 70), 130, torch.bfloat16), (2, (0, 9), 1, torch.float16)],
)
@pytest.mark.parametrize("side", ["klt:best-2/4", "klt:codebooks-dense-2", "cq-2"])
def test_padding_ratios_and_types(side: str, repeats: int, pad: tuple[int, ...], length: int, dtype: torch.dtype) -> None:
    layer, q, k, v = filled(side, repeats, 2, length, tuple(min(x, length - 1) for x in pad), dtype)
    slots = torch.arange(SLOTS)
    mask = ((slots >= torch.tensor(pad).clamp_max(length - 1)[:, None]) & (slots <= length))[:, None, None]
    assert compared(layer, q, k, v, mask) <= BOUND[dtype]


@pytest.mark.parametrize("moved", [slice(0, 100), slice(100, 151), slice(150, 151), slice(0, 151)], ids=str)
@pytest.mark.parametrize("side", ["klt:best-2/4", "klt:codebooks-dense-2"])
def test_positions_that_run_ahead_of_the_slots_unevenly_are_never_a_wrong_number(side: str, moved: slice) -> None:
    """No kernel knows of them where a compiled step brings them: then rows lie before the first block, behind the last or, all
    of them, behind the table of angles."""
    layer, q, k, v = filled(side, 1, 1, 150, (0,), torch.float16)
    layer.shared.positions[:, moved] += 3000
    codec = Codec.parse(layer.codec_text)
    st = {n: x.half() if n in ("exact_k", "exact_v") else x for n, x in codec.named(layer.state()).items()}
    made = rows_of_bytes.variant_of(codec.format, states.shape_of(k, q.shape[1]))
    assert not isinstance(made, str)
    p = dict(zip(codec.param_names(), layer.params, strict=True))
    assert p["start_cos"].shape[0] * codec.table_tokens < 3000
    got = rows_of_bytes.attend_one(EmulatedCodes(made), made, codec, q, k, v, st, p, None, SCALE, 3)
    assert got.isnan().all()


@pytest.mark.parametrize(("splits", "warps"), [(5, 1), (9, 2), (33, 8)])
def test_parts_of_many_splits_are_merged_by_several_warps(splits: int, warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More splits than windows: the later ones are empty."""
    monkeypatch.setattr(rows_of_bytes, "splits_of", lambda *_: splits)
    merged: list[int] = []
    merge = EmulatedCodes.merge
    monkeypatch.setattr(EmulatedCodes, "merge", lambda self, call, n: (merged.append(call.merge_warps), merge(self, call, n)))
    layer, q, k, v = filled("klt:best-2/4", 3, 1, 270, (0,), torch.float16)
    assert compared(layer, q, k, v, None) <= BOUND[torch.float16] and merged == [warps]


def test_a_step_beside_attention_reads_what_is_not_stored_yet() -> None:
    """The position of the new row comes from outside, rows are coded before and enter the exact ones behind attention."""
    layer, q, k, v = filled("klt:best-2/4", 2, 2, 200, (0, 37), torch.float16)
    codec = Codec.parse(layer.codec_text)
    st = {
        n: x.half() if n.startswith("exact_") and x.dtype == torch.float32 and x.dim() == 4 else x.clone()
        for n, x in codec.named(layer.state()).items()
    }
    p = dict(zip(codec.param_names(), layer.params, strict=True))
    made = rows_of_bytes.variant_of(codec.format, states.shape_of(k, q.shape[1]))
    assert not isinstance(made, str)
    first, calls = int(layer.length), []
    wanted = rows_of_bytes.attend_one(EmulatedCodes(made), made, codec, q, k, v, st, p, None, SCALE, 3)

    class Later:
        positions = st["positions"][:, first : first + 1].long()

        def code(self) -> None:
            calls.append("code")

        def enter(self) -> None:
            calls.append("enter")

        def join(self) -> None:
            calls.append("join")

    st["positions"][:, first] = 1 << 20  # what stands there is of no row
    got = rows_of_bytes.attend_one(EmulatedCodes(made), made, codec, q, k, v, st, p, None, SCALE, 3, Later())
    assert torch.equal(got, wanted) and calls == ["code", "enter", "join"]


def test_values_that_the_merge_cannot_take_back_are_declined() -> None:
    codec = Codec.parse(KVSinkCache.for_model(codes_of("klt:best-2/4", 4)(), 1, SLOTS).packed_layers()[0].codec_text)
    shape = states.shape_of(torch.zeros(1, KV, 1, 128, dtype=torch.float16), 4 * KV)
    assert not isinstance(rows_of_bytes.variant_of(codec.format, shape), str)
    for change in ({"transform": "klt"}, {"transform": "klt", "folded": True}, {"order": 64}):
        other = replace(codec, value=replace(codec.value, **change))
        assert "values of kind" in str(rows_of_bytes.variant_of(other.format, shape))


def test_walks_are_declined_on_either_side() -> None:
    """Values below 1.5 bits are codebooks, which the kernels read: the keys beside them are not."""
    shape = states.shape_of(torch.zeros(1, KV, 1, 128, dtype=torch.float16), 4 * KV)
    for side, kinds in (("klt-2/1", ("trellis", "vector")), ("klt-1/2", ("vector", "trellis"))):
        f = Codec.parse(KVSinkCache.for_model(codes_of(side, 4)(), 1, SLOTS).packed_layers()[0].codec_text).format
        assert (f.key.kind, f.value.kind) == kinds
        assert rows_of_bytes.declines(f, shape, replace(states.GPU, capability=(9, 0))) == "rows of kind trellis"


def test_a_call_reaches_the_kernels_with_its_coding_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the arguments of the op on: the kernels of the call's own variant, and the launches of the coding at their times."""
    layer, q, k, v = filled("klt:best-2/4", 4, 1, 150, (0,), torch.float16)
    codec = Codec.parse(layer.codec_text)
    held = {n: x.half() if n.startswith(("exact_k", "exact_v")) else x for n, x in codec.named(layer.state()).items()}
    call = states.asking(q, k, v, list(held.values()), layer.params, None, SCALE, codec)
    assert backends.choose("attend", *call.facts).name != "cuda (rows of bytes)" and call.shape.repeats == 4  # there is no GPU
    made, calls = rows_of_bytes.variant_of(codec.format, call.shape), []
    assert not isinstance(made, str)
    kernels: Any = EmulatedCodes(made)
    kernels.blocks = 3
    monkeypatch.setattr(rows_of_bytes, "kernels_for", lambda variant, place: calls.append(variant) or kernels)
    wanted = attend_ref(*(x.float() for x in (q, k, v)), layer.state(), layer.params, None, SCALE, True, layer.codec_text)
    got = rows_of_bytes.attend(call)
    assert calls == [made] and (got.float() - wanted).norm() <= BOUND[torch.float16] * wanted.norm()

    class Beside:
        def __init__(self, positions: Tensor, launches: Any) -> None:
            self.positions = positions
            calls.append(len(launches))

        def __getattr__(self, name: str) -> Any:
            return lambda: calls.append(name)

    monkeypatch.setattr(append_attend, "_Beside", Beside)
    call.positions, call.candidates = torch.full((1, 1), 150), states.candidates(layer, 1, 1)
    assert torch.equal(append_attend.side_by_side(call), got)
    assert calls == [made, 3, made, "code", "enter", "join"]
