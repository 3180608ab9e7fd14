"""One engine of vLLM in a process of its own: `python serve.py FOLDER ENGINE.json RUNS.json OUT.json`, which `serve` starts.

ENGINE: arguments of `vllm.LLM`. RUNS: a list of requests that run together, each {"prompts": ids, "max_tokens": n, "scored": bool,
"fresh": bool, "each": bool}; fresh: what earlier runs left in the cache is forgotten; each: the requests go one by one.
Or {"soak": requests, "at_once": n}, each request {"prompt": ids, "max_tokens": n, "abort": steps until it is taken back, or None}.
OUT: for every run, tokens, their log-probabilities, cached tokens and, where scored, the log-probabilities of prompts; facts of the
engine; or the error. A soak has None where a request was taken back, resident MiB after each, and whether every page came back.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ENGINE = {"dtype": "float32", "max_num_batched_tokens": 256, "max_num_seqs": 8, "enforce_eager": True, "skip_tokenizer_init": True}
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",
}


def run(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams, TokensPrompt

    if job.get("fresh"):
        llm.reset_prefix_cache()
    scored = bool(job.get("scored"))
    params = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=0, prompt_logprobs=0 if scored else None
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    begun = time.perf_counter()
    groups = [[p] for p in prompts] if job.get("each") else [prompts]
    outs = [out for group in groups for out in llm.generate(group, params, use_tqdm=False)]
    rows: dict[str, Any] = {
        "seconds": time.perf_counter() - begun,
        "tokens": [list(out.outputs[0].token_ids) for out in outs],
        "chosen": [chosen(out) for out in outs],
        "cached": [out.num_cached_tokens for out in outs],
    }
    if scored:
        pairs = [zip(ids[1:], out.prompt_logprobs[1:], strict=True) for ids, out in zip(job["prompts"], outs, strict=True)]
        rows["logprobs"] = [[of[token].logprob for token, of in pair] for pair in pairs]
    return rows


def chosen(out: Any) -> list[float]:
    """Log-probabilities of an answer's tokens."""
    return [of[token].logprob for of, token in zip(out.outputs[0].logprobs, out.outputs[0].token_ids, strict=True)]


def soak(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Requests that come as others end, some of which are taken back on the way."""
    from vllm import SamplingParams, TokensPrompt

    engine, requests, begun = llm.llm_engine, job["soak"], time.perf_counter()
    tokens: list[list[int] | None] = [None] * len(requests)
    logprobs: list[list[float] | None] = [None] * len(requests)
    memory: list[float] = []
    live: dict[str, int] = {}  # steps that a request has seen
    cached = 0
    while live or len(memory) < len(requests):
        while len(live) < job["at_once"] and len(live) + len(memory) < len(requests):
            name = str(len(live) + len(memory))
            params = SamplingParams(temperature=0, max_tokens=requests[int(name)]["max_tokens"], ignore_eos=True, logprobs=0)
            engine.add_request(name, TokensPrompt(prompt_token_ids=requests[int(name)]["prompt"]), params)
            live[name] = 0
        ended = {out.request_id: out for out in engine.step() if out.finished}
        for name in ended:
            tokens[int(name)], logprobs[int(name)] = list(ended[name].outputs[0].token_ids), chosen(ended[name])
            cached += ended[name].num_cached_tokens or 0
        live = {name: steps + 1 for name, steps in live.items() if name not in ended}
        gone = [name for name, steps in live.items() if steps == requests[int(name)]["abort"]]
        engine.abort_request(gone)
        live = {name: steps for name, steps in live.items() if name not in gone}
        memory += [resident()] * (len(ended) + len(gone))
    seconds = time.perf_counter() - begun
    facts = {"seconds": seconds, "memory": memory, "cached": cached, "free": engine.reset_prefix_cache()}
    return {"tokens": tokens, "chosen": logprobs, **facts}


def resident() -> float:
    """MiB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main(folder: str, engine: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    from vllm import LLM

    begun = time.perf_counter()
    try:
        llm = LLM(model=folder, **engine)
    except Exception as error:
        chain: list[str] = []
        at: BaseException | None = error
        while at is not None:
            chain.append(f"{type(at).__name__}: {at}")
            at = at.__cause__ or at.__context__
        return {"error": chain}
    config = llm.llm_engine.vllm_config
    out: dict[str, Any] = {
        "start": time.perf_counter() - begun,
        "blocks": config.cache_config.num_gpu_blocks,
        "block_size": config.cache_config.block_size,
        "runs": [soak(llm, job) if "soak" in job else run(llm, job) for job in runs],
    }
    metrics = llm.get_metrics() if engine.get("disable_log_stats") is False else []
    out["preemptions"] = sum(int(m.value) for m in metrics if m.name == "vllm:num_preemptions")
    return out


def serve(folder: Path, place: Path, runs: list[dict[str, Any]], seconds: int = 600, **engine: Any) -> dict[str, Any]:
    """What an engine of those options answers. place: a folder for the files; seconds: that it may take."""
    files = [place / f"{name}.json" for name in ("engine", "runs", "out")]
    files[0].write_text(json.dumps(ENGINE | engine))
    files[1].write_text(json.dumps(runs))
    command = [sys.executable, __file__, str(folder), *map(str, files)]
    workers = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} if "tensor_parallel_size" in engine else {}
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=place, env=os.environ | workers)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return dict(json.loads(files[2].read_text()))


if __name__ == "__main__":
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    given = [json.loads(Path(path).read_text()) for path in sys.argv[2:4]]
    Path(sys.argv[4]).write_text(json.dumps(main(sys.argv[1], *given)))
