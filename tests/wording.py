"""Tokenizers without a model: words, and characters with or without a chat template."""

from __future__ import annotations


class Words:
    """One token a word, numbered as they come."""

    chat_template = None
    bos_token = None

    def __init__(self):
        self.known = {}

    def __call__(self, text, **_):
        return {"input_ids": [self.known.setdefault(word, len(self.known)) for word in text.split()]}

    def decode(self, ids, **_):
        words = {number: word for word, number in self.known.items()}
        return " ".join(words[int(i)] for i in ids)


class Letters:
    """One token a character, so that what a model reads is the text itself."""

    chat_template = None
    bos_token = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids, **_):
        return "".join(chr(int(i)) for i in ids)


class Chat(Letters):
    """With a template of two marks."""

    chat_template = "some"

    def apply_chat_template(self, messages, **_):
        return "".join(f"<{m['role']}>{m['content']}</{m['role']}>" for m in messages) + "<assistant>"
