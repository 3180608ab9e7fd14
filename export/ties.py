"""Two float32 computations of one cache: where the codes differ, proof that a value stood on a threshold, and what follows from it.

A graph and the torch model add the same numbers in another order. A value that lies on the edge between two codes then falls to
either side. `Ties` lets the torch model go on with the codes of the graph, after it has shown of every row that differs that
torch itself codes a row so near by that float32 cannot tell the two apart. Whatever comes after is then computed from the same
codes on both sides, and its logits can be held to the bound of two computations that agree.

Formula    d = 1e-5 · max |x of that layer|. A row x of one layer and side is a tie when every number that the graph's codes stand
           for is, within d, the number of that channel in decode(quantize(x + u)) for some |u| <= d; u runs over shifts, scalings
           and random signs of three sizes. Levels lie thousands of d apart, so that a code is the same or it is not; scales are
           part of what is decoded
Source     ours; 1e-5 is what float32 leaves of 30 layers of sums in another order, some 2**-24 for each
Shapes     x [B, H, S, D]; codes of the graph by name, uint8 or int8 [B, H, P + S, bytes]; seen bool [B, S], false at padding
Exact      yes: rows that do not differ are left alone, and padding, which nothing reads, too
Raises     ExportError naming layer, side, token and channel of the first code that is no tie
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvsink.codecs import Codec
from kvsink.export.errors import ExportError
from kvsink.kernels.cpu.append import by_definition
from kvsink.model.runtime import Runtime

__all__ = ["NEAR", "Ties"]

NEAR = 1e-5
_SIZES = (1.0, 0.1, 0.01)  # of NEAR: a far shift may carry a second channel over its edge, and with it a fitted scale
_SIGNS = 8


class Ties:
    """The codes of one step of a graph, for the torch model that takes the same step inside `followed()`.

    present: the tensors the graph left, by name without prefix; at: the slot of the first new row. Counts bytes of codes, and
    of them those that differ.
    """

    def __init__(self, runtime: Runtime, present: Mapping[str, Any], at: int, seen: Any) -> None:
        self.bytes, self.different = 0, 0
        self._seen = torch.as_tensor(seen)
        self._calls = self._of_graph(runtime, present, at)

    def _of_graph(self, runtime: Runtime, present: Mapping[str, Any], at: int) -> Iterator[tuple[int, str, Tensor, Tensor | None]]:
        """Layer, side, codes and scale of the new rows, in the order in which the torch model codes them."""
        for i, plan in enumerate(runtime.plans):
            for name, side in (("key", "k"), ("value", "v")):
                c = plan.codec
                if c is not None and (c.key if side == "k" else c.value).packed:
                    codes = np.ascontiguousarray(present[f"{i}.{name}"][:, :, at:])
                    held = torch.from_numpy(codes).view(torch.uint8) ^ (128 if codes.dtype == np.int8 else 0)
                    scale = present.get(f"{i}.{name}_scale")
                    yield i, side, held, None if scale is None else torch.from_numpy(np.ascontiguousarray(scale[:, :, at:]))

    @contextmanager
    def followed(self) -> Iterator[Ties]:
        """For the time of a `with` block and one step, rows that tie are stored as the graph stores them."""
        quantize = Codec.quantize

        def follow(codec: Codec, side: str, x: Tensor, p: Any) -> tuple[Tensor, Tensor]:
            layer, which, codes, scale = next(self._calls)
            assert side == which, (layer, side, which)
            mine, own = quantize(codec, side, x, p)
            scale = own if scale is None else scale
            different = ((mine != codes).any(-1) | (own != scale).any(-1)).any(1) & self._seen  # [B, S]
            self.bytes += int(self._seen.sum()) * mine[0, :, 0].numel()
            if different.any():
                self.different += int((mine != codes).transpose(1, 2)[self._seen].sum())

                def rows(t: Tensor) -> Tensor:
                    return t.transpose(1, 2)[different].transpose(0, 1)[None]  # [1, H, rows, n]

                wrong = _unexplained(codec, quantize, side, rows(x), rows(codes), rows(scale), float(x.abs().max()), p)
                if wrong is not None:
                    row, channel = wrong
                    token = int(different.nonzero()[row, 1])
                    what = "keys" if side == "k" else "values"
                    raise ExportError(
                        f"{what} of layer {layer} are coded otherwise than in the torch cache, at new token {token}, channel "
                        f"{channel}, and no rounding explains it; nothing was written, please report the model"
                    )
                pick = different[:, None, :, None]
                mine, own = torch.where(pick, codes, mine), torch.where(pick, scale, own)
            return mine, own

        watched: Any = Codec
        watched.quantize = follow
        try:
            with by_definition():
                yield self
        finally:
            watched.quantize = quantize


def _unexplained(
    c: Codec, quantize: Any, side: str, x: Tensor, codes: Tensor, scale: Tensor, largest: float, p: Any
) -> tuple[int, int] | None:
    """Row and channel of the first number of rows [1, H, n, D] that torch gives to no row near x."""
    found: Tensor = c.dequantize(side, codes, scale, p)
    known, d = torch.zeros_like(found, dtype=torch.bool), NEAR * largest
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(0, 2, x.shape, generator=generator, dtype=x.dtype) * 2 - 1 for _ in range(_SIGNS)]
    for u in (torch.zeros_like(x), torch.ones_like(x), x / max(largest, 1e-30), *signs):
        for size in _SIZES:
            for sign in (1, -1):
                near, own = quantize(c, side, x + sign * size * d * u, p)
                known |= (c.dequantize(side, near, own, p) - found).abs() <= d
        if known.all():
            return None
    _, _, row, channel = (~known).nonzero()[0].tolist()
    return row, channel
