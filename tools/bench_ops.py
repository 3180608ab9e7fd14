"""`kvsink-bench kernels` and `shapes`: attention and append of one layer against the fastest backend in 16 bit.

Formula    limit = bytes of codes and scales of all tokens / measured read bandwidth; speed-up = time in 16 bit / time of ours:
           attention against attention, with `append_` against attention, and with `append_` against 16 bit with its own write
Shapes     B sequences of T tokens, one exact row (stage rows begin later in a model) or as many as asked for, one new row
Raises     an op whose result is outside the stated bound of the definition is not timed: its row says so
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvsink.cache.cache import KVSinkCache
from kvsink.cache.served import served
from kvsink.kernels import append_, append_attend_, attend
from kvsink.kernels.attend import attend_ref
from kvsink.kernels.backends import device_of
from kvsink.model.runtime import runtime_of
from kvsink.tools.bench_model import Shape, declared, fill, llama, rewritten
from kvsink.tools.bench_sdpa import DISTINCT, Baseline, sdpa_baseline
from kvsink.tools.timing import Times, graph_times

__all__ = ["BOUND", "SHAPES", "Case", "Kept", "ops_rows", "ops_table"]

SHAPES = ((1, 1024), (1, 131072), (16, 8192), (64, 4096))
BOUND = 2e-3  # relative error of an fp16 result: its own rounding, 2**-11, and a few like it
_SAID = (
    "method",
    "bits",
    "exact",
    "window",
    "kernel",
    "why",
    "error",
    "p50_ms",
    "speedup",
    "with_append_ms",
    "speedup_with_append",
    "speedup_with_both_writes",
    "in_turn_ms",
    "of_limit",
    "of_plain",
)


@dataclass(frozen=True)
class Kept:
    """Rows kept as they came: a protection, and recent rows."""

    protect: str = "kvsink:5+first:1"
    window: int = 0


def packed_bytes(codec: Any, b: int, t: int, kv_heads: int, dim: int = 128) -> int:
    """Bytes of codes and scales that decode attention must read."""
    rows = codec.layout(b, kv_heads, dim, dim, t, torch.float16)
    return sum(int(torch.Size(rows[n][0]).numel()) * rows[n][1].itemsize for n in ("k_codes", "k_scale", "v_codes", "v_scale"))


def ops_rows(
    models: Mapping[str, Shape],
    sides: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    bandwidth: float,
    say: Callable[[str], None],
    kept: Sequence[Kept] = (Kept(),),
    in_turn: bool = True,
    device: str = "cuda",
    dtype: torch.dtype = torch.float16,
) -> Iterator[dict[str, Any]]:
    """One row per (B, T), model, method and rows kept, in this order, as soon as it is measured. With the first of `kept` as its
    measure, `of_plain` says what the others cost. in_turn: time `append_` and attention one after the other, too."""
    made: dict[Any, Any] = {}
    for b, t in shapes:
        for name, shape in models.items():
            base = sdpa_baseline(b, t, shape.heads, shape.kv_heads, shape.head_dim, dtype, device)
            _free()
            say(f"B{b} T{t} {name} {shape.heads}/{shape.kv_heads}/{shape.head_dim}: {base.text()}")
            if name not in made:
                made[name] = llama(layers=1, dtype=dtype, vocabulary=512, shape=shape, device=device)
            for side in sides:
                plain: float | None = None
                for i, rows in enumerate(kept):
                    if (name, side, rows) not in made:
                        made[name, side, rows] = rewritten(made[name], side, rows.protect, rows.window)
                    row = _one(made[name, side, rows](), name, side, rows, b, t, base, bandwidth, in_turn)
                    if i == 0:
                        plain = row["p50_ms"]
                    else:
                        row["of_plain"] = round(row["p50_ms"] / plain, 3) if plain and row["p50_ms"] else None
                    say("  " + "  ".join(f"{k}={row[k]}" for k in _SAID if row.get(k) not in (None, "")))
                    yield row
                    _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Case:
    """One method at one shape: new rows, and as many caches as asked for, filled up to the last token."""

    def __init__(self, model: Any, b: int, t: int) -> None:
        self.model, self.b, self.t = model, b, t
        self.heads, self.kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        self.dim, device = model.config.head_dim, model.device
        plan: Any = runtime_of(model).plans[0]
        self.codec, self.scale = plan.codec, self.dim**-0.5
        g = torch.Generator(device).manual_seed(1)
        counts = (self.heads, self.kv_heads, self.kv_heads)
        self.q, self.k, self.v = (torch.randn(b, n, 1, self.dim, device=device, dtype=model.dtype, generator=g) for n in counts)
        self.positions = torch.full((1, 1), t - 1, device=device)
        self.scores: list[Tensor] = []
        for _ in self.codec.segments:
            self.scores += [torch.full((b, 1), float("-inf"), device=device), torch.zeros(b, 1, dtype=torch.int64, device=device)]
        self.angles = runtime_of(model).angles(0, self.positions)
        self.first = self.made()
        self.codec = self.first.codec
        self.bytes = packed_bytes(self.codec, b, t, self.kv_heads, self.dim)

    def made(self) -> Any:
        """A layer's cache of t - 1 tokens, with the new row in its place behind them."""
        cache = KVSinkCache.for_model(self.model, self.b, self.t)
        fill(cache, self.t - 1)
        x = cache.packed_layers()[0]
        append_(self.k, self.v, self.positions, *self.angles, self.scores, x.state(), x.params, x.codec_text, True)
        return x

    def caches(self) -> list[Any]:
        """So many that none stays in the L2 cache, each several times where that is not many."""
        layers = [self.first] + [self.made() for _ in range(max(1, min(32, -(-DISTINCT // self.bytes))) - 1)]
        return layers * (1 if len(layers) > 8 else 4)

    def attention(self, x: Any) -> Tensor:
        """Attention of the new row over a cache and itself."""
        return attend(self.q, self.k, self.v, x.state(), x.params, None, self.scale, False, x.codec_text)

    def step(self, x: Any) -> Tensor:
        """The same, with the new row coded and stored."""
        return append_attend_(
            self.q, self.k, self.v, self.positions, self.scores, x.state(), x.params, None, self.scale, False, x.codec_text, []
        )

    def in_turn(self, x: Any) -> Tensor:
        """The same by two ops, one after the other."""
        append_(self.k, self.v, self.positions, *self.angles, self.scores, x.state(), x.params, x.codec_text, True)
        return self.attention(x)

    def served(self) -> tuple[str, str]:
        """Which kernels attend, and why those over tiles do not."""
        choice = served(runtime_of(self.model), self.k.dtype, device_of(self.k.device))[0][0]
        return choice.name.removesuffix(" (tiles)"), choice.why[0][1] if choice.why else ""

    def error(self) -> float:
        """Relative error of the first two sequences against the definition."""
        out, layer = self.attention(self.first), self.first
        whole = self.codec.named(layer.state())
        few = [x if name in ("recent_slot", "length") else x[:2] for name, x in whole.items()]
        names = self.codec.param_names()
        tables = [x[:2] if n.startswith("origin_") else x for n, x in zip(names, layer.params, strict=True)]
        q, k, v = (x[:2].float() for x in (self.q, self.k, self.v))
        wanted = attend_ref(q, k, v, few, tables, None, self.scale, False, layer.codec_text)
        error = float((out[:2].float() - wanted).norm() / wanted.norm())
        return error if bool(torch.isfinite(out).all()) else float("nan")


def _one(
    model: Any, name: str, side: str, kept: Kept, b: int, t: int, base: Baseline, bandwidth: float, in_turn: bool
) -> dict[str, Any]:
    case = Case(model, b, t)
    method, key_bits, value_bits = declared(side)
    bits = int(key_bits) if key_bits == value_bits else f"{key_bits:g}/{value_bits:g}"
    (kernel, why), error = case.served(), case.error()
    row: dict[str, Any] = {
        "kind": "kernel",
        "model": name,
        "method": method.name,
        "bits": bits,
        "exact": case.codec.exact_rows,
        "window": case.codec.window,
        "kernel": kernel,
        "why": why,
        "counted_bits": round(8 * case.bytes / (b * t * case.kv_heads * 2 * case.dim), 3),
        "B": b,
        "T": t,
        "Hq": case.heads,
        "Hkv": case.kv_heads,
        "D": case.dim,
        "error": f"{error:.1e}",
        **base.facts(),
    }
    if not error <= BOUND:
        return {**row, **dict.fromkeys(_TIMED), "note": "wrong, not timed"}
    caches = case.caches()
    alone = graph_times([partial(case.attention, x) for x in caches])
    both = graph_times([partial(case.step, x) for x in caches])
    apart = None
    if in_turn:
        apart = graph_times([partial(case.in_turn, x) for x in caches])
    return {**row, **timed(base, alone, both, apart, case.bytes, bandwidth)}


_TIMED = ("p50_ms", "speedup", "with_append_ms", "speedup_with_append", "speedup_with_both_writes", "of_limit")
"""What a row without times leaves empty."""


def timed(base: Baseline, alone: Times, both: Times, in_turn: Times | None, size: int, bandwidth: float) -> dict[str, Any]:
    """Fields of a row from times of attention, of a step side by side and of one in turn, in ms."""
    limit = size / bandwidth * 1e3
    return {
        "p20_ms": round(alone[0], 5),
        "p50_ms": round(alone[1], 5),
        "p80_ms": round(alone[2], 5),
        "speedup": round(base.times[1] / alone[1], 3),
        "with_append_ms": round(both[1], 5),
        "speedup_with_append": round(base.times[1] / both[1], 3),
        "speedup_with_both_writes": round(base.updated_times[1] / both[1], 3),
        **({} if in_turn is None else {"in_turn_ms": round(in_turn[1], 5)}),
        "bytes": size,
        "limit_ms": round(limit, 5),
        "of_limit": round(limit / alone[1], 3),
        "byte_limit_speedup": round(base.times[1] / limit, 2),
    }


def ops_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table: both counts of the 16-bit side, in us, and what is gained over each."""
    lines = [
        "| shape | method | kernel | fp16 | with its write | ours | | with `append_` | against fp16 | against fp16 and write |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        fp16 = f"{r['sdpa_ms'] * 1e3:.2f} | {r['fp16_with_update_ms'] * 1e3:.2f}"
        kept = f", {r['exact']} + {r['window']} exact" if r["window"] or r["exact"] > 16 else ""
        shape = f"| {r['model']}, B{r['B']} T{r['T']} | `{r['method']}` {r['bits']}{kept} | {r['kernel']} | {fp16}"
        if r["p50_ms"] is None:
            lines.append(f"{shape} | {r['note']} | | | | |")
            continue
        lines.append(
            f"{shape} | {r['p50_ms'] * 1e3:.2f} | {r['speedup']:.2f}x | {r['with_append_ms'] * 1e3:.2f} | "
            f"{r['speedup_with_append']:.2f}x | {r['speedup_with_both_writes']:.2f}x |"
        )
    return "\n".join(lines)
