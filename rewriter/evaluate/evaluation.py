"""Measure a model through its real cache: perplexity, distance to the 16-bit model, passkey retrieval, counted bits.

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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvsink.errors import EvaluationError
from kvsink.evaluate.reference import Reference
from kvsink.model.offload import place_of
from kvsink.model.passing import given_cache

CacheFactory = Callable[[Any, int, int], Any]
"""(model, batch_size, max_length) -> an empty cache for `model`."""
Progress = Callable[[int, int], None]
"""(windows done, windows in all)."""

STOCK = "stock cache"
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_PASSKEYS = (71432, 20598, 84617, 39051, 56283, 10974, 62745, 97306)


@dataclass(frozen=True)
class PasskeyResult:
    """How often a five-digit number hidden in filler text was repeated correctly within 8 greedy tokens."""

    right: int
    total: int
    rows: tuple[dict[str, Any], ...] = ()  # length, depth, right, said

    @property
    def fraction(self) -> float:
        return self.right / self.total if self.total else math.nan


@dataclass(frozen=True)
class EvalResult:
    """One row: what was measured, on what, and with what."""

    model: str
    method: str
    text: str
    windows: int
    window_tokens: int
    chunk: int
    batch: int
    tokens: int  # tokens that were predicted: windows * (window_tokens - 1)
    perplexity: float
    bits_per_element: float
    cache_nbytes: int  # of one batch of `batch` rows at `window_tokens` tokens
    baseline: str | None = None
    baseline_perplexity: float | None = None
    baseline_bits_per_element: float | None = None
    baseline_cache_nbytes: int | None = None
    kl: float | None = None
    top1: float | None = None
    window_nll: tuple[float, ...] = ()
    baseline_window_nll: tuple[float, ...] = ()
    passkey: PasskeyResult | None = None
    baseline_passkey: PasskeyResult | None = None
    device: str = ""
    dtype: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    sink_decay: tuple[float | None, ...] | None = None  # D_sink by layer, of the packed cache against the reference

    @property
    def perplexity_change(self) -> float | None:
        """Relative change against the reference: 0.05 is five per cent worse."""
        return None if self.baseline_perplexity is None else self.perplexity / self.baseline_perplexity - 1

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`, with the derived numbers included."""
        record = dataclasses.asdict(self)
        for name in ("passkey", "baseline_passkey"):
            if (result := getattr(self, name)) is not None:
                record[name]["fraction"] = result.fraction
        return {**record, "perplexity_change": self.perplexity_change}

    def table(self) -> Any:
        """The row and its reference as a rich table."""
        from rich.table import Table

        table = Table(
            title=f"{self.model}: {self.windows} windows of {self.window_tokens} tokens in chunks of {self.chunk}",
            caption=self.provenance(),
        )
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "cache" else "right")
        for row in self.rows():
            table.add_row(*row)
        return table

    def rows(self) -> list[tuple[str, ...]]:
        """Cells under HEADINGS: the reference first, where there is one."""
        change, kl, top1 = self.perplexity_change, self.kl, self.top1
        compared = ("", "", "")
        rows: list[tuple[str, ...]] = []
        if change is not None and kl is not None and top1 is not None and self.baseline_perplexity is not None:
            compared = (f"{change:+.2%}", f"{kl:.4f}", f"{top1:.1%}")
            held = self._held(self.baseline_bits_per_element, self.baseline_cache_nbytes)
            quality = (f"{self.baseline_perplexity:.3f}", "", "", "", _share(self.baseline_passkey))
            rows.append((f"{self.baseline} (reference)", *held, *quality))
        held = self._held(self.bits_per_element, self.cache_nbytes)
        rows.append((self.method, *held, f"{self.perplexity:.3f}", *compared, _share(self.passkey)))
        return rows

    def _held(self, bits: float | None, nbytes: int | None) -> tuple[str, str]:
        if bits is None or nbytes is None:
            return "", ""
        return f"{bits:.2f}", f"{nbytes / (self.batch * self.window_tokens) / 1e3:.2f}"

    def provenance(self) -> str:
        """Text, tokens, device and versions in one line."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.text}; {self.tokens} tokens predicted; {self.batch} rows at a time; {self.device}, {self.dtype};"
            f" {versions}; {self.seconds:.0f} s"
        )


HEADINGS = ("cache", "bits", "KB/token", "perplexity", "change", "KL (nats)", "top-1", "passkey")


def markdown_table(results: Sequence[EvalResult]) -> str:
    """The rows of several results as one Markdown table; a reference that appears twice is listed once."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
    for result in results:
        for row in result.rows():
            line = "| " + " | ".join(cell or " " for cell in row) + " |"
            if line not in lines:
                lines.append(line)
    return "\n".join(lines)


