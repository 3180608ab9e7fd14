"""`kvsink-bench onnx`: exported graphs under onnxruntime beside an export of the same model whose cache is not coded.

Every case is exported, its logits are compared with those of the CPU provider and of the torch model, a decode step is timed
behind a prompt, and one step is profiled, which says on which provider each node ran.

Formula    difference = max |logits - logits'| / max |logits'| over a prompt of 96 tokens and 8 single ones, each side with its own
           cache; bytes: codes that differ between the providers. Verdict "ok": difference to the CPU at most 2 % in float16 (0.1 %
           in float32) and no node but those that handle shapes on the CPU
Shapes     one sequence; the cache stays on the device
Differs    random weights where no folder is given: times are those of the shape, differences those of an untrained model
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from kvsink.errors import KvsinkError
from kvsink.export import OnnxGenerator, onnx

__all__ = ["onnx_rows", "parse_cases", "table"]

Case = tuple[str, str, int]
_SAID = (
    "p50_ms", "p20_ms", "prefill_s", "cache_mib", "cache_bits", "off_cpu", "off_torch", "cpu_off_torch", "bytes_off_cpu",
    "cpu_share", "on_cpu", "slowest", "verdict",
)  # fmt: skip
_SHORT, _SINGLE, _CHUNK = 96, 8, 512
_LIMIT = {"float16": 2e-2, "float32": 1e-3}


def parse_cases(text: str) -> list[Case]:
    """ "gqa:4,functions:klt:2" → flavour, method, bits."""
    cases: list[Case] = []
    for part in (p for p in text.split(",") if p):
        flavour, *method, bits = part.split(":")
        if flavour not in ("functions", "gqa") or len(method) > 1 or not bits.isdigit():
            raise click.BadParameter(f"{part!r} is not FLAVOUR:BITS or FLAVOUR:METHOD:BITS", param_hint="--cases")
        cases.append((flavour, method[0] if method else "static-rotated", int(bits)))
    return cases


def onnx_rows(
    name: str, layers: int, hidden: int, provider: str, dtype: str | None, cases: list[Case], tokens: int, steps: int,
    threads: int, say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per case; a case that stops has its reason as verdict."""
    kind = dtype or ("float16" if provider == "cuda" else "float32")
    facts = _facts(provider) | {"kind": "onnx", "model": name if name != "llama" else f"llama {hidden} x{layers}", "dtype": kind}
    say("  ".join(f"{k}={v}" for k, v in facts.items()))
    for flavour, method, bits in cases:
        row = facts | {"flavour": flavour, "method": method if bits < 16 else "not coded", "bits": bits, "B": 1, "T": tokens}
        with tempfile.TemporaryDirectory() as folder:
            try:
                row |= _case(Path(folder), name, layers, hidden, provider, kind, (flavour, method, bits), tokens, steps, threads)
            except KvsinkError as error:
                row |= {"verdict": str(error)}
        gc.collect()
        say(f"{flavour}:{method}:{bits}  " + "  ".join(f"{k}={v}" for k, v in row.items() if k in _SAID))
        yield row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; the first of a flavour that is not coded is what its others are compared with."""
    lines = ["| flavour | method | bits | step, ms | against not coded | cache, MiB | off the CPU | off torch | verdict |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|---|")
    plain = {r["flavour"]: r["p50_ms"] for r in rows if r["bits"] == 16 and "p50_ms" in r}
    for r in rows:
        if "p50_ms" not in r:
            lines.append(f"| {r['flavour']} | {r['method']} | {r['bits']} | | | | | | {r['verdict']} |")
            continue
        ratio = f"{plain[r['flavour']] / r['p50_ms']:.2f}x" if r["flavour"] in plain else ""
        cells = [r["flavour"], r["method"], r["bits"], r["p50_ms"], ratio, r["cache_mib"], r["off_cpu"], r["off_torch"]]
        lines.append(f"| {' | '.join(map(str, cells))} | {r['verdict']} |")
    return "\n".join(lines)


def _facts(provider: str) -> dict[str, str]:
    import transformers

    found = [n for n in ("onnxruntime-gpu", "onnxruntime") if _version(n)]
    cuda = provider == "cuda" and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(0) if cuda else platform.machine(), "provider": provider,
        "torch": torch.__version__, "transformers": transformers.__version__,
        "onnxruntime": " ".join(f"{n} {_version(n)}" for n in found[:1]), "python": platform.python_version(),
    }  # fmt: skip


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _model(name: str, layers: int, hidden: int, positions: int) -> tuple[Any, Callable[[int], Tensor]]:
    """The model in float32 on the CPU, and a function that gives that many token ids [1, n]."""
    if name != "llama":
        from kvsink.demo import resolve_model_dir
        from kvsink.evaluation import token_windows
        from kvsink.loading import load_model, load_tokenizer
        from kvsink.texts import evaluation_text

        folder = resolve_model_dir(name)
        model = load_model(folder, "cpu", torch.float32)
        return model, lambda count: token_windows(evaluation_text(), load_tokenizer(folder), 1, count)
    from kvsink.tools.bench_model import Shape, llama

    torch.manual_seed(0)
    shape = Shape(
        vocabulary=8192, inner=hidden * 7 // 2, kv_heads=max(1, hidden // 512), theta=500000.0, hidden=hidden,
        heads=max(1, hidden // 128),
    )  # fmt: skip
    model = llama(layers, torch.float32, positions=positions, shape=shape, device="cpu")
    generator = torch.Generator().manual_seed(1)
    return model, lambda count: torch.randint(0, 8192, (1, count), generator=generator)


def _case(
    folder: Path, name: str, layers: int, hidden: int, provider: str, kind: str, case: Case, tokens: int, steps: int, threads: int
) -> dict[str, Any]:  # fmt: skip
    import kvsink

    flavour, method, bits = case
    positions = max(tokens + steps, _SHORT + _SINGLE)
    model, text = _model(name, layers, hidden, positions)
    begun = time.perf_counter()
    plain: dict[str, Any] = {"protect": "none"} if flavour == "gqa" or bits == 16 else {}
    given: dict[str, Any] = {"calibration": text(1024)} if name == "llama" else {}
    kvsink.rewrite(model, method, key_bits=bits, value_bits=bits, **plain, **given)
    path = folder / "model.onnx"
    manifest = onnx(model, path, flavour, tokens=positions, dtype=kind)
    row: dict[str, Any] = {"export_s": round(time.perf_counter() - begun, 1), "checked": manifest["check"]}
    ids = text(positions)
    torch_logits = _torch_logits(model, ids, strict=flavour == "gqa")
    del model
    gc.collect()
    here, cache_here = _short(OnnxGenerator(path, threads=threads), ids)
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if provider == "cuda":
        providers = [("CUDAExecutionProvider", {"use_tf32": "0"}), *providers]
    runner = OnnxGenerator(path, providers, threads=threads)
    there, cache_there = _short(runner, ids)
    row |= {
        "off_cpu": _off(there, here), "off_torch": _off(there, torch_logits), "cpu_off_torch": _off(here, torch_logits),
        "top1_torch": round(float((there.argmax(-1) == torch_logits.argmax(-1)).mean()), 4),
        "bytes_off_cpu": _bytes_off(cache_there, cache_here),
    }  # fmt: skip
    row |= _timed(runner, ids.numpy(), tokens, steps)
    del runner
    gc.collect()
    on_cpu, row["cpu_share"], row["slowest"] = _profiled(path, providers, ids, threads)
    row["on_cpu"] = on_cpu if provider == "cuda" else "all"
    computing = [op for op in on_cpu if op not in _SHAPES] if provider == "cuda" else []
    wrong = row["off_cpu"] > _LIMIT[kind]
    row["verdict"] = "logits differ from the CPU" if wrong else f"on the CPU: {' '.join(computing)}" if computing else "ok"
    return row


_SHAPES = {
    "Shape", "Gather", "Concat", "Slice", "Unsqueeze", "Squeeze", "Cast", "Add", "Sub", "Mul", "Div", "Min", "Max", "Reshape",
    "ConstantOfShape", "Constant", "Range", "Equal", "Where", "Expand", "Mod",
}  # fmt: skip
"""What onnxruntime computes of shapes on the CPU by its own choice."""


def _torch_logits(model: Any, ids: Tensor, strict: bool) -> Any:
    from kvsink import KVSinkCache

    cache = KVSinkCache.for_model(model, batch_size=1, strict=strict)
    parts = []
    with torch.no_grad():
        for a, b in _parts():
            parts.append(model(input_ids=ids[:, a:b], past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, dim=1).float().numpy()


def _parts() -> list[tuple[int, int]]:
    return [(0, _SHORT), *((i, i + 1) for i in range(_SHORT, _SHORT + _SINGLE))]


def _short(runner: OnnxGenerator, ids: Tensor) -> tuple[Any, dict[str, Any]]:
    """Logits and codes of the short text."""
    past, parts = runner.empty(1), []
    for a, b in _parts():
        logits, past = _step(runner, ids.numpy(), a, b, past)
        parts.append(logits)
    return np.concatenate(parts, axis=1), {n: v.numpy() for n, v in past.items() if n.endswith(("key", "value"))}


def _step(runner: OnnxGenerator, ids: Any, a: int, b: int, past: Any) -> Any:
    return runner.step(ids[:, a:b], np.ones((1, b)), np.arange(a, b)[None], past)


def _off(here: Any, there: Any) -> float:
    found = float(np.abs(here - there).max() / np.abs(there).max())
    return float(f"{found:.3g}")


def _bytes_off(here: dict[str, Any], there: dict[str, Any]) -> str:
    codes = [n for n in here if here[n].dtype in (np.uint8, np.int8)]
    different = sum(int((here[n] != there[n]).sum()) for n in codes)
    return f"{different} of {sum(here[n].size for n in codes)}"


def _timed(runner: OnnxGenerator, ids: Any, tokens: int, steps: int) -> dict[str, Any]:
    """Seconds of the prompt and of a step behind it: logits come to the host, the cache does not."""
    past = runner.empty(1) if runner.manifest["padding"] else runner.room(1, tokens + steps)
    begun = time.perf_counter()
    for a in range(0, tokens, _CHUNK):
        _, past = _step(runner, ids, a, min(a + _CHUNK, tokens), past)
    prefill = time.perf_counter() - begun
    times = []
    for i in range(tokens, tokens + steps):
        begun = time.perf_counter()
        _, past = _step(runner, ids, i, i + 1, past)
        times.append(time.perf_counter() - begun)
    times = sorted(times[2:])
    p20, p50, p80 = (round(times[int(len(times) * share)] * 1e3, 3) for share in (0.2, 0.5, 0.8))
    return {
        "prefill_s": round(prefill, 3), "p20_ms": p20, "p50_ms": p50, "p80_ms": p80,
        "cache_mib": round(runner.nbytes(past) / 2**20, 2), "cache_bits": round(runner.bits_per_element(past), 3),
    }  # fmt: skip


def _profiled(path: Path, providers: Any, ids: Tensor, threads: int) -> tuple[dict[str, int], float, list[str]]:
    """Nodes on the CPU, counted by operator, their share of a step, and its slowest operators; times of a GPU are launches."""
    runner = OnnxGenerator(path, providers, threads=threads, profile=path.parent / "profile")
    past = runner.empty(1)
    _, past = _step(runner, ids.numpy(), 0, _SHORT, past)
    for i in range(_SHORT, _SHORT + 3):
        _, past = _step(runner, ids.numpy(), i, i + 1, past)
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


