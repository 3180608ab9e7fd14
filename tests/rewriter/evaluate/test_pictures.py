"""Drawn pictures: the same from the same seed, what they say is what they show, and training never sees the held-back ones."""

from __future__ import annotations

import numpy as np

from kvsink.evaluate.pictures import COLORS, HELD_BACK, SHAPES, SIZE, drawn, picture


def test_a_seed_gives_the_same_picture_and_another_seed_another() -> None:
    one, again, other = picture(3, 5), picture(3, 5), picture(4, 5)
    assert one.image.tobytes() == again.image.tobytes() and one.caption == again.caption and one.questions == again.questions
    assert one.image.tobytes() != other.image.tobytes()
    assert [p.caption for p in drawn(3)] == [picture(HELD_BACK, i).caption for i in range(3)]


def test_captions_and_answers_agree_with_what_is_drawn() -> None:
    counts = set()
    for p in drawn(40, seed=1):
        pixels, half = np.asarray(p.image).astype(int), SIZE // 2
        inside = [c for c in p.cells if c is not None]
        counts.add(len(inside))
        assert len({c for c, _ in inside}) == len({s for _, s in inside}) == len(inside)
        for i, cell in enumerate(p.cells):
            part = pixels[i // 2 * half : (i // 2 + 1) * half, i % 2 * half : (i % 2 + 1) * half].reshape(-1, 3)
            ink = part[(abs(part - pixels[0, 0]).sum(1) > 60)]
            assert (len(ink) > 0) == (cell is not None)
            if cell is not None:
                nearest = min(COLORS, key=lambda c: abs(ink.mean(0) - COLORS[c]).sum())
                assert nearest == cell[0] and f"a {cell[0]} {cell[1]} at the" in p.caption
        for question, answer, options in p.questions:
            assert answer in options
            for color, shape in inside:
                if question == f"What color is the {shape}?":
                    assert answer == color
                if question == f"Which shape is {color}?":
                    assert answer == shape
    assert counts == {1, 2, 3, 4} and len(SHAPES) == 5


def test_training_seeds_stay_below_the_held_back_ones() -> None:
    import inspect

    from kvsink.evaluate.imagetext import _CALIBRATION_SEED
    from kvsink.tools import train_vision

    assert _CALIBRATION_SEED < HELD_BACK
    assert "500_000 + step" in inspect.getsource(train_vision.train_joint)  # a step would have to take half a million turns
