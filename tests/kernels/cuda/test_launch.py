"""The CUDA kernels on a GPU, against the definition run on the CPU: codes, outputs, masks, CUDA graphs, compiled decode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from kvsink.cache.cache import KVSinkCache
from kvsink.codecs import SHARED_NAMES
from kvsink.kernels import prefill
from kvsink.kernels.attend import attend_ref
from kvsink.kernels.cuda import launch, module
from kvsink.kernels.read import read_ref
from tests.states import asking, coding

from .test_tiles import CODECS, HEADS, SLOTS, append, layer_of, model_of, rows, summed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8,
        reason="needs an NVIDIA GPU of capability 8.0 or newer",
    ),
]


def on_gpu(layer: Any, dtype: torch.dtype) -> tuple[module.Cubin, list[torch.Tensor], list[torch.Tensor]]:
    """Kernels, and copies of a CPU layer's state and tables on the GPU."""
    lib = module.library(launch.variant_of(layer.codec, 4), torch.device("cuda", 0))
    layer.exact_k, layer.exact_v = layer.exact_k.to(dtype), layer.exact_v.to(dtype)
    return lib, [t.cuda() for t in layer.state()], [t.cuda() for t in layer.params]


@pytest.mark.parametrize("index", range(len(CODECS)))
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 300), (5, 129)])
def test_append_stores_the_codes_of_the_definition(index: int, batch: int, length: int) -> None:
    layer = layer_of(index, batch)
    lib, state, params = on_gpu(layer, torch.bfloat16)
    k, v = rows(batch, length, 1, dtype=torch.bfloat16), rows(batch, length, 2, dtype=torch.bfloat16)
    positions = torch.arange(length)[None]
    scores: list[torch.Tensor] = []
    for i, segment in enumerate(layer.segments):
        g = torch.Generator().manual_seed(i + length)
        scores += list(torch.randn(batch, length, generator=g).topk(min(segment.count, length), dim=1))
    append(layer, k, v, positions)
    gpu = [t.cuda() for t in scores]
    none = torch.empty(1, k.shape[2], 0, device="cuda")
    given = k.cuda(), v.cuda(), positions.cuda(), none, none, gpu, state, params, layer.codec, True
    launch.append(coding(*given), lib)
    for name, mine in layer.codec.named(state).items():
        wanted = getattr(layer.shared if name in SHARED_NAMES else layer, name)
        assert wanted is not None
        if name in ("k_codes", "k_scale", "v_codes", "v_scale") and name[0] in summed(index):
            assert mine.numel() == 0 or (mine.cpu() == wanted).float().mean() >= 0.998
        elif name == "exact_slot":
            assert torch.equal(mine.cpu().sort(1)[0], wanted.sort(1)[0])
        elif name not in ("length", "exact_k", "exact_v", "exact_score"):
            assert torch.equal(mine.cpu(), wanted), name


