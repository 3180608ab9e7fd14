"""Word problems made on demand, in the manner of GSM8K: two to four steps of arithmetic, the answer a whole number.

Source     the manner: arXiv 2110.14168 (GSM8K); the problems are ours, none is taken from it
Differs    seven stories with drawn names and numbers, easier and more alike than GSM8K's
Exact      an answer is right when the number it ends with equals the problem's
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from random import Random

__all__ = ["STORIES", "Problem", "number_in", "problems"]

_NAMES = ("Mara", "Tom", "Ines", "Ravi", "Lena", "Omar", "Nina", "Felix", "Aisha", "Jonas", "Mei", "Carlos")
_THINGS = ("apples", "marbles", "stamps", "pencils", "cards", "shells", "buttons", "cookies")
_ASK = "\nThink step by step, and end with a line that says Answer: and the number."


@dataclass(frozen=True)
class Problem:
    """A story that ends in a question, and the number that answers it."""

    text: str
    answer: int

    @property
    def prompt(self) -> str:
        """What a model is asked."""
        return self.text + _ASK


def _bags(rng: Random) -> tuple[str, int]:
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    a, b, c = rng.randint(5, 40), rng.randint(2, 9), rng.randint(3, 12)
    d = rng.randint(1, a + b * c - 1)
    text = (
        f"{name} has {a} {things}. {name} buys {b} bags with {c} {things} each and then gives {d} {things} to a friend. "
        f"How many {things} does {name} have now?"
    )
    return text, a + b * c - d


def _bakery(rng: Random) -> tuple[str, int]:
    a, b, d = rng.randint(8, 30), rng.randint(4, 9), rng.randint(2, 7)
    c = rng.randint(1, a)
    text = (
        f"A baker makes {a} loaves of bread every hour and works {b} hours a day. Of each day's bread, {c} loaves are not sold. "
        f"How many loaves are sold in {d} days?"
    )
    return text, (a * b - c) * d


def _wages(rng: Random) -> tuple[str, int]:
    name = rng.choice(_NAMES)
    a, b, c = rng.randint(9, 30), rng.randint(3, 9), rng.randint(2, 6)
    d = rng.randint(5, a * b)
    text = (
        f"{name} earns {a} dollars an hour. This week {name} worked {b} hours on each of {c} days and spent {d} dollars on food. "
        f"How many of the dollars that {name} earned this week are left?"
    )
    return text, a * b * c - d


def _sharing(rng: Random) -> tuple[str, int]:
    name, things = rng.choice(_NAMES), rng.choice(_THINGS)
    friends, each = rng.randint(2, 8), rng.randint(6, 25)
    lost = rng.randint(1, each - 1)
    text = (
        f"{name} and {friends} friends share {(friends + 1) * each} {things} equally. Each of them then loses {lost} {things}. "
        f"How many {things} does {name} have left?"
    )
    return text, each - lost


def _discount(rng: Random) -> tuple[str, int]:
    name = rng.choice(_NAMES)
    price, percent, count = 20 * rng.randint(2, 12), rng.choice((5, 10, 15, 20, 25, 30, 40)), rng.randint(2, 6)
    text = (
        f"A shop sells coats for {price} dollars each. Today the price is lowered by {percent} percent, and {name} buys {count} "
        f"coats. How many dollars does {name} pay?"
    )
    return text, price * (100 - percent) // 100 * count


def _train(rng: Random) -> tuple[str, int]:
    a, c = 10 * rng.randint(4, 14), 10 * rng.randint(4, 14)
    b, d, stop = rng.randint(2, 6), rng.randint(2, 6), 5 * rng.randint(1, 7)
    text = (
        f"A train travels at {a} kilometers an hour for {b} hours, then at {c} kilometers an hour for {d} hours, and then goes "
        f"{stop} kilometers to its last stop. How many kilometers has it travelled in all?"
    )
    return text, a * b + c * d + stop


def _ages(rng: Random) -> tuple[str, int]:
    one, two, three = rng.sample(_NAMES, 3)
    a, k = rng.randint(4, 15), rng.randint(2, 4)
    d = rng.randint(1, 3 * a // 2)
    text = (
        f"{one} is {a} years old. {two} is {k} times as old as {one}, and {three} is {d} years younger than {two}. "
        f"How many years old are the three together?"
    )
    return text, a + k * a + (k * a - d)


STORIES: tuple[Callable[[Random], tuple[str, int]], ...] = (_bags, _bakery, _wages, _sharing, _discount, _train, _ages)


def problems(count: int, seed: int = 0) -> list[Problem]:
    """`count` problems, the stories in turn; the same for the same seed, and the first ones of any larger count."""
    return [Problem(*STORIES[i % len(STORIES)](Random(f"{seed} {i}"))) for i in range(count)]


def number_in(said: str) -> Fraction | None:
    """The first number behind the last "Answer:", else the last number of all; commas between thousands are none of it."""
    before, mark, behind = said.replace("**", "").rpartition("Answer:")
    for part, which in ((behind, 0 if mark else -1), (before, -1)):
        if found := re.findall(r"(?<![\d.])-?\d[\d,]*(?:\.\d+)?", part):
            return Fraction(found[which].replace(",", ""))
    return None
