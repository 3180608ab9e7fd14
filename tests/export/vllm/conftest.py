"""What the tests with an engine share: a folder that is written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export.vllm.plans import folder, planted


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = planted()
    model.config.max_position_embeddings = 1024
    return folder(model, tmp_path_factory.mktemp("served") / "out", places=3)
