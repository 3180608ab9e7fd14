"""Which method does my model bear, on my text? `python examples/compare_methods.py MODEL TEXT_FILE [klt:2:4 rtn:4:4 ...]`.

MODEL is a folder, a hub id or demo:smollm2; a method may name the bits of its keys and of its values. The text goes through the
model's own cache and through every packed one in chunks, so that tokens attend to stored rows; printed is how far the
probabilities of the next token move. `kvsink-eval MODEL --compare` does this at length: perplexity, runs that go on where they
were interrupted, tables and plots.
"""

from __future__ import annotations

import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import kvsink
from kvsink.folder.demo import resolve_model_dir

CHUNK = 64


def log_probabilities(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Of every next token, [T, V] float32, with `ids` [T] fed through `cache` in chunks."""
    taken = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in taken else "past_key_values"  # since transformers 5.24, and before
    with torch.no_grad():
        logits = [model(input_ids=part[None], **{name: cache}, use_cache=True).logits[0] for part in ids.split(CHUNK)]
    return torch.cat(logits).float().log_softmax(-1)


def main(path: str, text_path: str, *methods: str, tokens: int = 1024, **options: Any) -> None:
    """One line a method: counted bits, divergence from the stock cache in nats, and how often the likeliest token is the same."""
    folder = resolve_model_dir(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(Path(text_path).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0, :tokens]
    wanted = log_probabilities(stock, ids, DynamicCache(config=stock.config))
    print(f"{'method':20} {'bits':>6} {'KL':>9} {'same':>7}")
    for asked in methods or ("klt", "klt:3", "klt:2:2", "centred:2:2", "kivi:2:2", "rtn:4:4"):
        method, *bits = asked.split(":")
        widths = dict(zip(("key_bits", "value_bits"), map(float, bits), strict=False))
        model = copy.deepcopy(stock)
        kvsink.rewrite(model, method, tokenizer=tokenizer, **widths, **options)
        cache = kvsink.KVSinkCache.for_model(model)
        found = log_probabilities(model, ids, cache)
        apart = (wanted.exp() * (wanted - found)).sum(-1).mean()
        same = (wanted.argmax(-1) == found.argmax(-1)).float().mean()
        print(f"{asked:20} {cache.bits_per_element():6.2f} {float(apart):9.5f} {float(same):7.1%}")


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
