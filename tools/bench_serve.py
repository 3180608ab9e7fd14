"""`kvsink-bench serve`: requests of mixed lengths through vLLM's engine, of a 16-bit folder and of rewritten ones, in turn.

Formula    tokens/s: new tokens of all requests by the seconds from the first that comes to the last that ends; time to first token:
           from a request's coming, waiting included; time per token: from its first to its last, by their number less one
Shapes     all requests come at once; prompts of random tokens, which share no beginning; greedy, no end token
Differs    `vllm bench` does not start in the build for processors; its `serve` tells neither preemptions nor how many sequences ran
           at once, its `throughput` no times of a request: so the engine is driven here, in a process of its own for every folder
Raises     KvsinkError in one line: no vLLM, or what an engine said that did not start
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

from kvsink.errors import KvsinkError

__all__ = ["lengths_of", "serve_rows", "serve_table", "side_of"]

Row = dict[str, Any]

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's steps run where they are counted
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


def lengths_of(requests: int, prompts: tuple[int, int], answers: tuple[int, int], seed: int) -> list[tuple[int, int]]:
    """Tokens of each request's prompt and answer, any between two bounds as likely as another."""
    rng = random.Random(seed)
    return [(rng.randint(*prompts), rng.randint(*answers)) for _ in range(requests)]


def side_of(folder: Path) -> str:
    """How a row calls a folder: its method and bits a side, or 16 bit."""
    path = folder / "kvsink.json"
    if not path.is_file():
        return "16 bit"
    plan = json.loads(path.read_text(encoding="utf-8"))
    codecs = [row["codec"] for row in plan["layers"] if row["codec"] is not None]
    bits = [f"{mean(codec[name]['bits'] for codec in codecs):g}" for name in ("key", "value")]
    return f"{plan['method']} {'/'.join(bits)}"


def serve_rows(
    names: Sequence[str], lengths: Sequence[tuple[int, int]], cache_mib: int, engine: dict[str, Any], say: Callable[[str], None]
) -> Iterator[Row]:
    """One row per folder, as soon as it is measured; ratios are to the first. engine: further arguments of vLLM's."""
    from kvsink.folder.demo import resolve_model_dir

    if importlib.util.find_spec("vllm") is None:
        raise KvsinkError("vLLM is not installed in this environment; docs/serving.md has the lines that install it beside kvsink")
    folders = [resolve_model_dir(name) for name in names]
    longest = max(map(sum, lengths))
    options = {"dtype": "bfloat16", "max_model_len": longest, "kv_cache_memory_bytes": cache_mib * 2**20, **engine}
    first: Row | None = None
    for name, folder in zip(names, folders, strict=True):
        about = {"kind": "serve", "side": side_of(folder), "model": Path(name).name, "cache_mib": cache_mib}
        found = _asked({"folder": str(folder), "lengths": lengths, "engine": {**options, "tokenizer": str(folder)}})
        row = {**about, "dtype": options["dtype"], **({"engine": engine} if engine else {}), **found}
        first = first or row
        row["of_first"] = round(row["tokens_per_s"] / first["tokens_per_s"], 3)
        say("  ".join(f"{k}={v}" for k, v in row.items() if k != "kind"))
        yield row


def _asked(job: dict[str, Any]) -> Row:
    """What a process of its own measured."""
    with tempfile.TemporaryDirectory() as place:
        given, out = Path(place, "job.json"), Path(place, "row.json")
        given.write_text(json.dumps(job))
        command = [sys.executable, "-m", "kvsink.tools.bench_serve", str(given), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=_SETTINGS | os.environ)
        if not out.is_file():
            said = (done.stderr.strip() or f"it ended with {done.returncode}").splitlines()[-1]
            raise KvsinkError(f"vLLM's engine did not run {job['folder']}: {said}")
        return dict(json.loads(out.read_text()))


def _measured(folder: str, lengths: Sequence[Sequence[int]], engine: dict[str, Any]) -> Row:
    """One folder, in this process."""
    import torch
    import transformers
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.metrics.loggers import StatLoggerBase

    most = 0

    class Running(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any = None, *args: Any, **kwargs: Any) -> None:
            nonlocal most
            most = max(most, scheduler_stats.num_running_reqs if scheduler_stats is not None else 0)

        def log_engine_initialized(self) -> None:
            pass

    held = LLMEngine.from_engine_args(EngineArgs(model=folder, **engine), stat_loggers=[Running])
    vocabulary = held.model_config.get_vocab_size()
    rng = random.Random(0)
    prompts = [[rng.randrange(vocabulary) for _ in range(prompt)] for prompt, _ in lengths]
    warm = [prompt[::-1] for prompt in prompts[:8]]  # kernels are built and memory is touched before the clock starts
    _run(held, warm, [4] * len(warm))
    most, begun = 0, time.perf_counter()
    ended = _run(held, prompts, [answer for _, answer in lengths])
    seconds = time.perf_counter() - begun
    times = [out.metrics for out in ended]
    cache = held.vllm_config.cache_config
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores",
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "requests": len(lengths),
        "prompt_tokens": sum(prompt for prompt, _ in lengths),
        "new_tokens": sum(m.num_generation_tokens for m in times),
        "cache_tokens": cache.num_gpu_blocks * cache.block_size,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(sum(m.num_generation_tokens for m in times) / seconds, 2),
        **_spread("first_token_s", [m.first_token_latency for m in times], 3),
        **_spread("token_ms", [(m.last_token_ts - m.first_token_ts) / (m.num_generation_tokens - 1) * 1e3 for m in times], 2),
        "most_at_once": most,
        "preemptions": sum(m.num_preemptions for m in times),
    }


def _run(engine: Any, prompts: Sequence[list[int]], answers: Sequence[int]) -> list[Any]:
    """What the engine gave for each, in the order they ended."""
    from vllm import SamplingParams, TokensPrompt

    for i, (ids, tokens) in enumerate(zip(prompts, answers, strict=True)):
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        engine.add_request(str(i), TokensPrompt(prompt_token_ids=ids), params)
    ended: list[Any] = []
    while engine.has_unfinished_requests():
        ended += [out for out in engine.step() if out.finished]
    return ended


def _spread(name: str, values: Sequence[float], digits: int) -> dict[str, float]:
    """p20, p50 and p80."""
    tenths = quantiles(values, n=10, method="inclusive")
    return {f"p{10 * i}_{name}": round(tenths[i - 1], digits) for i in (2, 5, 8)}


def serve_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    lines = [
        "| folder | fits, tokens | most at once | preemptions | tokens/s | of the first | to first token, s | a token, ms |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        spread = (f"{r[f'p50_{name}']:,} ({r[f'p20_{name}']:,} to {r[f'p80_{name}']:,})" for name in ("first_token_s", "token_ms"))
        figures = f"{r['cache_tokens']:,} | {r['most_at_once']} | {r['preemptions']} | {r['tokens_per_s']:,} | {r['of_first']:.2f}x"
        lines.append(f"| `{r['model']}`, {r['side']} | {figures} | {' | '.join(spread)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_measured(**json.loads(Path(sys.argv[1]).read_text()))))
