"""One model of kvsink-eval: what is refused is refused before anything is measured, and default lengths fit the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvsink.errors import EvaluationError
from kvsink.evaluate import evaluation
from kvsink.tools import eval_text
from kvsink.tools.eval_text import Wishes, measure, text_of

WISH = Wishes(
    baseline=None,
    text=text_of(None, None),
    own_text=False,
    windows=2,
    window_tokens=32,
    length=None,
    chunk=32,
    batch=2,
    strict=False,
    sinks=False,
    device="cpu",
    dtype="auto",
    tasks=(),
    lengths=None,
    depths=(0.5,),
    samples=1,
    problems=0,
    budget=8,
    temperature=0.0,
    harness=(),
    limit=None,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length": 256, "baseline": "{dir}"}, "exceed the model's 128 positions"),
        ({"length": 64}, "not a rewritten folder"),
        ({"problems": 2, "baseline": "{dir}"}, "no chat template"),
        ({"tasks": ("single",), "lengths": (40,)}, "needs at least"),
        ({"tasks": ("single",), "lengths": (900,)}, "Pass --retrieval none"),
    ],
)
def test_nothing_is_measured_before_a_refusal(tiny_dir, monkeypatch, changes, words):
    def never(*_, **__):
        raise AssertionError("measured before it was refused")

    monkeypatch.setattr(evaluation, "evaluate", never)
    wish = replace(WISH, **{name: str(tiny_dir) if value == "{dir}" else value for name, value in changes.items()})
    with pytest.raises(EvaluationError, match=words):
        measure(str(tiny_dir), wish, lambda title: lambda *_: None)


class Model:
    def __init__(self, limit):
        self.config = self
        self.max_position_embeddings = limit

    def get_text_config(self):
        return self


@pytest.mark.parametrize(
    ("window", "limit", "tasks", "lengths"),
    [
        (1024, 8192, ("single",), (256, 512, 1024)),
        (512, 8192, ("single",), (256, 512)),
        (1024, 8192, ("single", "call"), (1024,)),
        (32768, 32768, ("single",), (8192, 16384, 32640)),
        (32768, None, ("variables",), (8192, 16384, 32768)),
        (32, 8192, ("single",), (256,)),
    ],
)
def test_default_lengths(window, limit, tasks, lengths):
    assert eval_text._lengths(Model(limit), replace(WISH, window_tokens=window, tasks=tasks)) == lengths