def _share(result: PasskeyResult | None) -> str:
    return "" if result is None else f"{result.right}/{result.total}"


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
    """`windows` windows of `window_tokens` tokens, spread evenly over `text`; no token is added: ids [N, T]."""
    if windows < 1 or window_tokens < 2:
        raise EvaluationError(
            f"cannot evaluate {windows} windows of {window_tokens} tokens. Ask for at least 1 window of at least 2"
            " tokens"
        )
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < windows * window_tokens:
        fits = len(ids) // window_tokens
        advice = (
            f"Pass --windows {fits}" if fits else f"Pass a longer text or --window-tokens {max(2, len(ids) // windows)}"
        )
        raise EvaluationError(
            f"the text holds {len(ids)} tokens, but {windows} windows of {window_tokens} need"
            f" {windows * window_tokens}. {advice}"
        )
    spare = len(ids) - windows * window_tokens
    starts = [k * window_tokens + (k * spare // (windows - 1) if windows > 1 else 0) for k in range(windows)]
    return torch.stack([ids[start : start + window_tokens] for start in starts])


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
) -> EvalResult:
    """Run every window of `ids` [N, T] through `model` and its cache, and beside it through `baseline`.

    `baseline`: `model` itself (its stored weights are a valid plain model), another model, a `Reference` that remembers
    its log-probabilities between calls, or None for perplexity alone.
    `cache_factory`: by default the packed cache of a rewritten model, else transformers.DynamicCache.
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
    nll = torch.zeros(count, dtype=torch.float64)
    base_nll = torch.zeros(count, dtype=torch.float64)
    kl = torch.zeros(count, dtype=torch.float64)
    agree = torch.zeros(count, dtype=torch.float64)
    largest: tuple[float, int] = (math.nan, 0)
    base_largest: tuple[float, int] = (math.nan, 0)
    with _evaluating(model, baseline), torch.no_grad():
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
                nll[span] -= log_q_target.sum(-1).double().cpu()
                if baseline is not None:
                    if kept:
                        log_p = reference.get(first, start)
                    else:
                        there = rows[:, start:stop].to(_device(baseline))
                        log_p = _log_probs(baseline, there, base_cache)[:, : targets.shape[1]]
                        reference.put(first, start, log_p)
                    log_p = log_p.to(log_q.device)
                    base_nll[span] -= log_p.gather(-1, targets[..., None])[..., 0].sum(-1).double().cpu()
                    agree[span] += (log_p.argmax(-1) == log_q.argmax(-1)).sum(-1).double().cpu()
                    log_q.sub_(log_p).neg_()  # log p - log q, in place
                    kl[span] += log_p.exp().mul_(log_q).sum(-1).sum(-1).double().cpu()
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


def passkey_retrieval(
    model: Any,
    tokenizer: Any,
    cache_factory: CacheFactory | None = None,
    lengths: Sequence[int] = (256, 512, 1024),
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    chunk: int = 64,
    new_tokens: int = 8,
    progress: Progress | None = None,
) -> PasskeyResult:
    """Hide a number at each depth of a filler text of each length, ask for it, and count exact answers.

    The prompts of one length are rows of one batch, exactly that long, so no padding is involved.
    """
    if cache_factory is None:
        cache_factory = packed_cache if is_rewritten(model) else dynamic_cache
    found: list[dict[str, Any]] = []
    with _evaluating(model), torch.no_grad():
        for done, length in enumerate(lengths):
            keys = [str(_PASSKEYS[(done * len(depths) + i) % len(_PASSKEYS)]) for i in range(len(depths))]
            prompts = [passkey_prompt(tokenizer, key, length, depth) for key, depth in zip(keys, depths, strict=True)]
            ids = torch.tensor(prompts, device=_device(model))  # [depths, length]
            cache = cache_factory(model, len(depths), length + new_tokens)
            for start in range(0, length, chunk):
                logits = model(
                    ids[:, start : start + chunk], **given_cache(model, cache), use_cache=True, logits_to_keep=1
                ).logits
            said = []
            for step in range(new_tokens):
                said.append(logits[:, -1].argmax(-1, keepdim=True))
                if step + 1 < new_tokens:
                    logits = model(said[-1], **given_cache(model, cache), use_cache=True).logits
            for key, depth, answer in zip(keys, depths, torch.cat(said, 1), strict=True):
                words = tokenizer.decode(answer, skip_special_tokens=True)
                found.append({"length": length, "depth": depth, "right": key in words, "key": key, "said": words})
            if progress is not None:
                progress(done + 1, len(lengths))
    return PasskeyResult(right=sum(row["right"] for row in found), total=len(found), rows=tuple(found))


def passkey_prompt(tokenizer: Any, key: str, length: int, depth: float) -> list[int]:
    """Exactly `length` token ids: an instruction, filler with the key at `depth` of it, and the question."""

    def encode(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False)["input_ids"])

    opening = "There is an important number hidden inside a lot of irrelevant text. Find it and memorize it.\n"
    question = "\nWhat is the pass key?"
    answer = "The pass key is"
    if getattr(tokenizer, "chat_template", None):
        mark = "<<filler>>"
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": opening + mark + question}], tokenize=False, add_generation_prompt=True
        )
        before, after = chat.split(mark)
        after += answer
    else:
        start = tokenizer.bos_token or ""
        before, after = start + opening, question + " " + answer
    head, tail = encode(before), encode(after)
    needle = encode(f" The pass key is {key}. Remember it. {key} is the pass key.")
    room = length - len(head) - len(tail) - len(needle)
    if room < 0:
        raise EvaluationError(
            f"a passkey prompt of {length} tokens is too short; it needs at least {length - room}. Pass longer lengths"
        )
    sentences = [encode(" " + words + ".") for words in _FILLER.rstrip(".").split(". ")]
    filler: list[int] = []
    ends = [0]
    while len(filler) < room:
        filler += sentences[(len(ends) - 1) % len(sentences)]
        ends.append(len(filler))
    cut = max(end for end in ends if end <= max(0, min(int(depth * room), room)))
    return head + filler[:cut] + needle + filler[cut:room] + tail


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
    return (
        f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
        if device.type == "cpu"
        else str(device)
    )


def _log_probs(model: Any, ids: Tensor, cache: Any) -> Tensor:
    logits = model(ids, **given_cache(model, cache), use_cache=True).logits
    return torch.log_softmax(logits.float(), dim=-1)  # [rows, C, V] float32


def _device(model: Any) -> torch.device:
    return place_of(model)


def _check_ids(model: Any, ids: Tensor) -> None:
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2 or ids.is_floating_point():
        raise EvaluationError(
            f"ids must be integers of shape [windows, tokens >= 2], not {ids.dtype} {list(ids.shape)}"
        )
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit and ids.shape[1] > limit:
        raise EvaluationError(
            f"windows of {ids.shape[1]} tokens exceed the model's {limit} positions. Pass --window-tokens {limit} or"
            " fewer"
        )
    if int(ids.max()) >= config.vocab_size:
        raise EvaluationError(
            f"token {int(ids.max())} is outside the model's vocabulary of {config.vocab_size}. Use the model's own"
            " tokenizer"
        )


class _evaluating:
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
