"""Requests that come and go in one batch over one packed cache: `python examples/serve_requests.py out/ "a prompt" "another" ...`.

The loop of a server without the server: a prompt is read into a cache of its own and joins the running batch, every step gives one
token to each running request, and a request that is done leaves, so that the next one can come in. Write the model first:
`kvsink-rewrite demo:smollm2 out/`.
"""

from __future__ import annotations

import inspect
import sys
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvsink


class Batch:
    """Running requests; greedy tokens. `said`: the tokens of every request so far."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache, self.running = model, None, []
        self.said: dict[int, list[int]] = {}
        self.mask, self.last = torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64)
        self.taken = inspect.signature(model.forward).parameters
        self.name = "cache" if "cache" in self.taken else "past_key_values"  # since transformers 5.24, and before

    def _next(self, cache: Any, ids: Tensor, **more: Tensor) -> Tensor:
        with torch.no_grad():
            out = self.model(input_ids=ids, **{self.name: cache}, use_cache=True, **more)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def join(self, request: int, prompt: Tensor) -> None:
        """Read `prompt` [1, S] and let the request run with the others."""
        own = kvsink.KVSinkCache.for_model(self.model, batch_size=1)
        first = self._next(own, prompt)
        pads = self.cache.batch_join(own) if self.running else (0, 0)  # slots of padding before the rows of either
        self.cache = self.cache if self.running else own
        masks = (self.mask, torch.ones_like(prompt)) if self.running else (torch.ones_like(prompt),)
        self.mask = torch.cat([pad(m, (p, 0)) for m, p in zip(masks, pads[-len(masks) :], strict=True)])
        self.last = torch.cat([self.last[: len(self.running)], first])
        self.running.append(request)
        self.said[request] = [int(first)]

    def step(self) -> None:
        """One more token for every running request."""
        self.mask = pad(self.mask, (0, 1), value=1)
        places = {"position_ids": self.mask.sum(1, keepdim=True) - 1} if "position_ids" in self.taken else {}
        self.last = self._next(self.cache, self.last, attention_mask=self.mask, **places)
        for request, token in zip(self.running, self.last[:, 0].tolist(), strict=True):
            self.said[request].append(token)

    def leave(self, done: set[int]) -> None:
        """Take requests out of the batch and their rows out of the cache."""
        kept = torch.tensor([i for i, request in enumerate(self.running) if request not in done], dtype=torch.int64)
        if len(kept):
            self.cache.batch_select_indices(kept)
        self.mask, self.last = self.mask[kept], self.last[kept]
        self.running = [request for request in self.running if request not in done]


def serve(model: Any, prompts: list[Tensor], new_tokens: int, most: int, end: int | None = None) -> list[list[int]]:
    """The tokens after every prompt [1, S], at most `most` of them running at a time."""
    batch, waiting = Batch(model), deque(enumerate(prompts))
    while waiting or batch.running:
        while waiting and len(batch.running) < most:
            batch.join(*waiting.popleft())
        batch.leave({r for r in batch.running if len(batch.said[r]) >= new_tokens or batch.said[r][-1] == end})
        if batch.running:
            batch.step()
    return [batch.said[request] for request in range(len(prompts))]


def main(path: str, *prompts: str, new_tokens: int = 30, most: int = 2) -> None:
    """Print what the model goes on with after each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
    for prompt, tokens in zip(prompts, serve(model, ids, new_tokens, most, tokenizer.eos_token_id), strict=True):
        print(prompt + tokenizer.decode(tokens, skip_special_tokens=True))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    main(sys.argv[1], *(sys.argv[2:] or ["Attention sinks are", "A cache of keys and values", "The first token"]))
