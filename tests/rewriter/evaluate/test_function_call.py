"""Function calls: the text states every argument, and only JSON with these arguments and types is exact."""

from __future__ import annotations

import json
import re
from random import Random

import pytest

from kvsink.evaluate.function_call import call, grade_call
from kvsink.evaluate.haystack import Haystack
from kvsink.evaluate.texts import evaluation_text
from tests.wording import Letters

WANTED = {"order_id": "1234567", "weight_kg": 40}


def test_a_reader_of_the_text_is_right():
    hay, rng = Haystack(Letters(), evaluation_text()), Random(4)
    draft = call(hay, 5000, 0.2, rng)
    text = Letters().decode(hay.prompt(draft, 5000, rng))
    read = {
        "order_id": re.search(r"order id of delivery \S+ is (\d{7})\.", text)[1],
        "city": re.search(r"goes to the city of (\w+)\.", text)[1],
        "weight_kg": int(re.search(r"weighs (\d+) kg\.", text)[1]),
        "date": re.search(r"is due on (\d{4}-\d\d-\d\d)\.", text)[1],
    }
    begun = text[text.rindex("\n") :].split(" and nothing else")[1].split("} ", 1)[-1]
    assert begun.endswith('"arguments":')
    assert draft.grade(f" {json.dumps(read)}}}").exact
    assert not draft.grade(f" {json.dumps({**read, 'city': 'Paris'})}}}").exact


@pytest.mark.parametrize(
    ("said", "exact", "recall", "valid"),
    [
        (' {"order_id": "1234567", "weight_kg": 40}}', True, 1, True),
        (' {"weight_kg": 40, "order_id": "1234567"}} and so on', True, 1, True),
        (' {"order_id": "1234567", "weight_kg": 41}}', False, 0.5, True),
        (' {"order_id": 1234567, "weight_kg": "40"}}', False, 0, True),
        (' {"order_id": "1234567", "weight_kg": true}}', False, 0.5, True),
        (' {"order_id": "1234567", "weight_kg": 40, "city": "Oslo"}}', False, 1, True),
        (' {"order_id": "1234567", "weight_kg": 40}', False, 0, False),
        (' {order_id: "1234567"}}', False, 0, False),
        (" 12}", False, 0, True),
        ("", False, 0, False),
    ],
)
def test_grades(said, exact, recall, valid):
    grade = grade_call(WANTED)(said)
    assert (grade.exact, grade.recall, grade.valid) == (exact, recall, valid)
