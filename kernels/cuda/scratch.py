"""What blocks of a launch leave for each other on one GPU: parts of rows, and how many heads have come.

Formula    launches find the words empty and leave them so; those that may overlap never share them: each stream has a place of
           its own, each captured graph one until it and all that was instantiated from it are gone
           no place can be made during a capture, so `RESERVE` free ones are made ahead, whenever a launch runs outside one
Source     ours
Differs    the driver tells that a graph is gone: it then posts a semaphore that the graph owns as a user object
Shapes     of a place: parts int32 [words], all -1; counts int32 [rows], all 0
Raises     NativeError when a capture finds no free place, with what to do
Cost       words and rows times 4 bytes a place: some 1.4 MB on 132 multiprocessors
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

from ..lasting import lasting
from .driver import NativeError, check, driver

__all__ = ["RESERVE", "Scratch"]

RESERVE = 16  # graphs that can be captured one after another without a launch outside them


def now_at(device: torch.device) -> tuple[int, int, int]:
    """Of the current stream: its handle, the number of the capture that it takes part in and its graph; 0 where there is none."""
    stream = torch.cuda.current_stream(device).cuda_stream
    if not torch.cuda.is_current_stream_capturing():
        return stream, 0, 0
    status, number, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    info = driver().cuStreamGetCaptureInfo_v2
    check(info(ctypes.c_void_p(stream), *map(ctypes.byref, (status, number, graph)), None, None), "naming a captured graph")
    return stream, number.value, graph.value or 0


def when_gone(graph: int) -> Callable[[], bool]:
    """A question, to be asked until the answer is True: whether a graph and what was instantiated from it are gone.

    Never, where the driver does not tell: the place then stays the graph's.
    """
    libc, owned = ctypes.CDLL(None), ctypes.c_void_p()
    libc.calloc.restype = ctypes.c_void_p
    posted = ctypes.c_void_p(libc.calloc(1, 128))  # a sem_t; not Python's, as the driver may post it at the very end
    libc.sem_init(posted, 0, 0)
    post = ctypes.cast(libc.sem_post, ctypes.c_void_p)
    no_sync, move, d = 1, 1, driver()
    if d.cuUserObjectCreate(ctypes.byref(owned), posted, post, 1, no_sync):
        return lambda: False
    if d.cuGraphRetainUserObject(ctypes.c_void_p(graph), owned, 1, move):
        return lambda: False

    def gone() -> bool:
        if libc.sem_trywait(posted):
            return False
        libc.free(posted)
        return True

    return gone


class Scratch:
    """The places of one GPU, of `words` parts and `rows` counts each."""

    def __init__(self, device: torch.device, words: int, rows: int) -> None:
        self.device, self.words, self.rows, self._ahead = device, words, rows, RESERVE
        self._free: list[tuple[Tensor, Tensor]] = []
        self._streams: dict[int, tuple[Tensor, Tensor]] = {}
        self._graphs: dict[int, tuple[tuple[Tensor, Tensor], Callable[[], bool]]] = {}
        self._lock = Lock()
        if not now_at(device)[1]:
            self._refill()

    def now(self) -> tuple[Tensor, Tensor]:
        """Words for parts and counts of heads, for a launch on the current stream."""
        stream, capture, graph = now_at(self.device)
        with self._lock:
            if not capture:
                self._refill()
                if stream not in self._streams:
                    self._streams[stream] = self._free.pop()
                return self._streams[stream]
            if capture not in self._graphs:
                self._collect()
                if not self._free:
                    raise NativeError(
                        f"no scratch memory is left for this CUDA graph: {len(self._graphs)} graphs own all that was made, and "
                        "none is made during a capture. Run one step outside a graph before you capture, which makes "
                        f"{self._ahead} places ahead, or ask for more: kvsink.kernels.cuda.module.scratch(device).reserve(n)"
                    )
                self._graphs[capture] = self._free.pop(), when_gone(graph)
            return self._graphs[capture][0]

    def reserve(self, places: int) -> None:
        """Keep so many places free, for as many captures one after another; call it outside of any."""
        with self._lock:
            self._ahead = max(places, 1)
            self._refill()

    def clean(self) -> bool:
        """Whether all words are empty, as they are between launches."""
        places = [*self._free, *self._streams.values(), *(place for place, _ in self._graphs.values())]
        return all(bool((parts == -1).all()) and not bool(counts.any()) for parts, counts in places)

    def _collect(self) -> None:
        """Places of graphs that are gone become free."""
        for capture in [n for n, (_, gone) in self._graphs.items() if gone()]:
            self._free.append(self._graphs.pop(capture)[0])

    def _refill(self) -> None:
        """Make the free places that are missing, ready for any stream."""
        if len(self._free) >= self._ahead:
            return
        self._collect()
        count = self._ahead - len(self._free)
        if count <= 0:
            return

        def make() -> list[tuple[Tensor, Tensor]]:
            parts = torch.full((count, self.words), -1, dtype=torch.int32, device=self.device)
            counts = torch.zeros(count, self.rows, dtype=torch.int32, device=self.device)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            return list(zip(parts.unbind(), counts.unbind(), strict=True))

        self._free += lasting(self.device, make)
