"""One exported model of `kvsink-bench onnx` in ONNX Runtime: its numbers against torch's, its times, what it spends them on."""

from __future__ import annotations

import gc
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvsink.errors import KvsinkError
from kvsink.export import OnnxGenerator

SHORT, SINGLE = 96, 8
_LIMIT = {"float16": 2e-2, "float32": 1e-3}


def _providers(provider: str) -> list[str | tuple[str, dict[str, str]]]:
    if provider == "cuda":
        return [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    return ["CPUExecutionProvider"]


def _runner(path: str, provider: str, threads: int, **options: Any) -> OnnxGenerator:
    from kvsink.tools.build_ort_ops import runner_for

    return runner_for(path, provider, threads, **options)


def starts(provider: str) -> dict[str, Any]:
    """Whether a graph of one node runs."""
    import onnxruntime
    from onnx import TensorProto, helper

    from kvsink.export.session import load_cuda

    if provider == "cuda":
        load_cuda(onnxruntime)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "one", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    names = [p if isinstance(p, str) else p[0] for p in _providers(provider)]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=names)
    if session.get_providers()[0] != names[0]:
        raise KvsinkError(f"{names[0]} does not start, it has {', '.join(onnxruntime.get_available_providers())}; see above")
    (got,) = session.run(None, {"x": np.eye(2, dtype=np.float32)})
    return {"ok": bool((got == np.eye(2)).all())}


def numbers(path: str, provider: str, kind: str, ids: Any, torch_logits: Any, threads: int) -> dict[str, Any]:
    """Logits and codes beside those of the CPU provider and of torch, and where the nodes ran."""
    runner = _runner(path, provider, threads)
    there, cache_there = _short(runner, ids)
    row: dict[str, Any] = {
        "off_torch": _off(there, torch_logits[provider]),
        "top1_torch": round(float((there.argmax(-1) == torch_logits[provider].argmax(-1)).mean()), 4),
    }
    if not runner.tiled:  # else its nodes run on CUDA alone
        here, cache_here = _short(_runner(path, "cpu", threads), ids) if provider == "cuda" else (there, cache_there)
        row |= {"off_cpu": _off(there, here), "cpu_off_torch": _off(here, torch_logits["cpu"])}
        row["bytes_off_cpu"] = _bytes_off(cache_there, cache_here)
    del runner
    gc.collect()
    on_cpu, row["cpu_share"], row["slowest"] = _profiled(path, provider, ids, threads)
    row["on_cpu"] = on_cpu if provider == "cuda" else "all"
    computing = [op for op in on_cpu if op not in _SHAPES] if provider == "cuda" else []
    if "half" in torch_logits:
        row["half_off_torch"] = _off(torch_logits["half"], torch_logits["cpu"])
    others = max(row.get("cpu_off_torch", 0.0), row.get("half_off_torch", 0.0))
    wrong = row.get("off_cpu", row["off_torch"]) > _LIMIT[kind] and row["off_torch"] > 1.5 * others
    row["verdict"] = "logits differ" if wrong else f"on the CPU: {' '.join(computing)}" if computing else "ok"
    return row


_SHAPES = {
    "Shape",
    "Gather",
    "Concat",
    "Slice",
    "Unsqueeze",
    "Squeeze",
    "Cast",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Min",
    "Max",
    "Reshape",
    "ConstantOfShape",
    "Constant",
    "Range",
    "Equal",
    "Where",
    "Expand",
    "Mod",
}
"""What onnxruntime computes of shapes on the CPU by its own choice."""


def pieces() -> list[tuple[int, int]]:
    return [(0, SHORT), *((i, i + 1) for i in range(SHORT, SHORT + SINGLE))]


def _begin(runner: OnnxGenerator, length: int) -> dict[str, Any]:
    return runner.empty(1, 0 if runner.manifest["padding"] else length)


