"""One engine of vLLM in a process of its own: `python serve.py FOLDER ENGINE.json RUNS.json OUT.json`.

ENGINE: arguments of `vllm.LLM`. RUNS: a list of requests that run together, each {"prompts": ids, "max_tokens": n, "scored": bool,
"fresh": bool, "each": bool}; fresh: what earlier runs left in the cache is forgotten; each: the requests go one by one.
OUT: for every run, tokens, cached tokens and, where scored, the log-probabilities of prompts; facts of the engine; or the error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

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
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, prompt_logprobs=0 if scored else None)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    begun = time.perf_counter()
    groups = [[p] for p in prompts] if job.get("each") else [prompts]
    outs = [out for group in groups for out in llm.generate(group, params, use_tqdm=False)]
    rows: dict[str, Any] = {
        "seconds": time.perf_counter() - begun,
        "tokens": [list(out.outputs[0].token_ids) for out in outs],
        "cached": [out.num_cached_tokens for out in outs],
    }
    if scored:
        pairs = [zip(ids[1:], out.prompt_logprobs[1:], strict=True) for ids, out in zip(job["prompts"], outs, strict=True)]
        rows["logprobs"] = [[of[token].logprob for token, of in pair] for pair in pairs]
    return rows


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
        "runs": [run(llm, job) for job in runs],
    }
    metrics = llm.get_metrics() if engine.get("disable_log_stats") is False else []
    out["preemptions"] = sum(int(m.value) for m in metrics if m.name == "vllm:num_preemptions")
    return out


if __name__ == "__main__":
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    given = [json.loads(Path(path).read_text()) for path in sys.argv[2:4]]
    Path(sys.argv[4]).write_text(json.dumps(main(sys.argv[1], *given)))
