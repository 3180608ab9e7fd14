"""CUDA-graph timing: one graph holds one call per input set, so that no set is still in the L2 cache when its turn comes again."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def graph_times(calls: Sequence[Callable[[], object]], replays: int = 30) -> tuple[float, float, float]:
    """p20, p50, p80 of the time of one call in ms."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for c in calls:
            c()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for c in calls:
            c()
    for _ in range(3):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for a, b in events:
        a.record()
        graph.replay()
        b.record()
    torch.cuda.synchronize()
    t = sorted(a.elapsed_time(b) / len(calls) for a, b in events)
    del graph
    return t[len(t) // 5], t[len(t) // 2], t[len(t) * 4 // 5]


def copy_bandwidth(gib: float = 2.0) -> float:
    """Bytes read plus written per second of a device-to-device copy."""
    x = torch.randint(0, 255, (int(gib * 2**30),), dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    ms = graph_times([lambda: y.copy_(x)], 10)[1]
    return 2 * x.numel() / ms * 1e3


def read_bandwidth(gib: float = 4.0) -> float:
    """Bytes read per second of a sum over a large tensor, the best of two element types."""
    x = torch.randint(0, 1 << 20, (int(gib * 2**28),), dtype=torch.int32, device="cuda")
    return max(x.numel() * 4 / graph_times([lambda y=y: torch.sum(y)], 10)[1] * 1e3 for y in (x.view(torch.float32), x.view(torch.float16)))
