"""`kvsink-bench kernels`: one layer of a LLaMA-3-8B shape, attention and append against the fastest 16-bit SDPA backend.

Formula    limit = bytes of codes and scales of all tokens / measured read bandwidth; speed-up = time of SDPA / time of ours:
           attention against attention, with `append_` against attention, and with `append_` against SDPA with its own write
Shapes     32 query heads, 8 key-value heads, 128 channels; B sequences of T tokens,
           one exact row (stage rows begin later in a model), one new row
Raises     an op whose result is outside the stated bound of the definition is not timed: its row says so
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvsink.kernels import native
from kvsink.kernels.append import append_
from kvsink.kernels.append_attend import append_attend_
from kvsink.kernels.attend import attend_ref, attention
from kvsink.kernels.backends import Call, LayerState
from kvsink.tools.bench_model import declared, fill, llama, rewritten
from kvsink.tools.bench_sdpa import DISTINCT, Baseline, sdpa_baseline
from kvsink.tools.timing import Times, graph_times

__all__ = ["BOUND", "SHAPES", "Case", "ops_rows", "ops_table"]

SHAPES = ((1, 1024), (1, 131072), (16, 8192), (64, 4096))
BOUND = 2e-3  # relative error of an fp16 result: its own rounding, 2**-11, and a few like it
_SAID = (
    "method", "bits", "error", "p50_ms", "speedup", "with_append_ms", "speedup_with_append", "speedup_with_both_writes",
    "in_turn_ms", "of_limit",
)  # fmt: skip


def packed_bytes(codec: Any, b: int, t: int, kv_heads: int) -> int:
    """Bytes of codes and scales that decode attention must read."""
    rows = codec.layout(b, kv_heads, 128, 128, t, torch.float16)
    return sum(
        int(torch.Size(rows[n][0]).numel()) * rows[n][1].itemsize for n in ("k_codes", "k_scale", "v_codes", "v_scale")
    )


def ops_rows(
    sides: Sequence[str], shapes: Sequence[tuple[int, int]], bandwidth: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row per method, bits and shape, with `append_`: beside attention, and in turn."""
    dtype, rows = torch.float16, []
    model = llama(layers=1, dtype=dtype, vocabulary=512)
    a = model.config
    heads, kv_heads = a.num_attention_heads, a.num_key_value_heads
    runtimes = [(side, rewritten(model, side)) for side in sides]
    for b, t in shapes:
        base = sdpa_baseline(b, t, heads, kv_heads, 128, dtype)
        gc.collect()
        torch.cuda.empty_cache()
        say(
            f"B{b} T{t}: {base.backend} {base.times[1] * 1e3:.2f} us, with its write {base.updated_times[1] * 1e3:.2f} us "
            f"({base.updated_backend}, {base.update})"
        )
        for side, attach in runtimes:
            row = _one(attach(), side, b, t, base, bandwidth)
            rows.append(row)
            say("  " + "  ".join(f"{k}={row[k]}" for k in _SAID if k in row))
            gc.collect()
            torch.cuda.empty_cache()
    return rows


