"""A function call whose arguments stand far back in the text: whether it is JSON, and whether every argument is right.

Formula    valid = the first JSON value of the answer is an object; exact = its arguments are those of the text, types included
           recall = share of the arguments that are
Source     ours
Units      depth as in `kvsink.evaluate.haystack`: of the first of four sentences, the others stand anywhere
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from kvsink.evaluate.haystack import Draft, Grade, Haystack

__all__ = ["call", "grade_call"]

_CITIES = ("Lisbon", "Oslo", "Quito", "Nairobi", "Hanoi", "Dublin", "Lima", "Ottawa", "Vienna", "Jakarta", "Havana", "Athens")
_BEGUN = '{"name": "book_delivery", "arguments":'


def call(hay: Haystack, length: int, depth: float, rng: Random) -> Draft:
    """Four facts about one delivery, to be passed to a function."""
    code = "-".join(hay.draw(rng, 2))
    wanted: dict[str, Any] = {
        "order_id": str(rng.randrange(10**6, 10**7)),
        "city": rng.choice(_CITIES),
        "weight_kg": rng.randrange(12, 990),
        "date": f"20{rng.randrange(27, 40)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}",
    }
    sentences = (
        f"The order id of delivery {code} is {wanted['order_id']}.",
        f"Delivery {code} goes to the city of {wanted['city']}.",
        f"Delivery {code} weighs {wanted['weight_kg']} kg.",
        f"Delivery {code} is due on {wanted['date']}.",
    )
    depths = (depth, *(rng.random() for _ in sentences[1:]))
    question = (
        f"Call the function book_delivery for delivery {code} with the facts that the text above states. Answer with one JSON"
        ' object and nothing else: {"name": "book_delivery", "arguments": {"order_id": string, "city": string,'
        ' "weight_kg": integer, "date": string "YYYY-MM-DD"}}'
    )
    opening = "Facts about a delivery are hidden within the following text. Memorize them. You will need them for a function call."
    return Draft(opening, question, _BEGUN, grade_call(wanted), tuple(zip(depths, sentences, strict=True)))


def grade_call(wanted: dict[str, Any]) -> Callable[[str], Grade]:
    """Grades what follows the beginning of a call."""

    def grade(said: str) -> Grade:
        try:
            found = json.JSONDecoder().raw_decode(_BEGUN + said)[0]["arguments"]
        except (ValueError, RecursionError):
            return Grade(False, 0.0, False)
        if not isinstance(found, dict):
            return Grade(False, 0.0, True)
        right = [type(found.get(name)) is type(value) and found[name] == value for name, value in wanted.items()]
        return Grade(all(right) and len(found) == len(wanted), sum(right) / len(right), True)

    return grade
