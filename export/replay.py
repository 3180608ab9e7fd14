"""Steps of one new token a row whose slot is its position: what is bound once stays bound, as a CUDA graph needs it.

Formula    the tensors of a cache, and those of tokens, positions and logits beside them, are bound at its first step; every
           further step writes tokens and positions into theirs and runs. With CUDA graphs the first step captures
Differs    capturing runs a step more than once. It codes its row anew each time, but may not offer it to the exact rows twice:
           those are put back, whatever comes of the capture
Cost       a graph of its own for the tensors of every cache, as long as the session lives; `begin` takes those of the last text
           again where they have room
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy as np

from kvsink.export.held import Held, dtype_of

__all__ = ["PAST", "PRESENT", "Steps"]

PAST, PRESENT = "past_key_values.", "present."


@dataclass
class _Bound:
    """A binding, the tensors it names beside the cache's, arrays that may be their memory, the number of its CUDA graph, and the
    cache's tensors."""

    binding: Any
    values: dict[str, Any]
    memory: Any
    graph: str
    cache: tuple[Any, ...]

    def binds(self, past: Held) -> bool:
        """Whether these are the tensors of a cache still, which may have been given others."""
        return len(past) == len(self.cache) and all(map(is_, past.values(), self.cache))


class Steps:
    """The steps of a runner of flavour custom or gqa in float16."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.graphs = runner, 0

    def begin(self, batch: int, length: int) -> Held:
        """An empty cache for a text of `length` tokens, in the tensors of the last one where it has ended and these have room."""
        last = self.runner.past
        free = last and last.text.ended and not last.lost
        if not free or last["0.key"].shape()[0] != batch or last["0.key"].shape()[2] < length:
            self.runner.past = self.runner.empty(batch, length + length // 8 if self.runner.graphs else length)
            return self.runner.past
        for name, value in last.items():
            for of, empty in ((".exact_slot", -1), (".exact_score", -np.inf)):
                if name.endswith(of):
                    value.update_inplace(np.full_like(value.numpy(), empty))
        again = self.runner.past = Held(last, 0)
        again.bound, last.text.taken = last.bound, True
        return again

    def step(self, ids: Any, positions: Any, past: Held) -> tuple[Any, Held]:
        """Tokens int64 [B, 1] behind a cache with room: (logits float32 [B, 1, V] of their own, the cache that holds them)."""
        bound = past.bound or self._bind(past, len(ids))
        for name, array in (("input_ids", ids), ("position_ids", positions)):
            bound.values[name].update_inplace(np.ascontiguousarray(array, dtype=np.int64))
        if past.bound is None and self.runner.graphs:
            exact = {name: value.numpy().copy() for name, value in past.items() if ".exact_" in name}
            try:
                self.runner.run(bound.binding, bound.graph)
            finally:
                for name, array in exact.items():
                    past[name].update_inplace(array)
        past.bound = bound
        self.runner.run(bound.binding, bound.graph)
        logits = bound.values[self.runner.last_logits].numpy()  # on a processor the memory that the next step writes
        logits = logits.astype(np.float32, copy=self.runner.device == "cpu")
        return logits, Held(past, past.tokens + 1)

    def _bind(self, past: Held, batch: int) -> _Bound:
        runner, binding, slots = self.runner, self.runner.session.io_binding(), past["0.key"].shape()[2]
        logits = next(e for e in runner.manifest["outputs"] if e["name"] == runner.last_logits)
        # Of a mask nobody reads more than the number of its columns. On a processor values are the memory of their arrays.
        memory = {name: np.ones((batch, 1), dtype=np.int64) for name in ("input_ids", "position_ids")}
        memory["attention_mask"] = np.ones((batch, slots), dtype=np.int64)
        memory[runner.last_logits] = np.zeros((batch, 1, logits["shape"][2]), dtype=dtype_of(logits))
        values = {}
        for name, array in memory.items():
            values[name] = runner.value(array, "cpu" if name == "attention_mask" and runner.tiled else "")
            (binding.bind_ortvalue_output if name == runner.last_logits else binding.bind_ortvalue_input)(name, values[name])
        for name, value in past.items():
            binding.bind_ortvalue_input(PAST + name, value)
            binding.bind_ortvalue_output(PRESENT + name, value)
        self.graphs += 1
        return _Bound(binding, values, memory, str(self.graphs), tuple(past.values()))
