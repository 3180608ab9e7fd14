"""Scratch memory: a place of its own for every stream and every living graph, or one line that says what to do."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import pytest
import torch

from kvsink.kernels.cuda import module, scratch
from kvsink.kernels.cuda.driver import NativeError
from kvsink.kernels.cuda.scratch import RESERVE, Scratch

CPU = torch.device("cpu")


class Machine:
    """A GPU's streams and graphs, as far as `Scratch` asks about them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capture, self.dead = 1, 0, set[int]()
        monkeypatch.setattr(scratch, "now_at", lambda device: (self.stream, self.capture, 1000 + self.capture))
        monkeypatch.setattr(scratch, "when_gone", lambda graph: lambda: graph - 1000 in self.dead)

    def on(self, held: Scratch, stream: int) -> int:
        """The address of the place of a launch on a stream."""
        self.stream, self.capture = stream, 0
        return held.now()[0].data_ptr()

    def within(self, held: Scratch, capture: int) -> int:
        """The same of a launch that is captured."""
        self.stream, self.capture = 1, capture
        return held.now()[0].data_ptr()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_every_stream_has_a_place_of_its_own(machine: Machine) -> None:
    held = Scratch(CPU, 6, 5)
    places = [machine.on(held, stream) for stream in range(1, 101)]
    assert len(set(places)) == 100
    assert [machine.on(held, stream) for stream in range(1, 101)] == places
    parts, counts = held.now()
    assert parts.tolist() == [-1] * 6 and counts.tolist() == [0] * 5 and held.clean()
    counts[4] = 1
    assert not held.clean()


def test_every_graph_has_a_place_of_its_own(machine: Machine) -> None:
    held, streams, graphs = Scratch(CPU, 4, 4), [], []
    for i in range(1, 60):  # each behind a step that runs outside a graph
        streams.append(machine.on(held, i % 3))
        graphs.append(machine.within(held, i))
        assert machine.within(held, i) == graphs[-1]
    assert len(set(graphs) | set(streams)) == 59 + 3


def test_a_capture_makes_no_memory_and_says_what_to_do(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Scratch(CPU, 4, 4)
    made = []
    monkeypatch.setattr(scratch, "lasting", lambda device, make: made.append(device) or make())
    graphs = [machine.within(held, i + 1) for i in range(RESERVE)]
    with pytest.raises(NativeError, match=f"{RESERVE} graphs own all.*Run one step outside a graph.*reserve") as error:
        machine.within(held, 99)
    assert "\n" not in str(error.value) and not made
    machine.on(held, 7)
    assert made == [CPU]
    assert machine.within(held, 99) not in graphs
    machine.capture = 0
    held.reserve(3 * RESERVE)
    graphs += [machine.within(held, 100 + i) for i in range(3 * RESERVE)]
    assert len(set(graphs)) == 4 * RESERVE


def test_the_place_of_a_graph_that_is_gone_is_given_again(machine: Machine) -> None:
    held = Scratch(CPU, 4, 4)
    graphs = [machine.within(held, i + 1) for i in range(RESERVE)]
    machine.dead.add(3)
    assert machine.within(held, 50) == graphs[2]
    machine.dead.remove(3)  # a graph dies once
    for i in range(100, 1000):  # a server that captures for every request holds no more than what lives
        machine.on(held, 1)
        machine.within(held, i)
        machine.dead.add(i)
    machine.on(held, 1)
    assert len(held._graphs) == RESERVE and len(held._free) <= 2 * RESERVE


def test_what_is_made_in_a_capture_takes_its_places_later(machine: Machine) -> None:
    machine.capture = 5
    held = Scratch(CPU, 4, 4)
    with pytest.raises(NativeError, match="0 graphs own"):
        held.now()
    machine.on(held, 1)
    machine.within(held, 5)


def test_the_end_of_a_graph_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def cuUserObjectCreate(self, out: Any, pointer: ctypes.c_void_p, destroy: ctypes.c_void_p, count: int, flags: int) -> int:
            assert destroy.value and pointer.value
            self.end = lambda: ctypes.CFUNCTYPE(None, ctypes.c_void_p)(destroy.value)(pointer.value)
            return 0

        def cuGraphRetainUserObject(self, graph: ctypes.c_void_p, owned: Any, count: int, flags: int) -> int:
            return int(graph.value != 77)

    driver = Driver()
    monkeypatch.setattr(scratch, "driver", lambda: driver)
    gone = scratch.when_gone(77)
    assert not gone() and not gone()
    driver.end()
    assert gone()
    assert not scratch.when_gone(78)()  # the driver does not tell


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_and_graphs_of_a_gpu() -> None:
    device = torch.device("cuda", 0)
    held = Scratch(device, 64, 64)

    def captured() -> tuple[torch.cuda.CUDAGraph, int]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            parts, counts = held.now()
            parts.add_(1)  # as a launch does: what it finds empty it leaves empty
            parts.sub_(1)
            counts.add_(0)
        return graph, parts.data_ptr()

    living = [captured() for _ in range(RESERVE)]
    assert len({place for _, place in living}) == RESERVE
    with pytest.raises(NativeError, match="Run one step outside a graph"):
        captured()
    torch.cuda.synchronize()
    graph, place = living.pop(4)
    graph.replay()
    del graph
    torch.cuda.synchronize()
    gc.collect()
    again = captured()
    assert again[1] == place
    streams = [torch.cuda.Stream() for _ in range(20)]
    places = set()
    for stream in streams:
        with torch.cuda.stream(stream):
            places.add(held.now()[0].data_ptr())
    assert len(places) == len({s.cuda_stream for s in streams})
    assert not places & {place for _, place in (*living, again)}
    for graph, _ in (*living, again):
        graph.replay()
    torch.cuda.synchronize()
    assert held.clean()
    assert module.scratch(device) is module.scratch(device)
