"""One record of a tiny llama, for all tests that read and none that change it."""

from __future__ import annotations

import pytest

from kvsink.calibrate.calibration import calibrate
from kvsink.calibrate.record import Calibration
from tests.models import build, tokens
from tests.rewriter.calibrate.recorded import BLOCKS, NOTHING


@pytest.fixture(scope="module")
def record() -> Calibration:
    return calibrate(build("llama"), tokens(8, 64, seed=1), NOTHING, BLOCKS)
