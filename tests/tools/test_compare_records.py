"""Finished rows: what replaces what, whose model they are of, and which tables they stand in."""

from __future__ import annotations

from typing import Any

from kvsink.methods import get_method
from kvsink.tools.compare_records import by_set, by_windows, latest, models_in, setting
from kvsink.tools.compare_rows import SETS, Row, resolved, row


def record(of: Row, version: str = "7.2.0", model: str = "M", **more: Any) -> dict[str, Any]:
    shape = {"text": "WikiText-2 test", "windows": 16, "window_tokens": 1024, "chunk": 64}
    own = {} if version == "0.1.0" else {n: getattr(resolved(of), n) for n in ("key_bits", "value_bits", "window")}
    return {**own, "row": of.as_dict(), "name": of.name, "model": model, "versions": {"kvsink": version}, **shape, **more}


def test_a_newer_version_replaces_an_older_one_in_whatever_order() -> None:
    order = ["0.1.0", "7.2.0.dev0", "7.2.0", "7.10.0"]
    rows = [record(row("rtn", 2, 2), v) for v in order]
    for given in (rows, rows[::-1], rows[2:] + rows[:2]):
        assert [r["versions"]["kvsink"] for r in latest(given)] == ["7.10.0"]
    assert [r["versions"]["kvsink"] for r in latest(rows[1::-1])] == ["7.2.0.dev0"]
    assert [r["versions"]["kvsink"] for r in latest(rows[2:0:-1])] == ["7.2.0"]  # a release comes behind its development
    assert latest([record(row("rtn", 2, 2), n=1), record(row("rtn", 2, 2), n=2)])[0]["n"] == 2  # of one version the last


def test_rows_of_another_setting_stay() -> None:
    rows = [
        row("rtn", 2, 2),
        row("rtn", 4, 4),
        row("rtn", 2, 2, "first:1"),
        row("rtn", 2, 2, window=16),
        row("rtn", 2, 2, key_clip=0.9),
    ]
    found = [record(r, "0.1.0") for r in rows] + [record(rows[0], model="N"), record(rows[0], windows=8), record(rows[0], chunk=32)]
    assert len(latest(found)) == len(found)


def test_a_setting_is_what_is_measured_not_how_it_was_asked_for() -> None:
    m = get_method("kivi")
    named = row("kivi", m.key_bits, m.value_bits, m.protect, m.window, label="KIVI")
    assert setting(row("kivi")) == setting(named) == setting(row("kivi", float(m.key_bits or 0)))
    old = record(row("kivi", m.key_bits, m.value_bits), "0.1.0", protect=m.protect)
    assert latest([old, record(named)])[0]["name"] == "KIVI" and len(latest([old, record(named)])) == 1
    gone = row("klt-of-old")
    assert setting(gone) != setting(row("klt-of-old", 2, 2)) and len(latest([record(gone), record(gone, "0.1.0")])) == 1


def test_own_settings_are_those_of_the_day_where_a_row_says_them() -> None:
    """A method's own bits may have changed since a row was measured, and what a row of 0.1.0 does not say is not guessed."""
    m = get_method("klt")
    unsaid = record(row("klt"), "0.1.0", protect=m.protect)
    assert len(latest([unsaid, record(row("klt", m.key_bits, m.value_bits), "0.1.0", protect=m.protect)])) == 2
    then = record(row("klt"), "0.1.0", key_bits=7, value_bits=7, protect=m.protect)
    assert len(latest([then, record(row("klt"))])) == 2


def test_the_demo_has_the_name_of_its_model_and_old_rows_their_dtype() -> None:
    old = record(row("rtn", 2, 2), "0.1.0", "demo:smollm2", command="compare --dtype bfloat16 --set plan")
    (found,) = latest([old])
    assert (found["model"], found["dtype"], old["model"]) == ("SmolLM2-135M-Instruct", "bfloat16", "demo:smollm2")
    assert latest([record(row("rtn"), command="compare")])[0]["dtype"] == "float32"
    new = record(row("rtn", 2, 2), model="SmolLM2-135M-Instruct", dtype="float16")
    assert latest([old, new]) == [new]


def test_tables_hold_the_rows_of_a_set_whichever_set_they_were_measured_for() -> None:
    ours = next(r for r in SETS["plan"].rows if r.plan == "uniform" and r.value_bits == 2)
    rows = [
        record(ours, set="published"),
        record(ours, model="N", set="published"),
        record(row("rtn", 3, 3), command="compare --set plan"),
        record(Row("stock:hqq", 4, 4), set="mine"),
        record(row("rtn", 2, 2), set="published"),
        record(SETS["shift"].rows[0], text="Python 3.12 standard library", set="shift"),
    ]
    found = by_set(rows)
    assert list(found) == ["default", "published", "plan", "shift", "mine"]
    assert found["plan"] == [rows[:2], [rows[2]]]  # one line for both models; what was measured for the set beside its rows
    assert found["published"] == [[rows[4]], rows[:2]] and found["mine"] == [[rows[3]]] and found["shift"] == [[rows[5]]]
    assert rows[5] not in [r for line in found["default"] for r in line]  # another text


def test_rows_are_told_apart_by_their_windows() -> None:
    rows = [record(row("rtn")), record(row("klt")), record(row("rtn"), windows=2, model="N")]
    assert by_windows(rows) == {("WikiText-2 test", 16, 1024, 64): rows[:2], ("WikiText-2 test", 2, 1024, 64): rows[2:]}
    assert models_in(rows) == ["M", "N"]
