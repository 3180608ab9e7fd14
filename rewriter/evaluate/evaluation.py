"""Measure a model through its real cache: perplexity, distance to the 16-bit model, counted bits.

Every window is fed in chunks of C tokens, so tokens attend to rows that were stored before them.
The reference model runs beside it chunk by chunk, so only one chunk of logits per model exists at a time.

Formula    perplexity = exp(mean of -log q(x_t | x_<t)) over tokens 1 .. n-1 of every window
           KL         = mean over the same positions of sum_v p(v) (log p(v) - log q(v)), p the reference, in nats
           top-1      = share of the same positions where both models prefer the same token
Shapes     ids [N, T] int64; logits per chunk [rows, C, V], log-softmax in float32
Units      bits per element: as the cache counts its own bytes at the window's full length
Raises     EvaluationError for windows that do not fit the text or the model, and for logits that are not finite
"""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvsink.calibrate.observing import begun
from kvsink.errors import EvaluationError
from kvsink.evaluate.positions import Sums
from kvsink.evaluate.reference import Reference
from kvsink.evaluate.results import EvalResult
from kvsink.model.offload import place_of
from kvsink.model.passing import given_cache

CacheFactory = Callable[[Any, int, int], Any]
"""(model, batch_size, max_length) -> an empty cache for `model`."""
Progress = Callable[[int, int], None]
"""(windows done, windows in all)."""

STOCK = "stock cache"


def dynamic_cache(model: Any, batch_size: int, max_length: int) -> Any:
    """The stock cache: keys and values as the model computes them."""
    from transformers import DynamicCache

    del batch_size, max_length  # it grows by itself
    return DynamicCache(config=model.config)


def packed_cache(model: Any, batch_size: int, max_length: int, strict: bool = False) -> Any:
    """The packed cache of a rewritten model; `strict` reads the newest rows back from their codes too."""
    from kvsink.cache.cache import KVSinkCache

    return KVSinkCache.for_model(model, batch_size=batch_size, max_length=max_length, strict=strict)


def is_rewritten(model: Any) -> bool:
    """True for a model with a packed cache: rewritten in memory, or loaded from a folder made by kvsink-rewrite."""
    return getattr(model, "_kvsink_runtime", None) is not None


def method_name(model: Any) -> str:
    """What a row calls the cache of `model`."""
    return f"kvsink {model._kvsink_runtime.method}" if is_rewritten(model) else STOCK


