"""Checks every variant of attend_packed.cuh against the fp32 definition, then times it against the best fp16 SDPA backend.

Usage: python bench_attend.py --build        compile the variants (no GPU needed) into build/
       python bench_attend.py --out DIR      check and time on the GPU, write DIR/attend.csv
"""
from __future__ import annotations

import argparse
import csv
import gc
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from driver import HERE, MIXED, Kernel, compile_cubin, name_of, variant
from layout import CENTRED, KLT, PLAIN, bind, make_case, reference, relative_error
from timing import copy_bandwidth, graph_times, read_bandwidth

SHAPES = [(1, 1024), (1, 131072), (16, 8192), (64, 4096)]
VARIANTS = [
    variant(CENTRED), variant(KLT, MIXED), variant(PLAIN), variant(CENTRED, (4,) * 16, (4,) * 16, ITEM_PAIRS=2),
    variant(CENTRED, TRACE=1),
]


def sdpa_best(b: int, t: int, hkv: int, r: int, sets: int, dtype=torch.float16) -> tuple[str, tuple[float, float, float], dict]:
    """Fastest of the fused backends, with grouped heads as heads (enable_gqa) or as query rows of one head."""
    data = [[torch.randn(b, hkv * r if i == 0 else hkv, 1 if i == 0 else t, 128, device="cuda", dtype=dtype) for i in range(3)] for _ in range(sets)]
    rows = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        for grouped in (False, True):
            def call(q, k, v, grouped=grouped):
                if grouped:
                    return F.scaled_dot_product_attention(q.view(b, hkv, r, 128), k, v)
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            try:
                with sdpa_kernel(backend):
                    rows[f"{backend.name.split('_')[0].lower()}{'_rows' if grouped else ''}"] = graph_times([lambda d=d: call(*d) for d in data])
            except Exception as e:  # noqa: BLE001 - a backend that refuses is a missing row
                print("no", backend, grouped, str(e)[:100].replace("\n", " "))
    best = min(rows, key=lambda k: rows[k][1])
    return best, rows[best], rows


def packed_bytes(v: dict, b: int, t: int, hkv: int) -> int:
    bits = sum(v["KW"]) * 8 + sum(v["VW"]) * 8 + (16 if v["MODE"] == KLT else 32) + 32
    return b * t * hkv * bits // 8


def main() -> None:
    ap = argparse.ArgumentParser()
    ap.add_argument("--build", action="store_true")
    ap.add_argument("--out", type=Path)
    ap.add_argument("--only", default="")
    ap.add_argument("--shapes", default="")
    ap.add_argument("--seconds", type=float, default=420)
    ap.add_argument("--no-check", action="store_true")
    a = ap.parse_args()
    chosen = [v for v in VARIANTS if all(o in name_of(v) for o in a.only.split(",") if o)]
    build = HERE / "build"
    if a.build:
        for i in range(0, len(chosen), 2):
            for v, proc in [(v, compile_cubin(v, build)) for v in chosen[i : i + 2]]:
                err = proc.communicate()[1]
                used = [x.strip() for x in err.splitlines() if "Used" in x or "spill" in x]
                print(name_of(v), proc.returncode, *used[:2], *(err.splitlines()[:5] if proc.returncode else []), flush=True)
        return
    started = time.time()
    kernels = {name_of(v): Kernel(build / f"{name_of(v)}.cubin", v) for v in chosen if not v.get("TRACE")}
    props = torch.cuda.get_device_properties(0)
    copy, read = copy_bandwidth(), read_bandwidth()
    band = max(copy, read)
    print(f"{props.name}, {props.multi_processor_count} SMs, torch {torch.__version__}, copy {copy / 1e12:.3f} TB/s, read {read / 1e12:.3f} TB/s", flush=True)
    hkv, r, rows = 8, 4, []
    shapes = [s for s in SHAPES if not a.shapes or f"{s[0]}x{s[1]}" in a.shapes.split(",")]
    for b, t in shapes:
        sets16 = 32 if t == 1024 else 1
        best, base, all16 = sdpa_best(b, t, hkv, r, sets16)
        gc.collect(), torch.cuda.empty_cache()
        print(f"\nB{b} T{t}: fp16 " + "  ".join(f"{k} {x[1]:.4f}" for k, x in all16.items()), flush=True)
        groups: dict = {}
        for name, k in kernels.items():
            groups.setdefault((k.v["MODE"], k.v["KW"], k.v["VW"]), []).append((name, k))
        for (mode, kw, vw), members in groups.items():
            c = make_case(mode, b, hkv, r, t, device="cuda", key_widths=kw, value_widths=vw, new=1)
            ref = reference(c) if not a.no_check else None
            del c["kc"], c["vc"]
            gc.collect(), torch.cuda.empty_cache()
            size = packed_bytes(dict(MODE=mode, KW=kw, VW=vw), b, t, hkv)
            sets = max(1, min(64, -(-200_000_000 // size)))
            for name, k in members:
                if time.time() - started > a.seconds:
                    print("out of time")
                    break
                grid = k.grid_x(hkv)
                cases = [dict(c) for _ in range(sets)]
                bound = []
                for i, x in enumerate(cases):
                    for key in ("k_codes", "v_codes", "k_scale", "v_scale", "exact_k", "exact_v"):
                        x[key] = c[key].clone() if i else c[key]
                    x["out"] = torch.full_like(c["q"], float("nan"))
                    bound.append(bind(x, grid))
                err = float("nan")
                if ref is not None and not k.v.get("ABLATE"):
                    for _ in range(2):
                        cases[-1]["out"].fill_(float("nan"))
                        k.launch(bound[-1][0], grid)
                        torch.cuda.synchronize()
                        err = relative_error(cases[-1]["out"], ref)
                        if not err <= 2e-3:
                            break
                    if not err <= 2e-3:
                        print(f"  {name}: WRONG {err:.3e}, not timed", flush=True)
                        continue
                reps = 1 if sets > 8 else 4
                p20, p50, p80 = graph_times([lambda p=p: k.launch(p, grid) for _ in range(reps) for p, _ in bound])
                limit = size / band * 1e3
                rows.append(dict(device=props.name, torch=torch.__version__, B=b, T=t, Hq=hkv * r, Hkv=hkv, D=128, variant=name, grid=grid * hkv,
                                 per_sm=k.per_sm, smem=k.smem, error=f"{err:.2e}", p20_ms=round(p20, 5), p50_ms=round(p50, 5), p80_ms=round(p80, 5),
                                 sdpa=best, sdpa_p20_ms=round(base[0], 5), sdpa_p50_ms=round(base[1], 5), sdpa_p80_ms=round(base[2], 5),
                                 speedup=round(base[1] / p50, 3), bytes=size, gb_per_s=round(size / p50 / 1e6), limit_ms=round(limit, 5),
                                 of_limit=round(limit / p50, 3), copy_tb_s=round(copy / 1e12, 3), read_tb_s=round(read / 1e12, 3)))
                print(f"  {name:44s} err {err:.1e} {p50 * 1e3:8.1f} us  {base[1] / p50:5.2f}x  {size / p50 / 1e6:6.0f} GB/s  {100 * limit / p50:5.1f} %", flush=True)
                del cases, bound
            del c
            gc.collect(), torch.cuda.empty_cache()
    if a.out and rows:
        with open(a.out / "attend.csv", "w", newline="") as f:
            w = csv.DictWriter(f, rows[0].keys())
            w.writeheader()
            w.writerows(rows)


if __name__ == "__main__":
    main()
