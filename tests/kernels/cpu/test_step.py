"""One new row in C, from the key and query of a model to the attention: every shape, dtype and build follows the definition."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsink.cache.cache import KVSinkCache
from kvsink.codecs import STATE_NAMES, Codec, SideSpec
from kvsink.codecs.quantizers import QUANTIZERS
from kvsink.kernels import stages
from kvsink.kernels.append import append_ref
from kvsink.kernels.attend import attend_ref
from kvsink.kernels.cpu import append as append_cpu
from kvsink.kernels.cpu import attend as attend_cpu
from kvsink.kernels.cpu import c_library
from kvsink.kernels.cpu.append import append as append_in_c
from tests.close import FUSED_FLOAT32, largest_difference
from tests.graphs import rewritten
from tests.models import VOCAB
from tests.states import CPU, asking, candidates, coding, shape_of

SCALE = 0.25


def _key(dim: int, kind: str, **given: Any) -> SideSpec:
    widths = tuple((4, 3, 2, 1, 1, 0, 2, 5, 3, 8)[i % 10] for i in range(dim // 8))
    made: dict[str, Any] = (
        dict(bits=2, kind=kind, gain=True, widths=widths)
        if kind == "lloyd"
        else dict(bits=3, kind=kind, group_size=dim // 2, widths=(3,) * (dim // 8))
    )
    return SideSpec(**(made | given))


CODECS = {
    "klt": lambda d: Codec(
        _key(d, "lloyd", domain="block", block=16, center=True, transform="klt"),
        SideSpec(bits=4, kind="gauss", group_size=d, widths=(4,) * (d // 8), center=True, transform="hadamard", folded=True),
        segments=(2, 1),
    ),
    "turned": lambda d: Codec(
        _key(d, "uniform", center=True, transform="hadamard", order=8), _key(d, "lloyd", center=True, transform="klt"), window=5
    ),
    "block": lambda d: Codec(
        _key(d, "gauss", domain="block", block=16, transform="hadamard", order=8),
        _key(d, "uniform-int", transform="hadamard", order=8),
    ),
    "plain": lambda d: Codec(_key(d, "lloyd"), _key(d, "lloyd", transform="klt"), segments=(1,), strict=True),
}


def _tables(c: Codec, heads: int, dim: int, rotary: int, slots: int, g: torch.Generator) -> list[Tensor]:
    n = c.table_tokens

    def angles(positions: Tensor) -> Tensor:
        turns = positions[:, None] * 0.5 ** torch.arange(rotary // 2)
        return torch.cat((turns, turns), dim=-1)

    starts, offsets = angles(torch.arange(-(-slots // n)) * float(n)), angles(torch.arange(float(n)))
    made = {"start_cos": starts.cos(), "start_sin": starts.sin(), "offset_cos": offsets.cos(), "offset_sin": offsets.sin()}
    for side in "kv":
        made[f"{side}_mean"], made[f"{side}_mean2"] = (torch.randn(heads, dim, generator=g) for _ in range(2))
        made[f"{side}_basis"] = torch.linalg.qr(torch.randn(heads, dim, dim, generator=g)).Q.contiguous()
        made[f"{side}_sigma"] = torch.rand(heads, dim, generator=g) + 0.1
    made["k_table"] = torch.randn(heads, n, dim, generator=g)
    return [made[name] for name in c.param_names()]


def _held(name: str, dim: int, rotary: int | None = None) -> Any:
    """A state of random codes, the newest row of them just appended, and what goes with it."""
    g, c = torch.Generator().manual_seed(dim), CODECS[name](dim)
    batch, heads, slots, length, rotary = 2, 3, 300, 290, dim if rotary is None else rotary
    state = {
        n: torch.full(shape, fill, dtype=dtype)
        for n, (shape, dtype, fill) in c.layout(batch, heads, dim, dim, slots, torch.float32).items()
    }
    for n in ("k_codes", "v_codes"):
        state[n].random_(0, 256, generator=g)
    for n in ("k_scale", "v_scale", "exact_k", "exact_v", "recent_k", "recent_v"):
        state[n].uniform_(0.5, 1.5, generator=g)
    state["positions"] = torch.arange(slots, dtype=torch.int32).expand(batch, -1).clone()
    state["real"] = torch.ones(batch, slots, dtype=torch.bool)
    state["exact_slot"] = torch.stack([torch.randperm(length - 1, generator=g)[: c.exact_rows] for _ in range(batch)]).int()
    state["recent_slot"] = torch.arange(length - c.window, length, dtype=torch.int32)
    state["length"] = torch.tensor(length - 1)
    k, v = torch.randn(batch, 1, heads, dim, generator=g).transpose(1, 2), torch.randn(batch, heads, 1, dim, generator=g)
    if c.window:
        state["recent_k"][:, :, -1:], state["recent_v"][:, :, -1:] = k, v
    return SimpleNamespace(
        c=c,
        text=c.text(),
        state=[state[n] for n in STATE_NAMES],
        params=_tables(c, heads, dim, rotary, slots, g),
        g=g,
        k=k,
        v=v,
        shape=(batch, heads, dim, rotary),
    )


def _asks(h: Any, repeats: int, mask: Tensor | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The definition's attention and that of the C code."""
    batch, heads, dim, _ = h.shape
    assert attend_cpu.declines(h.c.format, shape_of(h.k), CPU) == ""
    q = torch.randn(batch, heads * repeats, 1, dim, generator=h.g)
    rest = [q, h.k, h.v]
    rest = [t.to(dtype) for t in rest]
    wanted = attend_ref(*(t.float() for t in rest), h.state, h.params, mask, SCALE, mask is None, h.text)
    return wanted.to(dtype), attend_cpu.attend(asking(*rest, h.state, h.params, mask, SCALE, h.c))


