"""Kernels in CUDA C++: compiled for the GPU at hand when first needed, kept in the user's cache folder, launched by the driver.

Source     `kernels/cuda/*.cuh`; they include nothing, so NVRTC compiles them, which PyTorch brings along; nvcc is the second choice
Cache      $KVSINK_CACHE, else $XDG_CACHE_HOME/kvsink, else ~/.cache/kvsink, folder `cubin`; a file's name is a hash of source,
           architecture and compiler
Raises     NativeError with the reason; callers then take the plain operators
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base import cache_folder, stream_beside
from .driver import NativeError
from .driver import check as _check
from .driver import driver as _driver
from .scratch import Scratch
from .variants import Card, Variant, by_warp, card_of, single, unit

__all__ = ["Cubin", "Module", "NativeError", "library", "module_of", "scratch"]

SINGLE_ROWS = 1  # sequences up to which every new row of a head is coded by a block of its own
SPARE = 4  # multiprocessors that attention leaves to the coding of new rows
MOST_ROWS = 65536  # sequences whose exact rows the kernels see to
PART_WORDS = 8 * 260  # the most that a block leaves for another: see COLUMNS and SLOT in attend.cuh


# -- compiling ----------------------------------------------------------------------------------------------------------


@cache
def _nvrtc() -> ctypes.CDLL | None:
    """NVRTC as PyTorch's own wheels bring it, or the system's."""
    major = (torch.version.cuda or "").split(".")[0]
    found: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        found += sorted(str(p) for p in Path(root).glob(f"**/libnvrtc.so.{major}*") if "builtins" not in p.name)
    for name in (*found, f"libnvrtc.so.{major}", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _by_nvrtc(lib: ctypes.CDLL, source: str, arch: str) -> bytes:
    program = ctypes.c_void_p()

    def check(code: int, what: str) -> None:
        if code:
            raise NativeError(f"NVRTC error {code} while it {what}")

    check(lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kvsink.cu", 0, None, None), "took the source")
    options = [b"--std=c++17", f"--gpu-architecture={arch}".encode()]
    code = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    if code:
        size = ctypes.c_size_t()
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, log)
        raise NativeError(f"NVRTC error {code}: {log.value.decode(errors='replace')[:400]}")
    size = ctypes.c_size_t()
    kind = "PTX" if arch.startswith("compute") else "CUBIN"
    check(getattr(lib, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)), "measured the code")
    image = ctypes.create_string_buffer(size.value)
    check(getattr(lib, f"nvrtcGet{kind}")(program, image), "handed the code over")
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw


def _by_nvcc(nvcc: str, source: str, arch: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        unit, out = Path(folder) / "kvsink.cu", Path(folder) / "kvsink.cubin"
        unit.write_text(source)
        cubin = ["-cubin", f"-gencode=arch=compute_{arch[3:]},code={arch}"]
        what = ["-ptx", f"-arch={arch}"] if arch.startswith("compute") else cubin
        done = subprocess.run(
            [nvcc, "-std=c++17", "-O3", *what, str(unit), "-o", str(out)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NativeError(f"nvcc: {done.stderr[:400]}")
        return out.read_bytes()


def compile_cubin(source: str, arch: str) -> bytes:
    """Machine code of a source for an architecture such as sm_90a, from the cache folder when it has been compiled before."""
    lib, nvcc = _nvrtc(), shutil.which("nvcc")
    if lib is None and nvcc is None:
        raise NativeError("neither NVRTC nor nvcc is found; pip install nvidia-cuda-nvrtc brings the first")
    key = hashlib.sha256(f"{arch}\0{torch.version.cuda}\0{'nvrtc' if lib else 'nvcc'}\0{source}".encode()).hexdigest()[:32]
    held = cache_folder() / "cubin" / f"{key}.cubin"
    if held.is_file():
        return held.read_bytes()
    image = _by_nvrtc(lib, source, arch) if lib is not None else _by_nvcc(str(nvcc), source, arch)
    try:
        held.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=held.parent, delete=False) as file:
            file.write(image)
        os.replace(file.name, held)
    except OSError:
        pass  # a folder that cannot be written to costs a compilation next time
    return image


# -- loading and launching ----------------------------------------------------------------------------------------------


class Module:
    """Machine code on one GPU: its functions and how to launch them."""

    def __init__(self, source: str, device: torch.device, card: Card) -> None:
        self.device = device
        with torch.cuda.device(device):
            torch.zeros(1, device=device)  # makes the context current
            image = compile_cubin(source, card.arch)
            self._module = ctypes.c_void_p()
            _check(_driver().cuModuleLoadData(ctypes.byref(self._module), image), "loading the kernel")
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    def function(self, name: str) -> ctypes.c_void_p:
        found = ctypes.c_void_p()
        _check(_driver().cuModuleGetFunction(ctypes.byref(found), self._module, name.encode()), f"finding {name}")
        return found

    def numbers(self, name: str, count: int) -> tuple[int, ...]:
        """`count` integers of a variable of the source."""
        where, size, out = ctypes.c_uint64(), ctypes.c_size_t(), (ctypes.c_int * count)()
        code = _driver().cuModuleGetGlobal_v2(ctypes.byref(where), ctypes.byref(size), self._module, name.encode())
        _check(code, f"finding {name}")
        _check(_driver().cuMemcpyDtoH_v2(out, where, ctypes.c_size_t(4 * count)), f"reading {name}")
        return tuple(out)

    def allow_shared(self, function: ctypes.c_void_p, size: int) -> None:
        """Let a function have `size` bytes of shared memory in a block."""
        _check(_driver().cuFuncSetAttribute(function, 8, size), "asking for shared memory")

    def launch(self, function: ctypes.c_void_p, x: int, y: int, threads: int, shared: int, *arguments: ctypes.Structure) -> None:
        """Launch on the current stream of the module's GPU, which need not be the current one."""
        args = (ctypes.c_void_p * len(arguments))(*[ctypes.cast(ctypes.byref(a), ctypes.c_void_p) for a in arguments])
        where = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        here = self.device.index is None or torch.cuda.current_device() == self.device.index
        with nullcontext() if here else torch.cuda.device(self.device):
            _check(_driver().cuLaunchKernel(function, x, y, 1, threads, 1, 1, shared, where, args, None), "a launch")


