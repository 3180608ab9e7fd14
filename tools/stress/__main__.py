"""python -m kvsink.tools.stress: random operations, damaged files, kills, long generation and endless reuse, in large counts.

Every trial is drawn from its own number; a failure prints it, and `--first N --count 1` sees it again.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from kvsink.errors import KvsinkError
from kvsink.tools.cli import command_line

_COUNT = click.option("--count", default=1000, show_default=True, type=click.IntRange(1), help="Trials.")
_FIRST = click.option("--first", default=0, show_default=True, type=click.IntRange(0), help="Number of the first trial.")
_METHOD = click.option("--method", default="klt", show_default=True, help="A name of kvsink.methods().")


@click.group("kvsink-stress", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Random trials of what must never lose anything. Exit code 0: nothing was lost; 2: the failures are printed."""
    import torch

    torch.set_num_threads(1)


@command.command()
@_COUNT
@_FIRST
@click.option("--length", default=8, show_default=True, type=click.IntRange(1), help="Operations of a sequence.")
def operations(count: int, first: int, length: int) -> None:
    """Sequences of cache operations against a plain model of the cache."""
    from kvsink.tools.stress.operations import CASES, run_sequence

    click.echo(f"{count} sequences of {length} operations, {len(CASES)} kinds of cache")
    _trials(range(first, first + count), lambda seed: run_sequence(seed, length), "sequences")


@command.command()
@_COUNT
@_FIRST
def files(count: int, first: int) -> None:
    """Damaged files: refused with a KvsinkError, or of the same meaning."""
    from kvsink.tools.stress.files import Bench

    with tempfile.TemporaryDirectory(prefix="kvsink-stress-") as folder:
        bench = Bench(Path(folder))
        _trials(range(first, first + count), bench.run, "files")


@command.command()
@_COUNT
@_FIRST
@click.option(
    "--what",
    default="kill",
    show_default=True,
    type=click.Choice(["kill", "full-disk", "rivals", "readers"]),
    help="What befalls the rewrite.",
)
def kills(count: int, first: int, what: str) -> None:
    """kvsink-rewrite killed at a random moment, without room, against itself, or read while it is replaced."""
    from kvsink.tools.stress.kills import Yard

    with tempfile.TemporaryDirectory(prefix="kvsink-stress-") as folder:
        yard = Yard(Path(folder))
        click.echo(f"an undisturbed rewrite takes {yard.seconds:.2f} s")
        _trials(range(first, first + count), getattr(yard, what.replace("-", "_")), what)


@command.command()
@click.option("--tokens", default=100_000, show_default=True, type=click.IntRange(1))
@_METHOD
def long(tokens: int, method: str) -> None:
    """One generation of very many tokens: no drift of bytes, positions or codes."""
    from kvsink.tools.stress.endurance import generate_long

    began = time.monotonic()
    with _bar("tokens", tokens) as told:
        wrong = generate_long(tokens, method, told=told)
    if wrong:
        raise KvsinkError(f"{method}: {wrong}")
    click.echo(f"{tokens} tokens of {method} in {time.monotonic() - began:.0f} s: no drift")


@command.command()
@click.option("--rounds", default=20_000, show_default=True, type=click.IntRange(1))
@_METHOD
def reuse(rounds: int, method: str) -> None:
    """One cache, used and reset again and again: no growth of memory."""
    from kvsink.tools.stress.endurance import reuse as loop

    with _bar("rounds", rounds) as told:
        took = loop(rounds, method, told=told)
    click.echo(
        f"{took.rounds} rounds of {method} in {took.seconds:.0f} s: "
        f"resident {took.rss[0] / 2**20:.1f} → {took.rss[1] / 2**20:.1f} MiB, "
        f"Python {took.traced[0]} → {took.traced[1]} bytes, objects {took.objects[0]} → {took.objects[1]}, "
        f"cache {took.nbytes[0]} → {took.nbytes[1]} bytes"
    )
    if wrong := took.wrong():
        raise KvsinkError(f"{method}: {wrong}")


class _bar:
    """A progress bar on the error stream; gives a function that is told how far things are."""

    def __init__(self, what: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bars = Progress(*columns, console=Console(file=sys.stderr))
        self.task = self.bars.add_task(what, total=total)

    def __enter__(self) -> Callable[[int], None]:
        self.bars.start()
        return lambda done: self.bars.update(self.task, completed=done)

    def __exit__(self, *error: Any) -> None:
        self.bars.stop()


def _trials(seeds: Iterable[int], trial: Callable[[int], str | None], what: str) -> None:
    """Run every trial; print those that failed, and at the end how many did."""
    seeds, failures, began = list(seeds), 0, time.monotonic()
    with _bar(what, len(seeds)) as told:
        for done, seed in enumerate(seeds, 1):
            wrong = trial(seed)
            if wrong is not None:
                failures += 1
                click.echo(" ".join(wrong.split()))
            told(done)
    click.echo(f"{len(seeds)} {what}, {failures} failures, {time.monotonic() - began:.0f} s")
    if failures:
        raise KvsinkError(f"{failures} of {len(seeds)} {what} failed; see above")


main = command_line(command)

if __name__ == "__main__":
    sys.exit(main())
