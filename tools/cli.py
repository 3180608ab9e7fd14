"""What every command line shares: one line for an error, never a traceback.

Exit codes    0 done · 2 a KvsinkError, a wrong option, a disk or file problem · 130 interrupted · 1 a bug
              (KVSINK_DEBUG=1 shows the traceback of any of them)
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import click

Main = Callable[..., int]


def command_line(command: click.Command) -> Main:
    """Turn a click command into a `main(argv=None) -> exit code` that keeps the rules above."""

    def main(argv: Sequence[str] | None = None) -> int:
        _quiet()
        name = command.name or "kvsink"
        try:
            result = command.main(args=None if argv is None else list(argv), prog_name=name, standalone_mode=False)
            sys.stdout.flush()
        except BaseException as error:
            return _report(name, error)
        return result if isinstance(result, int) else 0

    main.__doc__ = command.help
    return main


def debugging() -> bool:
    """True when the user asked for tracebacks."""
    return os.environ.get("KVSINK_DEBUG", "") not in ("", "0")


def wide_console(file: TextIO) -> Any:
    """A rich console; where the output is no terminal, wide enough that tables are not folded."""
    from rich.console import Console

    return Console(file=file, width=None if file.isatty() else 140)


def _report(name: str, error: BaseException) -> int:
    """Print the one line that belongs to `error` and return its exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if debugging():
        traceback.print_exception(error)
    code, text = _explain(name, error)
    if isinstance(error, OSError) and error.errno == errno.EPIPE:  # the reader of our output went away
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  nothing more may be written at shutdown
        return code
    print(f"{name}: {' '.join(text.split())}", file=sys.stderr)
    return code


def _explain(name: str, error: BaseException) -> tuple[int, str]:
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return 130, "interrupted; nothing was left half-written"
    if isinstance(error, click.ClickException):
        return 2, f"{error.format_message()} See {name} --help"
    if isinstance(error, OSError):
        at = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return 2, f"no space left on the disk{at}. Free some and run it again"
        if error.errno is not None and error.filename:
            return 2, f"{error.strerror}{at}. Check the path and its permissions"
    if _is_kvsink_error(error):
        return 2, str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 2, "out of memory. Use a smaller --batch, shorter windows or another --device"
    # the Rust side of safetensors and tokenizers reports a full disk in words only
    if any(words in str(error) for words in ("No space left on device", "os error 28", "File too large", "os error 27")):
        return 2, "no space left on the disk, or the file is too large for it. Free some and run it again"
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return 1, f"unexpected {type(error).__name__}: {first}. Set KVSINK_DEBUG=1 for the traceback"


def _is_kvsink_error(error: BaseException) -> bool:
    from kvsink.errors import KvsinkError

    return isinstance(error, KvsinkError)


def _quiet() -> None:
    """Keep other libraries' advice out of the output, unless the user is debugging."""
    if debugging():
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
