"""Errors a user can act on: each text says what was found, where, and the next step.

The command lines print `str(error)` as one line and exit with code 2; see `kvsink.tools.cli`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KvsinkError(Exception):
    """Base of every error that kvsink raises on purpose."""


class UnknownName(KvsinkError):
    """A name that is not registered; lists the three nearest known ones.

    >>> str(UnknownName("method", "rotatkv", ["rtn", "klt", "rotatekv", "centred"]))
    "unknown method 'rotatkv'; nearest known: rotatekv, centred, klt"
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name = kind, name
        self.nearest = nearest_names(name, known)
        tail = f"; nearest known: {', '.join(self.nearest)}" if self.nearest else f"; no {kind} is known"
        super().__init__(f"unknown {kind} {name!r}{tail}" + (f". {hint}" if hint else ""))


class ModelError(KvsinkError):
    """A model folder, name or set of weights that cannot be used."""


class UnsupportedError(KvsinkError):
    """A valid request that kvsink does not carry out for this model or machine."""


class CalibrationError(KvsinkError):
    """Calibration text or statistics that are missing, too short or do not belong to this model."""


class SidecarError(KvsinkError):
    """`kvsink.json` or its tensors: missing, truncated, of another version or of another model."""


class EvaluationError(KvsinkError):
    """A text, window or cache that cannot be evaluated."""


class PictureError(KvsinkError):
    """Pictures with text that cannot be read, or that do not fit the model's prompts."""


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` known names most like `name`, best first; never empty while anything is known."""
    names = sorted(set(known))

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()

    return sorted(names, key=lambda other: (-likeness(other), other))[:count]
