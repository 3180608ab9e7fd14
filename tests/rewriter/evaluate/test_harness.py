"""lm-eval through a cache: on a task of local files its figures are those of generate() by hand, and one-pass tasks are refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from kvsink.errors import EvaluationError, UnknownName, UnsupportedError
from kvsink.evaluate.evaluation import dynamic_cache, packed_cache
from kvsink.evaluate.harness import harness, load_tasks
from tests.models import build
from tests.tools.conftest import folder_of

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
GENERATE = 'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 6\n  do_sample: false\n'
QUESTIONS = ("What is it?", "And this one?", "Who?", "Where was the other one?")


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from kvsink.folder.loading import load_tokenizer

    return load_tokenizer(folder_of("llama", tmp_path_factory.mktemp("tiny") / "model"))


def said(model, tokenizer, question):
    ids = tokenizer(question, return_tensors="pt")["input_ids"]
    return tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def task(tmp_path, monkeypatch, model, tokenizer):
    """A file of a task whose first three answers are those of the model in float32, and its fourth is not."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'kvsink[eval]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    answers = [said(model, tokenizer, q) for q in QUESTIONS[:3]] + ["something else"]
    rows = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "echo.yaml"
    file.write_text(TASK.format(name="echo", data=data, kind="generate_until", metric="exact_match") + GENERATE)
    one_pass = tmp_path / "score.yaml"
    one_pass.write_text(TASK.format(name="score", data=data, kind="loglikelihood", metric="acc"))
    return file, one_pass


def test_figures_are_those_of_generate_through_the_cache(task, model, tokenizer):
    import copy

    from kvsink import rewrite

    tasks = load_tasks([str(task[0])])
    row = {"task": "echo", "metric": "exact_match", "n": 4, "value": 0.75}
    (found,) = harness(model, tokenizer, tasks, dynamic_cache, batch=2)
    assert {**found, "interval": None} == {**row, "interval": None}
    assert found["interval"] == pytest.approx((0.3006, 0.9544), abs=1e-4)  # 3 of 4, Wilson
    assert harness(model, tokenizer, tasks, dynamic_cache, limit=2)[0]["n"] == 2

    for bits, value in ((8, 0.75), (1, 0.0)):
        work = copy.deepcopy(model)
        rewrite(work, "rtn", key_bits=bits, value_bits=bits, protect="none", calibration="none")
        before = torch.get_rng_state()
        assert harness(work, tokenizer, tasks, packed_cache, batch=2)[0]["value"] == value
        assert harness(work, tokenizer, tasks, dynamic_cache, batch=2)[0]["value"] == 0.75
        assert torch.equal(torch.get_rng_state(), before)


def test_what_is_refused(task, tmp_path):
    with pytest.raises(UnsupportedError, match="task score scores a prompt in one pass .loglikelihood.*Pass tasks that generate"):
        load_tasks([str(task[0]), str(task[1])])
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"task .*echo.yaml cannot be loaded: .*Check its file"):
        load_tasks([str(task[0])])


def test_a_file_that_is_not_there():
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'kvsink[eval]'")
    with pytest.raises(EvaluationError, match=r"task file ./none.yaml does not exist"):
        load_tasks(["./none.yaml"])


@pytest.mark.slow
def test_a_name_that_nobody_knows():
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'kvsink[eval]'")
    with pytest.raises(UnknownName, match="unknown lm-eval task 'gsm9k'; nearest known: gsm8k"):
        load_tasks(["gsm9k"])


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    with pytest.raises(UnsupportedError, match=r"--tasks needs lm-eval .*pip install 'kvsink\[eval\]'"):
        load_tasks(["gsm8k"])
