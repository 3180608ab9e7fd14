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

from kvsink.kernels import attend_triton, native, packed
from kvsink.kernels.append import append_
from kvsink.kernels.append_attend import append_attend_
from kvsink.kernels.attend import attend_any, attend_packed, attend_ref
from kvsink.tools.bench_model import declared, fill, llama, rewritten
from kvsink.tools.bench_sdpa import DISTINCT, Baseline, sdpa_baseline
from kvsink.tools.timing import Times, graph_times

__all__ = ["BOUND", "SHAPES", "ops_rows", "ops_table"]

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
            row = _one(attach(), side, b, t, heads, kv_heads, dtype, base, bandwidth)
            rows.append(row)
            say("  " + "  ".join(f"{k}={row[k]}" for k in _SAID if k in row))
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def _one(
    model: Any, side: str, b: int, t: int, heads: int, kv_heads: int, dtype: torch.dtype, base: Baseline, bandwidth: float,
) -> dict[str, Any]:  # fmt: skip
    from kvsink.cache import KVSinkCache

    def made() -> Any:
        cache = KVSinkCache.for_model(model, b, t)
        fill(cache, t - 1)
        return cache.packed_layers()[0]

    layer = made()
    codec, size = layer.codec, packed_bytes(layer.codec, b, t, kv_heads)
    lib = packed.usable(codec, heads, layer.k_codes.new_empty(1, kv_heads, 1, 128, dtype=dtype))
    method, key_bits, value_bits = declared(side)
    g = torch.Generator("cuda").manual_seed(1)
    q, k, v = (torch.randn(b, n, 1, 128, device="cuda", dtype=dtype, generator=g) for n in (heads, kv_heads, kv_heads))
    positions = torch.full((1, 1), t - 1, device="cuda")
    scores: list[Tensor] = []
    for _ in codec.segments:
        scores += [
            torch.full((b, 1), float("-inf"), device="cuda"),
            torch.zeros(b, 1, dtype=torch.int64, device="cuda"),
        ]
    scale = 128**-0.5

    cos, sin = layer.shared.runtime.angles(0, positions)

    def attention(x: Any) -> Tensor:
        if lib is None:
            return attend_any(q, k, v, x.state(), x.params, None, scale, False, x.codec_text)
        return attend_packed(lib, codec, q, k, v, x.state(), x.params, None, scale, False)  # type: ignore[return-value]

    def step(x: Any) -> Tensor:
        if lib is not None:
            return append_attend_(q, k, v, positions, scores, x.state(), x.params, None, scale, False, x.codec_text)
        append_(k, v, positions, cos, sin, scores, x.state(), x.params, x.codec_text, True)
        return attention(x)

    error = _error(layer, codec, attention, q, k, v, scale)
    bits_held = 8 * size / (b * t * kv_heads * 256)
    bits = int(key_bits) if key_bits == value_bits else f"{key_bits:g}/{value_bits:g}"
    row: dict[str, Any] = {
        "kind": "kernel", "method": method.name, "bits": bits,
        "kernel": "cuda" if lib is not None else attend_triton.served_by(codec, q, k, layer.state(), layer.params),
        "counted_bits": round(bits_held, 3), "B": b, "T": t, "Hq": heads, "Hkv": kv_heads, "D": 128,
        "error": f"{error:.1e}", "sdpa": base.backend, "sdpa_ms": round(base.times[1], 5),
        "sdpa_with_update": base.updated_backend, "fp16_update": base.update,
        "fp16_with_update_ms": round(base.updated_times[1], 5),
    }  # fmt: skip
    if not error <= BOUND:
        return {**row, **dict.fromkeys(_TIMED), "note": "wrong, not timed"}
    layers = [layer] + [made() for _ in range(max(1, min(32, -(-DISTINCT // size))) - 1)]
    repeats = 1 if len(layers) > 8 else 4
    alone = graph_times([partial(attention, x) for _ in range(repeats) for x in layers])
    both = graph_times([partial(step, x) for _ in range(repeats) for x in layers])
    native.ORDER, order = "in-turn", native.ORDER
    in_turn = graph_times([partial(step, x) for _ in range(repeats) for x in layers])
    native.ORDER = order
    return {**row, **timed(base, alone, both, in_turn, size, bandwidth)}


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


def _error(
    layer: Any, codec: Any, attention: Callable[[Any], Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float
) -> float:
    """Relative error of the first two sequences against the definition."""
    out = attention(layer)
    torch.cuda.synchronize()
    whole = codec.named(layer.state())
    few = [x if name in ("recent_slot", "length") else x[:2] for name, x in whole.items()]
    tables = [
        x[:2] if name.startswith("anchor_") else x for name, x in zip(codec.param_names(), layer.params, strict=True)
    ]
    wanted = attend_ref(q[:2].float(), k[:2].float(), v[:2].float(), few, tables, None, scale, False, layer.codec_text)
    error = float((out[:2].float() - wanted).norm() / wanted.norm())
    return error if bool(torch.isfinite(out).all()) else float("nan")
