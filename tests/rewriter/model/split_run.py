"""Folders loaded and run by one of several processes: `torchrun --nproc-per-node N split_run.py JOBS.json OUT`, or by one alone.

JOBS: a list of {"folder": path, "config": fields of a DistributedConfig, "chunk": rows of a pass, "saves": whether to try what a
split model declines}. OUT.RANK.pt: for every job tokens and logits of two generations, logits of a text in chunks that reads
codes, and the heads of the cache by layer; or the error, and how often weights were loaded before it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
STEPS = 12


def launch(jobs: list[dict[str, Any]], out: Path, ranks: int) -> list[list[dict[str, Any]]]:
    """What every process found, by process and job."""
    plan = out.with_suffix(".json")
    plan.write_text(json.dumps(jobs))
    if ranks == 1:
        main(str(plan), str(out))
        return [torch.load(f"{out}.0.pt")]
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    settings = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *many, __file__, str(plan), str(out)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(f"{out}.{rank}.pt") for rank in range(ranks)]


def main(plan: str, out: str) -> None:
    """Run all jobs, in the same order in every process."""
    from transformers import AutoModelForCausalLM, PreTrainedModel
    from transformers.distributed import DistributedConfig

    import kvsink
    from kvsink.model.passing import cache_name
    from tests.models import tokens

    found: list[dict[str, Any]] = []
    loaded: list[Any] = []
    loading = PreTrainedModel._load_pretrained_model

    def noted(*args: Any, **kwargs: Any) -> Any:
        loaded.append(args)
        return loading(*args, **kwargs)

    if "RANK" in os.environ:
        PreTrainedModel._load_pretrained_model = staticmethod(noted)  # type: ignore[method-assign]
    for job in json.loads(Path(plan).read_text()):
        loaded.clear()
        how: dict[str, Any] = {"distributed_config": DistributedConfig(**job["config"])} if job["config"] else {}
        if job["config"] == {"tp_plan": "auto"}:
            how = {"tp_plan": "auto"}  # as users write it; transformers warns that it will go
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model = AutoModelForCausalLM.from_pretrained(job["folder"], **how)
        except (kvsink.KvsinkError, ValueError, RuntimeError) as error:
            found.append({"error": f"{type(error).__name__}: {error}", "loaded": len(loaded)})
            continue
        row: dict[str, Any] = {"declined": []}
        settings: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "output_logits": True}
        for name, kind in (("grown", {}), ("static", {"cache_implementation": "static"})):
            out_ = model.generate(tokens(2, 40), return_dict_in_generate=True, **settings, **kind)
            row[name] = (out_.sequences, torch.stack(out_.logits, 1))
        cache = _cache(out_)
        row["heads"] = [(getattr(i, "k_codes", None) if hasattr(i, "k_codes") else i.keys).shape[1] for i in cache.layers]
        packed = hasattr(model, "_kvsink_runtime")
        held = kvsink.KVSinkCache.for_model(model, strict=True) if packed else None
        text, logits = tokens(2, 64, seed=3), []
        with torch.no_grad():
            for start in range(0, 64, job["chunk"]):
                step = model(text[:, start : start + job["chunk"]], use_cache=True, **{cache_name(model): held})
                held = _cache(step)
                logits.append(step.logits)
        row["text"] = torch.cat(logits, 1)
        if job.get("saves"):
            for act in (
                lambda m=model, j=job: m.save_pretrained(f"{j['folder']}-again"),
                lambda h=held: h.save(f"{out}.cache"),
                lambda m=model: kvsink.KVSinkCache.load(f"{out}.cache", m),
                lambda m=model: kvsink.rewrite(m, "rtn"),
                lambda m=model: m.generate(tokens(1, 4), compile_config=_compiled(), max_new_tokens=2),
            ):
                try:
                    act()
                    row["declined"].append("")
                except kvsink.KvsinkError as error:
                    row["declined"].append(str(error))
        found.append(row)
    torch.save(found, f"{out}.{os.environ.get('RANK', '0')}.pt")


def _cache(out: Any) -> Any:
    return out["cache"] if hasattr(out, "cache") else out.past_key_values


def _compiled() -> Any:
    from transformers import CompileConfig

    return CompileConfig()


if __name__ == "__main__":
    main(*sys.argv[1:])
