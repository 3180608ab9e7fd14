"""Answers of `generate()` through a cache: right or not, finished or not, how long, and how much they repeat.

Formula    repetition = 1 - different runs of four tokens / runs of four tokens, of one answer
           exhausted  = the budget was used up before the model ended its turn
Source     repetition: seq-rep-4 of arXiv 1908.04319, section 6
Shapes     prompts of a batch are padded on the left: ids, mask [rows, length]
Raises     EvaluationError for a tokenizer without a chat template, and for budgets beyond the model's positions
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from kvsink.errors import EvaluationError
from kvsink.evaluate.arithmetic import number_in, problems
from kvsink.evaluate.evaluation import CacheFactory, Progress, context_of, dynamic_cache, evaluating, is_rewritten, packed_cache
from kvsink.evaluate.results import GenerationResult
from kvsink.model.offload import place_of
from kvsink.model.passing import given_cache

__all__ = ["arithmetic", "check_arithmetic", "repetition"]


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
    if cache_factory is None:
        cache_factory = packed_cache if is_rewritten(model) else dynamic_cache
    asked, prompts = problems(count, seed), check_arithmetic(model, tokenizer, count, budget, seed)
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        how = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    end = model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    rows: list[dict[str, Any]] = []
    device = place_of(model)
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for first in range(0, count, batch):
            part = prompts[first : first + batch]
            length = max(map(len, part))
            ids = torch.tensor([[pad] * (length - len(p)) + p for p in part], device=device)
            mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in part], device=device)
            torch.manual_seed(1000 * seed + first)
            cache = given_cache(model, cache_factory(model, len(part), length + budget))
            out = model.generate(ids, attention_mask=mask, max_new_tokens=budget, pad_token_id=pad, **cache, **how)[:, length:]
            for problem, tokens in zip(asked[first:], out.tolist(), strict=False):
                stop = next((i for i, token in enumerate(tokens) if token in ends), None)
                said = tokens if stop is None else tokens[:stop]
                words = tokenizer.decode(said, skip_special_tokens=True)
                number = number_in(words)
                row = {"wanted": problem.answer, "number": None if number is None else float(number)}
                row |= {"right": number == problem.answer, "said": words, "tokens": len(said)}
                rows.append({**row, "finished": stop is not None, "repetition": repetition(said)})
            if progress is not None:
                progress(min(first + batch, count), count)
    return GenerationResult(budget, temperature, tuple(rows))


def _chat(tokenizer: Any, words: str) -> list[int]:
    chat = tokenizer.apply_chat_template([{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True)
    return list(tokenizer(chat, add_special_tokens=False)["input_ids"])
