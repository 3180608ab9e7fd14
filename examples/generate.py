"""Generate with a smaller cache, and see how much smaller: `python examples/generate.py MODEL ["a prompt"]`.

MODEL is a folder, a hub id or demo:smollm2, which is calibrated and rewritten in memory first, or a folder that `kvsink-rewrite`
wrote, which is read as it is. Without a prompt, the first paragraphs of the licence are one.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import kvsink
from kvsink.folder.demo import resolve_model_dir

LICENSE = Path(__file__).resolve().parents[1] / "LICENSE"


def main(path: str, prompt: str = "", new_tokens: int = 40, **options: Any) -> None:
    """Print the text and the bytes of the packed cache and of transformers' own; options are those of `kvsink.rewrite`."""
    folder = resolve_model_dir(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not (Path(folder) / "kvsink.json").is_file():
        report = kvsink.rewrite(model, tokenizer=tokenizer, **options)
        print(f"rewritten by {report.method}")
    given = tokenizer(prompt or LICENSE.read_text(encoding="utf-8")[:3000], return_tensors="pt")
    taken = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in taken else "past_key_values"  # since transformers 5.24, and before
    packed, stock = kvsink.KVSinkCache.for_model(model), DynamicCache(config=model.config)
    for cache in (packed, stock):
        tokens = model.generate(**given, **{name: cache}, max_new_tokens=new_tokens, do_sample=False)
        print(f"{type(cache).__name__}: {tokenizer.decode(tokens[0, given['input_ids'].shape[1] :])}")
    theirs = sum(t.nbytes for layer in stock.layers for t in (layer.keys, layer.values))
    print(
        f"{packed.get_seq_length()} tokens: {packed.held_nbytes()} bytes, {packed.bits_per_element():.2f} bits per element; "
        f"{type(stock).__name__} {theirs} bytes in {model.dtype}"
    )


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    main(*sys.argv[1:3])
