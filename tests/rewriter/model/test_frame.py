"""What a forward pass knows of its rows is asked of a GPU once."""

from __future__ import annotations

from kvsink.model.frame import Frame


def test_the_rows_before_are_read_once() -> None:
    reads = []

    class Number:
        def __int__(self) -> int:
            reads.append(1)
            return 7

    frame = Frame(start=Number())
    assert [frame.rows_before(), frame.rows_before()] == [7, 7] and len(reads) == 1
    assert Frame(start=3).rows_before() == 3
