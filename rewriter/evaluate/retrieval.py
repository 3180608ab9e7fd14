"""A number hidden in filler text, asked for at its end: whether a model over its cache still finds it.

Formula    right = the digits occur in 8 greedy tokens behind the question
Shapes     prompts of one length are rows of one batch, exactly that long
Raises     EvaluationError for lengths that do not hold the prompt
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvsink.errors import EvaluationError
from kvsink.evaluate.evaluation import CacheFactory, Progress, dynamic_cache, evaluating, is_rewritten, packed_cache
from kvsink.evaluate.results import PasskeyResult
from kvsink.model.offload import place_of
from kvsink.model.passing import given_cache

_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_PASSKEYS = (71432, 20598, 84617, 39051, 56283, 10974, 62745, 97306)


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
    with evaluating(model), torch.no_grad():
        for done, length in enumerate(lengths):
            keys = [str(_PASSKEYS[(done * len(depths) + i) % len(_PASSKEYS)]) for i in range(len(depths))]
            prompts = [passkey_prompt(tokenizer, key, length, depth) for key, depth in zip(keys, depths, strict=True)]
            ids = torch.tensor(prompts, device=place_of(model))  # [depths, length]
            cache = cache_factory(model, len(depths), length + new_tokens)
            for start in range(0, length, chunk):
                logits = model(ids[:, start : start + chunk], **given_cache(model, cache), use_cache=True, logits_to_keep=1).logits
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