def _agree(wanted: Tensor, got: Tensor) -> bool:
    """Within the bound of float32; in 16 bit the nearest number, or its neighbour where that bound lies across their middle."""
    wide = largest_difference(wanted.float(), got.float())
    step = 0.0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
    return got.dtype == wanted.dtype and wide <= (FUSED_FLOAT32 + step) * float(wanted.float().abs().max())


@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("name", CODECS)
def test_attention_of_every_head_size_and_share(name: str, dim: int) -> None:
    h = _held(name, dim)
    for repeats in (1, 3, 4, 6):
        assert _agree(*_asks(h, repeats))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CODECS)
def test_attention_in_16_bit(name: str, dtype: torch.dtype) -> None:
    h = _held(name, 64)
    q = torch.randn(2, 6, 1, 64, generator=h.g).to(dtype)
    rest = [q, h.k.to(dtype), h.v.to(dtype)]
    wanted = attend_cpu.attend(asking(*(t.float() for t in rest), h.state, h.params, None, SCALE, h.c))
    assert torch.equal(attend_cpu.attend(asking(*rest, h.state, h.params, None, SCALE, h.c)), wanted.to(dtype))
    assert _agree(*_asks(h, 2, dtype=dtype))
    for i in (4, 5, 8, 9):  # rows that are held as they came, in the same dtype
        h.state[i] = h.state[i].to(dtype)
    assert _agree(*_asks(h, 2, dtype=dtype))


@pytest.mark.parametrize("rotary", [8, 16])
@pytest.mark.parametrize("name", ["klt", "turned", "block"])
def test_attention_where_part_of_a_head_carries_rope(name: str, rotary: int) -> None:
    assert _agree(*_asks(_held(name, 32, rotary=rotary), 2))


POSITIONS = {
    "left padding": lambda n: torch.stack([torch.arange(n), (torch.arange(n) - 37).clamp_min(1)]),
    "negative": lambda n: torch.stack([torch.arange(n) - 20, torch.arange(n) - 3]),
    "in any order": lambda n: torch.stack([torch.randperm(n), torch.arange(n).flip(0)]),
    "behind the tables": lambda n: torch.stack([torch.arange(n) + 200, torch.full((n,), 2**31 - 1)]),
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["klt", "turned", "block"])
def test_attention_at_any_positions(name: str, positions: str) -> None:
    torch.manual_seed(0)
    h = _held(name, 32)
    h.state[12].copy_(POSITIONS[positions](h.state[12].shape[1]))
    seen = torch.rand(2, 1, 1, 300) < 0.7
    for mask in (None, seen, torch.where(seen, 0.5, -1e30), torch.randn(1, 6, 1, 300).to(torch.bfloat16)):
        assert _agree(*_asks(h, 2, mask))


def test_attention_says_what_it_cannot_read_and_keeps_what_is_no_number() -> None:
    h = _held("klt", 32)
    q = torch.randn(2, 6, 1, 32, generator=h.g)
    call = (h.k, h.v, h.state, h.params)
    with pytest.raises(ValueError, match="does not reach the 290 slots"):
        attend_cpu.attend(asking(q, *call, torch.ones(1, 1, 1, 289, dtype=torch.bool), SCALE, h.c))
    q[1, 2] = float("nan")
    out = attend_cpu.attend(asking(q, *call, None, SCALE, h.c))
    bad = torch.zeros(2, 6, dtype=torch.bool)
    bad[1, 2] = True
    assert torch.equal(out.isnan().any(-1)[..., 0], bad) and torch.equal(out.isnan().all(-1)[..., 0], bad)


def _wide_project(x: Tensor, basis: Tensor) -> Tensor:
    return (x.double() @ basis.double()).float()


WIDE = SimpleNamespace(**{name: getattr(stages, name) for name in stages.__all__} | {"project": _wide_project})
"""The stages with the sums of a basis in float64: those of the C code."""


