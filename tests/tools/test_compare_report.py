"""Every form of the comparison's table: lines of CSV, the page beside it, plots of several models."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from kvsink.tools.compare_report import COLUMNS, write_report
from tests.records import record


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "compare.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_form_holds_every_row(tmp_path: Path) -> None:
    refused = {**record("kivi"), "status": "declined", "reason": "too few"}
    known = {"head_dim": 64, "kv_heads": 3, "layers": 30, "dtype": "float16", "key_bits": 2.0, "set": "mine"}
    rows = [record("rtn", 2.5, 0.1), record("klt", 2.25, 0.02, command="the command", **known), refused]
    assert write_report(tmp_path, rows) == []
    found = {r["method"]: r for r in rows_of(tmp_path)}
    assert len(found) == 3 and tuple(found["rtn"]) == COLUMNS
    assert (found["rtn"]["gap_percent"], found["rtn"]["bits_at_4096"], found["rtn"]["head_dim"]) == ("10.0", "2.5", "")
    assert [found["klt"][n] for n in ("head_dim", "dtype", "set", "version")] == ["64", "float16", "mine", "7.2.0"]
    assert (found["kivi"]["status"], found["kivi"]["kl"], found["kivi"]["reason"]) == ("declined", "", "too few")
    page = (tmp_path / "compare.md").read_text()
    assert "the command" in page and "`kivi` 2/2: declined" in page
    assert {line.count("|") for line in page.splitlines() if line.startswith("| ") and "KL" in line} == {15}
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_plots_have_a_line_of_panels_for_each_model(tmp_path: Path) -> None:
    rows = [
        record(name, bits, gap, model) for model in ("First", "Second") for name, bits, gap in (("rtn", 2, 0.1), ("klt", 3, 0.01))
    ]
    other = record(gap=0.5, model="Third", text="another text")
    assert write_report(tmp_path, [*rows, record(gap=math.inf, model="Fourth"), other]) == []
    drawn = (tmp_path / "compare.svg").read_text()
    assert [f"<!-- {m} -->" in drawn for m in ("First", "Second", "Third", "Fourth")] == [True, True, False, False]
    assert sum(drawn.count(f'<g id="axes_{n}">') for n in range(1, 9)) == 4
    write_report(tmp_path, rows)
    assert (tmp_path / "compare.svg").read_text() == drawn  # of the same rows the same file


@pytest.mark.parametrize("rows", [[], [{**record(), "status": "failed", "reason": "x"}]])
def test_without_rows_nothing_is_drawn(rows: list[dict], tmp_path: Path) -> None:
    assert write_report(tmp_path, rows) == ["no plot: nothing was measured"]
    assert not (tmp_path / "compare.png").exists() and (tmp_path / "compare.md").exists()
