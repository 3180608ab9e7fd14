"""Answers of `generate()` through a cache: right or not, finished or not, how long, and how much they repeat.

Formula    repetition = 1 - different runs of four tokens / runs of four tokens, of one answer
           exhausted  = the budget was used up before the model ended its turn
Source     repetition: seq-rep-4 of arXiv 1908.04319, section 6
Shapes     prompts of a batch are padded on the left: ids, mask [rows, length]
Raises     EvaluationError for a tokenizer without a chat template, and for budgets beyond the model's positions
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from kvsink.errors import EvaluationError
from kvsink.evaluate.arithmetic import number_in, problems
from kvsink.evaluate.evaluation import CacheFactory, Progress, context_of, dynamic_cache, evaluating, is_rewritten, packed_cache
from kvsink.evaluate.results import GenerationResult
from kvsink.evaluate.texts import evaluation_text
from kvsink.model.offload import place_of
from kvsink.model.passing import given_cache

__all__ = ["arithmetic", "check_arithmetic", "repetition", "writing"]


def check_arithmetic(model: Any, tokenizer: Any, count: int, budget: int, seed: int = 0) -> list[list[int]]:
    """The prompts of the problems, in tokens. Refuses a tokenizer that cannot ask as a user does, and budgets that do not fit."""
    if not getattr(tokenizer, "chat_template", None):
        raise EvaluationError(
            "the tokenizer has no chat template, and problems are asked in a chat. Pass a model tuned for chats, or put its"
            " chat_template.jinja beside its tokenizer"
        )
    prompts = [_chat(tokenizer, problem.prompt) for problem in problems(count, seed)]
    room = (context_of(model) or math.inf) - max(map(len, prompts))
    if budget > room:
        raise EvaluationError(
            f"prompts of problems and {budget} new tokens exceed the model's {context_of(model)} positions. Pass"
            + (f" --budget {room} or less" if room > 0 else " a model with more")
        )
    return prompts


def repetition(tokens: Sequence[int]) -> float:
    """The share of runs of four tokens that have occurred before; 0 for fewer than four tokens."""
    runs = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def arithmetic(
    model: Any,
    tokenizer: Any,
    cache_factory: CacheFactory | None = None,
    count: int = 50,
    budget: int = 400,
    temperature: float = 0.0,
    batch: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> GenerationResult:
    """Answer `count` problems (`kvsink.evaluate.arithmetic`) in at most `budget` new tokens each.

    temperature: 0 takes the likeliest token, above it the whole distribution is sampled, every batch from its own seed. The
    problems are the same for every model and cache; penalties of the model's generation_config stay as they are.
    """
    asked, prompts = problems(count, seed), check_arithmetic(model, tokenizer, count, budget, seed)
    rows = []
    for problem, answer in zip(
        asked, _answers(model, tokenizer, prompts, cache_factory, budget, temperature, batch, seed, progress), strict=True
    ):
        number = number_in(answer["said"])
        row = {"wanted": problem.answer, "number": None if number is None else float(number), "right": number == problem.answer}
        rows.append({**row, **answer})
    return GenerationResult(budget, temperature, tuple(rows))


def writing(
    model: Any,
    tokenizer: Any,
    cache_factory: CacheFactory | None = None,
    count: int = 8,
    budget: int = 2000,
    temperature: float = 1.0,
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> GenerationResult:
    """Long answers, sampled: articles about the titles of WikiText-2's test split, asked for in the model's chat template, or begun
    where its tokenizer has none. Nothing is graded; arguments as in `arithmetic`."""
    titles = re.findall(r"^= ([^=\n]+) =$", evaluation_text(), re.MULTILINE)
    if count > len(titles):
        raise EvaluationError(
            f"the text holds {len(titles)} titles of articles, fewer than {count}. Ask for {len(titles)} or fewer"
        )
    ask = "Write a long and detailed article about {}, of at least 3,000 words, section by section."
    if getattr(tokenizer, "chat_template", None):
        prompts = [_chat(tokenizer, ask.format(title)) for title in titles[:count]]
    else:
        start = tokenizer.bos_token or ""
        prompts = [list(tokenizer(f"{start}= {t} =\n\n", add_special_tokens=False)["input_ids"]) for t in titles[:count]]
    limit = context_of(model)
    if limit and budget > limit - max(map(len, prompts)):
        raise EvaluationError(f"{budget} new tokens exceed the model's {limit} positions. Ask for fewer")
    answers = _answers(model, tokenizer, prompts, cache_factory, budget, temperature, batch, seed, progress)
    return GenerationResult(budget, temperature, tuple(answers))


def _answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    cache_factory: CacheFactory | None,
    budget: int,
    temperature: float,
    batch: int,
    seed: int,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """What generate() says to every prompt: said, tokens, finished, repetition."""
    if cache_factory is None:
        cache_factory = packed_cache if is_rewritten(model) else dynamic_cache
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        how = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    end = model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    rows: list[dict[str, Any]] = []
    device = place_of(model)
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for first in range(0, len(prompts), batch):
            part = prompts[first : first + batch]
            length = max(map(len, part))
            ids = torch.tensor([[pad] * (length - len(p)) + p for p in part], device=device)
            mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in part], device=device)
            torch.manual_seed(1000 * seed + first)
            cache = given_cache(model, cache_factory(model, len(part), length + budget))
            out = model.generate(ids, attention_mask=mask, max_new_tokens=budget, pad_token_id=pad, **cache, **how)[:, length:]
            for tokens in out.tolist():
                stop = next((i for i, token in enumerate(tokens) if token in ends), None)
                said = tokens if stop is None else tokens[:stop]
                words = tokenizer.decode(said, skip_special_tokens=True)
                rows.append({"said": words, "tokens": len(said), "finished": stop is not None, "repetition": repetition(said)})
            if progress is not None:
                progress(len(rows), len(prompts))
    return rows


def _chat(tokenizer: Any, words: str) -> list[int]:
    chat = tokenizer.apply_chat_template([{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True)
    return list(tokenizer(chat, add_special_tokens=False)["input_ids"])
