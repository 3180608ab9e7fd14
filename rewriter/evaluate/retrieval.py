"""Whether a model over its cache still finds what stands far back in a text, by task, length and depth.

Formula    exact = all that was asked for occurs in the greedy answer; recall = share of it, which is RULER's score
Source     arXiv 2404.06654, section 3 (RULER); `call` is ours
Shapes     prompts of one length are rows of batches [rows, length], exactly that long, so no padding is involved
Units      shares of prompts, with 95 % intervals (`kvsink.evaluate.intervals`)
Raises     EvaluationError for lengths that do not hold the prompt, or that the model has no positions for; UnknownName
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from kvsink.errors import EvaluationError, UnknownName
from kvsink.evaluate.evaluation import CacheFactory, Progress, context_of, dynamic_cache, evaluating, is_rewritten, packed_cache
from kvsink.evaluate.function_call import call
from kvsink.evaluate.haystack import Draft, Haystack
from kvsink.evaluate.results import RetrievalResult
from kvsink.evaluate.ruler import common_words, multikey, multiquery, multivalue, single, variables
from kvsink.evaluate.texts import evaluation_text
from kvsink.model.offload import place_of
from kvsink.model.passing import given_cache

__all__ = ["DEPTHS", "TASKS", "Question", "check_retrieval", "questions", "retrieval", "task_names"]

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
TASKS: dict[str, tuple[Callable[[Haystack, int, float, Random], Draft], int]] = {
    "single": (single, 128),
    "multikey": (multikey, 128),
    "multivalue": (multivalue, 128),
    "multiquery": (multiquery, 128),
    "variables": (variables, 60),
    "words": (common_words, 120),
    "call": (call, 128),
}
"""By name: what drafts a prompt, and the most tokens of an answer."""
Question = tuple[dict[str, Any], Draft, list[int]]
"""Task, length and depth of a prompt, what it is graded by, and its token ids."""


def task_names(words: str) -> tuple[str, ...]:
    """The tasks in a list with commas; `all` and `none` are such lists. Raises UnknownName."""
    if words in ("all", "none"):
        return tuple(TASKS) if words == "all" else ()
    names = tuple(name.strip() for name in words.split(","))
    for name in names:
        if name not in TASKS:
            raise UnknownName("retrieval task", name, [*TASKS, "all", "none"])
    return names


def check_retrieval(model: Any, tokenizer: Any, tasks: Sequence[str], lengths: Sequence[int], text: str | None = None) -> None:
    """Refuse lengths that do not hold the prompts, or leave no positions for an answer."""
    hay, limit = _haystack(tokenizer, text), context_of(model)
    for name in tasks:
        make, most = TASKS[name]
        hay.room(make(hay, min(lengths), 0.5, Random(0)), min(lengths))
        if limit and max(lengths) + most > limit:
            way = f"--lengths up to {limit - most}" if limit - most >= 256 else "--retrieval none"
            raise EvaluationError(
                f"prompts of {max(lengths)} tokens and answers of {most} ({name}) exceed the model's {limit} positions. Pass {way}"
            )


def questions(
    tokenizer: Any, tasks: Sequence[str], lengths: Sequence[int], depths: Sequence[float], samples: int, text: str | None = None
) -> list[Question]:
    """What `retrieval` asks, prompts of one length together."""
    hay, asked = _haystack(tokenizer, text), list[Question]()
    for length in lengths:
        for task in tasks:
            for number, depth in enumerate(depth for depth in depths for _ in range(samples)):
                rng = Random(f"{task} {length} {number}")
                draft = TASKS[task][0](hay, length, depth, rng)
                asked.append(({"task": task, "length": length, "depth": depth}, draft, hay.prompt(draft, length, rng)))
    return asked


def retrieval(
    model: Any,
    tokenizer: Any,
    cache_factory: CacheFactory | None = None,
    tasks: Sequence[str] = ("single",),
    lengths: Sequence[int] = (256, 512, 1024),
    depths: Sequence[float] = DEPTHS,
    samples: int = 1,
    text: str | None = None,
    chunk: int = 64,
    batch: int = 5,
    progress: Progress | None = None,
    asked: Sequence[Question] | None = None,
) -> RetrievalResult:
    """Ask for what was hidden at each depth of each length, `samples` times, and count exact answers.

    The prompts depend on the tokenizer, the text (by default WikiText-2's test split) and these arguments alone, so that two
    caches are asked the same. asked: those that `questions` made of them before.
    """
    if cache_factory is None:
        cache_factory = packed_cache if is_rewritten(model) else dynamic_cache
    check_retrieval(model, tokenizer, tasks, lengths, text)
    found: list[dict[str, Any]] = []
    if asked is None:
        asked = questions(tokenizer, tasks, lengths, depths, samples, text)
    with evaluating(model), torch.no_grad():
        while len(found) < len(asked):  # tasks of one length share batches, since their rows stop on their own
            at = asked[len(found) : len(found) + batch]
            part = [one for one in at if len(one[2]) == len(at[0][2])]
            ids = torch.tensor([ids for *_, ids in part], device=place_of(model))  # [rows, length]
            most = [TASKS[about["task"]][1] for about, *_ in part]
            said = _answers(model, tokenizer, ids, [draft for _, draft, _ in part], cache_factory, chunk, most)
            for (about, draft, _), words in zip(part, said, strict=True):
                grade = draft.grade(words)
                found.append({**about, "right": grade.exact, "recall": grade.recall, "valid": grade.valid, "said": words})
            if progress is not None:
                progress(len(found), len(asked))
    found.sort(key=lambda row: tasks.index(row["task"]))
    return RetrievalResult(tuple(found))


def _haystack(tokenizer: Any, text: str | None) -> Haystack:
    return Haystack(tokenizer, evaluation_text() if text is None else text)


def _answers(
    model: Any, tokenizer: Any, ids: Tensor, drafts: Sequence[Draft], cache_factory: CacheFactory, chunk: int, most: list[int]
) -> list[str]:
    """Greedy answers of at most `most` tokens each, up to the model's end of a turn; a row that is exact may stop sooner."""
    rows, length = ids.shape
    config = getattr(model, "generation_config", None)
    end = getattr(config, "eos_token_id", None)
    ends = {end} if isinstance(end, int) else set(end or ())
    cache = cache_factory(model, rows, length + max(most))
    for start in range(0, length, chunk):
        logits = model(ids[:, start : start + chunk], **given_cache(model, cache), use_cache=True, logits_to_keep=1).logits
    said: list[list[int]] = [[] for _ in drafts]
    running = [True] * rows
    for step in range(max(most)):
        tokens = logits[:, -1].argmax(-1, keepdim=True)  # [rows, 1]
        for i, token in enumerate(tokens[:, 0].tolist()):
            running[i] = running[i] and token not in ends
            if running[i]:
                said[i].append(token)
                running[i] = len(said[i]) < most[i] and not drafts[i].grade(_words(tokenizer, said[i])).exact
        if not any(running) or step + 1 == max(most):
            break
        logits = model(tokens, **given_cache(model, cache), use_cache=True).logits
    return [_words(tokenizer, tokens) for tokens in said]


def _words(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
