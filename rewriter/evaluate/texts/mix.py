"""Calibration text of several kinds: prose, code, chats, numbers and nine languages beside English, a paragraph of each in turn.

Formula    the next paragraph is of the part that has the fewest characters by its share so far, until a part ends; prose goes on
Source     the README beside the files: WikiText-2 of the validation split, and texts of this project
Units      shares of characters
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from random import Random

from kvsink.evaluate.arithmetic import problems
from kvsink.evaluate.texts import builtin_text

__all__ = ["SHARES", "mixed_text"]

SHARES = {"prose": 0.45, "code": 0.2, "chats": 0.12, "numbers": 0.08, "languages": 0.15}
_PROBLEMS, _TABLES, _LINES = 40, 4, 12


@cache
def mixed_text() -> str:
    """The text behind `--calibration mix`."""
    left = {"prose": builtin_text(), "numbers": _numbers(), **{n: _file(n) for n in ("code", "chats", "languages")}}
    parts = {name: [p.strip("\n") for p in text.split("\n\n") if p.strip()][::-1] for name, text in left.items()}
    taken, out = dict.fromkeys(SHARES, 0), list[str]()
    while parts["prose"]:
        name = min(parts, key=lambda n: taken[n] / SHARES[n])
        out.append(parts[name].pop())
        taken[name] += len(out[-1])
        if not parts[name] and name != "prose":
            del parts[name]
    return "\n\n".join(out) + "\n"


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(f"{name}.txt").read_text(encoding="utf-8")


def _numbers() -> str:
    """Word problems with their answers, and tables of figures between them."""
    asked = [f"{problem.text}\nAnswer: {problem.answer}" for problem in problems(_PROBLEMS, seed=1)]
    for table in range(_TABLES):
        rng = Random(f"table {table}")
        lines = [
            f"{2001 + i},{rng.randrange(100, 99999)},{rng.uniform(-40, 40):.2f},{rng.random():.1%},{rng.randrange(1, 13):02}:{i:02}"
            for i in range(_LINES)
        ]
        asked.insert(table * _PROBLEMS // _TABLES, "\n".join(["year,count,degrees,share,time", *lines]))
    return "\n\n".join(asked)
