"""Long nodes go on in further lines, cut behind commas; nothing else of their text changes."""

from __future__ import annotations

from kvsink.graph.render import COLUMNS, _wrapped


def test_a_short_line_stays() -> None:
    assert _wrapped("a = b(c, d)  # f32 [1, 2]") == "a = b(c, d)  # f32 [1, 2]"


def test_a_long_line_is_cut_behind_commas() -> None:
    line = f"node = op([{', '.join(f'argument_{i}' for i in range(60))}])  # f32 [1, 2]"
    lines = _wrapped(line).split("\n")
    assert len(lines) > 5 and all(len(each) <= COLUMNS for each in lines)
    assert all(each.endswith(",") for each in lines[:-1]) and all(each.startswith(" " * 8) for each in lines[1:])
    assert ", ".join(each.strip().removesuffix(",") for each in lines) == line


def test_what_has_no_comma_cannot_be_cut() -> None:
    assert _wrapped("x" * 200) == "x" * 200
