"""The reference model's log-probabilities over one set of windows, computed once and compared with many caches.

Exact      float32 as computed; kept only where they fit, else computed again at every use
Shapes     one tensor [rows, C, V] per batch of windows and chunk
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

__all__ = ["Reference", "free_bytes"]

_SHARE = 0.4  # of the memory that is free when the first chunk is asked for


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; 0 where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


class Reference:
    """A 16-bit model beside which caches are measured. Give it to `evaluate` as `baseline`.

    keep: keep the log-probabilities of every chunk; None keeps them when all of them take at most 40 % of the free memory.
    One Reference serves one set of windows, one chunk length and one batch size; another set starts it anew.
    """

    def __init__(self, model: Any, keep: bool | None = None) -> None:
        self.model = model
        self.wanted, self.keep = keep, bool(keep)
        self._of: tuple[Any, ...] = ()
        self._chunks: dict[tuple[int, int], Tensor] = {}
        self.size: tuple[float, int] = (math.nan, 0)  # bits per element and bytes of its own cache

    def begin(self, ids: Tensor, chunk: int, batch: int) -> None:
        """Say what is about to be compared; what is kept of anything else is dropped."""
        of = (tuple(ids.shape), hash(ids.cpu().numpy().tobytes()), chunk, batch)
        if of == self._of:
            return
        self._of, self._chunks, self.size = of, {}, (math.nan, 0)
        if self.wanted is None:
            vocabulary = self.model.config.get_text_config().vocab_size
            self.keep = 4 * ids.numel() * vocabulary <= _SHARE * free_bytes(next(self.model.parameters()).device)

    def complete(self, first: int, starts: range) -> bool:
        """Whether every chunk of the batch that begins at window `first` is kept."""
        return all((first, start) in self._chunks for start in starts)

    def put(self, first: int, start: int, log_p: Tensor) -> None:
        """Keep one chunk, if chunks are kept."""
        if self.keep:
            self._chunks[first, start] = log_p

    def get(self, first: int, start: int) -> Tensor:
        """A kept chunk; the caller must not write into it."""
        return self._chunks[first, start]
