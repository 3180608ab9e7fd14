"""Which cases of a long parametrised test run by default."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_collection_modifyitems


class Case:
    def __init__(self, name: str, *marks: Any) -> None:
        self.nodeid, self.marks = name, [m.mark for m in marks]

    def get_closest_marker(self, name: str) -> Any:
        return next((m for m in self.marks if m.name == name), None)

    def add_marker(self, mark: Any) -> None:
        self.marks.append(mark.mark)


def cases(args: list[str], *more: Any) -> list[Case]:
    items = [Case(f"tests/{test}.py::f[{i}]", pytest.mark.sample(3), *more) for test in "abcdef" for i in range(9)]
    items.append(Case("tests/a.py::alone"))
    pytest_collection_modifyitems(SimpleNamespace(args=args), items)  # type: ignore[arg-type]
    return [x for x in items if x.get_closest_marker("slow") is None]


def test_every_third_case_runs_and_another_one_of_another_test() -> None:
    found = [x.nodeid for x in cases(["tests"])]
    assert found.pop() == "tests/a.py::alone"
    first = {name: [int(x[-2]) for x in found if x.startswith(f"tests/{name}.py")] for name in "abcdef"}
    assert all(x == list(range(x[0], 9, 3)) for x in first.values())
    assert len({x[0] for x in first.values()}) > 1


def test_a_case_that_is_named_runs() -> None:
    assert len(cases(["tests/a.py::f[1]"])) == 6 * 9 + 1


def test_a_slow_case_stays_slow_and_is_not_counted() -> None:
    assert [x.nodeid for x in cases(["tests"], pytest.mark.slow)] == ["tests/a.py::alone"]
