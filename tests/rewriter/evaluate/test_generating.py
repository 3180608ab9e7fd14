"""Answers by generate(): those of each problem alone, through the cache that was given, and figures counted by hand."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
import transformers as hf

from kvsink.errors import EvaluationError
from kvsink.evaluate.arithmetic import problems
from kvsink.evaluate.evaluation import dynamic_cache, packed_cache
from kvsink.evaluate.generating import arithmetic, repetition
from kvsink.evaluate.results import GenerationResult
from tests.models import _DECODER
from tests.wording import Chat, Letters


class Talk(Chat):
    pad_token_id = None


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{**_DECODER, "vocab_size": 128, "max_position_embeddings": 1024})
    model = hf.LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data.normal_(std=0.15)
    return model


def chat(problem):
    return Talk()(f"<user>{problem.prompt}</user><assistant>")["input_ids"]


def test_answers_are_those_of_each_problem_alone(model):
    run = partial(arithmetic, model, Talk(), count=3, budget=16, batch=3)
    found = run()
    whole = [model.generate(torch.tensor([ids := chat(p)]), max_new_tokens=16)[0, len(ids) :].tolist() for p in problems(3)]
    assert [row["said"] for row in found.rows] == [Letters().decode(tokens) for tokens in whole]
    assert [row["wanted"] for row in found.rows] == [p.answer for p in problems(3)]
    assert not any(row["finished"] for row in found.rows) and {row["tokens"] for row in found.rows} == {16}

    end = whole[1][7]
    model.generation_config.eos_token_id = end
    rows = run().rows
    model.generation_config.eos_token_id = 2
    for row, tokens in zip(rows, whole, strict=True):
        assert row["finished"] == (end in tokens)
        assert row["tokens"] == (tokens.index(end) if end in tokens else 16)


def test_samples_are_drawn_again_from_the_same_seed_and_leave_the_callers_alone(model):
    run = partial(arithmetic, model, Talk(), count=2, budget=12)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = run(temperature=1.0), run(temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again and first.rows != run().rows


def test_the_packed_cache_is_what_generate_reads(model):
    """8 bits say what 16 bit says; keys and values of 1 bit do not. Left padding included."""
    from kvsink import rewrite

    said = {}
    for bits in (8, 1):
        torch.manual_seed(0)
        work = hf.LlamaForCausalLM(model.config).eval()
        work.load_state_dict(model.state_dict())
        rewrite(work, "rtn", key_bits=bits, value_bits=bits, protect="none", calibration="none")
        run = partial(arithmetic, work, Talk(), count=3, budget=12)
        said[bits] = run()
        assert said[bits] == run(cache_factory=packed_cache)
        assert run(cache_factory=dynamic_cache) == arithmetic(model, Talk(), count=3, budget=12)
    stock = arithmetic(model, Talk(), count=3, budget=12)
    agreed = {
        bits: sum(a["said"] == b["said"] for a, b in zip(found.rows, stock.rows, strict=True)) for bits, found in said.items()
    }
    assert agreed[8] >= 2 and agreed[1] == 0


def test_figures():
    row = {"wanted": 4, "said": "", "tokens": 10, "finished": True, "repetition": 0.0, "number": 4.0, "right": True}
    rows = (row, {**row, "number": 5.0, "right": False, "tokens": 30, "finished": False}, {**row, "number": None, "right": False})
    other = GenerationResult(30, 0.0, ({**row}, {**row, "number": 5.0, "right": False}, {**row, "number": None, "right": False}))
    figures = GenerationResult(30, 0.0, rows).figures(other)
    assert (figures["n"], figures["right"], figures["exhausted"], figures["agreement"]) == (
        3,
        1,
        1,
        2,
    )  # no number agrees with none
    assert figures["tokens"] == pytest.approx(50 / 3) and figures["repetition"] == 0
    assert figures["right_interval"] == pytest.approx((0.0615, 0.7923), abs=1e-4)
    assert figures["tokens_interval"] == (10, 30)
    assert "agreement" not in dataclasses.replace(other).figures()


def test_repetition_by_hand():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 1, 2, 1, 2, 1]) == 0.5  # 1212 and 2121, twice each
    assert repetition([1, 2, 3]) == 0


def test_what_cannot_be_asked(model):
    with pytest.raises(EvaluationError, match="no chat template"):
        arithmetic(model, Letters())
    with pytest.raises(EvaluationError, match=r"exceed the model's 1024 positions. Pass --budget \d+ or less"):
        arithmetic(model, Talk(), budget=1000)
