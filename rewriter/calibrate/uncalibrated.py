"""What `calibration="none"` leaves to choose: a method that needs no statistics, and exact rows that need no text to be found.

Source     ours
Raises     CalibrationError for methods, protections and plans that need text, with the nearest that do without
"""

from __future__ import annotations

from typing import Any

from kvsink.calibrate.design import needs_calibration
from kvsink.codecs.protect import parse_policies
from kvsink.errors import CalibrationError
from kvsink.methods import Method, methods

__all__ = ["FIRST_ROWS", "METHOD", "default_method", "default_protection", "is_none", "refuse"]

METHOD = "rotated"  # the default without statistics
FIRST_ROWS = "first:4"  # the default of exact rows where nobody has looked where sinks are
_FOUND_IN_TEXT = ("kvsink", "sinks", "pivots")


def is_none(calibration: Any) -> bool:
    """Whether the user gives no text, ids or record at all."""
    return isinstance(calibration, str) and calibration == "none"


def default_method(calibration: Any) -> str:
    """The method where the user names none."""
    return METHOD if is_none(calibration) else "klt"


def default_protection(m: Method, calibration: Any) -> str:
    """The rows that stay exact where the user names none: the method's own, but the first ones where its rule asks for text."""
    asks = any(p.kind in _FOUND_IN_TEXT for p in parse_policies(m.protect))
    return FIRST_ROWS if is_none(calibration) and asks else m.protect


def refuse(m: Method, statistics: bool, protect: str) -> None:
    """Raise what a method that needs statistics, or a protection that is found in text, lacks without calibration."""
    if statistics:
        free = [n for n, o in methods().items() if not any(needs_calibration(o.side(w, 4)) for w in ("key", "value"))]
        raise CalibrationError(
            f"{m.name} is made from statistics of text, and calibration is 'none'; use {METHOD}, the default without "
            f"(or {', '.join(n for n in free if n != METHOD)}), --calibration random (tokens instead of text) or builtin"
        )
    raise CalibrationError(
        f"the rows of protection {protect!r} are found in text, and calibration is 'none'; use --protect {FIRST_ROWS}, or "
        "--profile with a profile of this model"
    )
