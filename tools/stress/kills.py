"""`kvsink-rewrite` killed at random moments, on a full disk, and against itself: OUT_DIR is absent or complete, always.

Every run is a process of its own, forked from a server that has everything imported and no threads, so that its life is the
rewrite and not the start of Python. After a run dies, OUT_DIR must not exist, or hold what was there before, or load and give the
numbers of an undisturbed run; one more run into the same place must succeed and leave nothing beside it.

Source     ours
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from kvsink.tools.stress.models import tiny_folder, tokens

__all__ = ["Yard"]

# Forking the caller would copy locks that its other threads hold (progress bars, thread pools), which nobody then opens.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["kvsink.tools.rewrite", "kvsink.folder.loading"])
_PATIENCE = 300.0  # seconds, for what takes one


class Yard:
    """A model folder, a text, and what an undisturbed rewrite of it gives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source, self.text = tiny_folder(folder / "model"), folder / "text.txt"
        self.text.write_text("the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 8)
        self.out = folder / "place" / "out"
        self.ids = tokens(1, 24, seed=3)
        began = time.monotonic()
        assert self.wait(self.start("rotatekv")) == 0, "the undisturbed rewrite failed"
        self.seconds = time.monotonic() - began
        self.logits = {"rotatekv": self.load()}
        self.clear()
        assert self.wait(self.start("rtn")) == 0, "the undisturbed rewrite failed"
        self.logits["rtn"] = self.load()
        self.clear()

    def clear(self) -> None:
        """Remove OUT_DIR and everything beside it."""
        shutil.rmtree(self.out.parent, ignore_errors=True)

    def start(self, method: str, most: int | None = None) -> BaseProcess:
        """Begin a run of the command line; with `most`, one that may not let a file grow beyond so many bytes."""
        return _begin(_rewrite, self.source, self.out, self.text, method, most)

    @staticmethod
    def wait(process: BaseProcess) -> int:
        """The exit code of a run; negative for the signal that ended it. TimeoutError if it does not end."""
        process.join(_PATIENCE)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"a run did not end within {_PATIENCE:.0f} s")
        return process.exitcode

    def load(self) -> torch.Tensor:
        """What the model in OUT_DIR gives."""
        return _logits(self.out, self.ids)

    def beside(self) -> list[str]:
        """Names beside OUT_DIR."""
        return sorted(p.name for p in self.out.parent.iterdir() if p != self.out) if self.out.parent.is_dir() else []

    def sound(self, allowed: tuple[str, ...], absent: bool) -> str | None:
        """What is wrong with OUT_DIR, or None: it is absent where it may be, or one of the allowed results and complete."""
        if not self.out.exists():
            return None if absent else "OUT_DIR is gone"
        try:
            found = self.load()
        except Exception as error:  # whatever it is, it is what this looks for
            return f"OUT_DIR is there and does not load: {type(error).__name__}: {error}"
        known = any(torch.equal(found, self.logits[m]) for m in allowed)
        return None if known else "OUT_DIR holds neither the old nor the new model"

    # -- trials --------------------------------------------------------------------------------------------------------

    def kill(self, seed: int) -> str | None:
        """One kill; in half of the trials an older OUT_DIR stands there."""
        pick = random.Random(seed)
        existing = pick.random() < 0.5
        self.clear()
        if existing:
            self.wait(self.start("rtn"))
        run = self.start("rotatekv")
        time.sleep(self.seconds * pick.random() * 1.05)
        run.kill()
        self.wait(run)
        wrong = self.sound(("rtn", "rotatekv") if existing else ("rotatekv",), absent=not existing)
        if wrong is None and self.wait(self.start("rotatekv")) != 0:
            wrong = "the run after the kill failed"
        wrong = wrong or self.sound(("rotatekv",), absent=False)
        if wrong is None and (left := self.beside()):
            wrong = f"the run after the kill left {', '.join(left)}"
        return None if wrong is None else f"kill {seed}: {wrong}"

    def full_disk(self, seed: int) -> str | None:
        """No file may grow beyond a random size: the run must exit with 2, and OUT_DIR and its neighbours stay as they were."""
        pick = random.Random(seed)
        most = pick.choice((0, 100, 1000, 10_000, 50_000, 200_000))
        existing = pick.random() < 0.5
        self.clear()
        if existing:
            self.wait(self.start("rtn"))

        code = self.wait(self.start("rotatekv", most))
        wrong = None if code == 2 else f"exit code {code}"
        wrong = wrong or self.sound(("rtn",) if existing else (), absent=not existing)
        wrong = wrong or (f"it left {', '.join(left)}" if (left := self.beside()) else None)
        return None if wrong is None else f"files of at most {most} bytes, {seed}: {wrong}"

    def rivals(self, seed: int) -> str | None:
        """Two runs into one OUT_DIR at the same time: one result stands there, complete, and nothing beside it."""
        pick = random.Random(seed)
        self.clear()
        one = self.start("rotatekv")
        time.sleep(self.seconds * pick.random())
        codes = [self.wait(run) for run in (self.start("rtn"), one)]
        wrong = None if all(code in (0, 2) for code in codes) and 0 in codes else f"exit codes {codes}"
        wrong = wrong or self.sound(("rtn", "rotatekv"), absent=False)
        wrong = wrong or (f"they left {', '.join(left)}" if (left := self.beside()) else None)
        return None if wrong is None else f"rivals {seed}: {wrong}"

    def readers(self, seed: int) -> str | None:
        """Processes that load OUT_DIR while it is replaced again and again see one of the two models, whole."""
        self.clear()
        self.wait(self.start("rtn"))
        readers = [_begin(_read, self.out, self.ids, list(self.logits.values()), 2 * self.seconds) for _ in range(2)]
        codes = [self.wait(self.start(method)) for method in ("rotatekv", "rtn")]
        read = [self.wait(reader) for reader in readers]
        return None if codes == [0, 0] and read == [0, 0] else f"readers {seed}: writers {codes}, readers {read}"

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _begin(what: Any, *args: Any) -> BaseProcess:
    """Run a function of this module in a process of its own."""
    process = _PROCESSES.Process(target=what, args=args)
    process.start()
    return process


def _rewrite(source: Path, out: Path, text: Path, method: str, most: int | None) -> None:
    """In a process of its own: the command line, silent."""
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if most is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    from kvsink.tools.rewrite import main

    options = ["--method", method, "--calibration", str(text), "--calibration-tokens", "512", "--device", "cpu"]
    os._exit(main([str(source), str(out), *options, "--eval-windows", "0", "--force"]))


def _read(out: Path, ids: torch.Tensor, known: list[torch.Tensor], seconds: float) -> None:
    """In a process of its own: load OUT_DIR again and again; exit code 3 for numbers of neither model, 4 for another error."""
    from kvsink.errors import KvsinkError

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            found = _logits(out, ids)
        except KvsinkError:
            continue  # weights of one and plan of the other: refused, which is right
        except Exception as error:
            print(f"reader: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(4)
        if not any(torch.equal(found, x) for x in known):
            os._exit(3)


def _logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits [1, V] of the eighth token that the model in a folder generates; one thread, so that every process sums alike."""
    from kvsink.folder.loading import load_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = load_model(folder)
        with torch.no_grad():
            settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            logits: torch.Tensor = model.generate(ids, **settings).logits[-1]
            return logits
    finally:
        torch.set_num_threads(threads)
