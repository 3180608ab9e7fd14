"""Build the nodes of com.kvsink as a custom-op library for onnxruntime: `python -m kvsink.tools.build_ort_ops [OUT.so]`.

The library carries kernels for every node of flavour `custom`, with OpenMP threads and vectorised loops; it needs a C++17 compiler
of GCC's command line and nothing else, since it declares what it calls of the runtime's C API itself (`tools/ort_ops/runtime.h`).
`OnnxGenerator(path, library=...)` loads it.

Source     ours
Cache      without OUT.so, a file in the user's cache folder, named by a hash of sources, compiler and processor
Raises     KvsinkError when there is no compiler, it fails, or OUT.so cannot be written; exit code 2 on the command line
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kvsink.errors import KvsinkError
from kvsink.kernels.base import cache_folder
from kvsink.kernels.cpu.c_library import EXACT, FOLDER, LOOSE, machine
from kvsink.kernels.hadamard import hadamard_matrix
from kvsink.kernels.levels import even_levels, even_thresholds, lloyd_max, thresholds
from kvsink.kernels.trellis import TRELLIS_WIDTHS, subsets, trellis_levels

__all__ = ["build", "compiler", "main"]

SOURCES = Path(__file__).parent / "ort_ops"
PARTS = ((FOLDER / "attend.c", LOOSE), (SOURCES / "walks.c", EXACT))
"""C of the cache's own path on the CPU, with its flags: attention of one new row over packed rows; walks of a trellis."""
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


def compiler() -> str | None:
    """The C++ compiler: $CXX, else g++, c++ or clang++ on the path."""
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    return next((found for name in (*named, "g++", "c++", "clang++") if (found := shutil.which(name))), None)


def levels_header() -> str:
    """levels.h: tables by width, and the cores of Hadamard matrices, as float32."""
    lines = ["// Written by build_ort_ops; see kvsink.kernels.levels and kvsink.kernels.hadamard.", "#pragma once"]

    def numbers(name: str, values: list[float]) -> None:
        lines.append(f"static const float {name}[] = {{{', '.join(f'{v:.9e}f' for v in values)}}};")

    tables = {"Levels": lloyd_max, "Thresholds": thresholds, "EvenLevels": even_levels, "EvenThresholds": even_thresholds}
    for name, table in tables.items():
        for width in range(1, 9):
            numbers(f"k{name}{width}", table(width).tolist())
        lines.append(f"static const float* const k{name}[] = {{nullptr, {', '.join(f'k{name}{w}' for w in range(1, 9))}}};")
    walks = [(trellis_levels(w, "cpu"), *subsets(w, "cpu")) for w in TRELLIS_WIDTHS]
    for name, of in zip(("WalkLevels", "SubsetLevels", "SubsetEdges"), zip(*walks, strict=True), strict=True):
        for width, known in zip(TRELLIS_WIDTHS, of, strict=True):
            numbers(f"k{name}{width}", known.flatten().tolist() or [0.0])  # of one bit no subset has an edge
        lines.append(f"static const float* const k{name}[] = {{nullptr, {', '.join(f'k{name}{w}' for w in TRELLIS_WIDTHS)}}};")
    for order in (12, 20):
        numbers(f"kCore{order}", hadamard_matrix(order).flatten().tolist())
    return "\n".join(lines) + "\n"


def _run(command: list[str], source: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise KvsinkError(f"{command[0]} could not build {source}: {first[:300]}")


def build(out: str | Path | None = None) -> Path:
    """Compile the library, to `out` or into the cache folder; one that stands there already is taken as it is."""
    found = compiler()
    if found is None:
        raise KvsinkError("no C++ compiler found; install g++, or set CXX")
    version = subprocess.run([found, "--version"], capture_output=True, check=False).stdout
    header = levels_header()
    parts = [p.read_bytes() for p in (*sorted(SOURCES.iterdir()), FOLDER / "attend.c", *sorted(FOLDER.glob("*.h")))]
    flags = " ".join((*FLAGS, *LOOSE, *EXACT)).encode()
    key = hashlib.sha256(b"".join(parts) + header.encode() + version + flags + machine()).hexdigest()[:24]
    target = Path(out) if out is not None else cache_folder() / "kernels" / f"ort-ops-{key}.so"
    if out is None and target.is_file():
        return target
    try:
        if out is None:
            target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            (Path(scratch) / "levels.h").write_text(header, encoding="utf-8")
            fresh = Path(scratch) / "ops.so"
            include, objects = [f"-I{folder}" for folder in (scratch, SOURCES, FOLDER)], []
            for source, of_part in PARTS:
                objects.append(str(Path(scratch) / f"{source.stem}.o"))
                compiled = [flag for flag in of_part if flag != "-shared"]
                _run([found, "-x", "c", "-c", *compiled, *include, "-o", objects[-1], str(source)], source)
            _run([found, *FLAGS, *include, "-o", str(fresh), str(SOURCES / "ops.cpp"), *objects], SOURCES / "ops.cpp")
            os.replace(fresh, target)
    except OSError as error:
        raise KvsinkError(f"{target} cannot be written ({error.strerror}); choose another path") from error
    return target


def main(argv: list[str] | None = None) -> int:
    """Print the path of the library."""
    given = sys.argv[1:] if argv is None else argv
    if len(given) > 1 or any(a.startswith("-") for a in given):
        print("usage: python -m kvsink.tools.build_ort_ops [OUT.so]")
        return 0 if given in (["-h"], ["--help"]) else 2
    try:
        print(build(*given))
    except KvsinkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
