"""A prompt of exactly so many tokens: a text with needles at chosen depths, and a question behind it.

Source     arXiv 2404.06654, section 3 and appendix B (RULER)
Differs    the text is what `kvsink-eval` measures on, WikiText-2 by default, in place of essays; a prompt is filled to the token,
           its last sentence cut short, so that prompts of one length are rows of one batch without padding
Shapes     ids: a list of exactly `length` integers
Units      depth: 0 right behind the opening, 1 right before the question, measured in tokens of the text
Raises     EvaluationError for lengths that do not hold the prompt, and for texts without sentences or words to draw from
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

from kvsink.errors import EvaluationError

__all__ = ["Draft", "Grade", "Haystack", "contains"]


@dataclass(frozen=True)
class Grade:
    """What an answer is worth. recall: share of what was wanted; valid: whether it is of the form that was asked for."""

    exact: bool
    recall: float
    valid: bool | None = None


@dataclass(frozen=True)
class Draft:
    """A prompt before it has a length.

    needles: (depth, sentence) inside the text; items: what stands instead of the text's sentences, cut where the room ends.
    answer: how the answer begins, which the model goes on with; grade: of what it says, without that beginning.
    """

    opening: str
    question: str
    answer: str
    grade: Callable[[str], Grade]
    needles: tuple[tuple[float, str], ...] = ()
    items: tuple[str, ...] = ()


def contains(wanted: Sequence[str]) -> Callable[[str], Grade]:
    """Grades an answer by which of `wanted` occur in it, whatever their case: RULER's recall, and whether all do."""

    def grade(said: str) -> Grade:
        found = [want.lower() in said.lower() for want in wanted]
        return Grade(all(found), sum(found) / len(found))

    return grade


class Haystack:
    """The sentences and words of a text, in tokens of one model."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer, self._text = tokenizer, text
        self._ids: dict[str, list[int]] = {}

    @cached_property
    def sentences(self) -> list[str]:
        """Sentences of more than two words, in order, without headings and without the holes of WikiText (`<unk>`)."""
        lines = [line.strip() for line in self._text.split("\n") if not line.strip().startswith("=")]
        found = [s for line in lines for s in re.split(r"(?<=[.!?])\s+", line) if len(s.split()) > 2 and "<unk>" not in s]
        if not found:
            raise EvaluationError("the text holds no sentences to hide anything between. Pass a --text of prose")
        return found

    @cached_property
    def words(self) -> list[str]:
        """Words of 4 to 9 small letters that occur at least twice, in alphabetical order."""
        counts = Counter(re.findall(r"\b[a-z]{4,9}\b", self._text))
        return sorted(word for word, count in counts.items() if count > 1)

    def draw(self, rng: Random, count: int) -> list[str]:
        """`count` different words."""
        if count > len(self.words):
            raise EvaluationError(f"the text holds {len(self.words)} different words, {count} are needed. Pass a longer --text")
        return rng.sample(self.words, count)

    def encode(self, words: str) -> list[int]:
        """Token ids, no special token added."""
        return list(self.tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"])

    def room(self, draft: Draft, length: int) -> int:
        """Tokens that are left for sentences or items."""
        head, tail = self._ends(draft)
        room = length - len(head) - len(tail) - sum(len(self.encode(" " + needle)) for _, needle in draft.needles)
        if room < 0:
            raise EvaluationError(
                f"a prompt of {length} tokens is too short; it needs at least {length - room}. Pass longer lengths"
            )
        return room

    def prompt(self, draft: Draft, length: int, rng: Random) -> list[int]:
        """Exactly `length` token ids."""
        room = self.room(draft, length)
        head, tail = self._ends(draft)
        filler, ends = self._filler(room, draft.items, rng)
        body, at = list[int](), 0
        for depth, needle in sorted(draft.needles, key=lambda pair: pair[0]):
            cut = max(end for end in ends if end <= max(0, min(int(depth * room), room)))
            body += filler[at:cut] + self.encode(" " + needle)
            at = cut
        return head + body + filler[at:room] + tail

    def _filler(self, room: int, items: Sequence[str], rng: Random) -> tuple[list[int], list[int]]:
        """At least `room` ids, and where sentences end in them."""
        from_text = not items
        pieces, at = (self.sentences, rng.randrange(len(self.sentences))) if from_text else (items, 0)
        filler, ends = list[int](), [0]
        while len(filler) < room:
            piece = pieces[at % len(pieces)]
            if piece not in self._ids:
                self._ids[piece] = self.encode(" " + piece)
            filler += self._ids[piece]
            ends.append(len(filler))
            at += 1
        return filler, ends

    def _ends(self, draft: Draft) -> tuple[list[int], list[int]]:
        """What stands before and behind the text, in the model's own chat template where it has one."""
        opening, question = draft.opening + "\n", "\n" + draft.question
        if getattr(self.tokenizer, "chat_template", None):
            mark = "<<filler>>"
            chat = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": opening + mark + question}], tokenize=False, add_generation_prompt=True
            )
            before, after = chat.split(mark)
            return self.encode(before), self.encode(after + draft.answer)
        start = self.tokenizer.bos_token or ""
        return self.encode(start + opening), self.encode(question + " " + draft.answer)
