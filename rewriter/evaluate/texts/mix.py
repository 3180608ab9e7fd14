"""Calibration text of several kinds: prose, code, chats, numbers and nine languages beside English, a paragraph of each in turn.

Formula    the next paragraph is of the part that has the fewest characters by its share so far, until a part ends; prose goes on
Source     the README beside the files: WikiText-2 of the validation split, and texts of this project
Units      shares of characters
"""

from __future__ import annotations

from functools import cache
from importlib import resources

from kvsink.evaluate.texts import builtin_text

__all__ = ["SHARES", "mixed_text"]

SHARES = {"prose": 0.45, "code": 0.2, "chats": 0.12, "numbers": 0.08, "languages": 0.15}


@cache
def mixed_text() -> str:
    """The text behind `--calibration mix`."""
    left = {"prose": builtin_text(), **{n: _file(n) for n in SHARES if n != "prose"}}
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
