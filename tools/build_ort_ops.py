"""Build the nodes of com.kvsink as a custom-op library for onnxruntime: `python -m kvsink.tools.build_ort_ops [OUT.so]`.

The library carries kernels for every node of flavour `custom`, with OpenMP threads and vectorised loops; it needs a C++17 compiler
of GCC's command line and nothing else, since it declares what it calls of the runtime's C API itself (`tools/ort_ops/runtime.h`).
`--cuda MODEL.onnx`, of a model in float16, adds machine code of the kernels of `kvsink.kernels.cuda` for its layers, compiled for
the card at hand or for each `--capability`; that needs NVRTC or nvcc. `OnnxGenerator(path, library=...)` loads it.

Source     ours
Cache      without OUT.so, a file in the user's cache folder, named by a hash of sources, compiler and processor
Raises     KvsinkError when there is no compiler, it fails, or OUT.so cannot be written; exit code 2 on the command line
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from kvsink.errors import KvsinkError, UnknownName
from kvsink.export import OnnxGenerator
from kvsink.export.manifest import manifest_path, read_manifest
from kvsink.export.session import Provider
from kvsink.export.tiles import variant_name
from kvsink.kernels.base import cache_folder
from kvsink.kernels.cpu.c_library import EXACT, FOLDER, LOOSE, machine
from kvsink.kernels.cuda import launch, module, variants
from kvsink.kernels.hadamard import hadamard_matrix
from kvsink.kernels.levels import even_levels, even_thresholds, lloyd_max, thresholds
from kvsink.kernels.trellis import TRELLIS_WIDTHS, subsets, trellis_levels

__all__ = ["build", "compiler", "main", "runner_for"]

SOURCES = Path(__file__).parent / "ort_ops"
SEGMENTS = 4  # of exact rows, as prompt.cu has them
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


# -- machine code for CUDA ----------------------------------------------------------------------------------------------


class _Enter(ctypes.Structure):
    """`EnterParams` of prompt.cu."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("k", "v", "exact_k", "exact_v", "slot", "score")),
        *((n, ctypes.c_void_p * SEGMENTS) for n in ("best", "row")),
        *((n, ctypes.c_int * SEGMENTS) for n in ("capacity", "count")),
        *((n, ctypes.c_int) for n in ("segments", "E", "H", "S", "D", "first")),
    ]  # fmt: skip


