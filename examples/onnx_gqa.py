"""A quantized cache in plain onnxruntime, without kvsink: `python examples/onnx_gqa.py out/model.onnx "Attention sinks are"`.

Write the model first: `kvsink-rewrite demo:smollm2 out/ --onnx-flavour gqa`. Every past and present tensor has its usual name, so
this is the loop that any pipeline has; only the dtype of the cache, which the session tells, is another.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from transformers import AutoTokenizer

DTYPES = {"tensor(uint8)": np.uint8, "tensor(int8)": np.int8, "tensor(float)": np.float32}


def generate(session: onnxruntime.InferenceSession, ids: list[int], new_tokens: int) -> tuple[list[int], dict[str, np.ndarray]]:
    """Greedy tokens after `ids`, and the cache that holds all of them but the last."""
    past = {
        i.name: np.zeros([1, i.shape[1], 0, i.shape[3]], DTYPES[i.type])
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    presents = [name.replace("past_key_values", "present") for name in past]
    found, fed, length = [], list(ids), 0
    while len(found) < new_tokens:
        length += len(fed)
        feeds = {
            "input_ids": np.array([fed]),
            "attention_mask": np.ones((1, length), dtype=np.int64),
            "position_ids": np.arange(length - len(fed), length)[None],
        }
        logits, *held = session.run(["logits", *presents], {**feeds, **past})
        past = dict(zip(past, held, strict=True))
        fed = [int(logits[0, -1].argmax())]
        found += fed
    return found, past


def main(path: str, *prompts: str, new_tokens: int = 40) -> None:
    """Print what the model goes on with after each prompt, and what its cache takes."""
    tokenizer = AutoTokenizer.from_pretrained(Path(path).parent)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for prompt in prompts:
        tokens, past = generate(session, tokenizer(prompt, add_special_tokens=False)["input_ids"], new_tokens)
        print(prompt + tokenizer.decode(tokens, skip_special_tokens=True))
        print(f"cache: {sum(t.nbytes for t in past.values())} bytes of {next(iter(past.values())).dtype}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    main(sys.argv[1], *(sys.argv[2:] or ["Attention sinks are"]))
