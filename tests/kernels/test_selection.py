"""Every implementation of the running selection keeps the rows that a sorted list keeps, whatever scores tie."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsink.codecs import STATE_NAMES, Codec
from kvsink.kernels.append import append_
from kvsink.kernels.cpu.append import by_definition, declines, select_one
from kvsink.kernels.cuda import launch
from kvsink.kernels.select_sinks import select_sinks
from kvsink.kernels.selection import merge_exact, top_rows
from kvsink.kernels.triton import append as append_triton
from kvsink.model.candidates import order_candidates
from kvsink.model.frame import Frame
from tests import states
from tests.kernels.cuda import test_tiles
from tests.kernels.cuda.emulated import Emulated
from tests.kernels.triton.test_attend import INTERPRETED, here, interpreter, run_in_the_interpreter

BATCH, HEADS, SEGMENTS = 2, 2, (3, 1, 2)
PLACES, NEVER = sum(SEGMENTS), float("-inf")
SCORES = torch.tensor([NEVER, float("nan"), -1.5, 0.0, 1.0, 1.0, 2.0])
CHUNKS = (5, *[1] * 18, 4, *[1] * 14)
NAMES = ("exact_slot", "exact_score", "exact_k", "exact_v")

State = dict[str, Tensor]
Offer = Callable[[Tensor, Tensor, list[Tensor], int], None]


class Sorted:
    """What one sequence holds exact, told by a list of (score, slot) per segment."""

    def __init__(self) -> None:
        self.held: list[list[tuple[float, int]]] = [[] for _ in SEGMENTS]

    def offer(self, segment: int, scores: list[float], slots: list[int]) -> None:
        held = self.held[segment] + [pair for pair in zip(scores, slots, strict=True) if pair[0] > NEVER]
        self.held[segment] = sorted(held, key=lambda pair: (-pair[0], pair[1]))[: SEGMENTS[segment]]

    def crop(self, end: int) -> None:
        self.held = [[pair for pair in held if pair[1] < end] for held in self.held]


def named(slot: list[int]) -> list[int]:
    return [-s - 2 if s < -1 else s for s in slot]


def compare(state: State, sequences: list[Sorted], k: Tensor, v: Tensor) -> None:
    """The rows of every segment, their scores, the marks of repeats and the rows themselves."""
    for b, sequence in enumerate(sequences):
        slots, scores, at = state["exact_slot"][b].tolist(), state["exact_score"][b].tolist(), 0
        for capacity, wanted in zip(SEGMENTS, sequence.held, strict=True):
            places = list(zip(scores, named(slots), strict=True))[at : at + capacity]
            assert sorted(p for p in places if p[1] >= 0) == sorted(wanted)
            assert all(p == (NEVER, -1) for p in places if p[1] < 0)
            at += capacity
        for place, (slot, name) in enumerate(zip(slots, named(slots), strict=True)):
            assert (slot < -1) == (name >= 0 and name in named(slots)[:place])
            if name >= 0:
                assert torch.equal(state["exact_k"][b, :, place], k[b, :, name].to(state["exact_k"].dtype))
                assert torch.equal(state["exact_v"][b, :, place], v[b, :, name].to(state["exact_v"].dtype))


def shuffle(state: State, g: torch.Generator) -> None:
    """The places of every segment in another order, of which nothing may depend."""
    for b in range(BATCH):
        parts, at = [], 0
        for capacity in SEGMENTS:
            parts.append(at + torch.randperm(capacity, generator=g))
            at += capacity
        order = torch.cat(parts)
        slots = named(state["exact_slot"][b][order].tolist())
        marked = [-s - 2 if s >= 0 and s in slots[:i] else s for i, s in enumerate(slots)]
        state["exact_slot"][b] = torch.tensor(marked, dtype=torch.int32)
        state["exact_score"][b] = state["exact_score"][b][order]
        for name in ("exact_k", "exact_v"):
            state[name][b] = state[name][b][:, order]


def crop(state: State, end: int) -> None:
    """As a cache does: rows from slot `end` on are gone, their places stay empty where they are."""
    slot = state["exact_slot"]
    gone = torch.where(slot < -1, -slot - 2, slot) >= end
    slot.masked_fill_(gone, -1)
    state["exact_score"].masked_fill_(gone, NEVER)


def play(state: State, offer: Offer, several: bool, seed: int) -> None:
    """Chunks of rows, most of them single, against the sorted lists. several: a row may be a candidate twice in one segment."""
    g, sequences, first, entered = torch.Generator().manual_seed(seed), [Sorted() for _ in range(BATCH)], 0, 0
    sizes = [state[n].shape[3] for n in ("exact_k", "exact_v")]
    k, v = (torch.zeros(BATCH, HEADS, sum(CHUNKS), d) for d in sizes)
    for step, n in enumerate(CHUNKS):
        rows = [torch.randn(BATCH, n, HEADS, d, generator=g).half().float().transpose(1, 2) for d in sizes]
        for held, new in zip((k, v), rows, strict=True):
            held[:, :, first : first + n] = new
        candidates: list[Tensor] = []
        for segment, capacity in enumerate(SEGMENTS):
            index = torch.arange(n).repeat(2 if several and step % 3 == 1 else 1).expand(BATCH, -1)
            score = SCORES[torch.randint(len(SCORES), index.shape, generator=g)] + step // 5  # or no row enters any more
            for b, sequence in enumerate(sequences):
                sequence.offer(segment, score[b].tolist(), (index[b] + first).tolist())
            if n > 1:  # of one row's scores there is nothing to choose
                score, order = top_rows(score, max(capacity, index.shape[1] // n))
                index = index.gather(1, order)
            candidates += [score, index]
        offer(*rows, candidates, first)
        compare(state, sequences, k, v)
        first += n
        entered += int((state["exact_slot"] == first - 1).any())
        if step % 7 == 5:
            shuffle(state, g)
        if step in (11, 20, 30):
            first -= 3
            crop(state, first)
            for sequence in sequences:
                sequence.crop(first)
    assert entered >= 12


def fresh(dtype: torch.dtype = torch.float32) -> State:
    """The exact rows of an empty cache; a place that is not filled must not pass for right."""
    rows = {n: torch.full((BATCH, HEADS, PLACES, d), float("nan"), dtype=dtype) for n, d in (("exact_k", 8), ("exact_v", 6))}
    return {
        "exact_slot": torch.full((BATCH, PLACES), -1, dtype=torch.int32),
        "exact_score": torch.full((BATCH, PLACES), NEVER),
        **rows,
    }


class Layer:
    """A codec with these segments and its state; `append_` by one way of running it."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self.codec: Codec = replace(layer.codec, segments=SEGMENTS)
        self.params, self.slots = layer.params, layer.max_length
        layout = self.codec.layout(BATCH, HEADS, layer.head_dim, layer.value_dim, self.slots, dtype)
        self.st = {n: torch.full(shape, fill, dtype=kind) for n, (shape, kind, fill) in layout.items()}
        self.st["positions"] = torch.zeros(BATCH, self.slots, dtype=torch.int32)
        self.st["real"] = torch.ones(BATCH, self.slots, dtype=torch.bool)
        self.state = [self.st[name] for name in STATE_NAMES]
        self.dtype = dtype

    def arguments(self, k: Tensor, v: Tensor, candidates: list[Tensor], first: int) -> dict[str, Any]:
        self.st["length"].fill_(first)
        s = k.shape[2]
        none = torch.empty(1, s, 0)
        return dict(
            k=k.to(self.dtype),
            v=v.to(self.dtype),
            positions=torch.arange(first, first + s)[None],
            cos=none,
            sin=none,
            candidates=candidates,
            state=self.state,
            params=self.params,
            codec=self.codec.text(),
            roped=True,
        )

    def append(self, *given: Any) -> None:
        append_(**self.arguments(*given))


