"""Answers through a cache: those of generate(), graded, counted by task and length, the same questions for every cache."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers as hf

from kvsink.errors import EvaluationError, UnknownName
from kvsink.evaluate.evaluation import dynamic_cache
from kvsink.evaluate.haystack import Draft, Grade, Haystack
from kvsink.evaluate.retrieval import TASKS, retrieval, task_names
from tests.models import _DECODER
from tests.wording import Letters


class Ascii(Letters):
    """Characters that a vocabulary of 128 holds."""

    def __call__(self, text, **_):
        return {"input_ids": [min(ord(letter), 127) for letter in text]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = hf.LlamaConfig(**{**_DECODER, "vocab_size": 128, "max_position_embeddings": 2048})
    model = hf.LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data.normal_(std=0.15)  # so that what it says depends on what it has read
    return model


@pytest.fixture
def asked(monkeypatch):
    """A task whose prompts are remembered; its answers are exact as soon as they hold `until`."""
    prompts, until = [], []

    def task(hay, length, depth, rng):
        return Draft("Say.", "What?", "It is", lambda said: Grade(bool(until) and until[0] in said, 0.5))

    def prompt(*args):
        prompts.append(whole(*args))
        return prompts[-1]

    whole = Haystack.prompt
    monkeypatch.setitem(TASKS, "plain", (task, 12))
    monkeypatch.setattr(Haystack, "prompt", prompt)
    return prompts, until


def alone(model, ids):
    return model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()


def test_answers_are_those_of_generate(model, asked):
    """Rows of a batch stop on their own, and what is graded is what generate() says of each prompt alone."""
    prompts, until = asked
    run = partial(retrieval, model, Ascii(), tasks=("plain",), lengths=(90,), depths=(0.2, 0.8), samples=2, batch=3, chunk=7)
    said = [row["said"] for row in run().rows]
    whole = [alone(model, ids) for ids in prompts]
    assert len(said) == len({tuple(ids) for ids in prompts}) == 4 and said == [Ascii().decode(tokens) for tokens in whole]

    end = whole[1][5]
    model.generation_config.eos_token_id = [end, 2]
    cut = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in whole]
    assert [row["said"] for row in run().rows] == [Ascii().decode(tokens) for tokens in cut]
    model.generation_config.eos_token_id = 2

    until.append(said[2][:4])
    rows = run().rows
    assert rows[2]["right"] and rows[2]["said"] == said[2][:4]  # an exact answer needs no more
    assert all(row["said"] == words[: len(row["said"])] for row, words in zip(rows, said, strict=True))


def test_a_cache_that_forgets_finds_nothing_more(model, asked):
    """The answers come through the cache that was given."""

    class Forgetful(hf.DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            past = keys.shape[2] - key_states.shape[2]
            return torch.cat([keys[:, :, :past] * 0, keys[:, :, past:]], 2), values

    sizes = []

    def forgetful(model, rows, length):
        sizes.append((rows, length))
        return Forgetful()

    run = partial(retrieval, model, Ascii(), tasks=("plain",), lengths=(90,), depths=(0.2, 0.8))
    kept, lost = run(cache_factory=dynamic_cache), run(cache_factory=forgetful)
    assert sizes == [(2, 102)]
    assert all(a["said"] != b["said"] for a, b in zip(kept.rows, lost.rows, strict=True))


def test_every_task_runs_and_is_counted_by_length(model):
    tasks = ("single", "multikey", "multivalue", "multiquery", "variables", "call")
    bars = []
    run = partial(retrieval, model, Ascii(), depths=(0.5,), chunk=500)
    found = run(tasks=tasks, lengths=(1300,), progress=lambda *done: bars.append(done))
    cells = found.cells()
    assert [(c["task"], c["length"], c["n"]) for c in cells] == [(task, 1300, 1) for task in tasks]
    assert all((c["valid"] is not None) == (c["task"] == "call") for c in cells)
    assert found.right == 0 and found.total == 6  # random weights find nothing
    assert cells[0]["interval"] == pytest.approx((0, 0.7935), abs=1e-4) and bars[-1] == (6, 6)
    cells = run(tasks=("variables",), lengths=(1300, 1400), samples=2).cells()
    assert [(c["task"], c["length"], c["n"]) for c in cells] == [("variables", 1300, 2), ("variables", 1400, 2)]


def test_names_of_tasks():
    assert task_names("all") == tuple(TASKS) and task_names("none") == () and task_names("call, single") == ("call", "single")
    with pytest.raises(UnknownName, match="unknown retrieval task 'multykey'; nearest known: multikey"):
        task_names("single,multykey")


def test_lengths_beyond_the_model(model):
    with pytest.raises(EvaluationError, match="prompts of 2000 tokens and answers of 128 .single. exceed the model's 2048"):
        retrieval(model, Ascii(), lengths=(400, 2000))
