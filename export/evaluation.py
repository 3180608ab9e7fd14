"""Perplexity of an exported model through its runner: `kvsink-eval OUT_DIR/model.onnx`.

Formula    as in `kvsink.evaluate.evaluation`: windows are fed in chunks, so that tokens attend to stored rows
Raises     EvaluationError for logits that are not finite, ExportError from the runner
"""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Callable

import numpy as np
from torch import Tensor

from kvsink.errors import EvaluationError
from kvsink.evaluate.evaluation import versions
from kvsink.evaluate.results import EvalResult
from kvsink.export.runner import OnnxGenerator

__all__ = ["evaluate_onnx"]


def evaluate_onnx(
    runner: OnnxGenerator,
    ids: Tensor,
    chunk: int = 64,
    batch: int = 4,
    text_name: str = "unnamed text",
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """One row for windows `ids` [N, T]; the bits are those of the tensors that cross the boundary at the window's end."""
    started = time.perf_counter()
    windows, (count, length) = ids.numpy(), ids.shape
    if length > runner.manifest["max_positions"]:
        raise EvaluationError(
            f"windows of {length} tokens exceed the {runner.manifest['max_positions']} positions the model serves. Pass "
            "--window-tokens with fewer"
        )
    batch = 1 if runner.one_row else batch  # what its operator takes in chunks
    nll = np.zeros(count)
    held = (math.nan, 0)
    for first in range(0, count, batch):
        rows = windows[first : first + batch]
        past = runner.begin(len(rows), length)
        mask, positions = np.ones_like(rows), np.broadcast_to(np.arange(length), rows.shape)
        for start in range(0, length, chunk):
            part = slice(start, start + chunk)
            logits, past = runner.step(rows[:, part], mask[:, : start + chunk], positions[:, part], past)
            targets = rows[:, start + 1 : start + chunk + 1]
            scores = logits[:, : targets.shape[1]].astype(np.float64)
            top = scores.max(-1, keepdims=True)
            log_sum = np.log(np.exp(scores - top).sum(-1)) + top[..., 0]
            nll[first : first + batch] += (log_sum - np.take_along_axis(scores, targets[..., None], -1)[..., 0]).sum(-1)
        runner.past = past
        past.end()
        if not np.isfinite(nll).all():
            raise EvaluationError(f"the model gives logits that are not finite in windows {first} to {first + len(rows) - 1}")
        if not held[1]:
            held = runner.bits_per_element(past), runner.nbytes(past)
        if progress is not None:
            progress(min(first + batch, count), count)
    predicted = count * (length - 1)
    return EvalResult(
        model=str(runner.path),
        method=f"kvsink {runner.manifest['method']}, onnx {runner.manifest['flavour']}".removesuffix(" functions"),
        text=text_name,
        windows=count,
        window_tokens=length,
        chunk=chunk,
        batch=min(batch, count),
        tokens=predicted,
        perplexity=math.exp(nll.sum() / predicted),
        bits_per_element=held[0],
        cache_nbytes=held[1],
        window_nll=tuple((nll / (length - 1)).tolist()),
        device=runner.session.get_providers()[0],
        dtype=runner.manifest["dtype"],
        versions=versions() | {"onnxruntime": importlib.metadata.version("onnxruntime")},
        seconds=time.perf_counter() - started,
    )
