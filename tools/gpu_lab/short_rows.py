"""Attention of many short rows on an H100: rows divided among warps against whole rows per warp, beside fp16 SDPA.

    OUT=folder python tools/gpu_lab/short_rows.py [--shapes 1416x32x512,…] [--mask]

Every result is compared with the definition (four sequences) and the two ways with each other (all of them) before it is timed;
what is wrong is not timed. Times are of CUDA-graph replays over input sets larger than the L2 cache. Rows are appended to
$OUT/short_rows.jsonl. `limit` counts codes and scales, as `kvsink-bench kernels` does, `all` the exact rows too.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from kvsink.kernels.append_attend import append_attend_
from kvsink.kernels.attend import attend_ref
from kvsink.kernels.backends import Call, LayerState
from kvsink.kernels.cuda.launch import attend, library
from kvsink.kernels.cuda.variants import by_warp
from kvsink.tools.bench_model import LLAMA_3_8B, LLAVA_15_7B, fill, llama, rewritten
from kvsink.tools.bench_ops import BOUND, packed_bytes
from kvsink.tools.bench_sdpa import sdpa_best
from kvsink.tools.timing import device_facts, graph_times, read_bandwidth

SHAPES = "1416x32x512,304x32x2944,64x8x4096,16x8x8192,1x8x131072,1x8x1024"
SIDES = (("centred:even-2", 22), ("centred:even-2", 6), ("centred:even-4", 22), ("centred:even-4", 6), ("akvq-vl:even-2", 15))
HEADS, SCALE, WAYS = 32, 128**-0.5, ("divided", "whole")
_DISTINCT = 200_000_000  # bytes of all input sets together: four times the L2 cache


def made(model: Any, b: int, t: int, exact: int) -> Any:
    """A layer that holds t - 1 tokens. Many exact rows lie all over the row, as pivots do, few at its start, as sinks do."""
    from kvsink.cache.cache import KVSinkCache

    cache = KVSinkCache.for_model(model, b, t)
    fill(cache, t - 1)
    layer = cache.packed_layers()[-1]
    if layer.exact_slot.shape[1] != exact:
        raise ValueError(f"{layer.exact_slot.shape[1]} exact rows, {exact} wanted")
    if exact > 8:
        layer.exact_slot.copy_((torch.arange(exact, device=layer.device) * (t - 1) // exact).int()[None])
    return layer


def error_of(layer: Any, out: Tensor, given: tuple[Tensor, ...], mask: Tensor | None) -> float:
    """Relative error of four sequences, the worst of them, against the definition."""
    pick = torch.tensor(sorted({0, 1, out.shape[0] // 2, out.shape[0] - 1} & set(range(out.shape[0]))), device=out.device)
    codec, worst = layer.codec, 0.0
    for i in pick.split(1):
        few = [x if n in ("recent_slot", "length") else x[i] for n, x in codec.named(layer.state()).items()]
        tables = [x[i] if n.startswith("origin_") else x for n, x in zip(codec.param_names(), layer.params, strict=True)]
        q, k, v = (x[i].float() for x in given)
        wanted = attend_ref(q, k, v, few, tables, mask, SCALE, False, layer.codec_text)
        worst = max(worst, float((out[i].float() - wanted).norm() / wanted.norm()))
    return worst if bool(torch.isfinite(out).all()) else float("nan")


def measure(model: Any, side: str, exact: int, shape: tuple[int, int, int], masked: bool, bandwidth: float) -> dict[str, Any]:
    b, kv_heads, t = shape
    layer = made(model, b, t, exact)
    codec, size = layer.codec, packed_bytes(layer.codec, b, t, kv_heads)
    device = layer.device
    g = torch.Generator(device).manual_seed(1)
    heads = (HEADS, kv_heads, kv_heads)
    q, k, v = (torch.randn(b, n, 1, 128, device=device, dtype=torch.float16, generator=g) for n in heads)
    lib = library(codec, HEADS // kv_heads, codec.rotary(layer.params), k.device)
    slots = torch.arange(layer.k_codes.shape[2], device=device)
    mask = (slots < t)[None, None, None] if masked else None
    positions = torch.full((1, 1), t - 1, device=device)
    scores: list[Tensor] = []
    for _ in codec.segments:
        scores += [torch.full((b, 1), float("-inf"), device=device), torch.zeros(b, 1, dtype=torch.int64, device=device)]

    def attention(x: Any) -> Tensor:
        call = Call(codec, x.codec_text, k, v, LayerState(*x.state()), x.params, q, mask=mask, scale=SCALE)
        return attend(call, lib)

    def step(x: Any) -> Tensor:
        return append_attend_(q, k, v, positions, scores, x.state(), x.params, mask, SCALE, False, x.codec_text, [])

    limit, whole_limit = size / bandwidth * 1e3, (size + b * kv_heads * exact * 512) / bandwidth * 1e3
    row: dict[str, Any] = {
        "kind": "short rows",
        "side": side,
        "E": exact,
        "B": b,
        "Hq": HEADS,
        "Hkv": kv_heads,
        "T": t,
        "mask": masked,
        "bytes": size,
        "limit_ms": round(limit, 5),
        "limit_all_ms": round(whole_limit, 5),
        "chosen": "whole" if by_warp(b, lib.share(kv_heads), slots.numel() // 128, lib.warps) and lib.whole_rows else "divided",
    }
    outs, layers = {}, [layer]
    for name, whole in (("divided", False), ("whole", True)):
        if whole and not lib.whole_rows:
            continue
        lib.by_warp = whole
        outs[name] = attention(layer)
        torch.cuda.synchronize()
        row[f"{name}_error"] = error_of(layer, outs[name], (q, k, v), mask)
    if len(outs) == 2:
        a, c = (x.float() for x in outs.values())
        row["apart"] = float((a - c).norm() / a.norm())
    wrong = [n for n in outs if not row[f"{n}_error"] <= BOUND] + ["apart"] * (not row.get("apart", 0.0) <= BOUND)
    if wrong:
        lib.by_warp = None
        return {**row, "note": f"wrong, not timed: {wrong}"}
    layers += [made(model, b, t, exact) for _ in range(max(1, min(32, -(-_DISTINCT // size))) - 1)]
    repeats = 1 if len(layers) > 8 else 4 if size < 1 << 30 else 2
    for name in outs:
        lib.by_warp = name == "whole"
        for what, call in (("ms", attention), ("with_append_ms", step)):
            times = graph_times([partial(call, x) for _ in range(repeats) for x in layers], 20)
            row[f"{name}_{what}"] = round(times[1], 5)
            if call is attention:
                row[f"{name}_p20_ms"], row[f"{name}_p80_ms"] = round(times[0], 5), round(times[2], 5)
        row[f"{name}_of_limit"] = round(limit / row[f"{name}_ms"], 3)
        row[f"{name}_of_all"] = round(whole_limit / row[f"{name}_ms"], 3)
    lib.by_warp = None
    return row


def line(row: dict[str, Any]) -> str:
    def of(name: str, form: str) -> str:
        return format(row[name], form) if name in row else "-"

    ways = [f"{of(f'{n}_ms', '.4f'):>8} {of(f'{n}_of_limit', '.0%'):>5} {of(f'{n}_of_all', '.0%'):>5}" for n in WAYS]
    steps = [f"{of(f'{n}_with_append_ms', '.4f'):>8}" for n in WAYS]
    errors = [f"{of(f'{n}_error', '.1e'):>8}" for n in WAYS]
    shape = f"B{row['B']} {row['Hq']}/{row['Hkv']} T{row['T']}"
    head = f"{shape:<20} {row['side']:<15} {row['E']:>3} {of('sdpa_ms', '.4f'):>8} {row['limit_ms']:>8.4f}"
    return "  ".join([head, *ways, *steps, *errors, row["chosen"], row.get("note", "")])


@click.command()
@click.option("--shapes", default=SHAPES, show_default=True, help="BATCHxKVHEADSxLENGTH, comma-separated; 32 query heads.")
@click.option("--mask/--no-mask", default=False, show_default=True, help="With one mask for all sequences, as a static cache has.")
def main(shapes: str, mask: bool) -> None:
    """Check and time both ways."""
    bandwidth, facts, wrong = read_bandwidth(), device_facts(), 0
    print(f"{facts} read {bandwidth / 1e12:.3f} TB/s", flush=True)
    print(
        f"{'shape':<20} {'side':<15} {'E':>3} {'fp16 ms':>8} {'limit ms':>8}  divided ms limit   all     whole ms limit   all  "
        "with append_: both    errors: both",
        flush=True,
    )
    out = Path(os.environ.get("OUT", ".")) / "short_rows.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    models = {n.kv_heads: llama(2, torch.float16, 512, shape=n) for n in (LLAMA_3_8B, LLAVA_15_7B)}
    for text in shapes.split(","):
        b, kv_heads, t = (int(n) for n in text.split("x"))
        name, base = sdpa_best(b, t, HEADS, kv_heads, 128, torch.float16)
        for side, exact in SIDES:
            if side.startswith("akvq") and kv_heads != HEADS:
                continue
            gc.collect()
            torch.cuda.empty_cache()
            model = rewritten(models[kv_heads], side, f"kvsink:5+first:{exact - 5}")()
            row = measure(model, side, exact, (b, kv_heads, t), mask, bandwidth)
            row |= {"sdpa": name, "sdpa_ms": round(base[1], 5), "read_tb_s": round(bandwidth / 1e12, 3)}
            wrong += "note" in row
            print(line(row), flush=True)
            with open(out, "a") as file:
                file.write(json.dumps({**facts, **row}) + "\n")
    sys.exit(2 if wrong else 0)


if __name__ == "__main__":
    main()
