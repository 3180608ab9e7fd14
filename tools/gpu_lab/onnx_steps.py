"""Decode steps of exported graphs behind caches of any length, on CUDA: files in turn, with and without CUDA graphs.

    OUT=folder python tools/gpu_lab/onnx_steps.py        # 4 layers of the LLaMA-3-8B shape, random weights, float16

Caches are empty tensors marked as full, so that no prompt has to be computed: times do not depend on what stands in them, and
numbers are asked for by `kvsink-bench onnx` and tests/export/test_tiles_gpu.py. Rows go to $OUT/onnx_steps.jsonl, graphs to the
temporary folder.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvsink.export import OnnxGenerator
from kvsink.tools.bench_onnx import _Source
from kvsink.tools.build_ort_ops import build

CASES = (("gqa", "static:rotated", 16), ("custom", "klt", 2), ("custom", "klt:even", 4), ("functions", "klt", 16))
SHAPES = ((1, 4096), (1, 32768), (8, 4096), (8, 32768), (16, 32768))
POSITIONS, STEPS, PROMPT = 32768 + 256, 60, 8192


def export(case: tuple[str, str, int], folder: str) -> tuple[tuple[str, str, int], str]:
    torch.set_num_threads(4)
    source = _Source("llama", 4, 4096, POSITIONS)
    path = Path(folder) / "-".join(map(str, case)).replace(":", "_") / "model.onnx"
    source.export(case, path, "float16", POSITIONS)
    return case, str(path)


def runners(made: dict[tuple[str, str, int], str]) -> dict[tuple[Any, ...], OnnxGenerator]:
    library, found = build(cuda=[path for case, path in made.items() if case[0] == "custom"]), {}
    for case in CASES:
        for graph in (False, True) if case[0] == "custom" else (False,):
            options = {"use_tf32": "0"} | ({"enable_cuda_graph": "1"} if graph else {})
            providers = [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
            found[(*case, graph)] = OnnxGenerator(made[case], providers, library=library if case[0] == "custom" else None)
    return found


def steps(runner: OnnxGenerator, past: Any, ids: Any, at: int) -> Any:
    batch, new = ids.shape
    mask, positions = np.ones((batch, at + new), dtype=np.int64), np.broadcast_to(np.arange(at, at + new), (batch, new))
    return runner.step(ids, mask, positions, past)[1]


def main() -> None:
    import onnxruntime

    facts = {"device": torch.cuda.get_device_name(0), "provider": "cuda", "onnxruntime": onnxruntime.__version__}
    facts |= {"torch": torch.__version__, "model": "llama 4096 x4", "dtype": "float16"}
    out, rng = Path(os.environ["OUT"]) / "onnx_steps.jsonl", np.random.default_rng(0)

    def say(case: tuple[Any, ...], **row: Any) -> None:
        flavour, method, bits, graph = case
        row = facts | {"flavour": flavour, "method": method if bits < 16 else "not coded", "bits": bits, "graph": graph} | row
        print(json.dumps(row), flush=True)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        with multiprocessing.get_context("spawn").Pool(len(CASES)) as pool:
            made = dict(pool.starmap(export, [(case, folder) for case in CASES]))
        every = runners(made)
    for batch, tokens in SHAPES:
        asked = [case for case in every if case[0] != "functions" or batch * tokens <= 40000]
        pasts = {case: every[case].empty(batch, tokens + 128) for case in asked}
        taken: dict[Any, list[float]] = {case: [] for case in asked}
        for past in pasts.values():
            past.tokens = tokens
        for at in range(tokens, tokens + STEPS):
            for case in asked:
                ids, begun = rng.integers(0, 8000, (batch, 1)), time.perf_counter()
                pasts[case] = steps(every[case], pasts[case], ids, at)
                taken[case].append(time.perf_counter() - begun)
        for case, times in taken.items():
            ordered = sorted(times[10:])
            row = {f"p{p}_ms": round(ordered[len(ordered) * p // 100] * 1e3, 3) for p in (20, 50)}
            cache = round(every[case].nbytes(pasts[case]) / 2**20, 1)
            say(case, kind="onnx", B=batch, T=tokens, **row, fastest_ms=round(ordered[0] * 1e3, 3), cache_mib=cache)
        del pasts
    for again in range(4):
        for case in (case for case in every if case[0] != "functions"):
            past, ids = every[case].empty(1, PROMPT + 128), rng.integers(0, 8000, (1, PROMPT))
            begun = time.perf_counter()
            steps(every[case], past, ids, 0)
            say(case, kind="onnx-prefill", B=1, T=PROMPT, rep=again, ms=round((time.perf_counter() - begun) * 1e3, 1))


if __name__ == "__main__":
    main()
