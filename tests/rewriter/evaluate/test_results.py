"""A row of an evaluation: plain data, a table, a page."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from kvsink.evaluate.evaluation import evaluate
from kvsink.evaluate.results import RetrievalResult, markdown_table
from tests.models import VOCAB, build

TOKENS = 40


@pytest.fixture(scope="module")
def model():
    return build("llama").eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCAB, (5, TOKENS), generator=torch.Generator().manual_seed(7))


def test_result_as_json_and_tables(model, ids):
    result = evaluate(model, model, ids, model_name="tiny", method="kvsink rtn", text_name="noise")
    prompt = {"task": "single", "length": 256, "recall": 1.0, "valid": None}
    found = [{**prompt, "depth": depth, "right": depth < 0.8} for depth in (0.2, 0.4, 0.6, 0.8)]
    result = dataclasses.replace(result, retrieval=RetrievalResult(tuple(found)), baseline_retrieval=RetrievalResult(()))
    record = json.loads(json.dumps(result.to_json()))
    assert (record["retrieval"]["right"], record["retrieval"]["total"]) == (3, 4)
    assert record["retrieval"]["cells"][0]["n"] == 4
    for name in ("model", "text", "windows", "tokens", "chunk", "bits_per_element", "device", "dtype", "versions"):
        assert record[name], name
    assert {"python", "torch", "transformers", "kvsink"} <= record["versions"].keys()
    page = markdown_table([result, result])
    assert len(page.splitlines()) == 4  # heading, rule, reference once, the row once
    assert "3/4" in page
    assert "reference" in page
    assert len(result.table().rows) == 2
    assert "noise" in result.provenance()