def module_of(defines: Mapping[str, str], names: Sequence[str], device: torch.device) -> Module:
    """The files of `kernels/cuda` of those names behind macros, compiled for a device and loaded."""
    return Module(unit(defines, names), device, card_of(device))


@cache
def scratch(device: torch.device) -> Scratch:
    """The scratch memory of a GPU."""
    words = torch.cuda.get_device_properties(device).multi_processor_count * PART_WORDS
    return Scratch(device, words, MOST_ROWS)


class Cubin:
    """The kernels of one variant on one GPU.

    overlap: in a CUDA graph, new rows are coded on a second stream while attention runs. by_warp: warps of attention take whole
    rows where they can; None: where it is expected to be faster.
    """

    def __init__(
        self, variant: Variant, device: torch.device, card: Card | None = None, overlap: bool = True, by_warp: bool | None = None
    ) -> None:
        self.variant, self.device, card = variant, device, card or card_of(device)
        self.overlap, self.by_warp = overlap, by_warp
        with torch.cuda.device(device):
            self._module = Module(variant.source(card), device, card)
            self._attend, self._single, self._append, self._append_row, self._decode, self._list = (
                self._module.function(name)
                for name in ("attend_packed", "attend_single", "append_rows", "append_row", "decode_rows", "list_exact")
            )
            *threads, self._shared, self._shared_single = self._module.numbers("kvsink_launch", 6)
            self._threads, self._row_threads, self._append_row_threads, self._single_threads = threads
            self._module.allow_shared(self._attend, self._shared)
            if self._shared_single:
                self._module.allow_shared(self._single, self._shared_single)
            self.turned = 0
            if variant.ahead:
                self._turn_threads, self._shared_turn, self.turned = self._module.numbers("kvsink_turn", 3)
                self._turn = self._module.function("turn_queries")
                self._module.allow_shared(self._turn, self._shared_turn)
            (self._shared_rows,) = self._module.numbers("kvsink_by_warp", 1)
            self.whole_rows = self._shared_rows > 0
            if self.whole_rows:
                self._attend_rows = self._module.function("attend_rows")
                self._module.allow_shared(self._attend_rows, self._shared_rows)
        shape = variant.shape(card)
        self.groups, self.warps = shape.groups(variant.repeats), shape.warps
        self.blocks = self._module.multiprocessors
        self.scratch = scratch(device)
        self._side = torch.cuda.Stream(device)

    @property
    def partial(self) -> Tensor:
        """Words by which the blocks of a launch hand over parts of rows, see `Scratch`."""
        return self.scratch.now()[0]

    @property
    def arrived(self) -> Tensor:
        """Counts of the heads that have come to a sequence's exact rows, see `Scratch`."""
        return self.scratch.now()[1]

    def share(self, heads: int) -> int:
        """Blocks per key-value head that attend. All run at once, as waiting for each other needs; a few are left over."""
        return max(1, (self.blocks - SPARE) // heads)

    def attend(self, argument: Any, fresh: Any, heads: int) -> None:
        """Launch the kernel for these rows; `fresh` names the new ones that may enter the exact ones, or none."""
        _turned = self._ahead(argument, heads)  # not another tensor's memory before the launch that reads it is on the stream
        self._attend_now(argument, fresh, heads)

    def _ahead(self, argument: Any, heads: int) -> Tensor | None:
        """Launch what turns the queries of all blocks, where attention does not; returns where they will stand."""
        if not self.turned or (self._shared_single and single(argument)):
            return None
        turned = torch.empty(argument.B * heads * argument.tiles * self.turned, dtype=torch.uint8, device=self.device)
        argument.turned = turned.data_ptr()
        self._module.launch(self._turn, self.share(heads), heads, self._turn_threads, self._shared_turn, argument)
        return turned

    def _attend_now(self, argument: Any, fresh: Any, heads: int) -> None:
        if self._shared_single and single(argument):
            self._module.launch(self._single, argument.share, heads, self._single_threads, self._shared_single, argument, fresh)
            return
        whole = by_warp(argument.B, argument.share, argument.tiles, self.warps) if self.by_warp is None else self.by_warp
        if whole and self.whole_rows and not self.variant.many:
            self._module.launch(self._attend_rows, argument.share, heads, self._threads, self._shared_rows, argument, fresh)
            return
        self._module.launch(self._attend, argument.share, heads, self._threads, self._shared, argument, fresh)

    def append(self, argument: Any) -> None:
        """Launch `append_row`, where latency is all, or `append_rows`."""
        if argument.S == 1 and argument.B <= SINGLE_ROWS and self.variant.single_row:
            self._module.launch(self._append_row, argument.Hkv, argument.B, self._append_row_threads, 0, argument)
            return
        pairs = argument.B * argument.S * argument.Hkv
        self._module.launch(self._append, -(-pairs // argument.per), 1, self._row_threads, 0, argument)

    def step(self, argument: Any, fresh: Any, rows: Any, heads: int) -> None:
        """`attend` and `append` of the same new rows: side by side in a CUDA graph, else one after the other."""
        if not self.overlap or not torch.cuda.is_current_stream_capturing():
            self.append(rows)
            self.attend(argument, fresh, heads)
            return
        here = torch.cuda.current_stream(self.device)
        self._side = stream_beside(here, self._side)
        self._side.wait_stream(here)
        _turned = self._ahead(argument, heads)
        self._attend_now(argument, fresh, heads)
        with torch.cuda.stream(self._side):
            self.append(rows)
        here.wait_stream(self._side)

    def decode(self, argument: Any, rows: int, heads: int) -> None:
        """Launch `decode_rows` over `rows` rows of every head."""
        self._module.launch(self._decode, -(-rows // 8), heads, self._row_threads, 0, argument)

    def list_exact(self, argument: Any, sequences: int) -> None:
        """Launch `list_exact`."""
        self._module.launch(self._list, sequences, 1, 32, 0, argument)


_LOADED: dict[tuple[Variant, str], Cubin | NativeError] = {}


def library(variant: Variant, device: torch.device) -> Cubin:
    """The kernels of a variant on a device, compiled and loaded once. Raises NativeError, the same one every time."""
    key = (variant, str(device))
    held = _LOADED.get(key)
    if held is None:
        try:
            held = Cubin(variant, device)
        except NativeError as error:
            held = error
        _LOADED[key] = held
    if isinstance(held, NativeError):
        raise held
    return held


def loaded(variant: Variant, device: torch.device) -> Cubin | None:
    """The kernels of a variant if they are loaded already."""
    held = _LOADED.get((variant, str(device)))
    return held if isinstance(held, Cubin) else None


def pointer(x: Tensor | None) -> int | None:
    """Address of a tensor's first element; None for no tensor or an empty one."""
    return x.data_ptr() if x is not None and x.numel() else None


def contiguous(tensors: Sequence[Tensor]) -> None:
    """Check what kernels take for granted."""
    for t in tensors:
        if not t.is_contiguous():
            raise ValueError(f"a kernel needs contiguous memory; this tensor has strides {t.stride()}")
