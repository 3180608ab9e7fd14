"""Chats as calibration text: what a model reads when it is used, in its own chat template.

A line of the file is {"messages": [{"role": ..., "content": ...}, ...]}, or {"prompt": TEXT}, which is a turn of the user.
A chat that does not end with the model's turn ends with the beginning of one, as it does where the model answers.

Source     ours
Units      tokens of the chats one after the other, in their order
Raises     CalibrationError for a tokenizer without a chat template, and for lines that are no chat, with their number
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvsink.errors import CalibrationError

__all__ = ["chat_tokens", "is_chats"]

_FORM = 'write {"messages": [{"role": "user", "content": TEXT}, ...]} or {"prompt": TEXT} on each line'


def is_chats(path: str | Path) -> bool:
    """Whether a file's first line is a chat or a prompt, and not a picture with its text."""
    file = Path(path)
    if file.suffix != ".jsonl" or not file.is_file():
        return False
    with file.open(encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        record = json.loads(first)
    except ValueError:
        return False
    return isinstance(record, dict) and ("messages" in record or "prompt" in record)


def chat_tokens(path: str | Path, tokenizer: Any) -> list[int]:
    """Token ids of all chats of a file."""
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{path} holds chats, but the tokenizer has no chat template; put the model's chat_template.jinja beside its tokenizer,"
            " or pass plain text"
        )
    ids: list[int] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            turns = record["messages"] if "messages" in record else [{"role": "user", "content": record["prompt"]}]
            opens = turns[-1]["role"] != "assistant"
            chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opens)
        except Exception as error:  # templates raise their own kinds
            said = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise CalibrationError(f"{path} line {number} is no chat that the template takes ({said}); {_FORM}") from error
        ids += tokenizer(chat, add_special_tokens=False)["input_ids"]
    return ids
