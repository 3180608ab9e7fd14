"""README shows the rows that were measured, and no others."""

from __future__ import annotations

import json

import pytest

from kvsink.tools.readme_table import ROOT, WANTED, table

RECORDS = [json.loads(line) for line in (ROOT / "docs" / "compare.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_table_in_readme_is_that_of_the_records() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table(RECORDS) in readme
    assert len(table(RECORDS).splitlines()) == 3 + len(WANTED)


def test_a_row_that_was_not_measured_is_not_invented() -> None:
    with pytest.raises(KeyError):
        table([r for r in RECORDS if r["name"] != "kivi"])
