"""A folder that appears complete or not at all, whoever else writes to the same place, and whenever one is killed.

Formula    built beside its final place under a hidden name that its writer holds a lock on; put there by one rename; an existing
           folder is exchanged with it in one step where the system can (Linux), else kept aside until the new one stands
Source     ours; renameat2(2), flock(2)
Differs    leftovers are told from folders at work by their lock, which the kernel lets go when a process dies
Raises     KvsinkError when another run has put a folder there meanwhile; OSError from the disk
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvsink.errors import KvsinkError

try:
    import fcntl
except ImportError:  # no such locks on Windows: leftovers are then taken for folders at work and stay
    fcntl = None  # type: ignore[assignment]

__all__ = ["building", "exchange", "sweep"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def building(target: Path, force: bool) -> Iterator[Path]:
    """A hidden folder beside `target`, locked; when the block ends it takes the place of `target`, if it fails it is gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    build, lock = _locked_folder(target)
    try:
        yield build
        os.chmod(build, 0o755)
        exchange(build, target, force)
    finally:
        shutil.rmtree(build, ignore_errors=True)  # after an exchange: what stood there before
        if lock is not None:
            os.close(lock)


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """A new hidden folder and the lock on it; another one where a sweep has taken the first before it was locked."""
    while True:
        build = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        if fcntl is None:
            return build, None
        lock = os.open(build, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if build.is_dir():
            return build, lock
        os.close(lock)


def exchange(build: Path, target: Path, force: bool = True) -> None:
    """Put `build` where `target` is. Without `force` only an empty folder may stand there."""
    if target.is_dir() and not force and any(target.iterdir()):
        raise KvsinkError(f"{target} was made by another run meanwhile; pass --force to replace it, or choose another OUT_DIR")
    for _ in range(100):  # another run may take the place away or put something there between two steps
        try:
            os.rename(build, target)  # onto nothing, or onto an empty folder
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if not force:
            raise KvsinkError(f"{target} was made by another run meanwhile; pass --force to replace it, or choose another OUT_DIR")
        if _swap(build, target) or _set_aside(build, target):
            return
    raise KvsinkError(f"{target} is written by other runs again and again; choose another OUT_DIR")


def _swap(a: Path, b: Path) -> bool:
    """Exchange two folders in one step; False where this system or disk cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def _set_aside(build: Path, target: Path) -> bool:
    """The same in two steps; between them the old folder waits under a name that the next run brings back."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        os.rename(target, aside / "old")
    except FileNotFoundError:
        aside.rmdir()
        return False
    try:
        os.rename(build, target)
    except BaseException:
        os.rename(aside / "old", target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
    return True


def sweep(target: Path) -> None:
    """Remove what killed runs left beside `target`, and bring back a target one of them had set aside."""
    if not target.parent.is_dir():
        return
    for left in target.parent.glob(f".{target.name}.*.old"):
        if not target.exists() and (left / "old").is_dir():
            with contextlib.suppress(OSError):
                os.rename(left / "old", target)
        shutil.rmtree(left, ignore_errors=True)
    for left in target.parent.glob(f".{target.name}.*.partial"):
        if left.is_dir() and fcntl is not None:
            _remove_abandoned(left)


def _remove_abandoned(build: Path) -> None:
    """Remove a hidden folder that nobody works on any more."""
    try:
        lock = os.open(build, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(build, ignore_errors=True)  # still locked: who has just made it waits and makes another
    except OSError:
        pass  # somebody does
    finally:
        os.close(lock)