def token_windows(text: str, tokenizer: Any, windows: int, window_tokens: int) -> Tensor:
    """`windows` windows of `window_tokens` tokens, spread evenly over `text`, the first token of each as the
    tokenizer begins a text: ids [N, T]."""
    if windows < 1 or window_tokens < 2:
        raise EvaluationError(
            f"cannot evaluate {windows} windows of {window_tokens} tokens. Ask for at least 1 window of at least 2 tokens"
        )
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < windows * window_tokens:
        fits = len(ids) // window_tokens
        advice = f"Pass --windows {fits}" if fits else f"Pass a longer text or --window-tokens {max(2, len(ids) // windows)}"
        raise EvaluationError(
            f"the text holds {len(ids)} tokens, but {windows} windows of {window_tokens} need {windows * window_tokens}. {advice}"
        )
    spare = len(ids) - windows * window_tokens
    starts = [k * window_tokens + (k * spare // (windows - 1) if windows > 1 else 0) for k in range(windows)]
    return begun(torch.stack([ids[start : start + window_tokens] for start in starts]), tokenizer)


def evaluate(
    model: Any,
    baseline: Any | None,
    ids: Tensor,
    chunk: int = 64,
    cache_factory: CacheFactory | None = None,
    baseline_cache_factory: CacheFactory = dynamic_cache,
    batch: int = 4,
    model_name: str = "",
    method: str = "",
    text_name: str = "",
    baseline_name: str = STOCK,
    progress: Progress | None = None,
    edges: Sequence[int] | None = None,
) -> EvalResult:
    """Run every window of `ids` [N, T] through `model` and its cache, and beside it through `baseline`.

    `baseline`: `model` itself (its stored weights are a valid plain model), another model, a `Reference` that remembers
    its log-probabilities between calls, or None for perplexity alone.
    `cache_factory`: by default the packed cache of a rewritten model, else transformers.DynamicCache.
    `edges`: positions 0 .. T at which the figures are told apart too (`kvsink.evaluate.positions`).
    """
    if cache_factory is None:
        cache_factory = packed_cache if is_rewritten(model) else dynamic_cache
    if chunk < 1 or batch < 1:
        raise EvaluationError(f"chunk={chunk} and batch={batch} must be at least 1")
    _check_ids(model, ids)
    started = time.perf_counter()
    reference = baseline if isinstance(baseline, Reference) else Reference(baseline, keep=False)
    baseline = reference.model
    if baseline is not None:
        reference.begin(ids, chunk, batch)
    count, length = ids.shape
    sums = Sums(count, length, edges)
    largest: tuple[float, int] = (math.nan, 0)
    base_largest: tuple[float, int] = (math.nan, 0)
    with evaluating(model, baseline), torch.no_grad():
        for first in range(0, count, batch):
            rows = ids[first : first + batch].to(_device(model))
            cache = cache_factory(model, len(rows), length)
            kept = reference.complete(first, range(0, length, chunk))
            fresh = baseline is not None and not kept
            base_cache = baseline_cache_factory(baseline, len(rows), length) if fresh else None
            span = slice(first, first + len(rows))
            for start in range(0, length, chunk):
                stop = min(start + chunk, length)
                targets = rows[:, start + 1 : stop + 1]  # [rows, C]; one fewer in the last chunk
                log_q = _log_probs(model, rows[:, start:stop], cache)[:, : targets.shape[1]]
                log_q_target = log_q.gather(-1, targets[..., None])[..., 0]
                if not torch.isfinite(log_q_target).all():
                    raise EvaluationError(
                        f"the model gives logits that are not finite in windows {first}-{first + len(rows) - 1}, tokens"
                        f" {start}-{stop - 1}. Check its weights, or try --dtype float32"
                    )
                sums.add("nll", span, start, -log_q_target)
                if baseline is not None:
                    if kept:
                        log_p = reference.get(first, start)
                    else:
                        there = rows[:, start:stop].to(_device(baseline))
                        log_p = _log_probs(baseline, there, base_cache)[:, : targets.shape[1]]
                        reference.put(first, start, log_p)
                    log_p = log_p.to(log_q.device)
                    sums.add("base_nll", span, start, -log_p.gather(-1, targets[..., None])[..., 0])
                    sums.add("agree", span, start, log_p.argmax(-1) == log_q.argmax(-1))
                    log_q.sub_(log_p).neg_()  # log p - log q, in place
                    sums.add("kl", span, start, log_p.exp().mul_(log_q).sum(-1))
                    del log_p
                del log_q
            if not largest[1]:
                largest = cache_size(cache)
                if base_cache is not None:
                    reference.size = cache_size(base_cache)
                base_largest = reference.size
            del cache, base_cache
            if progress is not None:
                progress(min(first + batch, count), count)
    per_window = length - 1
    predicted = count * per_window
    nll, base_nll, kl, agree = (sums.of_window(name) for name in ("nll", "base_nll", "kl", "agree"))
    result = EvalResult(
        model=model_name or type(model).__name__,
        method=method or method_name(model),
        text=text_name or "unnamed text",
        windows=count,
        window_tokens=length,
        chunk=chunk,
        batch=min(batch, count),
        tokens=predicted,
        perplexity=math.exp(nll.sum().item() / predicted),
        bits_per_element=largest[0],
        cache_nbytes=largest[1],
        window_nll=tuple((nll / per_window).tolist()),
        device=device_name(_device(model)),
        dtype=str(model.dtype).removeprefix("torch."),
        versions=versions(),
        seconds=time.perf_counter() - started,
        positions=() if edges is None else sums.buckets(compared=baseline is not None),
    )
    if baseline is None:
        return result
    return dataclasses.replace(
        result,
        baseline=baseline_name,
        baseline_perplexity=math.exp(base_nll.sum().item() / predicted),
        baseline_bits_per_element=base_largest[0],
        baseline_cache_nbytes=base_largest[1],
        kl=max(0.0, kl.sum().item() / predicted),
        top1=agree.sum().item() / predicted,
        baseline_window_nll=tuple((base_nll / per_window).tolist()),
    )


def cache_size(cache: Any) -> tuple[float, int]:
    """(bits per element, bytes): as the cache counts them, or from the tensors of a stock cache."""
    if hasattr(cache, "bits_per_element"):
        return float(cache.bits_per_element()), int(cache.nbytes())
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
    nbytes, elements = sum(t.nbytes for t in tensors), sum(t.numel() for t in tensors)
    return (8 * nbytes / elements if elements else math.nan), nbytes


def versions() -> dict[str, str]:
    """The versions a row must carry."""
    import importlib.metadata

    from kvsink import __version__  # not the metadata of an editable install, which stay those of the day it was made

    found = {"python": platform.python_version(), "kvsink": __version__}
    for name in ("torch", "transformers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "torch": str(torch.__version__)}


def device_name(device: torch.device) -> str:
    """A name a reader can compare: the accelerator's, or the CPU's architecture and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def _log_probs(model: Any, ids: Tensor, cache: Any) -> Tensor:
    logits = model(ids, **given_cache(model, cache), use_cache=True).logits
    return torch.log_softmax(logits.float(), dim=-1)  # [rows, C, V] float32


def _device(model: Any) -> torch.device:
    return place_of(model)


def _check_ids(model: Any, ids: Tensor) -> None:
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2 or ids.is_floating_point():
        raise EvaluationError(f"ids must be integers of shape [windows, tokens >= 2], not {ids.dtype} {list(ids.shape)}")
    check_length(model, ids.shape[1])
    vocabulary = model.config.get_text_config().vocab_size
    if int(ids.max()) >= vocabulary:
        raise EvaluationError(
            f"token {int(ids.max())} is outside the model's vocabulary of {vocabulary}. Use the model's own tokenizer"
        )


def check_length(model: Any, tokens: int, option: str = "--window-tokens") -> None:
    """Refuse windows of more `tokens` than the model has positions; option: what to pass fewer by."""
    limit = context_of(model)
    if limit and tokens > limit:
        raise EvaluationError(f"windows of {tokens} tokens exceed the model's {limit} positions. Pass {option} {limit} or fewer")


def context_of(model: Any) -> int | None:
    """The positions a model is made for, or None where its configuration names no number."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


class evaluating:
    """Switch models to eval mode and back."""

    def __init__(self, *models: Any) -> None:
        self._models = [m for m in models if m is not None]

    def __enter__(self) -> None:
        self._modes = [m.training for m in self._models]
        for m in self._models:
            m.eval()

    def __exit__(self, *_: object) -> None:
        for m, training in zip(self._models, self._modes, strict=True):
            m.train(training)
