"""Decode steps of exported graphs behind caches of any length, on CUDA: files in turn, with and without CUDA graphs.

    OUT=folder python tools/gpu_lab/onnx_steps.py        # 4 layers of the LLaMA-3-8B shape, random weights, float16

Caches are empty tensors marked as full, so that no prompt has to be computed: times do not depend on what stands in them, and
numbers are asked for by `kvsink-bench onnx` and tests/export/test_tiles_gpu.py. Rows of kind onnx have wall times of a step
through `OnnxGenerator`, logits on the host; onnx-kernels what the card computes in it, and what of that is the attention node;
onnx-memory times of a prompt of 8,192 tokens, and what the card holds more when 32,768 have been fed in pieces than behind
a short text, at most and behind every piece. Rows go to $OUT/onnx_steps.jsonl, graphs to the temporary folder.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from kvsink.export import OnnxGenerator
from kvsink.tools.bench_onnx import _Source
from kvsink.tools.build_ort_ops import build

GQA = tuple(("gqa", "static:rotated", bits) for bits in (16, 8, 4))
CUSTOM = (("custom", "klt", 2), ("custom", "klt:even", 2), ("custom", "klt:even", 4))
FUNCTIONS = (("functions", "klt:even", 2),)
CASES = (*GQA, *CUSTOM, *FUNCTIONS)
SHAPES = ((1, 4096), (1, 32768), (16, 32768), (32, 32768))
POSITIONS, STEPS, PROMPT, PIECE = 32768 + 256, 60, 8192, 2048
ATTENTION = ("kernel_mha", "flash", "attend", "append", "Dequantize", "UnpackRoPE", "GetSequence", "turn_queries")


def export(case: tuple[str, str, int], folder: str) -> tuple[tuple[str, str, int], str]:
    torch.set_num_threads(4)
    source = _Source("llama", 4, 4096, POSITIONS)
    path = Path(folder) / "-".join(map(str, case)).replace(":", "_") / "model.onnx"
    source.export(case, path, "float16", POSITIONS)
    return case, str(path)


def runner_of(path: str, case: tuple[str, str, int], library: Any, graph: bool = False, **more: str) -> OnnxGenerator:
    options = {"use_tf32": "0"} | ({"enable_cuda_graph": "1"} if graph else {}) | more
    return OnnxGenerator(
        path, [("CUDAExecutionProvider", options), "CPUExecutionProvider"], library=library if case in CUSTOM else None
    )


def memory(path: str, case: tuple[str, str, int], library: Any, tokens: int, told: Any) -> None:
    """MiB that the card holds more at most, while a text is fed in pieces, than after a short text; times of prompts."""
    runner, rng = runner_of(path, case, library, arena_extend_strategy="kSameAsRequested"), np.random.default_rng(0)
    warm = runner.empty(1, 2 * PIECE + 128)
    for new in (PIECE, PIECE, 1, 1, 1, 1):  # code that is loaded at first use, and room that the runtime keeps, are not the cache's
        warm = runner.step(rng.integers(0, 8000, (1, new)), None, None, warm, last=True)[1]
    before, most, done = torch.cuda.mem_get_info()[0], 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, before - torch.cuda.mem_get_info()[0])
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    past = runner.empty(1, tokens + 128)
    pieces = []
    for _ in range(0, tokens, PIECE):
        past = runner.step(rng.integers(0, 8000, (1, PIECE)), None, None, past, last=True)[1]
        pieces.append(round((before - torch.cuda.mem_get_info()[0]) / 2**20, 1))
    for _ in range(8):
        past = runner.step(rng.integers(0, 8000, (1, 1)), None, None, past)[1]
    behind = before - torch.cuda.mem_get_info()[0]
    done.set()
    watcher.join()
    del past, warm
    prompts = []
    for _ in range(4):
        past, ids, begun = runner.empty(1, PROMPT + 128), rng.integers(0, 8000, (1, PROMPT)), time.perf_counter()
        runner.step(ids, None, None, past, last=True)
        prompts.append(round((time.perf_counter() - begun) * 1e3, 1))
    told.put(
        {
            "prompt": PROMPT,
            "prompt_ms": prompts,
            "B": 1,
            "T": tokens,
            "most_mib": round(max(most, behind) / 2**20, 1),
            "behind_mib": round(behind / 2**20, 1),
            "behind_pieces_mib": pieces,
        }
    )


def main() -> None:
    import onnxruntime

    facts = {"device": torch.cuda.get_device_name(0), "provider": "cuda", "onnxruntime": onnxruntime.__version__}
    facts |= {"torch": torch.__version__, "model": "llama 4096 x4", "dtype": "float16"}
    out, rng = Path(os.environ["OUT"]) / "onnx_steps.jsonl", np.random.default_rng(0)

    def say(kind: str, case: tuple[Any, ...], **row: Any) -> None:
        flavour, method, bits, graph = case
        row = (
            facts
            | {"kind": kind, "flavour": flavour, "method": method if bits < 16 else "not coded", "bits": bits, "graph": graph}
            | row
        )
        print(json.dumps(row), flush=True)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        with spawn.Pool(5) as pool:
            made = dict(pool.starmap(export, [(case, folder) for case in CASES], chunksize=1))
        library = build(cuda=[made[case] for case in CUSTOM])
        every = {
            (*case, graph): runner_of(made[case], case, library, graph)
            for case in CASES
            for graph in (False, case not in FUNCTIONS)
        }
        times(every, rng, say)
        del every
        for case in (GQA[0], *CUSTOM[:2]):
            told = spawn.Queue()
            process = spawn.Process(target=memory, args=(made[case], case, library, 32768, told))
            process.start()
            process.join()
            say("onnx-memory", (*case, False), **(told.get(timeout=5) if not process.exitcode else {"exit": process.exitcode}))


def times(every: dict[tuple[Any, ...], OnnxGenerator], rng: Any, say: Any) -> None:
    for batch, tokens in SHAPES:
        asked = [case for case in every if batch * tokens <= 40000 or case[:3] in (GQA[0], *CUSTOM)]
        pasts = {case: every[case].empty(batch, tokens + 128) for case in asked}
        taken: dict[Any, list[float]] = {case: [] for case in asked}
        for past in pasts.values():
            past.tokens = tokens

        def step(case: Any, pasts: Any = pasts, batch: int = batch) -> float:
            ids, begun = rng.integers(0, 8000, (batch, 1)), time.perf_counter()
            pasts[case] = every[case].step(ids, None, None, pasts[case])[1]
            return time.perf_counter() - begun

        for _ in range(STEPS):
            for case in asked:
                taken[case].append(step(case))
        for case, found in taken.items():
            ordered = sorted(found[10:])
            row = {f"p{p}_ms": round(ordered[len(ordered) * p // 100] * 1e3, 3) for p in (20, 50)}
            cache = round(every[case].nbytes(pasts[case]) / 2**20, 1)
            say("onnx", case, B=batch, T=tokens, **row, fastest_ms=round(ordered[0] * 1e3, 3), cache_mib=cache)
        for case in asked:
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                for _ in range(10):
                    step(case)
                torch.cuda.synchronize()
            kernels = [(e.key, e.device_time_total / 10, e.count / 10) for e in seen.key_averages() if e.device_time_total > 0]
            own = sum(us for name, us, _ in kernels if any(part in name for part in ATTENTION))
            device, launches = sum(us for _, us, _ in kernels), sum(n for *_, n in kernels)
            say(
                "onnx-kernels",
                case,
                B=batch,
                T=tokens,
                device_us=round(device, 1),
                attention_us=round(own, 1),
                launches=round(launches, 1),
            )
        del pasts


if __name__ == "__main__":
    main()
