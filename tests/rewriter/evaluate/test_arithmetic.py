"""Word problems, solved again by somebody who reads the numbers off the text; and the number an answer ends with."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest

from kvsink.evaluate.arithmetic import STORIES, number_in, problems

SOLVED = (
    (r"has (\d+) .* buys (\d+) bags with (\d+) .* gives (\d+) ", lambda has, bags, each, gone: has + bags * each - gone),
    (r"makes (\d+) loaves .* works (\d+) hours .* (\d+) loaves are not .* in (\d+) days", lambda a, h, c, d: d * (a * h - c)),
    (
        r"earns (\d+) .* (\d+) hours on each of (\d+) days and spent (\d+)",
        lambda pay, hours, days, spent: pay * hours * days - spent,
    ),
    (r"and (\d+) friends share (\d+) .* loses (\d+) ", lambda friends, shared, lost: Fraction(shared, friends + 1) - lost),
    (r"for (\d+) dollars each.* by (\d+) percent.* buys (\d+) coats", lambda p, r, n: Fraction(p * n * (100 - r), 100)),
    (
        r"at (\d+) kilo.* for (\d+) hours, then at (\d+) kilo.* for (\d+) hours, and then goes (\d+) kilo",
        lambda a, b, c, d, rest: a * b + c * d + rest,
    ),
    (r"is (\d+) years old. .* is (\d+) times as old .* is (\d+) years younger", lambda a, k, d: a + 2 * k * a - d),
)


def test_every_answer_follows_from_its_text():
    asked = problems(40 * len(STORIES))
    for i, problem in enumerate(asked):
        pattern, solve = SOLVED[i % len(STORIES)]
        numbers = [int(n) for n in re.search(pattern, problem.text).groups()]
        assert len(re.findall(r"\d+", problem.text)) == len(numbers)  # no number is left out
        assert solve(*numbers) == problem.answer > 0
    assert len({problem.text for problem in asked}) == len(asked)
    assert problems(5) == asked[:5] and problems(5, seed=1) != asked[:5]
    assert all(problem.prompt.startswith(problem.text) for problem in asked)


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("3 + 4 = 7\nAnswer: 7", 7),
        ("Answer: 5\nNo, wait.\nAnswer: 1,234 apples in 3 bags", 1234),
        ("So 10-5=5 and 12*2 is 24.", 24),
        ("10-5", 5),
        ("Answer: $18.50.", Fraction(37, 2)),
        ("**Answer:** -3", -3),
        ("It is 9. Answer: nine", 9),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(said, number):
    assert number_in(said) == number