class _Lay(ctypes.Structure):
    """`LayParams` of prompt.cu."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("k", "v", "exact_k", "exact_v", "slot")),
        *((n, ctypes.c_int) for n in ("E", "H", "S", "D")),
    ]  # fmt: skip


class _Rows(ctypes.Structure):
    """`RowsParams` of prompt.cu."""

    _fields_ = [*((n, ctypes.c_void_p) for n in ("x", "y")), *((n, ctypes.c_int) for n in ("H", "S", "D"))]


_TYPES = {ctypes.c_void_p: "void*", ctypes.c_int: "int", ctypes.c_longlong: "long long", ctypes.c_float: "float"}
_ARGUMENTS = {
    "AttendArguments": launch.AttendArguments,
    "RowArguments": launch.RowArguments,
    "EnterArguments": _Enter,
    "LayArguments": _Lay,
    "RowsArguments": _Rows,
}
PROMPT = "prompt"


def _struct(name: str, made: Any) -> str:
    """A structure of arguments in C++, from the one that Python launches with."""
    fields = []
    for field, kind in made._fields_:
        of, count = (kind._type_, f"[{kind._length_}]") if hasattr(kind, "_length_") else (kind, "")
        fields.append(f"{_TYPES[of]} {field}{count};")
    return f"struct {name} {{ {' '.join(fields)} }};\nstatic_assert(sizeof({name}) == {ctypes.sizeof(made)});"


def _sources(models: Sequence[Path], capabilities: Sequence[str]) -> list[tuple[str, variants.Card, variants.Variant | None, str]]:
    """Name, card, variant (None: what prompts ask for besides) and source of the code that models need. Raises KvsinkError."""
    asked: dict[str, variants.Variant] = {}
    for path in models:
        kernels = read_manifest(path).get("kernels")
        if not kernels:
            raise KvsinkError(f'{manifest_path(path)} names no kernels for CUDA; export flavour custom with dtype="float16"')
        for name, fields in kernels.items():
            given: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in fields.items()}
            try:
                asked[name] = variants.Variant(**given)
            except TypeError as error:
                what = f"{manifest_path(path)} names layers that these kernels do not know"
                raise KvsinkError(f"{what} ({error}); export the model again") from error
            if variant_name(asked[name]) != name:
                raise KvsinkError(f"{manifest_path(path)} names other layers than it describes; export the model again")
    if capabilities and not asked:
        raise KvsinkError("a capability is of kernels for CUDA; name a model that needs them with --cuda")
    if not asked:
        return []
    if capabilities:
        cards = [variants.card_named(c) for c in capabilities]
    elif torch.cuda.is_available():
        cards = [variants.card_of(torch.device("cuda", 0))]
    else:
        raise KvsinkError("there is no GPU here to compile for; name one, for example --capability 9.0")
    prompt = (SOURCES / "prompt.cu").read_text(encoding="utf-8")
    return [
        item
        for card in dict.fromkeys(cards)
        for item in ((PROMPT, card, None, prompt), *((name, card, v, v.source(card)) for name, v in sorted(asked.items())))
    ]


def images_header(found: Sequence[tuple[str, variants.Card, variants.Variant | None, str]]) -> str:
    """images.h: the structures of arguments, numbers of kvsink.kernels.cuda, and what machine code there is."""
    lines = ["// Written by build_ort_ops; see kvsink.kernels.cuda.", "#pragma once", "#include <vector>"]
    lines += [_struct(name, made) for name, made in _ARGUMENTS.items()]
    lines.append(f'constexpr const char* kPromptKernels = "{PROMPT}";')
    numbers = {
        "kSpare": module.SPARE, "kPartWords": module.PART_WORDS, "kMostRows": module.MOST_ROWS, "kSingleRows": module.SINGLE_ROWS,
        "kFew": variants.FEW, "kRowCost": variants.ROW_COST,
    }  # fmt: skip
    lines += [f"constexpr int {name} = {number};" for name, number in numbers.items()]
    fields = "const char* name; int capability; const unsigned char* begin; int groups, warps, single_row, many, ahead;"
    lines.append(f"struct Image {{ {fields} }};")
    entries = []
    for i, (name, card, v, _) in enumerate(found):
        lines.append(f'extern "C" const unsigned char kvsink_image_{i}[];')
        shape = v.shape(card) if v is not None else None
        rest = (shape.groups(v.repeats), shape.warps, v.single_row, v.many, v.ahead) if v is not None and shape else (0,) * 5
        entries.append(f'{{"{name}", {card.target}, kvsink_image_{i}, {", ".join(str(int(n)) for n in rest)}}}')
    lines.append(f"static const std::vector<Image> kImages = {{{', '.join(entries)}}};")
    return "\n".join(lines) + "\n"


def _assembly(images: Sequence[Path]) -> str:
    """images.S: machine code as it is."""
    lines = ['.section .rodata,"a",@progbits']
    for i, path in enumerate(images):
        lines += [".balign 16", f".globl kvsink_image_{i}", f"kvsink_image_{i}:", f'.incbin "{path}"', ".byte 0"]
    return "\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""])


def _run(command: list[str], source: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise KvsinkError(f"{command[0]} could not build {source}: {first[:300]}")


def build(out: str | Path | None = None, cuda: Sequence[str | Path] = (), capabilities: Sequence[str] = ()) -> Path:
    """Compile the library, to `out` or into the cache folder; one that stands there already is taken as it is.

    cuda: exported models in float16 whose kernels for CUDA go with it; capabilities: of the cards, such as "9.0".
    """
    found = compiler()
    if found is None:
        raise KvsinkError("no C++ compiler found; install g++, or set CXX")
    version = subprocess.run([found, "--version"], capture_output=True, check=False).stdout
    header, found_images = levels_header(), _sources([Path(p) for p in cuda], capabilities)
    images = images_header(found_images)
    parts = [p.read_bytes() for p in (*sorted(SOURCES.iterdir()), FOLDER / "attend.c", *sorted(FOLDER.glob("*.h")))]
    flags = " ".join((*FLAGS, *LOOSE, *EXACT)).encode()
    code = "".join(f"{card}{source}" for _, card, _, source in found_images)
    key = hashlib.sha256(b"".join(parts) + (header + images + code).encode() + version + flags + machine()).hexdigest()[:24]
    target = Path(out) if out is not None else cache_folder() / "kernels" / f"ort-ops-{key}.so"
    if out is None and target.is_file():
        return target
    try:
        if out is None:
            target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            (Path(scratch) / "levels.h").write_text(header, encoding="utf-8")
            (Path(scratch) / "images.h").write_text(images, encoding="utf-8")
            fresh = Path(scratch) / "ops.so"
            include, objects = [f"-I{folder}" for folder in (scratch, SOURCES, FOLDER)], []
            for source, of_part in PARTS:
                objects.append(str(Path(scratch) / f"{source.stem}.o"))
                compiled = [flag for flag in of_part if flag != "-shared"]
                _run([found, "-x", "c", "-c", *compiled, *include, "-o", objects[-1], str(source)], source)
            if found_images:
                objects.append(_compiled(found, found_images, Path(scratch)))
            _run([found, *FLAGS, *include, "-o", str(fresh), str(SOURCES / "ops.cpp"), *objects, "-ldl"], SOURCES / "ops.cpp")
            os.replace(fresh, target)
    except OSError as error:
        raise KvsinkError(f"{target} cannot be written ({error.strerror}); choose another path") from error
    return target


def _compiled(by: str, found: Sequence[tuple[str, variants.Card, variants.Variant | None, str]], scratch: Path) -> str:
    """An object file of the machine code of all sources."""
    places = [scratch / f"{i}.cubin" for i in range(len(found))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = pool.map(lambda item: module.compile_cubin(item[3], item[1].arch), found)
        for path, code in zip(places, codes, strict=True):
            path.write_bytes(code)
    listing, made = scratch / "images.S", scratch / "images.o"
    listing.write_text(_assembly(places), encoding="utf-8")
    _run([by, "-x", "assembler", "-c", "-o", str(made), str(listing)], listing)
    return str(made)


def runner_for(path: str | Path, device: str = "auto", threads: int = 0, **options: Any) -> OnnxGenerator:
    """The runner of an exported model, with the library that it needs built where there is none.

    device: cpu, cuda, or auto, which is cuda for a model whose nodes run there alone. Steps of flavours custom and gqa in float16
    are CUDA graphs there. Raises KvsinkError children.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UnknownName("device", device, ("auto", "cpu", "cuda"))
    manifest = read_manifest(Path(path))
    tiled = "kernels" in manifest
    on_cuda = device == "cuda" or (device == "auto" and tiled)
    captured = tiled or any(e["name"] == "last_logits" for e in manifest["outputs"])
    cuda = {"use_tf32": "0"} | ({"enable_cuda_graph": "1"} if captured else {})
    providers: list[Provider] = [("CUDAExecutionProvider", cuda)] if on_cuda else []
    library = None  # without a GPU the session says what is missing
    if manifest["flavour"] == "custom" and (not tiled or torch.cuda.is_available()):
        library = build(cuda=[path] if tiled else [])
    return OnnxGenerator(path, [*providers, "CPUExecutionProvider"], threads, library, **options)


def main(argv: list[str] | None = None) -> int:
    """Print the path of the library."""
    parser = argparse.ArgumentParser(prog="python -m kvsink.tools.build_ort_ops", description="Build the operators of com.kvsink.")
    parser.add_argument("out", nargs="?", metavar="OUT.so", help="where to; without it a file in the cache folder")
    parser.add_argument("--cuda", action="append", default=[], metavar="MODEL.onnx", help="a model in float16 to run on CUDA")
    parser.add_argument("--capability", action="append", default=[], metavar="9.0", help="of a card; without it the one at hand")
    try:
        given = parser.parse_args(argv)
    except SystemExit as error:
        return int(error.code or 0)
    try:
        print(build(given.out, given.cuda, given.capability))
    except (KvsinkError, module.NativeError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