def _short(runner: OnnxGenerator, ids: Any) -> tuple[Any, dict[str, Any]]:
    """Logits and codes of the short text."""
    past, parts = _begin(runner, SHORT + SINGLE), []
    for a, b in pieces():
        logits, past = _step(runner, ids, a, b, past)
        parts.append(logits)
    return np.concatenate(parts, axis=1), {n: v.copy() for n, v in runner.arrays(past).items() if n.endswith(("key", "value"))}


def _step(runner: OnnxGenerator, ids: Any, a: int, b: int, past: Any) -> Any:
    return runner.step(ids[:, a:b], np.ones((1, b)), np.arange(a, b)[None], past)


def _off(here: Any, there: Any) -> float:
    found = float(np.abs(here - there).max() / np.abs(there).max())
    return float(f"{found:.3g}")


def _bytes_off(here: dict[str, Any], there: dict[str, Any]) -> str:
    codes = [n for n in here if here[n].dtype in (np.uint8, np.int8)]
    different = sum(int((here[n] != there[n]).sum()) for n in codes)
    return f"{different} of {sum(here[n].size for n in codes)}"


def timed(
    graphs: Sequence[tuple[str, str]], provider: str, ids: Any, tokens: int, steps: int, threads: int, chunk: int
) -> dict[str, Any]:
    """Seconds of the prompt and of steps behind it, one of every graph in turn: logits come to the host, the cache does not."""
    runners = [_runner(path, provider, threads) for _, path in graphs]
    rows: list[dict[str, Any]] = []
    pasts = []
    for runner in runners:
        past = _begin(runner, tokens + steps)
        _step(runner, ids, 0, min(chunk, tokens), past)  # what is done once: buffers, choice of kernels
        past = _begin(runner, tokens + steps)
        begun = time.perf_counter()
        for a in range(0, tokens, chunk):
            _, past = _step(runner, ids, a, min(a + chunk, tokens), past)
        rows.append({"prefill_s": round(time.perf_counter() - begun, 3)})
        pasts.append(past)
    taken: list[list[float]] = [[] for _ in runners]
    for i in range(tokens, tokens + steps):
        for j, runner in enumerate(runners):
            begun = time.perf_counter()
            _, pasts[j] = _step(runner, ids, i, i + 1, pasts[j])
            taken[j].append(time.perf_counter() - begun)
    for row, runner, past, times in zip(rows, runners, pasts, taken, strict=True):
        ordered = sorted(times[2:])
        row |= {f"p{p}_ms": round(ordered[len(ordered) * p // 100] * 1e3, 3) for p in (20, 50, 80)}
        row |= {"fastest_ms": round(ordered[0] * 1e3, 3), "cache_mib": round(runner.nbytes(past) / 2**20, 2)}
        row |= {"cache_bits": round(runner.bits_per_element(past), 3), "verdict": "ok"}
    return {"rows": rows}


def _profiled(path: str, provider: str, ids: Any, threads: int) -> tuple[dict[str, int], float, list[str]]:
    """Nodes on the CPU, counted by operator, their share of a step, and its slowest operators; times of a GPU are launches."""
    runner = _runner(path, provider, threads, profile=Path(path).parent / "profile")
    past = _begin(runner, SHORT + 3)
    _, past = _step(runner, ids, 0, SHORT, past)
    for i in range(SHORT, SHORT + 3):
        _, past = _step(runner, ids, i, i + 1, past)
    file = Path(runner.session.end_profiling())
    events = [e for e in json.loads(file.read_text()) if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    events = events[len(events) * 3 // 4 :]  # the last of four runs of the same nodes
    on_cpu = Counter(e["args"]["op_name"] for e in events if e["args"].get("provider") == "CPUExecutionProvider")
    times: Counter[str] = Counter()
    for e in events:
        times[f"{e['args']['op_name']}@{e['args'].get('provider', '?')[:4]}"] += e["dur"]
    whole = sum(times.values()) or 1
    share = sum(t for op, t in times.items() if op.endswith("@CPUE")) / whole
    return dict(on_cpu), round(share, 3), [f"{op} {100 * t / whole:.0f}%" for op, t in times.most_common(6)]
