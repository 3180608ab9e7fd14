"""Text from an exported model with onnxruntime: `python examples/onnx_generate.py out/model.onnx "Attention sinks are"`.

Write the model first: `kvsink-rewrite demo:smollm2 out/ --onnx`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer

from kvsink.export import OnnxGenerator


def main(path: str, *prompts: str, new_tokens: int = 40) -> None:
    """Print what the model goes on with after each prompt, and what its cache takes."""
    tokenizer = AutoTokenizer.from_pretrained(Path(path).parent)
    runner = OnnxGenerator(path)
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    for prompt, tokens in zip(prompts, runner.generate(ids, new_tokens), strict=True):
        print(prompt + tokenizer.decode(tokens, skip_special_tokens=True))
    print(f"cache: {runner.nbytes(runner.past)} bytes, {runner.bits_per_element(runner.past):.2f} bits per element")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    main(sys.argv[1], *(sys.argv[2:] or ["Attention sinks are"]))