def rows_of_bytes() -> Layer:
    return Layer(states.layer_of("rtn", (("protect", "first:1"),), BATCH), torch.float32)


@pytest.mark.parametrize("seed", range(4))
def test_the_reference(seed: int) -> None:
    state = fresh()

    def offer(k: Tensor, v: Tensor, candidates: list[Tensor], first: int) -> None:
        held = state["exact_slot"], state["exact_score"], (state["exact_k"], state["exact_v"])
        state.update(zip(NAMES, merge_exact(*held, (k, v), candidates, SEGMENTS, torch.tensor(first)), strict=True))

    play(state, offer, True, seed)


def test_plain_operators() -> None:
    layer = rows_of_bytes()
    with by_definition():
        play(layer.st, layer.append, True, 10)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alone", [False, True])
def test_c(seed: int, alone: bool) -> None:
    """The selection alone, and within the code that does all of one new row."""
    layer = rows_of_bytes()
    if declines(layer.codec.format, states.shape_of(layer.st["exact_k"]), states.CPU):
        pytest.skip("no C compiler")

    def offer(k: Tensor, v: Tensor, candidates: list[Tensor], first: int) -> None:
        if alone and k.shape[2] == 1:
            select_one(layer.codec, k, v, candidates, layer.st, first)
        else:
            layer.append(k, v, candidates, first)

    play(layer.st, offer, True, seed)


@here
@interpreter
def test_triton() -> None:
    layer = rows_of_bytes()

    def offer(k: Tensor, v: Tensor, candidates: list[Tensor], first: int) -> None:
        assert append_triton.declines(layer.codec.format, states.shape_of(k), states.GPU) == ""
        return append_triton.append(states.coding(**layer.arguments(k, v, candidates, first)))

    play(layer.st, offer, False, 40)


