"""A prompt enters a cache as on a GPU: rows are attended to as they came, and the device is waited for once, not in every layer."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from kvsink.cache.cache import KVSinkCache
from kvsink.cache.layer import KVSinkLayer
from kvsink.codecs import Codec
from kvsink.errors import KvsinkError
from kvsink.kernels import backends
from kvsink.kernels.append import append_ref
from kvsink.kernels.cpu import append as append_cpu
from kvsink.kernels.triton import append as append_triton
from kvsink.kernels.triton import attend as attend_triton
from tests.close import FUSED_FLOAT32, largest_difference
from tests.graphs import rewritten
from tests.kernels.triton.test_attend import INTERPRETED, here, interpreter, run_in_the_interpreter
from tests.models import LAYERS, build, tokens
from tests.states import GPU, method_named, shape_of
from tests.walks import files_from, rows_given_to_the_table


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors: on a GPU, each waits for all that is queued."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def far(cache: KVSinkCache) -> KVSinkCache:
    """A cache of a fixed length that takes its device for one that has to be waited for."""
    for layer in cache.packed_layers():
        layer.distant = True
    return cache


def fed(model: Any, cache: Any, *chunks: Tensor, **inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model(c, past_key_values=cache, use_cache=True, **inputs).logits for c in chunks]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("method", ["klt", "rtn"])
def test_a_prompt_is_that_of_the_stock_model_and_steps_read_codes(family: str, method: str) -> None:
    stock, model = build(family), rewritten(family, "sdpa", method, key_bits=8, value_bits=8)
    chunks = tokens(2, 19, seed=1), tokens(2, 5, seed=2), tokens(2, 1, seed=3)
    plain = fed(stock, DynamicCache(config=stock.config), *chunks)
    near, distant = KVSinkCache.for_model(model, 2, 64), far(KVSinkCache.for_model(model, 2, 64))
    wanted, got = fed(model, near, *chunks), fed(model, distant, *chunks)
    bound = FUSED_FLOAT32 * float(plain[0].abs().max())
    assert largest_difference(got[0], plain[0]) <= bound  # nothing is decoded
    assert 1e-6 < largest_difference(got[2], plain[2]) <= 0.05 * float(plain[2].abs().max())  # 8 bits
    assert largest_difference(got, wanted) <= bound
    for a, b in zip(near.packed_layers(), distant.packed_layers(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state(), b.state(), strict=True))


@pytest.mark.parametrize("padded", [False, True])
def test_the_device_is_read_once_for_all_layers(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def store(layer: Any, k: Tensor, v: Tensor, positions: Tensor, angles: Any, candidates: Any, direct: bool) -> None:
        append_ref(k, v, positions, *angles, candidates, layer.state(), layer.params, layer.codec_text, True)

    monkeypatch.setattr(KVSinkLayer, "_store", store)  # in C, it reads the length
    model = rewritten("llama", "sdpa", "klt")
    ids, mask = tokens(2, 19, seed=1), torch.ones(2, 19, dtype=torch.int64)
    mask[0, : 4 * padded] = 0
    counts = []
    near, distant = KVSinkCache.for_model(model, 2, 64), far(KVSinkCache.for_model(model, 2, 64))
    for of, held in ((build("llama"), StaticCache(model.config, max_cache_len=64)), (model, distant), (model, near)):
        with Reads() as reads:
            fed(of, held, ids, attention_mask=mask)
        counts.append(reads.count)
    stock, once, every = counts
    assert once <= stock + 3  # what is held, for the mask and for us; how far positions reach
    assert every >= once + LAYERS  # the count sees what it counts


def test_rows_that_codes_do_not_hold_are_refused_at_the_end_of_the_pass() -> None:
    model = rewritten("llama", "sdpa", "rtn", protect="none")
    held = model.model.layers[1].self_attn.v_proj.weight
    cache = far(KVSinkCache.for_model(model, 2, 64))
    with torch.no_grad():
        held.mul_(1e7)
    with pytest.raises(KvsinkError, match=r"layer 1: values of this prompt reach \S+e\+07, above the 6.55e\+04"):
        fed(model, cache, tokens(2, 9))
    with pytest.raises(KvsinkError, match="stopped half-way, as when memory runs out; call cache.reset"):
        fed(model, cache, tokens(2, 1))
    cache.reset()
    with torch.no_grad():
        held.div_(1e7)
    again, fresh = fed(model, cache, tokens(2, 9)), fed(model, KVSinkCache.for_model(model, 2, 64), tokens(2, 9))
    assert largest_difference(again, fresh) == 0


def test_large_rows_that_stay_exact_are_taken() -> None:
    model = rewritten("llama", "sdpa", "rtn", protect="first:2")
    large = {}

    def grown(module: Any, args: Any, out: Tensor) -> Tensor:
        large["rows"] = out.abs().max()
        return torch.cat([out[:, :2] * 1e7, out[:, 2:]], 1) if out.shape[1] > 2 else out

    hook = model.model.layers[1].self_attn.v_proj.register_forward_hook(grown)
    fed(model, far(KVSinkCache.for_model(model, 2, 64)), tokens(2, 9))
    hook.remove()
    assert large


def test_rows_that_do_not_fit_are_refused_before_any_is_stored() -> None:
    model = rewritten("llama", "sdpa", "klt")
    cache = far(KVSinkCache.for_model(model, 1, max_length=8))
    fed(model, cache, tokens(1, 6))
    before = [t.clone() for t in cache.tensors().values()]
    with pytest.raises(KvsinkError, match="layer 0: 3 rows do not fit behind 6 of max_length=8"):
        fed(model, cache, tokens(1, 3))
    assert largest_difference(before, list(cache.tensors().values())) == 0


@pytest.mark.parametrize(
    ("places", "by_kernel"), [((0, 9, 12), True), ((700, 709, 712), True), ((0, 500, 503), False), ((300, 9, 12), False)]
)
def test_positions_that_do_not_all_run_ahead_alike_are_read_by_the_definition(
    places: tuple[int, ...], by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rewritten("llama", "sdpa", "klt")
    chunks = tokens(1, 9, seed=1), tokens(1, 3, seed=2), tokens(1, 1, seed=3)
    plain, outs, reasons = KVSinkLayer.attend, [], set[str]()

    def attend(layer: KVSinkLayer, q: Tensor, *given: Any) -> Tensor:
        if q.shape[2] == 1:
            k = q[:, :: q.shape[1] // layer.num_heads]  # of the shape of the new keys
            reasons.add(attend_triton.declines(Codec.parse(layer.codec_text).format, shape_of(k, 4, exact=6), GPU))
        return plain(layer, q, *given)

    monkeypatch.setattr(KVSinkLayer, "attend", attend)
    for held in (KVSinkCache.for_model(model, 1, 64), far(KVSinkCache.for_model(model, 1, 64))):
        reasons.clear()
        for chunk, start in zip(chunks, places, strict=True):
            positions = torch.arange(start, start + chunk.shape[1])[None]
            out = fed(model, held, chunk, position_ids=positions)
        outs += out
    assert largest_difference(outs[0], outs[1]) <= FUSED_FLOAT32 * float(outs[0].abs().max())
    assert reasons == {"" if by_kernel else "positions that run ahead of their slots unevenly"}
    for layer in held.packed_layers():
        assert layer.stored_text() == KVSinkCache.for_model(model, 1, 64).packed_layers()[layer.layer].codec_text
    held.reset()
    reasons.clear()
    fed(model, held, *chunks)
    assert reasons == {""}


@pytest.mark.parametrize("fuse", [True, False])
def test_a_compiled_step_reads_no_position_that_its_tables_do_not_reach(fuse: bool) -> None:
    torch._dynamo.reset()  # graphs of other tests count towards the limit of recompilations
    model = rewritten("llama", "sdpa", "klt", value_bits=3)
    run = torch.compile(model, backend="kvsink", options={"kvsink.inner": "eager", "kvsink.fuse": fuse})
    held = KVSinkCache.for_model(model, 1, 64)
    fed(model, held, tokens(1, 9))
    for at, lost in ((9, False), (5000, False), (5001, True)):  # the newest row is read as it came
        out = fed(run, held, tokens(1, 1), position_ids=torch.tensor([[at]]))[0]
        assert bool(out.isnan().all()) == lost
    held.reset()
    fed(model, held, tokens(1, 9))
    assert fed(run, held, tokens(1, 1))[0].isfinite().all()  # nothing is left of them behind the rows held
    fed(run, held, tokens(1, 1), position_ids=torch.tensor([[5000]]))
    again = fed(model, held, tokens(1, 1), position_ids=torch.tensor([[5001]]))[0]  # an uncompiled step makes the tables longer
    held.crop(-1)
    torch.testing.assert_close(fed(run, held, tokens(1, 1), position_ids=torch.tensor([[5001]]))[0], again)


def test_a_loaded_cache_reads_all_its_positions_in_a_compiled_step(tmp_path: Path) -> None:
    model, other = rewritten("llama", "sdpa", "klt"), rewritten("llama", "sdpa", "klt")  # each with tables of its own
    held, places = KVSinkCache.for_model(model, 1, 64), torch.arange(5000, 5010)[None]
    fed(model, held, tokens(1, 9), position_ids=places[:, :9])
    held.save(tmp_path / "cache")
    wanted = fed(model, held, tokens(1, 1), position_ids=places[:, 9:])[0]
    run = torch.compile(other, backend="kvsink", options={"kvsink.inner": "eager"})
    got = fed(run, KVSinkCache.load(tmp_path / "cache", other, 64), tokens(1, 1), position_ids=places[:, 9:])[0]
    torch.testing.assert_close(got, wanted)


def served_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, int]]) -> None:
    """Rows are coded and attended to by Triton where it serves a GPU, else by plain operators. asked: told of its calls."""

    def part(name: str, held: backends.Part | None, declines: Any) -> backends.Part | None:
        def run(call: Any) -> Any:
            asked.append((name, call.k.shape[2]))
            return held.run(call)  # type: ignore[union-attr]

        return held and backends.Part(lambda f, s, d: declines(f, s, GPU), run, held.knows)

    def served(b: backends.Backend) -> backends.Backend:
        if b.name != "triton":
            return b if b.name == "torch" else replace(b, append=None, attend=None)
        return replace(
            b, append=part("append", b.append, append_triton.declines), attend=part("attend", b.attend, attend_triton.declines)
        )

    table = tuple(map(served, backends.table()))
    monkeypatch.setattr(backends, "table", lambda: table)
    monkeypatch.setattr(backends, "choose", cache(backends.choose.__wrapped__))
    plain = KVSinkLayer.lazy_initialization

    def distant(self: KVSinkLayer, k: Tensor, v: Tensor) -> None:
        plain(self, k, v)
        self.distant = True

    monkeypatch.setattr(KVSinkLayer, "lazy_initialization", distant)


@here
@interpreter
@pytest.mark.parametrize(
    ("family", "max_length", "options"),
    [("llama", 64, {"window": 4, "protect": "first:2+kvsink:3"}), ("mistral-sliding", None, {})],
)
def test_a_model_over_the_kernels_of_a_gpu(
    family: str, max_length: int | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = rewritten(family, "sdpa", "klt", **options), list[tuple[str, int]]()
    mask = torch.ones(2, 36, dtype=torch.int64)
    mask[1, :5] = 0

    def run() -> tuple[list[Tensor], KVSinkCache]:
        held, outs, at = KVSinkCache.for_model(model, 2, max_length), [], 0
        for rows in (29, 6, 1):
            at += rows
            outs += fed(model, held, tokens(2, rows, seed=rows), attention_mask=mask[:, :at])
        return outs, held

    wanted, near = run()
    served_as_on_a_gpu(monkeypatch, asked)
    got, far_off = run()
    assert set(asked) == {("append", 29), ("append", 6), ("append", 1), ("attend", 1)}
    for one, two in zip(got, wanted, strict=True):
        seen = mask[:, -one.shape[1] :].bool() if one.shape[1] < 29 else mask[:, :29].bool()
        assert largest_difference(one[seen], two[seen]) <= FUSED_FLOAT32 * float(two.abs().max())
    for a, b in zip(near.packed_layers(), far_off.packed_layers(), strict=True):
        n = int(a.length)
        for name in ("k_codes", "v_codes"):  # sums in another order: a tie may fall either way
            assert (getattr(a, name)[:, :, :n] == getattr(b, name)[:, :, :n]).float().mean() >= 0.998
        assert torch.equal(a.recent_slot, b.recent_slot) and torch.equal(a.exact_slot.sort().values, b.exact_slot.sort().values)
        if a.codec.ring:  # the last row came through another attention
            assert largest_difference(a.recent_k, b.recent_k) <= FUSED_FLOAT32 * float(a.recent_k.abs().max())


@here
@interpreter
@pytest.mark.parametrize("method", ["klt", "klt-dense"])
def test_compiled_steps_over_the_kernels_of_a_gpu_read_every_position_or_none(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that an uncompiled prompt brought are read by whoever can; of those that a compiled step brings itself, no kernel
    knows before: logits are right or NaN."""
    model, asked = rewritten("llama", "sdpa", method_named(method)), list[tuple[str, int]]()
    run = torch.compile(model, backend="kvsink", options={"kvsink.inner": "eager"})
    chunks = tokens(2, 9, seed=1), tokens(2, 3, seed=2), *(tokens(2, 1, seed=s) for s in (3, 4))
    shift, mask = torch.tensor([[0], [5]]), torch.ones(2, 14, dtype=torch.int64)
    mask[1, :5] = 0

    def fed_at(step: Any, places: tuple[int, ...], apart: int) -> list[Tensor]:
        held, outs, at = KVSinkCache.for_model(model, 2, 64), [], 0
        for chunk, start in zip(chunks, places, strict=True):
            n = chunk.shape[1]
            positions = torch.arange(start, start + n)[None] - shift + apart * torch.tensor([[0], [1]])
            at += n
            given = {"attention_mask": mask[:, :at], "position_ids": positions.clamp_min(0)}
            outs += fed(step if n == 1 else model, held, chunk, **given)
        return [out[:, -1] for out in outs]

    cases = [
        ((0, 9, 12, 13), 0),
        ((700, 709, 712, 713), 0),
        ((0, 500, 503, 504), 0),
        ((300, 9, 12, 13), 0),
        ((0, 9, 12, 13), 90),
        ((0, 9, 12, 500), 0),
        ((0, 9, 12, 5000), 0),
    ]
    wanted = [fed_at(model, *case) for case in cases]
    served_as_on_a_gpu(monkeypatch, asked)
    for case, right in zip(cases, wanted, strict=True):
        asked.clear()
        torch._dynamo.reset()
        *early, last = fed_at(run, *case)
        for got, one in zip(early, right, strict=False):
            assert largest_difference(got, one) <= FUSED_FLOAT32 * float(one.abs().max())
        if case[0][-1] == 13 or case[0][-1] - case[0][-2] == 1:
            assert largest_difference(last, right[-1]) <= FUSED_FLOAT32 * float(last.abs().max())
            assert (("attend", 1) in asked) == (case in cases[:1])
        else:
            assert last.isnan().all() and ("attend", 1) in asked


