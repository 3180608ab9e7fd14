"""One line and the right exit code for everything that can go wrong on a command line."""

from __future__ import annotations

import errno

import click
import pytest

from kvsink.errors import KvsinkError
from kvsink.tools.cli import command_line


def run(raised: BaseException | None, argv: list[str] | None = None) -> int:
    @click.command("kvsink-test")
    @click.option("--number", type=int)
    def command(number):
        if raised is not None:
            raise raised
        click.echo(f"number {number}")

    return command_line(command)(argv or [])


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (KvsinkError("layer 3: bits=9.\nPass 1 to 8"), 2, "kvsink-test: layer 3: bits=9. Pass 1 to 8"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), 2, "no space left on the disk (/out/x)"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 2, "Permission denied (/out)"),
        (RuntimeError("Error: I/O error: No space left on device (os error 28)"), 2, "no space left on the disk"),
        (MemoryError(), 2, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("first\nsecond"), 1, "unexpected RuntimeError: first. Set KVSINK_DEBUG=1"),
        (AssertionError(), 1, "unexpected AssertionError: no message"),
    ],
)
def test_one_line_and_exit_code(raised, code, words, capsys, monkeypatch):
    monkeypatch.delenv("KVSINK_DEBUG", raising=False)
    assert run(raised) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]


def test_success_and_help(capsys):
    assert run(None, ["--number", "3"]) == 0
    assert run(None, ["--help"]) == 0
    assert capsys.readouterr().out.startswith("number 3\nUsage: kvsink-test")


@pytest.mark.parametrize("argv", [["--number", "x"], ["--numbr", "3"], ["extra"]])
def test_wrong_options(argv, capsys):
    assert run(None, argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("kvsink-test: ")
    assert "See kvsink-test --help" in lines[0]


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("KVSINK_DEBUG", "1")
    assert run(KvsinkError("why")) == 2
    assert "Traceback" in capsys.readouterr().err


def test_closed_pipe_is_quiet(capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert run(BrokenPipeError(errno.EPIPE, "Broken pipe")) == 1
    assert capsys.readouterr().err == ""
