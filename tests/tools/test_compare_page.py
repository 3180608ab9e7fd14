"""The page of the comparison: what each row says of itself, models side by side, rows of older versions."""

from __future__ import annotations

import math

from kvsink.methods import Claim, methods
from kvsink.tools.compare_page import markdown, pareto
from tests.records import record


def lines(page: str, start: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(start)]


def test_a_row_says_where_and_with_what_it_was_measured() -> None:
    page = markdown([record(), record("klt", 2.25, 0.02, versions={"kvsink": "0.1.0"}, device="CPU")])
    assert lines(page, "| klt ")[0].endswith(
        "| 2.250 | 3.250 | 1.00 | 10.200 | **+2.00%** | 0.0020 | 50.0% | - | - | - | 0.1.0, CPU |"
    )
    assert lines(page, "| rtn ")[0].endswith("| +10.00% | 0.0100 | 50.0% | - | - | - | 7.2.0, GPU |")
    assert "## WikiText-2 test, 16 windows of 1024 tokens" in page and "- M: perplexity 10.000 at 16 bit" in page


def test_a_method_that_is_gone_keeps_its_name_and_version() -> None:
    page = markdown([record("klt-of-old", versions={"kvsink": "0.1.0"}), record()])
    assert [line.split(" | ")[-1] for line in lines(page, "| klt-of-old ")] == ["0.1.0, GPU |"]


def test_models_stand_side_by_side_where_there_are_several() -> None:
    rows = [
        record(model="A", command="x --set published"),
        record("klt", 2.1, 0.03, "A", strict_kl=0.5),
        record(gap=0.3, model="B"),
    ]
    page = markdown(rows)
    assert (
        "| method | keys/values | kept exact | A: bits | gap | KL | strict KL | B: bits | gap | KL | strict KL | measured |" in page
    )
    rtn, own_of_a, own_of_b = lines(page, "| rtn ")[:3]
    assert rtn == "| rtn | 2/2 | none | 2.500 | +10.00% | 0.0100 | - | 2.500 | **+30.00%** | 0.0300 | - | 7.2.0, GPU |"
    assert "| +10.00% |" in own_of_a and "| **+30.00%** |" in own_of_b
    klt = "| klt | 2/2 | none | 2.100 | **+3.00%** | 0.0030 | 0.5000 | – | – | – | – | 7.2.0, GPU |"
    assert klt in markdown([*rows[:2], {**rows[2], "set": "rows"}, {**rows[1], "set": "rows"}])
    assert "A: bits" not in markdown(rows[:2])


def test_bits_of_the_whole_cache_stand_behind_where_layers_stay_in_16_bit() -> None:
    shape = {"layers": 18, "kv_heads": 1, "head_dim": 256, "packed_layers": 3, "dtype": "float32", "cache_bits": 7.4}
    page = markdown([record(**shape), record("klt", 2.1, 0.03, cache_bits=2.1)])
    assert "| 2.500 (7.40) |" in page and "| 2.100 |" in page
    assert "18 attention layers, 3 of them packed and the others left in 16 bit, 1 key-value heads of 256 channels, float32" in page


def test_bits_of_long_texts_have_a_column_where_they_were_counted() -> None:
    old, new = record("rtn", 3.32, set="mine"), record("centred", 3.38, set="mine", bits_far=2.25)
    assert "131072 |" not in markdown([old])
    table = [line for line in markdown([old, new]).splitlines() if line.startswith(("| method", "| rtn", "| centred"))]
    found = [[c.strip() for c in line.split("|")] for line in table]
    at = found[0].index("bits at 131072")
    assert found[0][at - 2] == "bits at 4096" and {line[1]: line[at] for line in found[1:3]} == {"rtn": "-", "centred": "2.250"}


def test_what_was_not_measured_is_said() -> None:
    declined = {
        n: v for n, v in record("kivi").items() if n in ("row", "name", "model", "text", "windows", "window_tokens", "chunk")
    }
    page = markdown([record(), {**declined, "status": "declined", "reason": "too\nfew"}])
    assert "- M, `kivi` 2/2: declined, too few" in page


def test_published_figures_stand_apart() -> None:
    claim: Claim = methods()["rotatekv"].claims[0]
    ours, theirs = markdown([record("rotatekv")]).split("## Published figures")
    assert claim.setting in theirs and claim.source in theirs and claim.setting not in ours


def test_pareto_front() -> None:
    points = [(2.0, 5.0), (1.0, 9.0), (3.0, 5.0), (3.0, 1.0), (2.0, 4.0), (0.5, math.nan)]
    assert pareto(points) == [1, 4, 3]
    assert pareto([]) == []
