"""Drawn pictures with captions, questions and answers: made on demand from a seed, nothing is stored.

A picture of 64 x 64 pixels has one to four shapes in the cells of a 2 x 2 grid, no shape and no colour twice, each with a
random size and place in its cell on a light background.

Source     ours
Shapes     a Picture's image is an RGB image of PIL; `cells` name (colour, shape) of the four cells in reading order, or None
Exact      the same seed and index give the same picture everywhere; seeds from `HELD_BACK` on are never trained on
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["COLORS", "HELD_BACK", "SHAPES", "Picture", "drawn", "picture"]

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 140, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 200, 20),
    "purple": (128, 60, 170),
    "orange": (255, 127, 14),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
ROWS, COLUMNS, NUMBERS = ("top", "bottom"), ("left", "right"), ("one", "two", "three", "four")
HELD_BACK = 1_000_000
SIZE = 64


@dataclass(frozen=True)
class Picture:
    """An image, what is in it, and what can be said and asked about it."""

    image: Any
    cells: tuple[tuple[str, str] | None, ...]
    caption: str
    questions: tuple[tuple[str, str, tuple[str, ...]], ...]  # question, answer, all answers one could give


def drawn(count: int, seed: int = HELD_BACK) -> Iterator[Picture]:
    """`count` pictures."""
    return (picture(seed, i) for i in range(count))


def picture(seed: int, index: int) -> Picture:
    """One picture."""
    r = random.Random(f"{seed}.{index}")
    n = r.randint(1, 4)
    places = sorted(r.sample(range(4), n))
    kinds = list(zip(r.sample(list(COLORS), n), r.sample(SHAPES, n), strict=True))
    cells: list[tuple[str, str] | None] = [None] * 4
    for place, kind in zip(places, kinds, strict=True):
        cells[place] = kind
    said = [f"a {c[0]} {c[1]} at the {ROWS[i // 2]} {COLUMNS[i % 2]}" for i, c in enumerate(cells) if c is not None]
    caption = (", ".join(said[:-1]) + " and " + said[-1] if len(said) > 1 else said[0]) + "."
    asked: list[tuple[str, str, tuple[str, ...]]] = []
    for i, c in enumerate(cells):
        if c is not None:
            asked += [
                (f"What color is the {c[1]}?", c[0], tuple(COLORS)),
                (f"Which shape is {c[0]}?", c[1], SHAPES),
                (f"Is the {c[1]} at the top or bottom?", ROWS[i // 2], ROWS),
                (f"Is the {c[1]} on the left or right?", COLUMNS[i % 2], COLUMNS),
            ]
    asked = [("How many shapes?", NUMBERS[n - 1], NUMBERS), *r.sample(asked, min(4, len(asked)))]
    r.shuffle(asked)
    return Picture(_draw(cells, r), tuple(cells), caption, tuple(asked))


def _draw(cells: list[tuple[str, str] | None], r: random.Random) -> Any:
    from PIL import Image, ImageDraw

    shade = tuple(r.randint(215, 255) for _ in range(3))
    image = Image.new("RGB", (SIZE, SIZE), shade)
    pen = ImageDraw.Draw(image)
    for i, cell in enumerate(cells):
        if cell is None:
            continue
        half = SIZE // 4
        size = r.uniform(9, 13)
        x = half + i % 2 * 2 * half + r.uniform(size - half, half - size)
        y = half + i // 2 * 2 * half + r.uniform(size - half, half - size)
        fill = tuple(max(0, min(255, v + r.randint(-15, 15))) for v in COLORS[cell[0]])
        _shape(pen, cell[1], x, y, size, fill)
    return image


def _shape(pen: Any, name: str, x: float, y: float, size: float, fill: tuple[int, ...]) -> None:
    if name == "circle":
        pen.ellipse((x - size, y - size, x + size, y + size), fill=fill)
    elif name == "square":
        side = 0.85 * size
        pen.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif name == "triangle":
        pen.polygon([(x, y - size), (x - size, y + 0.8 * size), (x + size, y + 0.8 * size)], fill=fill)
    elif name == "cross":
        arm = 0.3 * size
        pen.rectangle((x - size, y - arm, x + size, y + arm), fill=fill)
        pen.rectangle((x - arm, y - size, x + arm, y + size), fill=fill)
    else:
        at = [(size if k % 2 == 0 else 0.42 * size, math.pi * k / 5 - math.pi / 2) for k in range(10)]
        pen.polygon([(x + q * math.cos(a), y + q * math.sin(a)) for q, a in at], fill=fill)