@pytest.mark.slow
@here
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 4, "over_the_kernels_of_a_gpu")


class Launches(TorchDispatchMode):
    """Names of the operators that would launch a kernel on a GPU."""

    FREE = ("view", "slice", "select", "expand", "transpose", "unsqueeze", "detach", "alias", "as_strided", "empty", "reshape")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not any(free in name for free in self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@here
@pytest.mark.parametrize("options", [{}, {"window": 4, "protect": "first:2+kvsink:3"}])
def test_a_layer_takes_a_prompt_in_few_launches(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from kvsink.kernels.triton import rows_kernels

    model, mode = rewritten("llama", "sdpa", "klt:best", **options), Launches()

    def counted(name: str) -> Any:
        return type("Kernel", (), {"__getitem__": lambda self, grid: lambda *args, **kwargs: mode.names.append(name)})()

    served_as_on_a_gpu(monkeypatch, [])
    for name in ("code_rows_kernel", "enter_rows_kernel"):
        monkeypatch.setattr(rows_kernels, name, counted(name))
    plain = {name: getattr(KVSinkLayer, name) for name in ("update", "begins")}

    def watched(name: str) -> Any:
        def run(self: KVSinkLayer, *args: Any, **more: Any) -> Any:
            if self.layer < LAYERS - 1:
                mode.names.clear()
                return plain[name](self, *args, **more)
            with mode:
                return plain[name](self, *args, **more)

        return run

    for name in plain:
        monkeypatch.setattr(KVSinkLayer, name, watched(name))
    fed(model, far(KVSinkCache.for_model(model, 2, 64)), tokens(2, 30))
    kernels = [name for name in mode.names if name.endswith("_kernel")]
    assert sorted(kernels) == ["code_rows_kernel", "code_rows_kernel", "enter_rows_kernel"]
    assert len(mode.names) <= 3 + 3, mode.names  # and the sizes of both sides and the length


@pytest.mark.parametrize(
    ("attention", "between"), [("sdpa", []), ("eager", ["kernels/append.py"])], ids=["asked by attention", "read back"]
)
def test_a_new_key_comes_to_its_bytes_through_four_files(
    attention: str, between: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From `update` to the C code, `append.c` counted; who serves is decided by the rows' sizes, without the rows."""
    model, ways, library = rewritten("llama", attention), list[list[str]](), append_cpu._library()
    held = KVSinkCache.for_model(model)
    fed(model, held, tokens(1, 9))
    assert library is not None

    class Library:
        def __getattr__(self, name: str) -> Any:
            ways.append(files_from("rewriter/cache/layer.py"))
            return getattr(library, name)

    monkeypatch.setattr(append_cpu, "_library", Library)
    assert rows_given_to_the_table(lambda: fed(model, held, tokens(1, 1))) == []
    assert ways == [["rewriter/cache/layer.py", *between, "kernels/cpu/append.py"]] * LAYERS
