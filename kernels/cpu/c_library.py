"""The C files beside this one, built by the system's C compiler at first use and kept in the cache folder.

Source     ours
Raises     nothing: a file that cannot be built gives None and one warning; KVSINK_CPU_KERNEL=0 gives None without one
"""

from __future__ import annotations

import ctypes
import hashlib
import operator
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import cache_folder

__all__ = ["EXACT", "FLOAT_TYPES", "LOOSE", "Plan", "c_library", "machine"]

FOLDER = Path(__file__).parent
EXACT = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC")
"""Sums and quotients as they are written: what decides a code."""
LOOSE = (
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
    "-shared",
    "-fPIC",
)
"""Sums in any order: what is compared within a bound."""


FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""As half.h numbers them."""


class Plan:
    """What the calls of a C function over one state have in common. It is kept as long as the first tensor of the state lives, and
    made anew when the codec or any other tensor is not the one it was."""

    kept: ClassVar[dict[int, tuple[weakref.ref[Tensor], Any]]]  # by the identity of the first tensor, one dict for each kind

    def __init_subclass__(cls) -> None:
        cls.kept = {}

    def __init__(self, c: Any, state: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self.codec, self.others = c, (*state[1:], *params)
        self.tables: list[Tensor] = []  # what the structures point to and nobody else holds

    @classmethod
    def of(cls, c: Any, state: Sequence[Tensor], params: Sequence[Tensor]) -> Any:
        """The plan that is kept, if it is right, else a new one."""
        first, key = state[0], id(state[0])
        held = cls.kept.get(key)
        if held is not None and held[0]() is first and held[1].codec is c:
            plan, others = held[1], (*state[1:], *params)
            if len(plan.others) == len(others) and all(map(operator.is_, plan.others, others)):
                return plan
        plan = cls(c, state, params)
        cls.kept[key] = weakref.ref(first, lambda ref: cls._forget(key, ref)), plan
        return plan

    @classmethod
    def _forget(cls, key: int, ref: weakref.ref[Tensor]) -> None:
        held = cls.kept.get(key)
        if held is not None and held[0] is ref:
            del cls.kept[key]

    def pointer(self, t: Tensor) -> int:
        """The address of a table, float32 where it is no table of integers; it lives as long as the plan."""
        self.tables.append((t.float() if t.is_floating_point() else t).contiguous())
        return self.tables[-1].data_ptr()


@cache
def c_library(name: str, flags: tuple[str, ...], sizes: tuple[tuple[str, int], ...], what: str) -> ctypes.CDLL | None:
    """The library of `name`.c. sizes: functions that tell the bytes of its structures, and what the caller takes them for; what:
    the words of the warning that say what runs in PyTorch instead."""
    if os.environ.get("KVSINK_CPU_KERNEL", "1") == "0":
        return None
    source = FOLDER / f"{name}.c"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    found = shutil.which(compiler) or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    try:
        if found is None:
            raise OSError("no C compiler found")
        version = subprocess.run([found, "--version"], capture_output=True, check=True).stdout
        text = source.read_bytes() + b"".join(p.read_bytes() for p in sorted(FOLDER.glob("*.h")))
        key = hashlib.sha256(text + version + " ".join(flags).encode() + machine()).hexdigest()[:24]
        folder = cache_folder() / "kernels"
        built = folder / f"{name}-{key}.so"
        if not built.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                fresh = Path(scratch) / built.name
                subprocess.run([found, *flags, "-o", str(fresh), str(source), "-lm"], check=True, capture_output=True)
                os.replace(fresh, built)
        library = ctypes.CDLL(str(built))
        for function, size in sizes:
            getattr(library, function).restype = ctypes.c_int64
            if getattr(library, function)() != size:
                raise OSError(f"{built} was built from another layout; remove it")
        return library
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        reason = (said.decode(errors="replace").strip().splitlines() or [str(error)])[0]
        warnings.warn(f"{what}: its C kernel was not built ({reason}). Install a C compiler with OpenMP, or set CC", stacklevel=2)
        return None


def machine() -> bytes:
    """What -march=native depends on: a cache folder may be shared between machines."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").encode()
    except OSError:
        import platform

        return f"{platform.machine()} {platform.processor()}".encode()
