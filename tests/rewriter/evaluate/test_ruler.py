"""RULER's prompts, read back as a careful reader would: the text alone gives the answer that is graded as right."""

from __future__ import annotations

import re
from collections import Counter
from random import Random
from string import ascii_lowercase

import pytest

from kvsink.errors import EvaluationError
from kvsink.evaluate.haystack import Haystack
from kvsink.evaluate.ruler import common_words, multikey, multiquery, multivalue, single, variables
from kvsink.evaluate.texts import evaluation_text
from tests.wording import Letters, Words

NEEDLE = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")


@pytest.fixture(scope="module")
def hay():
    return Haystack(Letters(), evaluation_text())


def written(hay, make, length, depth=0.3, seed=1):
    rng = Random(seed)
    draft = make(hay, length, depth, rng)
    return draft, Letters().decode(hay.prompt(draft, length, rng))


@pytest.mark.parametrize(
    ("make", "needles", "keys", "asked"), [(single, 1, 1, 1), (multikey, 4, 4, 1), (multivalue, 4, 1, 1), (multiquery, 4, 4, 4)]
)
def test_needles(hay, make, needles, keys, asked):
    draft, text = written(hay, make, 4000)
    held = NEEDLE.findall(text)
    assert len(set(held)) == needles and len({key for key, _ in held}) == keys
    question = text[text.rindex("What ") :]
    wanted = [key for key in {key for key, _ in held} if key in question]
    assert len(wanted) == asked
    answer = ", ".join(number for key, number in held if key in wanted)
    assert draft.grade(answer).exact
    assert draft.grade(answer[:-1]).recall < 1  # a digit is missing
    assert (draft.grade(answer[:7]).recall == 1) == (answer.count(",") == 0)
    if make is multikey:
        other = next(number for key, number in held if key not in wanted)
        assert not draft.grade(other).exact


def test_the_needle_asked_for_stands_at_the_depth(hay):
    for make in (single, multikey):
        for depth in (0.1, 0.9):
            _, text = written(hay, make, 20_000, depth)
            key = re.search(r"magic number for (\S+) mentioned", text)[1]
            at = text.index(f"numbers for {key} is:") / len(text)
            assert abs(at - depth) < 0.05


def test_variables(hay):
    draft, text = written(hay, variables, 4000, 0.4)
    example, body = text.split("\n\n", 1)
    for part, solved in ((example, True), (body, False)):
        number = re.search(r"assigned the value (\d{5}) in the text", part)[1]
        holds, rest = {}, part[: part.index("Question:")]
        for name, value in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})", rest):  # in order, as a program runs
            holds[name] = holds.get(value, value)
        names = [name for name, value in holds.items() if value == number]
        assert len(names) == 5
        if solved:
            assert part.endswith(f"they are: {', '.join(names)}")
    assert draft.grade(" ".join(names)).exact and draft.grade(" ".join(names[:4])).recall == 0.8
    assert text.endswith(f"5 variables are assigned the value {number}, they are:")


@pytest.mark.parametrize(("length", "often", "seldom"), [(2600, 4, 1), (4000, 10, 1), (14_000, 30, 3)])
def test_common_words(hay, length, often, seldom):
    draft, text = written(hay, common_words, length)
    example, body = text.split("\n\n", 1)
    listed = body[: body.index("\nQuestion:")]
    numbers, words = zip(*re.findall(r"(\d+)\. ([a-z]+)", listed), strict=True)
    assert [int(n) for n in numbers] == list(range(1, len(numbers) + 1))
    counts = Counter(words)
    top = counts.most_common(10)
    assert {count for _, count in top} == {often}
    others = Counter(sorted(counts.values())[:-10])
    assert max(others) == seldom and others[seldom] > 0.8 * sum(others.values()) - 4 * seldom  # the cut end holds words once
    assert draft.grade(" ".join(word for word, _ in top)).exact
    assert draft.grade(" ".join(word for word, _ in top[:7])).recall == 0.7
    shown = Counter(re.findall(r"\d+\. ([a-z]+)", example[: example.index("Question:")]))
    solved = re.findall(r"\d+\. ([a-z]+)", example[example.index("Answer:") :])
    assert {word for word, count in shown.items() if count == 2} == set(solved) and len(solved) == 10


def test_the_same_seed_asks_the_same_and_another_something_else(hay):
    for make in (single, multiquery, variables, common_words):
        assert written(hay, make, 4000)[1] == written(hay, make, 4000)[1] != written(hay, make, 4000, seed=2)[1]


def test_lists_that_do_not_fit(hay):
    with pytest.raises(EvaluationError, match="does not fit"):
        written(hay, common_words, 1400)
    short = Haystack(Words(), "some words stand here. " * 2 + " ".join(f"word{c}x. word{c}x." for c in ascii_lowercase))
    with pytest.raises(EvaluationError, match="Pass a longer --text"):
        common_words(short, 4000, 0.5, Random(0))