class Case:
    """One method at one shape: new rows, and as many caches as asked for, filled up to the last token."""

    def __init__(self, model: Any, b: int, t: int) -> None:
        self.model, self.b, self.t = model, b, t
        self.heads, self.kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        self.first = self.made()
        self.codec, device, self.scale = self.first.codec, "cuda", 128**-0.5
        g = torch.Generator(device).manual_seed(1)
        counts = (self.heads, self.kv_heads, self.kv_heads)
        self.q, self.k, self.v = (torch.randn(b, n, 1, 128, device=device, dtype=torch.float16, generator=g) for n in counts)
        self.positions = torch.full((1, 1), t - 1, device=device)
        self.scores: list[Tensor] = []
        for _ in self.codec.segments:
            self.scores += [
                torch.full((b, 1), float("-inf"), device=device),
                torch.zeros(b, 1, dtype=torch.int64, device=device),
            ]
        self.cos, self.sin = self.first.shared.runtime.angles(0, self.positions)
        call = Call(self.codec, "", self.k, self.v, LayerState(*self.first.state()), self.first.params, self.q)
        self.kernel = call.choice("attend").name
        self.bytes = packed_bytes(self.codec, b, t, self.kv_heads)

    def made(self) -> Any:
        """A layer's cache of t - 1 tokens."""
        from kvsink.cache import KVSinkCache

        cache = KVSinkCache.for_model(self.model, self.b, self.t)
        fill(cache, self.t - 1)
        return cache.packed_layers()[0]

    def caches(self) -> list[Any]:
        """So many that none stays in the L2 cache, each several times where that is not many."""
        layers = [self.first] + [self.made() for _ in range(max(1, min(32, -(-DISTINCT // self.bytes))) - 1)]
        return layers * (1 if len(layers) > 8 else 4)

    def attention(self, x: Any) -> Tensor:
        """Attention of the new row over a cache and itself."""
        return attention(self.q, self.k, self.v, x.state(), x.params, None, self.scale, False, x.codec_text)

    def append(self, x: Any) -> None:
        """Code the new row and store it."""
        append_(self.k, self.v, self.positions, self.cos, self.sin, self.scores, x.state(), x.params, x.codec_text, True)

    def step(self, x: Any) -> Tensor:
        """Both."""
        return append_attend_(
            self.q, self.k, self.v, self.positions, self.scores, x.state(), x.params, None, self.scale, False, x.codec_text, []
        )

    def error(self) -> float:
        """Relative error of the first two sequences against the definition."""
        out, layer = self.attention(self.first), self.first
        torch.cuda.synchronize()
        whole = self.codec.named(layer.state())
        few = [x if name in ("recent_slot", "length") else x[:2] for name, x in whole.items()]
        names = self.codec.param_names()
        tables = [x[:2] if n.startswith("anchor_") else x for n, x in zip(names, layer.params, strict=True)]
        q, k, v = (x[:2].float() for x in (self.q, self.k, self.v))
        wanted = attend_ref(q, k, v, few, tables, None, self.scale, False, layer.codec_text)
        error = float((out[:2].float() - wanted).norm() / wanted.norm())
        return error if bool(torch.isfinite(out).all()) else float("nan")


def _one(model: Any, side: str, b: int, t: int, base: Baseline, bandwidth: float) -> dict[str, Any]:
    case = Case(model, b, t)
    error = case.error()
    method, key_bits, value_bits = declared(side)
    bits = int(key_bits) if key_bits == value_bits else f"{key_bits:g}/{value_bits:g}"
    row: dict[str, Any] = {
        "kind": "kernel", "method": method.name, "bits": bits, "kernel": case.kernel,
        "counted_bits": round(8 * case.bytes / (b * t * case.kv_heads * 256), 3),
        "B": b, "T": t, "Hq": case.heads, "Hkv": case.kv_heads, "D": 128,
        "error": f"{error:.1e}", "sdpa": base.backend, "sdpa_ms": round(base.times[1], 5),
        "sdpa_with_update": base.updated_backend, "fp16_update": base.update,
        "fp16_with_update_ms": round(base.updated_times[1], 5),
    }  # fmt: skip
    if not error <= BOUND:
        return {**row, **dict.fromkeys(_TIMED), "note": "wrong, not timed"}
    caches = case.caches()
    alone = graph_times([partial(case.attention, x) for x in caches])
    both = graph_times([partial(case.step, x) for x in caches])
    native.BESIDE, beside = False, native.BESIDE
    in_turn = graph_times([partial(case.step, x) for x in caches])
    native.BESIDE = beside
    return {**row, **timed(base, alone, both, in_turn, case.bytes, bandwidth)}


_TIMED = ("p50_ms", "speedup", "with_append_ms", "speedup_with_append", "speedup_with_both_writes", "of_limit")
"""What a row without times leaves empty."""


def timed(base: Baseline, alone: Times, both: Times, in_turn: Times, size: int, bandwidth: float) -> dict[str, Any]:
    """Fields of a row from times of attention, of a step side by side and of one in turn, in ms."""
    limit = size / bandwidth * 1e3
    return {
        "p20_ms": round(alone[0], 5), "p50_ms": round(alone[1], 5), "p80_ms": round(alone[2], 5),
        "speedup": round(base.times[1] / alone[1], 3), "with_append_ms": round(both[1], 5),
        "speedup_with_append": round(base.times[1] / both[1], 3),
        "speedup_with_both_writes": round(base.updated_times[1] / both[1], 3), "in_turn_ms": round(in_turn[1], 5),
        "bytes": size, "limit_ms": round(limit, 5), "of_limit": round(limit / alone[1], 3),
        "byte_limit_speedup": round(base.times[1] / limit, 2),
    }  # fmt: skip


def ops_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table: both counts of the 16-bit side, in us, and what is gained over each."""
    lines = [
        "| shape | method | fp16 | with its write | ours | | with `append_` | against fp16 | against fp16 with its write |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        fp16 = f"{r['sdpa_ms'] * 1e3:.2f} | {r['fp16_with_update_ms'] * 1e3:.2f}"
        shape = f"| B{r['B']} T{r['T']} | `{r['method']}` {r['bits']} | {fp16}"
        if r["p50_ms"] is None:
            lines.append(f"{shape} | {r['note']} | | | | |")
            continue
        lines.append(
            f"{shape} | {r['p50_ms'] * 1e3:.2f} | {r['speedup']:.2f}x | {r['with_append_ms'] * 1e3:.2f} | "
            f"{r['speedup_with_append']:.2f}x | {r['speedup_with_both_writes']:.2f}x |"
        )
    return "\n".join(lines)
