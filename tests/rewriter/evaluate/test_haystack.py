"""Prompts from a text: exactly as long as asked for, needles whole and at their depth, nothing else changed."""

from __future__ import annotations

from random import Random

import pytest

from kvsink.errors import EvaluationError
from kvsink.evaluate.haystack import Draft, Haystack, contains
from tests.wording import Chat, Letters, Words

TEXT = "= Title =\nThis has an <unk> hole. " + " ".join(
    f"Sentence number {i} of the text. And it has another part!" for i in range(40)
)
DRAFT = Draft("Remember the key.", "Which key?", "The key is", contains(["12345"]), ((0.5, "The key is 12345."),))


def drafted(*needles):
    return Draft("Remember the keys.", "Which?", "They are", contains(["1"]), needles)


@pytest.mark.parametrize("length", [60, 100, 301])
@pytest.mark.parametrize("tokenizer", [Words(), Letters(), Chat()], ids=["words", "letters", "chat"])
def test_prompts_have_exactly_their_length(tokenizer, length):
    if not isinstance(tokenizer, Words):
        length *= 5
    ids = Haystack(tokenizer, TEXT).prompt(DRAFT, length, Random(0))
    text = tokenizer.decode(ids)
    assert len(ids) == length
    assert text.count("The key is 12345.") == 1
    assert text.endswith("The key is") and "Title" not in text and "<unk>" not in text
    assert text.index("Remember the key.") < text.index("12345") < text.index("Which key?")


def test_a_needle_stands_at_its_depth_between_sentences():
    hay, length = Haystack(Letters(), TEXT), 4000
    for depth in (0.0, 0.25, 0.8, 1.0):
        text = Letters().decode(hay.prompt(drafted((depth, "The key is 1.")), length, Random(3)))
        body = text[len("Remember the keys.\n") : -len("\nWhich? They are")]
        at = body.index(" The key is 1.")
        assert body[:at] == "" or body[at - 1] in ".!"
        assert 0 <= depth * (len(body) - 14) - at < 40  # at most one sentence before the depth


def test_needles_keep_the_order_of_their_depths_and_the_text_is_whole():
    needles = ((0.9, "The last."), (0.1, "The first."), (0.5, "The middle."), (0.5, "The middle too."))
    hay = Haystack(Letters(), TEXT)
    text = Letters().decode(hay.prompt(drafted(*needles), 3000, Random(5)))
    at = [text.index(f" {words}") for words in ("The first.", "The middle.", "The middle too.", "The last.")]
    assert at == sorted(at)
    for _, words in needles:
        text = text.replace(f" {words}", "", 1)
    assert text == Letters().decode(hay.prompt(drafted(), len(text), Random(5)))


def test_a_chat_template_goes_around_the_prompt_and_the_answer_begins_behind_it():
    text = Chat().decode(Haystack(Chat(), TEXT).prompt(DRAFT, 300, Random(0)))
    assert text.startswith("<user>Remember the key.\n") and text.endswith("\nWhich key?</user><assistant>The key is")


def test_grades_count_what_occurs():
    grade = contains(["Alpha", "42"])
    assert (grade("alpha and 42").exact, grade("alpha and 42").recall) == (True, 1.0)
    assert (grade("ALPHA and 4 2").exact, grade("ALPHA and 4 2").recall) == (False, 0.5)
    assert grade("").recall == 0 and grade("").valid is None


def test_words_are_drawn_once():
    hay = Haystack(Words(), TEXT)
    assert hay.words == ["another", "number", "part", "text"]  # of 4 to 9 small letters, twice or more
    assert sorted(hay.draw(Random(1), 4)) == hay.words
    with pytest.raises(EvaluationError, match="holds 4 different words, 5 are needed"):
        hay.draw(Random(1), 5)


def test_what_does_not_fit():
    with pytest.raises(EvaluationError, match="needs at least 12. Pass longer lengths"):
        Haystack(Words(), TEXT).prompt(DRAFT, 10, Random(0))
    assert len(Haystack(Words(), TEXT).prompt(DRAFT, 12, Random(0))) == 12
    with pytest.raises(EvaluationError, match="holds no sentences"):
        Haystack(Words(), "one\ntwo words").prompt(DRAFT, 60, Random(0))
