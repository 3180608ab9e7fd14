"""Latency of coding one new row, alone and beside attention, before and after its own kernel; every order of a step's two launches.

    python tools/gpu_lab/append_latency.py         # needs a GPU of capability 9.0; rows go to $OUT/append_latency.jsonl

"behind" is a step behind a small launch that writes the query, as a model has one, less that launch alone: what an early start
gains must not come from calls that overlap each other. Codes are compared with the definition on the processor first: a kernel
that stores others is not timed. Times are p50 of CUDA graph replays over several caches, the graphs in turn in every round, so
that drift meets all of them alike.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsink.kernels import native, packed, tiles
from kvsink.kernels.append import append_, append_ref
from kvsink.kernels.append_attend import append_attend_
from kvsink.kernels.attend import attend_packed
from kvsink.tools import bench_ops
from kvsink.tools.bench_model import fill, llama, rewritten
from kvsink.tools.bench_sdpa import DISTINCT, UPDATES, _inputs, sdpa_baseline, sdpa_calls, updated
from kvsink.tools.timing import device_facts, event_times

SIDES = ("klt-even-2", "centred-even-2")
SHAPES = ((1, 1024), (1, 2048), (16, 8192), (1, 131072), (64, 4096))
SIZES = (0.0, 1e-7, 1e-3, 0.1, *[1.0] * 24, 30.0, 1e3, 6e3)  # of the rows whose codes are compared
ROUNDS, REPLAYS = 5, 16
DEVICE = "cuda:0"
BEFORE = Path(__file__).with_name("rows_before.cuh")


@dataclass(frozen=True)
class Source(native.Variant):
    """A variant from other text: rows.cuh as it was, or macros."""

    before: bool = False
    macros: tuple[tuple[str, str], ...] = ()

    def source(self) -> str:
        text = super().source()
        if self.before:
            now = (native._FOLDER / "rows.cuh").read_text()
            assert text.count(now) == 1
            text = text.replace(now, BEFORE.read_text())
        return "".join(f"#define {name} {value}\n" for name, value in self.macros) + text


@dataclass(frozen=True)
class Code:
    """What runs: a name, source, up to how many sequences a row has a block of its own, whether idle blocks attend too, and
    whether attention starts early."""

    name: str
    before: bool = False
    macros: tuple[tuple[str, str], ...] = ()
    lone_rows: int = 1
    all_blocks: bool = False
    early: bool = False


BEFORE_ALL = Code("before", before=True, lone_rows=0, all_blocks=True)
NOW = Code("now")
EARLY = Code("now, early", early=True)
CODES = (
    BEFORE_ALL,
    NOW,
    EARLY,
    Code("now, blocks of rows", lone_rows=0),
    Code("now, all blocks", all_blocks=True),
    Code("now, first 2", macros=(("LONE_FIRST", "2"),)),
    Code("now, first 8", macros=(("LONE_FIRST", "8"),)),
)
STEPS = [(o, priority) for o in native.ORDERS for priority in (0, -1) if not priority or o not in ("chained", "in-turn")]


@contextmanager
def running(code: Code, codec: Any, libraries: dict[Any, Any], order: str = "beside", priority: int = 0) -> Iterator[Any]:
    """The kernels of a code in place of those of the package."""
    plain = packed.variant_of(codec, 4)
    source = Source(plain.mode, plain.key_widths, plain.value_widths, plain.repeats, code.before, code.macros)
    if source not in libraries:
        libraries[source] = native.Cubin(source, torch.device(DEVICE))
    lib, key = libraries[source], (plain, DEVICE)
    held = native._LOADED.get(key), native.LONE_ROWS, native.ORDER, native.SIDE_PRIORITY, native.EARLY
    native._LOADED[key], native.LONE_ROWS, native.ORDER, native.SIDE_PRIORITY = lib, code.lone_rows, order, priority
    native.EARLY = code.early
    if code.all_blocks:
        lib.attend = partial(attend_with_all, lib)
    try:
        yield lib
    finally:
        native.LONE_ROWS, native.ORDER, native.SIDE_PRIORITY, native.EARLY = held[1:]
        native._LOADED.pop(key)
        if held[0] is not None:
            native._LOADED[key] = held[0]
        vars(lib).pop("attend", None)


def attend_with_all(lib: Any, argument: Any, fresh: Any, heads: int) -> None:
    """`Cubin.attend` with as many blocks as ever, some without work."""
    argument.share = lib.share(heads)
    type(lib).attend(lib, argument, fresh, heads)


@dataclass
class Case:
    """One method at one shape: its model, inputs and caches."""

    model: Any
    side: str
    b: int
    t: int

    def __post_init__(self) -> None:
        g = torch.Generator(DEVICE).manual_seed(1)
        make = partial(torch.randn, device=DEVICE, dtype=torch.float16, generator=g)
        self.q, self.k, self.v = (make(self.b, n, 1, 128) for n in (32, 8, 8))
        self.first = self.made()
        self.codec = self.first.codec
        self.positions = torch.full((1, 1), self.t - 1, device=DEVICE)
        self.scores: list[Tensor] = []
        for _ in self.codec.segments:
            self.scores += [
                torch.full((self.b, 1), float("-inf"), device=DEVICE),
                torch.zeros(self.b, 1, dtype=torch.int64, device=DEVICE),
            ]
        self.cos, self.sin = self.first.shared.runtime.angles(0, self.positions)

    def made(self) -> Any:
        from kvsink.cache import KVSinkCache

        cache = KVSinkCache.for_model(self.model, self.b, self.t)
        fill(cache, self.t - 1)
        return cache.packed_layers()[0]

    def attention(self, x: Any) -> Tensor:
        lib = packed.usable(self.codec, 32, self.k)
        assert lib is not None
        return attend_packed(
            lib, self.codec, self.q, self.k, self.v, x.state(), x.params, None, 128**-0.5, False
        )  # type: ignore[return-value]

    def append(self, x: Any) -> None:
        append_(self.k, self.v, self.positions, self.cos, self.sin, self.scores, x.state(), x.params, x.codec_text, True)

    def step(self, x: Any) -> None:
        append_attend_(
            self.q, self.k, self.v, self.positions, self.scores, x.state(), x.params, None, 128**-0.5, False, x.codec_text
        )

    def behind(self, x: Any) -> None:
        self.q.mul_(1.0)
        self.step(x)

    def small(self, x: Any) -> None:
        self.q.mul_(1.0)

    def check(self) -> tuple[float, float, float]:
        """Shares of equal key and value codes over rows of many sizes, and the error of attention."""
        x = self.made()
        plain = [s.cpu() for s in x.state()]
        tables = [p.cpu() for p in x.params]
        length = self.codec.named(x.state())["length"]
        start = self.t - 1 - len(SIZES)
        for i, size in enumerate(SIZES):
            g = torch.Generator(DEVICE).manual_seed(i)
            k, v = (torch.randn(self.b, 8, 1, 128, device=DEVICE, generator=g).mul(size).half() for _ in range(2))
            k[:, 1::2, :, 3:90] = 0
            at = torch.full((1, 1), start + i, device=DEVICE)
            length.fill_(start + i)
            self.codec.named(plain)["length"].fill_(start + i)
            append_(k, v, at, self.cos, self.sin, self.scores, x.state(), x.params, x.codec_text, True)
            none = torch.empty(1, 1, 0)
            scores = [s.cpu() for s in self.scores]
            append_ref(k.cpu(), v.cpu(), at.cpu(), none, none, scores, plain, tables, x.codec_text, True)
        mine, wanted = ([s.cpu() for s in x.state()], plain)
        shares = []
        for name, widths in (("k", self.codec.key.widths), ("v", self.codec.value.widths)):
            a, b = (
                tiles.fetch(self.codec.named(s)[f"{name}_codes"], widths, name, start, len(SIZES)) for s in (mine, wanted)
            )
            shares.append(float((a == b).float().mean()))
        error = bench_ops._error(
            self.first, self.codec, self.attention, self.q, self.k, self.v, 128**-0.5
        )
        return shares[0], shares[1], error


def captured(calls: list[Callable[[], object]]) -> Any:
    """One graph of all calls, warmed up."""
    side = torch.cuda.Stream()
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


def times(graphs: dict[Any, Any], calls: int) -> dict[Any, float]:
    """Microseconds of a call of each graph."""
    found: dict[Any, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            found[name] += event_times(graph.replay, REPLAYS)
    return {name: statistics.median(values) / calls * 1e3 for name, values in found.items()}


def graphs_of(case: Case, codes: list[Code], libraries: dict[Any, Any]) -> tuple[dict[Any, Any], int]:
    """(code, what, order, priority) → graph, and the calls in each."""
    size = bench_ops.packed_bytes(case.codec, case.b, case.t, 8)
    caches = [case.first] + [case.made() for _ in range(max(1, min(32, -(-DISTINCT // size))) - 1)]
    caches *= 1 if len(caches) > 8 else 4
    graphs = {}
    for code in codes:
        orders = STEPS
        if code != NOW:  # a start before the join of two streams is no programmatic launch
            orders = [(o, 0) for o in ("chained", "in-turn") if code == EARLY or o == "in-turn"]
            orders += [("beside", 0)] if code != EARLY else []
        wanted = [("attention", "", 0), ("append", "", 0), *(("step", *how) for how in orders)]
        if code in (BEFORE_ALL, NOW, EARLY):
            wanted += [("behind", *how) for how in orders if how[0] in ("beside", "chained") and not how[1]]
        for what, order, priority in wanted:
            try:
                with running(code, case.codec, libraries, order or "beside", priority):
                    graphs[code.name, what, order, priority] = captured([partial(getattr(case, what), x) for x in caches])
            except RuntimeError as error:
                print(f"    {code.name}, {what} {order} is not captured: {str(error).splitlines()[0]}")
    graphs["none", "small", "", 0] = captured([partial(case.small, x) for x in caches])
    return graphs, len(caches)


def fp16_behind(b: int, t: int, base: Any) -> tuple[float, float]:
    """Microseconds of fp16 attention, alone and with its write, behind a small launch, less that launch."""
    calls, data = sdpa_calls(b, t, 32, 8, 128, torch.float16), _inputs(b, t, 32, 8, 128, torch.float16)
    plain, written = calls[base.backend], updated(calls[base.updated_backend], UPDATES[base.update])

    def small(d: Any) -> None:
        d[0].mul_(1.0)

    def first(call: Callable[[Any], Any], d: Any) -> None:
        small(d)
        call(d)

    kinds = {"small": small, "plain": partial(first, plain), "written": partial(first, written)}
    found = times({name: captured([partial(call, d) for d in data]) for name, call in kinds.items()}, len(data))
    return found["plain"] - found["small"], found["written"] - found["small"]


def main() -> int:
    begun, count, wrong = time.monotonic(), 0, 0
    libraries: dict[Any, Any] = {}
    facts, out = device_facts(), Path(os.environ.get("OUT", ".")) / "append_latency.jsonl"
    out.write_text("")
    model = llama(layers=1, dtype=torch.float16, vocabulary=512)
    attached = {side: rewritten(model, side) for side in SIDES}
    for b, t in SHAPES:
        base = sdpa_baseline(b, t, 32, 8, 128, torch.float16)
        fp16, written = base.times[1] * 1e3, base.updated_times[1] * 1e3
        behind = fp16_behind(b, t, base)
        print(
            f"\nB{b} T{t}: fp16 {fp16:.2f} us ({base.backend}), with its write {written:.2f} us ({base.update}); "
            f"behind a small launch {behind[0]:.2f} and {behind[1]:.2f} us"
        )
        for side in SIDES:
            case = Case(attached[side](), side, b, t)
            right = []
            for code in CODES if t <= 2048 else CODES[:2]:
                if code.macros and case.codec.key.transform != "klt":
                    continue
                with running(code, case.codec, libraries):
                    keys, values, error = case.check()
                if keys >= 0.998 and values == 1.0 and error <= bench_ops.BOUND:
                    right.append(code)
                else:
                    wrong += 1
                print(f"  {side:15} {code.name:20} equal codes {keys:.5f} {values:.5f}  error {error:.1e}")
            graphs, calls = graphs_of(case, right, libraries)
            found, rows = times(graphs, calls), []
            small = found.pop(("none", "small", "", 0))
            for (name, what, order, priority), seen in found.items():
                us = seen - small if what == "behind" else seen
                plain, both = behind if what == "behind" else (fp16, written)
                rows.append({
                    "kind": "append-latency", "method": side, "B": b, "T": t, "code": name, "what": what, "order": order,
                    "side_priority": priority, "us": round(us, 3), "fp16_us": round(plain, 3),
                    "fp16_with_update_us": round(both, 3), "against_fp16": round(plain / us, 3),
                    "against_fp16_with_update": round(both / us, 3),
                })  # fmt: skip
                how = f"{what} {order}{' high priority' if priority else ''}"
                print(f"    {name:20} {how:32} {us:7.2f} us  {plain / us:5.3f}x  {both / us:5.3f}x", flush=True)
            with open(out, "a") as file:
                file.writelines(json.dumps({**facts, **row}) + "\n" for row in rows)
            count += len(rows)
            del graphs, case
            torch.cuda.empty_cache()
    print(f"\n{count} rows in {out}, {wrong} codes wrong, {time.monotonic() - begun:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