@pytest.mark.parametrize("index", range(len(CODECS)))
@pytest.mark.parametrize(
    ("batch", "length", "kind"),
    [(1, 0, None), (1, 500, None), (2, 131, "random"), (7, 380, "padding"), (40, 129, "padding"), (300, 257, None)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attend_equals_the_definition(index: int, batch: int, length: int, kind: str | None, dtype: torch.dtype) -> None:
    layer = layer_of(index, batch)
    shift = torch.arange(batch)[:, None] % 90 if kind == "padding" else torch.zeros(batch, 1, dtype=torch.int64)
    if length:
        append(layer, rows(batch, length, 1), rows(batch, length, 2), torch.arange(length)[None] - shift)
    layer.length.fill_(length)
    lib, state, params = on_gpu(layer, dtype)
    q = rows(batch, 1, 5, HEADS, dtype) * 0.5
    k, v = rows(batch, 1, 6, dtype=dtype), rows(batch, 1, 7, dtype=dtype)
    slots, mask = torch.arange(SLOTS), None
    if kind == "padding":
        mask = ((slots >= shift) & (slots <= length))[:, None, None]
    elif kind == "random":
        mask = (torch.rand(batch, 1, 1, SLOTS, generator=torch.Generator().manual_seed(3)) > 0.4) & (slots <= length)
    gpu = [t.cuda() for t in (q, k, v)]
    for _ in range(3):  # a later launch finds the scratch words as the first did
        got = launch.attend(asking(*gpu, state, params, None if mask is None else mask.cuda(), 0.09, layer.codec), lib)
        wide = [x.float() for x in (q, k, v)]
        wanted = attend_ref(*wide, layer.state(), layer.params, mask, 0.09, False, layer.codec_text)
        assert got is not None
        error = (got.float().cpu() - wanted).norm() / wanted.norm()
        assert error <= (4e-3 if dtype == torch.bfloat16 else 2e-3)
    assert lib.scratch.clean()


@pytest.mark.parametrize("index", range(len(CODECS)))
@pytest.mark.parametrize("masked", [False, True])
def test_a_chunk_equals_the_definition(index: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(index, 2)
    append(layer, rows(2, 300, 1), rows(2, 300, 2), torch.arange(300)[None])
    layer.length.fill_(300)
    lib, state, params = on_gpu(layer, torch.float16)
    st, p = layer.codec.named(state), dict(zip(layer.codec.param_names(), params, strict=True))
    nothing = rows(2, 0, 0)
    full = read_ref(nothing, nothing, layer.state(), layer.params, layer.codec_text)
    for a, b in zip(launch.decode_rows(lib, layer.codec, st, p, 7, 300, torch.float16, 300), full, strict=True):
        assert (a.float().cpu() - b[:, :, 7:300].float()).abs().max() <= 2e-3 * b.abs().max()
    monkeypatch.setattr(prefill, "_DECODED_BYTES", 1)
    q, k, v = (rows(2, 66, 5, HEADS, torch.float16), rows(2, 66, 6, dtype=torch.float16), rows(2, 66, 7, dtype=torch.float16))
    mask = None
    if masked:
        slots = torch.arange(SLOTS)
        mask = ((slots <= torch.arange(300, 366)[:, None]) & (slots >= 9))[None, None].expand(2, -1, -1, -1)
    gpu = [t.cuda() for t in (q, k, v)]
    got = launch.attend(asking(*gpu, state, params, None if mask is None else mask.cuda(), 0.09, layer.codec), lib)
    wide = [x.float() for x in (q, k, v)]
    wanted = attend_ref(*wide, layer.state(), layer.params, mask, 0.09, False, layer.codec_text)
    assert got is not None
    assert (got.float().cpu() - wanted).norm() <= 3e-3 * wanted.norm()


@pytest.mark.parametrize("index", [0, 2, 6])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_is_the_same_side_by_side(index: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(index, batch)
    append(layer, rows(batch, 140, 1), rows(batch, 140, 2), torch.arange(140)[None])
    layer.length.fill_(140)
    q, k, v = (rows(batch, 1, seed, n, torch.float16).cuda() for seed, n in ((5, HEADS), (6, 2), (7, 2)))
    positions = torch.full((1, 1), 140).cuda()
    zero = torch.zeros(batch, 1, dtype=torch.int64).cuda()
    scores = [t for _ in layer.segments for t in (torch.full((batch, 1), 1e30).cuda(), zero)]
    found = []
    for overlap in (False, True):
        lib, state, params = on_gpu(layer, torch.float16)
        p, st = dict(zip(layer.codec.param_names(), params, strict=True)), layer.codec.named(state)
        held = [t.clone() for t in state]
        monkeypatch.setattr(lib, "overlap", overlap)

        def step(st: Any = st, p: Any = p, lib: Any = lib) -> torch.Tensor:
            out = launch.step_one(lib, layer.codec, q, k, v, positions, scores, st, p, None, 0.09)
            assert out is not None
            return out

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for _ in range(3):  # each time from the state before the step
            for t, before in zip(state, held, strict=True):
                t.copy_(before)
            graph.replay()
        torch.cuda.synchronize()
        assert lib.scratch.clean()
        found.append((out.clone(), [t.clone() for t in state]))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("captured", [False, True])
def test_launches_that_overlap_do_not_meet(captured: bool) -> None:
    """Two streams, and two graphs replayed on them, attend to one cache at the same time."""
    layer = layer_of(2, 3)
    append(layer, rows(3, 380, 1), rows(3, 380, 2), torch.arange(380)[None])
    layer.length.fill_(380)
    lib, state, params = on_gpu(layer, torch.float16)
    calls = [[rows(3, 1, 5 * i, n, torch.float16).cuda() for n in (HEADS, 2, 2)] for i in (1, 2)]

    def attend(x: list[torch.Tensor]) -> torch.Tensor:
        out = launch.attend(asking(*x, state, params, None, 0.09, layer.codec), lib)
        assert out is not None
        return out

    alone = [attend(x) for x in calls]
    torch.cuda.synchronize()
    streams, found, graphs = [torch.cuda.Stream() for _ in calls], [torch.empty_like(a) for a in alone], []
    for x, out in zip(calls, found, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(50):
                out.copy_(attend(x))
        graphs.append(graph)
    for stream, x, out, graph in zip(streams, calls, found, graphs, strict=True):
        with torch.cuda.stream(stream):
            if captured:
                graph.replay()
            else:
                for _ in range(200):
                    out.copy_(attend(x))
    torch.cuda.synchronize()
    for a, b in zip(alone, found, strict=True):
        assert torch.equal(a, b)
    assert lib.scratch.clean()


@pytest.mark.parametrize("index", [0, 2])
def test_compiled_decode_under_cuda_graphs_gives_the_tokens_of_eager_decode(index: int) -> None:
    model = copy.deepcopy(model_of(index)).cuda().to(torch.bfloat16)
    ids = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(8)).cuda()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    import kvsink
    from kvsink.model.runtime import attach, runtime_of

    attach(model, runtime_of(model_of(index)))
    from kvsink.hf import install_generate

    install_generate(model)
    assert kvsink.KVSinkCache.for_model(model, 2, 128).packed_layers()[0].codec.tiles
    logits = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = torch.compile(model, backend="kvsink", fullgraph=True, options={"kvsink.inner": "eager"})
    fused = torch.compile(model, backend="kvsink", fullgraph=True)
    graphs = torch.compile(model, backend="kvsink", mode="reduce-overhead", fullgraph=True)
    for call in (model, plain, fused, graphs):
        cache = KVSinkCache.for_model(model, 2, 128)
        seen, held = mask, []
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            for i in range(12):
                full = torch.cat([seen, seen.new_ones(2, i + 1)], 1)
                wide = torch.cat([full, full.new_zeros(2, 128 - full.shape[1])], 1)[:, None, None].bool()
                positions = (full.cumsum(1) - 1)[:, -1:].contiguous()
                torch.compiler.cudagraph_mark_step_begin()
                step = call(ids[:, i : i + 1], attention_mask=wide, position_ids=positions, past_key_values=cache)
                held.append(step.logits.clone())
        logits.append(torch.cat(held, 1).float())
    assert (logits[0] - logits[1]).norm() <= 1e-2 * logits[0].norm()  # the same operators in bfloat16
    assert torch.equal(logits[2], logits[3])  # capture changes nothing
    assert (logits[0] - logits[2]).norm() <= 0.15 * logits[0].norm()  # Inductor rounds less often, and codes of 2 bits turn
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # one each: no recompilation per token
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def test_generate_takes_the_packed_path() -> None:
    model = copy.deepcopy(model_of(0)).cuda().to(torch.bfloat16)
    from kvsink.hf import install_generate
    from kvsink.model.runtime import attach, runtime_of

    attach(model, runtime_of(model_of(0)))
    install_generate(model)
    ids = torch.randint(3, 97, (2, 33), generator=torch.Generator().manual_seed(8)).cuda()
    out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.shape == (2, 41) and out.past_key_values.packed_layers()[0].codec.tiles
    model.generation_config.compile_config = None
    again = model.generate(ids, max_new_tokens=8, do_sample=False, disable_compile=True)
    assert (again == out.sequences).float().mean() > 0.9  # 16-bit rounding may turn a late token


def test_a_cache_larger_than_the_gpu_is_refused_before_it_is_made() -> None:
    from kvsink.errors import KvsinkError
    from kvsink.model.runtime import attach, runtime_of

    model = copy.deepcopy(model_of(0)).cuda().to(torch.bfloat16)
    attach(model, runtime_of(model_of(0)))
    before = torch.cuda.memory_allocated()
    with pytest.raises(KvsinkError, match="GiB are free"):
        KVSinkCache.for_model(model, 100000, max_length=1 << 20)
    assert torch.cuda.memory_allocated() <= before
