"""Rewritten tiny models that the tests of the packed cache feed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.graphs import rewritten

METHODS = ("klt", "centred", "rotatekv", "rtn")


@pytest.fixture(scope="module", params=METHODS)
def model(request: pytest.FixtureRequest) -> Any:
    return rewritten("llama", "sdpa", request.param)


@pytest.fixture
def wide(model: Any) -> Iterator[Any]:
    """The model in float64: in float32, sums in another order turn a code that stands on a threshold."""
    yield model.double()
    model.float()


@pytest.fixture(scope="module")
def klt() -> Any:
    return rewritten("llama", "sdpa", "klt", protect="first:2+massive:3", window=4)


@pytest.fixture(scope="module")
def massive() -> Any:
    return rewritten("llama", "sdpa", "rtn", protect="massive:3", key_bits=3)


@pytest.fixture(scope="module")
def passthrough() -> Any:
    return rewritten("llama", "sdpa", "rtn", key_bits=16, value_bits=16)
