"""RULER's prompts, made on demand: needles of four kinds, chains of variables, common words.

Source     arXiv 2404.06654, section 3, appendix B; as many keys, values and queries as its thirteen tasks have
Differs    keys and words are drawn from the text; the needle asked for, or the first of several, stands at the depth that is given,
           all others at depths drawn from it on for chains and anywhere for the rest; short lists repeat common words less often
Units      depth as in `kvsink.evaluate.haystack`
Raises     EvaluationError for lengths that do not hold ten common words often enough
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random
from string import ascii_uppercase

from kvsink.errors import EvaluationError
from kvsink.evaluate.haystack import Draft, Haystack, contains

__all__ = ["common_words", "multikey", "multiquery", "multivalue", "single", "variables"]

_COMMON, _HOPS = 10, 4
_TIMES = ((30, 3), (10, 1), (4, 1))  # how often common and other words occur: the first that leaves half of the room to others
_MEMORIZE = "Make sure to memorize it. I will quiz you about the"
_TRACK = "Memorize and track the chain(s) of variable assignment hidden in the following text."
_COUNT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often."
)
_ASK = "Question: What are the 10 most common words in the above list?"
_TOP = "Answer: The top 10 words that appear most often in the list are:"


def single(hay: Haystack, length: int, depth: float, rng: Random) -> Draft:
    """One number under one key."""
    return _needles(hay, depth, rng, keys=1)


def multikey(hay: Haystack, length: int, depth: float, rng: Random) -> Draft:
    """One number among four, each under a key of its own."""
    return _needles(hay, depth, rng, keys=4)


def multivalue(hay: Haystack, length: int, depth: float, rng: Random) -> Draft:
    """Four numbers under one key, all asked for."""
    return _needles(hay, depth, rng, values=4)


def multiquery(hay: Haystack, length: int, depth: float, rng: Random) -> Draft:
    """Four numbers under four keys, all asked for."""
    return _needles(hay, depth, rng, keys=4, queries=4)


def variables(hay: Haystack, length: int, depth: float, rng: Random) -> Draft:
    """Five variables that hold one number, each assigned from the one before."""
    shown, wanted = _chain(rng), _chain(rng)
    solved = _asked_of_chain(*shown)
    example = f"{_TRACK}\n{' '.join(_assignments(*shown))}\n{solved[0]} {solved[1]} {', '.join(shown[1])}\n\n"
    question, answer = _asked_of_chain(*wanted)
    depths = sorted([depth, *(rng.uniform(depth, 1) for _ in range(_HOPS))])
    needles = tuple(zip(depths, _assignments(*wanted), strict=True))
    return Draft(example + _TRACK, question, answer, contains(wanted[1]), needles)


def common_words(hay: Haystack, length: int, depth: float, rng: Random) -> Draft:
    """The ten words that a numbered list repeats most often; a depth means nothing here."""
    words = hay.draw(rng, 2 * _COMMON)
    shown = _numbered(_shuffled(rng, words[:_COMMON] * 2 + words[_COMMON:]))
    solved = " ".join(_numbered(words[:_COMMON]))
    opening = f"{_COUNT}\n{' '.join(shown)}\n{_ASK} {_TOP} {solved}\n\n{_COUNT}"
    wanted = hay.draw(rng, _COMMON)
    others = [word for word in _shuffled(rng, hay.words) if word not in wanted]
    draft = Draft(opening, _ASK, _TOP, contains(wanted))
    return replace(draft, items=tuple(_numbered(_list_of(hay, hay.room(draft, length), wanted, others, rng))))


def _list_of(hay: Haystack, room: int, wanted: list[str], others: list[str], rng: Random) -> list[str]:
    """Words in the order of a list a little longer than `room` tokens, which ends inside words that occur once."""

    def size(words: Sequence[str]) -> int:
        return len(hay.encode(" " + " ".join(_numbered(words))))

    for often, seldom in _TIMES:
        common, spare = wanted * often, 4 * seldom
        if 2 * size(common) > room:
            continue
        most = len(others) - spare
        if size([*common, *(others[:most] * seldom)]) < room:
            raise EvaluationError(f"the text holds {len(hay.words)} different words, too few for a list. Pass a longer --text")
        fits = bisect_right(range(most), room, key=lambda n: size([*common, *(others[:n] * seldom)])) - 1
        order = _shuffled(rng, common + others[:fits] * seldom)
        while sum(len(hay.encode(" " + item)) for item in _numbered(order)) > room:  # one by one they may take more tokens
            fits -= 1
            order = _shuffled(rng, common + others[:fits] * seldom)
        return order + others[fits : fits + spare]
    raise EvaluationError(f"a list of common words does not fit into {room} tokens. Pass longer lengths")


def _needles(hay: Haystack, depth: float, rng: Random, keys: int = 1, values: int = 1, queries: int = 1) -> Draft:
    words = hay.draw(rng, 2 * keys)
    names = [f"{a}-{b}" for a, b in zip(words[:keys], words[keys:], strict=True)]
    numbers = [_number(rng) for _ in range(keys * values)]
    owners = [name for name in names for _ in range(values)]
    depths = [depth, *(rng.random() for _ in numbers[1:])]
    sentences = [f"One of the special magic numbers for {o} is: {n}." for o, n in zip(owners, numbers, strict=True)]
    asked, count = _listed(names[:queries]), queries * values
    needles = tuple(zip(depths, sentences, strict=True))
    grade = contains(numbers[:count])
    if count == 1:
        opening = f"A special magic number is hidden within the following text. {_MEMORIZE} number afterwards."
        question = f"What is the special magic number for {asked} mentioned in the provided text?"
        return Draft(opening, question, f"The special magic number for {asked} mentioned in the provided text is", grade, needles)
    opening = f"Some special magic numbers are hidden within the following text. {_MEMORIZE} numbers afterwards."
    question = f"What are all the special magic numbers for {asked} mentioned in the provided text?"
    return Draft(opening, question, f"The special magic numbers for {asked} mentioned in the provided text are", grade, needles)


def _chain(rng: Random) -> tuple[str, list[str]]:
    """A number and the names of the variables that hold it."""
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(rng.choices(ascii_uppercase, k=5))
        names += [name] if name not in names else []
    return str(rng.randrange(10_000, 100_000)), names


def _assignments(number: str, names: Sequence[str]) -> list[str]:
    return [f"VAR {names[0]} = {number}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]


def _asked_of_chain(number: str, names: Sequence[str]) -> tuple[str, str]:
    question = f"Question: Find all variables that are assigned the value {number} in the text above."
    answer = "Answer: According to the chain(s) of variable assignment in the text above,"
    return question, f"{answer} {len(names)} variables are assigned the value {number}, they are:"


def _numbered(words: Sequence[str]) -> list[str]:
    return [f"{i}. {word}" for i, word in enumerate(words, 1)]


def _shuffled(rng: Random, words: Sequence[str]) -> list[str]:
    return rng.sample(words, len(words))


def _listed(names: Sequence[str]) -> str:
    """a; a and b; a, b, and c"""
    *rest, last = names
    return last if not rest else f"{rest[0]} and {last}" if len(rest) == 1 else f"{', '.join(rest)}, and {last}"


def _number(rng: Random) -> str:
    return str(rng.randrange(10**6, 10**7))