@here
@interpreter
@pytest.mark.parametrize("seed", range(3))
def test_triton_of_exact_rows_alone(seed: int) -> None:
    layer = rows_of_bytes()

    def offer(k: Tensor, v: Tensor, candidates: list[Tensor], first: int) -> None:
        layer.st["length"].fill_(first)
        append_triton.keep_exact(layer.codec, layer.st, k, v, candidates)

    play(layer.st, offer, True, seed)
    assert not layer.st["positions"].any() and not layer.st["k_codes"].any()


@here
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, 26)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler to emulate the CUDA kernels with")
@pytest.mark.parametrize("kernel", ["append_rows", "append_row", "attend"])
def test_cuda(kernel: str) -> None:
    """The kernels that code rows, and attention, which lets the new row in after it has read the exact ones."""
    made = test_tiles.layer_of(5, BATCH)
    layer = Layer(made, torch.float16)
    lib = Emulated(launch.variant_of(layer.codec, 1), 1, single_rows=BATCH if kernel == "append_row" else 0)

    def offer(k: Tensor, v: Tensor, candidates: list[Tensor], first: int) -> None:
        a = layer.arguments(k, v, candidates, first)
        st, p = layer.st, dict(zip(layer.codec.param_names(), layer.params, strict=True))
        given = a["k"], a["v"], a["positions"], candidates
        if kernel == "attend" and k.shape[2] == 1:
            assert launch.step_one(lib, layer.codec, a["k"], *given, st, p, None, 0.1) is not None
        else:
            launch.append(states.coding(**a), lib)

    play(layer.st, offer, False, 20)


def test_onnx() -> None:
    pytest.importorskip("onnx", reason="needs kvsink[onnx]")
    ort = pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")
    from onnx import helper

    from kvsink.export.bodies import DOMAIN, OPSET, function_proto

    state = fresh()
    names = [f"x{i}" for i in range(7 + 2 * len(SEGMENTS))]
    kinds = (torch.int32, *[torch.float32] * 5, torch.int64, *[torch.float32, torch.int64] * len(SEGMENTS))
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=t).numpy().dtype), [None] * dims)
        for n, t, dims in zip(names, kinds, (2, 2, 4, 4, 4, 4, 1, *[2] * 2 * len(SEGMENTS)), strict=True)
    ]
    results = [helper.make_empty_tensor_value_info(n) for n in NAMES]
    node = helper.make_node("PreserveSinks", names, list(NAMES), domain=DOMAIN, segments=SEGMENTS, overload="1")
    function = function_proto("PreserveSinks", "1", {"segments": SEGMENTS}, (True,) * len(names), OPSET)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "selection", values, results)
    model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    from onnx import shape_inference

    model = shape_inference.infer_shapes(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def offer(k: Tensor, v: Tensor, candidates: list[Tensor], first: int) -> None:
        given = [*(state[n] for n in NAMES), k, v, torch.full((BATCH,), first), *candidates]
        found = session.run(None, {n: t.contiguous().numpy() for n, t in zip(names, given, strict=True)})
        state.update(zip(NAMES, map(torch.from_numpy, found), strict=True))

    play(state, offer, True, 30)


@pytest.mark.parametrize("seed", range(5))
def test_candidates_of_a_chunk_are_its_best_rows_the_earlier_of_equal_ones(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    score = SCORES[torch.randint(len(SCORES), (BATCH, 40), generator=g)]
    best, index = top_rows(score, 9)
    hidden, valid = torch.randint(-2, 3, (BATCH, 40, 6), generator=g).float(), torch.rand(BATCH, 40, generator=g) < 0.9
    by_channel = select_sinks(hidden, valid, torch.tensor([1, 4]), torch.tensor([1.0, 0.5]), 9, False)
    by_entry = select_sinks(hidden, valid, torch.tensor([0]), torch.ones(1), 9, True)
    order = torch.randint(0, 3, (BATCH, 40), generator=g)  # documents packed in one sequence share its places
    segment: Any = type("Segment", (), {"source": "first", "count": 2})
    by_place = order_candidates(Frame(valid=valid), order, BATCH, segment)
    for b in range(BATCH):
        wanted = sorted(range(40), key=lambda i: (-s if (s := float(score[b, i])) > NEVER else float("inf"), i))[:9]
        assert index[b].tolist() == wanted
        assert best[b].tolist() == [s if s > NEVER else NEVER for s in score[b][wanted].tolist()]
        seen = [i for i in range(40) if valid[b, i]]
        size = hidden[b].abs()
        wanted = sorted(seen, key=lambda i: (-max(float(size[i, 1]), float(size[i, 4]) / 2), i))[:9]
        assert by_channel[1][b].tolist() == wanted
        entries = sorted((-float(size[i, c]), i) for i in seen for c in range(6))[:9]
        assert by_entry[1][b].tolist() == [i for _, i in entries]
        assert by_place[1][b].tolist() == sorted((i for i in seen if order[b, i] < 2), key=lambda i: (int(order[b, i]), i))[:2]