def _append(h: Any, dtype: torch.dtype, positions: Tensor, in_c: bool) -> tuple[dict[str, Tensor], Any]:
    """The state after the row has come, by the C code or the definition."""
    turns = positions[..., None] * 0.5 ** torch.arange(h.shape[3] // 2)
    cos, sin = (f(torch.cat((turns, turns), dim=-1)).to(dtype) for f in (torch.cos, torch.sin))
    state = [t.clone() for t in h.state]
    layer: Any = SimpleNamespace(segments=[SimpleNamespace(count=n) for n in h.c.segments])
    k, v = h.k.to(dtype), h.v.to(dtype)
    rest = (k, v, positions, cos, sin, candidates(layer, h.shape[0], 1), state, h.params)
    if in_c:
        append_in_c(coding(*rest, h.c, True))
        assert append_cpu._AppendPlan.kept[id(state[0])][0]() is state[0]
    else:
        append_ref(*rest, h.text, True)
    p = dict(zip(h.c.param_names(), h.params, strict=True))
    rows = h.c.transform_keys(k, cos, sin, positions, p, True, WIDE), h.c.transform_values(v, p, WIDE)
    return h.c.named(state), SimpleNamespace(rows=rows, p=p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("name", CODECS)
def test_a_new_row_has_the_codes_of_the_definition(name: str, dim: int, dtype: torch.dtype) -> None:
    h = _held(name, dim, rotary=dim if dim < 80 else dim // 2)
    for i in (4, 5, 8, 9):
        h.state[i] = h.state[i].to(dtype)
    for positions in (torch.tensor([[289], [-5]]), torch.tensor([[77]])):
        got, made = _append(h, dtype, positions, True)
        wanted, _ = _append(h, dtype, positions, False)
        for n in STATE_NAMES:
            if n not in ("k_codes", "k_scale", "v_codes", "v_scale"):
                assert torch.equal(got[n], wanted[n]), n
        for prefix, side, x in (("k", h.c.key, made.rows[0]), ("v", h.c.value, made.rows[1])):
            codes, scale = QUANTIZERS[side.kind].encode(x, side, made.p, prefix)
            for n, new in ((f"{prefix}_codes", codes), (f"{prefix}_scale", scale)):
                wanted[n][:, :, 289] = new[:, :, 0]
                assert torch.equal(got[n], wanted[n]), n


def test_the_sums_of_a_basis_are_the_definitions_up_to_float32() -> None:
    h = _held("klt", 64)
    p = dict(zip(h.c.param_names(), h.params, strict=True))
    angles = (torch.rand(1, 1, 64, generator=h.g) for _ in range(2))
    rest = (h.k, *angles, torch.tensor([[5]]), p, True)
    one, two = h.c.transform_keys(*rest), h.c.transform_keys(*rest, WIDE)
    assert largest_difference(one, two) <= 64 * 2.0**-24 * float(two.abs().max())


def test_a_build_for_any_processor_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what -march=native brings: no permutation of sixteen levels, no conversion of float16."""
    wanted = {name: _asks(_held(name, 80), 3)[1] for name in CODECS}
    codes = {name: _append(_held(name, 80), torch.float16, torch.tensor([[9]]), True)[0] for name in CODECS}
    for module, flags in ((attend_cpu, "LOOSE"), (append_cpu, "EXACT")):
        monkeypatch.setattr(module, flags, tuple(f for f in getattr(c_library, flags) if f != "-march=native"))
    for name in CODECS:
        assert _agree(wanted[name], _asks(_held(name, 80), 3)[1])
        plain = _append(_held(name, 80), torch.float16, torch.tensor([[9]]), True)[0]
        assert all(torch.equal(t, plain[n]) for n, t in codes[name].items())


def test_plans_follow_the_tensors_of_a_state() -> None:
    h = _held("klt", 32)
    plan = attend_cpu._AttendPlan.of(h.c, h.state, h.params)
    assert attend_cpu._AttendPlan.of(h.c, list(h.state), list(h.params)) is plan
    for i in (1, 6, 12):
        state = list(h.state)
        state[i] = state[i].clone()
        assert attend_cpu._AttendPlan.of(h.c, state, h.params) is not plan
    assert attend_cpu._AttendPlan.of(replace(h.c, strict=True), h.state, h.params) is not plan
    kept, key = attend_cpu._AttendPlan.kept, id(h.state[0])
    assert key in kept
    del h, state, plan
    assert key not in kept


def test_copies_crops_and_growth_of_a_cache_in_use() -> None:
    """What moves or shares the tensors between two steps leaves every cache with its own."""
    model = rewritten("llama", "sdpa", "klt", protect="first:3")  # none of which a later row evicts
    ids = torch.randint(0, VOCAB, (2, 300), generator=torch.Generator().manual_seed(0))

    def run(cache: KVSinkCache, start: int, end: int) -> Tensor:
        steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(start, end)]
        return torch.cat(steps, dim=1)

    with torch.no_grad():
        cache = KVSinkCache.for_model(model, 2)
        model(ids[:, :250], past_key_values=cache, use_cache=True)
        run(cache, 250, 252)
        twin = copy.deepcopy(cache)
        wanted = run(cache, 252, 260)  # grows at 256 slots
        assert torch.equal(run(twin, 252, 260), wanted)
        twin.crop(-8)
        assert torch.equal(run(twin, 252, 260), wanted)
        twin.batch_select_indices(torch.tensor([1]))
        cache.crop(-4)
        assert torch.equal(run(cache, 256, 260), wanted[:, 4:])
