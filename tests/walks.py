"""The way that something takes through the files of the package, as the stack shows it, and who is asked on the way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from kvsink.kernels import backends

ROOT = Path(__file__).resolve().parents[1]


def of_the_package(frame: Any) -> bool:
    """Whether a frame runs code of the package, wherever its environment lies."""
    return bool(frame.f_globals.get("__name__", "").partition(".")[0] == "kvsink")


def files_from(first: str) -> list[str]:
    """Files of the package on the stack, outermost first, from the outermost of that name on; neighbours in one file once."""
    files, frame = list[str](), sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if of_the_package(frame) and files[-1:] != [file]:
            files.append(file)
        frame = frame.f_back  # type: ignore[assignment]
    names = [str(Path(file).relative_to(ROOT)) for file in reversed(files)]
    return names[names.index(first) :]


def rows_given_to_the_table(run: Callable[[], Any]) -> list[str]:
    """Functions of `kvsink.kernels.backends` that are handed tensors, or the `Call` that holds them, while something runs. What a
    `Call` says of itself does not count."""
    told: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or code.co_filename != backends.__file__:
            return
        given = [frame.f_locals[name] for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
        alone = len(given) == 1 and isinstance(given[0], backends.Call) and hasattr(backends.Call, code.co_name)
        if not alone and any(isinstance(x, (Tensor, backends.Call)) for x in given):
            told.append(code.co_name)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return told
