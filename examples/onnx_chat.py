"""Answers of an exported model as they come: `python examples/onnx_chat.py out/model.onnx "What is a sink?" ["another" ...]`.

Write the model first: `kvsink-rewrite demo:smollm2 out/ --onnx`. Questions are put in the model's own chat template and answered
together where the graph pads them, each until the model ends it. `--cuda` runs on an NVIDIA GPU (`pip install onnxruntime-gpu`),
for which `--onnx-flavour custom:float16` writes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from kvsink.tools.build_ort_ops import runner_for


def pieces(tokenizer: Any, steps: Iterator[list[int | None]]) -> Iterator[tuple[int, str]]:
    """Of every step the rows that go on, each with what it adds to its text; a character in several tokens comes whole."""
    tokens: dict[int, list[int]] = {}
    said: dict[int, str] = {}
    for step in steps:
        for row, token in enumerate(step):
            if token is not None:  # this row has not ended
                tokens.setdefault(row, []).append(token)
                text = tokenizer.decode(tokens[row], skip_special_tokens=True)
                if not text.endswith("\ufffd"):
                    yield row, text[len(said.get(row, "")) :]
                    said[row] = text


def main(path: str, *questions: str, new_tokens: int = 200, device: str = "auto") -> None:
    """Print one answer as it comes; several one below the other, when all have ended; and what their cache takes."""
    tokenizer = AutoTokenizer.from_pretrained(Path(path).parent)
    if tokenizer.chat_template is None:
        sys.exit(f"the tokenizer beside {path} has no chat template; examples/onnx_generate.py goes on with a text")
    runner = runner_for(path, device)
    prompts = []
    for question in questions:
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    together = len({len(p) for p in prompts}) == 1 or runner.manifest["padding"]  # else one after the other
    answers = [""] * len(questions)
    for first in range(0, len(prompts), len(prompts) if together else 1):
        group = prompts if together else prompts[first : first + 1]
        for row, piece in pieces(tokenizer, runner.stream(group, new_tokens)):
            answers[first + row] += piece
            if len(questions) == 1:
                print(piece, end="", flush=True)
    print("\n".join(f"{question}\n  {answer}" for question, answer in zip(questions, answers, strict=True) if len(questions) > 1))
    print(f"cache: {runner.nbytes(runner.past)} bytes, {runner.bits_per_element(runner.past):.2f} bits per element")


if __name__ == "__main__":
    given = [a for a in sys.argv[1:] if a != "--cuda"]
    if len(given) < 2 or given[0] in ("-h", "--help"):
        sys.exit(__doc__)
    main(*given, device="cuda" if "--cuda" in sys.argv else "auto")
