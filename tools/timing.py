"""Times and ceilings of a GPU: CUDA-graph replays over several input sets, so that nothing is found in the L2 cache again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

__all__ = ["ASKED", "captured", "copy_bandwidth", "device_facts", "event_times", "graph_times", "read_bandwidth"]

ASKED = {"target": "KVSINK_CUDA_TARGET", "shared_bytes": "KVSINK_CUDA_SHARED", "block": "KVSINK_CUDA_SHAPE"}
"""What a row calls the build that was asked of `kvsink.kernels.cuda.module`, and the variables that ask."""

Times = tuple[float, float, float]
"""p20, p50, p80 in ms."""


def _quantiles(values: Sequence[float]) -> Times:
    t = sorted(values)
    return t[len(t) // 5], t[len(t) // 2], t[len(t) * 4 // 5]


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph that holds all calls, replayed a few times."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    return graph


def graph_times(calls: Sequence[Callable[[], object]], replays: int = 30) -> Times:
    """Time of one call, from replays of one graph that holds all calls; without a GPU, of the calls themselves."""
    if not torch.cuda.is_available():
        return _quantiles([t / len(calls) for t in _wall_times(lambda: [call() for call in calls], min(replays, 3))])
    graph = captured(calls)
    return _quantiles([t / len(calls) for t in event_times(graph.replay, replays)])


def event_times(call: Callable[[], object], repeats: int) -> list[float]:
    """Times of repeated calls in ms, by device events."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for a, b in events:
        a.record()
        call()
        b.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in events]


def _wall_times(call: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append((time.perf_counter() - begun) * 1e3)
    return times


def copy_bandwidth(gib: float = 2.0) -> float:
    """Bytes read plus written per second of a device-to-device copy."""
    x = torch.randint(0, 255, (int(gib * 2**30),), dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / graph_times([lambda: y.copy_(x)], 10)[1] * 1e3


def read_bandwidth(gib: float = 4.0) -> float:
    """Bytes read per second of a sum over a large tensor, the best of two element types."""
    x = torch.randint(0, 1 << 20, (int(gib * 2**28),), dtype=torch.int32, device="cuda")
    views = (x.view(torch.float32), x.view(torch.float16))
    return max(x.numel() * 4 / graph_times([partial(torch.sum, y)], 10)[1] * 1e3 for y in views)


def device_facts() -> dict[str, str]:
    """What a row says about where it was measured."""
    import transformers

    p = torch.cuda.get_device_properties(0)
    asked = {name: os.environ[variable] for name, variable in ASKED.items() if variable in os.environ}
    return {
        "device": p.name,
        "capability": f"{p.major}.{p.minor}",
        **asked,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
