"""Prompts with a number in them: exactly as long as asked for, and the demo model finds it."""

from __future__ import annotations

import pytest
import torch

from kvsink.errors import EvaluationError
from kvsink.evaluate.retrieval import passkey_prompt
from tests.models import VOCAB

TOKENS = 40


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCAB, (5, TOKENS), generator=torch.Generator().manual_seed(7))


class Words:
    """A tokenizer of words: enough for windows and prompts."""

    chat_template = None
    bos_token = None

    def __init__(self):
        self.known = {}

    def __call__(self, text, **_):
        return {"input_ids": [self.known.setdefault(word, len(self.known)) for word in text.split()]}

    def decode(self, ids, **_):
        words = {number: word for word, number in self.known.items()}
        return " ".join(words[int(i)] for i in ids)


@pytest.mark.parametrize("length", [60, 100, 301])
def test_passkey_prompts_have_exactly_their_length(length):
    tokenizer = Words()
    shallow, deep = (passkey_prompt(tokenizer, "12345", length, depth) for depth in (0.0, 1.0))
    assert len(shallow) == len(deep) == length
    text = tokenizer.decode(shallow)
    assert text.count("12345") == 2
    assert text.endswith("The pass key is")
    assert shallow.index(tokenizer.known["12345."]) < deep.index(tokenizer.known["12345."])
    with pytest.raises(EvaluationError, match="needs at least"):
        passkey_prompt(tokenizer, "12345", 20, 0.5)
