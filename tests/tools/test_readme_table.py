"""README shows the rows that were measured, and no others."""

from __future__ import annotations

import pytest

import kvsink
from kvsink.errors import KvsinkError
from kvsink.tools.compare_records import read_records
from kvsink.tools.compare_rows import SETS
from kvsink.tools.readme_table import ROOT, table

ALL = read_records(ROOT / "docs" / "compare.jsonl")
RECORDS = [r for r in ALL if r["model"] == "demo:smollm2"]  # of one model, each setting once
KIVI = [r for r in RECORDS if r["name"] == "kivi" and r["row"]["key_bits"] == 2 and r["row"]["protect"] is None]


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| `")]


def test_the_table_in_readme_is_that_of_the_records() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table(ALL) in readme
    assert len(SETS["default"].rows) == 9 >= len(rows(table(ALL))) > 0


def test_a_row_that_was_not_measured_is_not_invented() -> None:
    (kivi,) = KIVI
    bits, perplexity = f"{kivi['bits']:.2f}", f"{kivi['perplexity']:.2f}"
    assert sum(f"{bits} ({16 / kivi['bits']:.1f}x) | {perplexity}" in line for line in rows(table(RECORDS))) == 1
    assert not any("kivi" in line for line in rows(table([r for r in RECORDS if r is not kivi])))
    with pytest.raises(KvsinkError, match="--set default"):
        table([{**kivi, "status": "declined"}])


def test_models_stand_side_by_side_with_gaps_where_one_has_no_row() -> None:
    about = {
        "head_dim": 256,
        "layers": 18,
        "packed_layers": 3,
        "dtype": "bfloat16",
        "device": "Card",
        "versions": {"kvsink": "9.9"},
    }
    other = {**KIVI[0], **about, "model": "Other", "bits": 2.5, "cache_bits": 8.0, "perplexity": 22.0, "gap": 0.1, "kl": 0.5}
    text = table([*RECORDS, {**other, "baseline_perplexity": 20.0}])
    head = "SmolLM2-135M-Instruct: bits | perplexity, 18.31 at 16 bit | KL | Other: bits | perplexity, 20.00 at 16 bit | KL |"
    assert text.splitlines()[0].endswith(head) and len(rows(text)) == len(rows(table(RECORDS)))
    assert [line.endswith("| 2.50 (2.0x) | 22.00 (+10.0%) | 0.5000 |") for line in rows(text) if "`kivi`" in line] == [True]
    assert all(line.endswith("| – | – | – |") for line in rows(text) if "`kivi`" not in line)
    said = " ".join(text.split())
    assert "Other: head width 256, 3 of 18 layers packed, which bits are of, bfloat16, Card, version 9.9." in said
    assert "| `kivi` of 0.1.0 and 9.9 | 2/2 | none |" in text and "| `cq` 4c8b of 0.1.0 | 2/2 |" in text
    now = {**other, "versions": {"kvsink": kvsink.__version__}}
    assert "| `kivi` | 2/2 | none |" in table([now])
    newer = {**other, "model": "demo:smollm2", "versions": {"kvsink": "7.2.0"}}
    told = " ".join(table([newer, *RECORDS]).split())
    assert "22.00 (+10.0%)" in told and "version 0.1.0 and " in told and told.endswith(" and 7.2.0.")
    few = [{**other, "windows": 2}]
    assert "Other" not in table([*few, *RECORDS])
