"""The CUDA driver by ctypes, and the error that says why it or a kernel cannot be had.

Source     ours
Raises     NativeError with the reason in one line
"""

from __future__ import annotations

import ctypes
from functools import cache

__all__ = ["NativeError", "check", "driver"]


class NativeError(RuntimeError):
    """Why a kernel cannot be had here."""


@cache
def driver() -> ctypes.CDLL:
    """The driver's library. Raises NativeError where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NativeError("libcuda.so.1 is not found") from error


def check(code: int, what: str) -> None:
    """Raise NativeError where the driver answers with an error."""
    if code:
        raise NativeError(f"CUDA driver error {code} in {what}")
