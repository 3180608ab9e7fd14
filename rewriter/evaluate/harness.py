"""Tasks of EleutherAI's evaluation harness through a cache: those that generate, since only they read stored rows.

Source     lm-eval (`pip install 'kvsink[eval]'`): its tasks, prompts and metrics as they are
Differs    the tokenizer's chat template goes around a prompt where there is one; tasks that score a prompt in one pass are refused
Units      those of the metric; 95 % intervals of what single documents got (`kvsink.evaluate.intervals`)
Raises     UnsupportedError without lm-eval, and for tasks that never read a stored row; EvaluationError for task files and data
           that are not there; UnknownName
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvsink.errors import EvaluationError, UnknownName, UnsupportedError
from kvsink.evaluate.evaluation import CacheFactory, evaluating
from kvsink.evaluate.intervals import Interval, binomial, bootstrap
from kvsink.model.passing import given_cache

__all__ = ["harness", "load_tasks"]


def load_tasks(names: Sequence[str]) -> list[Any]:
    """The harness's tasks by name, or by the path of a task's YAML file; of a group all its tasks."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UnsupportedError(f"--tasks needs lm-eval ({error}). pip install 'kvsink[eval]'") from error
    files = [name.endswith((".yaml", ".yml")) for name in names]
    for name, is_file in zip(names, files, strict=True):
        if is_file and not Path(name).is_file():
            raise EvaluationError(f"task file {name} does not exist. Pass a YAML file of lm-eval, or the name of one of its tasks")
    manager = TaskManager(include_defaults=not all(files))
    found: dict[str, Any] = {}
    for name in names:
        try:
            found |= manager.load([name])["tasks"]
        except Exception as error:  # the harness, its data sets and YAML each raise their own kinds
            if isinstance(error, KeyError) and "not a registered task" in str(error):
                raise UnknownName("lm-eval task", name, manager.all_tasks) from error
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EvaluationError(
                f"task {name} cannot be loaded: {first[:200]}. Check its file and where its data set lies"
            ) from error
    for name, task in found.items():
        if task.OUTPUT_TYPE != "generate_until":
            raise UnsupportedError(
                f"task {name} scores a prompt in one pass ({task.OUTPUT_TYPE}), which reads no stored row: it would show 16 bit."
                " Pass tasks that generate, such as gsm8k or ifeval"
            )
    return list(found.values())


def harness(
    model: Any, tokenizer: Any, tasks: Sequence[Any], cache_factory: CacheFactory, limit: int | None = None, batch: int = 4
) -> tuple[dict[str, Any], ...]:
    """Metrics of tasks that were loaded: task, metric, n documents, value, interval. limit: the first so many documents of each."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Through(HFLM):
        def _model_generate(self, context: Any, max_length: int, stop: list[str], **how: Any) -> Any:
            cache = cache_factory(model, len(context), max_length)
            return super()._model_generate(context, max_length, stop, **given_cache(model, cache), **how)

    template = bool(getattr(tokenizer, "chat_template", None))
    with evaluating(model), torch.random.fork_rng():
        through = Through(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        asked = {
            "tasks": list(tasks),
            "task_manager": TaskManager(include_defaults=False),
        }  # they are loaded: it need not look for more
        report = simple_evaluate(through, limit=limit, bootstrap_iters=0, apply_chat_template=template, **asked)
    rows = []
    for task, figures in report["results"].items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            each = [s.get(metric) for s in report["samples"][task] if s["filter"] == kind]
            row = {"task": task, "metric": key.removesuffix(",none"), "n": len(each), "value": float(value)}
            rows.append({**row, "interval": _interval(float(value), each)})
    return tuple(rows)


def _interval(value: float, each: Sequence[Any]) -> Interval | None:
    """Of a metric that is the mean of its documents; None for any other."""
    if not each or not all(isinstance(x, (bool, int, float)) for x in each):
        return None
    values = [float(x) for x in each]
    if not math.isclose(sum(values) / len(values), value, abs_tol=1e-9):
        return None
    return binomial(int(sum(values)), len(values)) if set(values) <= {0.0, 1.0} else bootstrap(torch.tensor(values)[:, None])
