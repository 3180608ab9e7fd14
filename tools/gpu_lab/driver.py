"""Loads cubins of attend_packed.cuh through the CUDA driver and launches them on torch's current stream."""
from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch

from layout import Params

HERE = Path(__file__).parent
MIXED = (4, 4, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1)      # a typical water-filled layout: 32 bits per 16 runs, 2.0 on average


def variant(mode: int, kw=(2,) * 16, vw=(2,) * 16, **defs) -> dict:
    return dict(MODE=mode, KW=tuple(kw), VW=tuple(vw), **defs)


def name_of(v: dict) -> str:
    kw = "".join(map(str, v["KW"])) if len(set(v["KW"])) > 1 else str(v["KW"][0])
    rest = "_".join(f"{k.lower()}{x}" for k, x in v.items() if k not in ("MODE", "KW", "VW"))
    return f"m{v['MODE']}_k{kw}_v{v['VW'][0]}" + (f"_{rest}" if rest else "")


def compile_cubin(v: dict, folder: Path, source: str = "attend_packed.cuh") -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"#define {k} {', '.join(map(str, x)) if isinstance(x, tuple) else x}\n" for k, x in v.items())
    unit = folder / f"{name_of(v)}.cu"
    unit.write_text(text + f'#include "../{source}"\n')
    return subprocess.Popen(["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin", str(unit),
                             "-o", str(unit.with_suffix(".cubin"))], stderr=subprocess.PIPE, text=True)


class Kernel:
    """One cubin; `launch` takes the argument block of layout.bind."""

    _driver = None

    def __init__(self, cubin: Path, v: dict):
        cls = type(self)
        if cls._driver is None:
            torch.zeros(1, device="cuda")
            cls._driver = ctypes.CDLL("libcuda.so.1")
        self.v = v
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        image = cubin.read_bytes()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), image), "load")
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(self.function), module, b"attend_packed"), "find")
        where, size, launch = ctypes.c_uint64(), ctypes.c_size_t(), (ctypes.c_int * 2)()
        self._check(self._driver.cuModuleGetGlobal_v2(ctypes.byref(where), ctypes.byref(size), module, b"attend_packed_launch"), "launch sizes")
        self._check(self._driver.cuMemcpyDtoH_v2(launch, where, ctypes.c_size_t(8)), "read launch sizes")
        self.threads, self.smem = launch
        self._check(self._driver.cuFuncSetAttribute(self.function, 8, self.smem), "shared memory")    # MAX_DYNAMIC_SHARED_SIZE_BYTES
        blocks = ctypes.c_int()
        self._check(self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(ctypes.byref(blocks), self.function, self.threads, ctypes.c_size_t(self.smem)), "occupancy")
        self.per_sm = blocks.value

    @staticmethod
    def _check(code: int, what: str) -> None:
        if code:
            raise RuntimeError(f"CUDA driver error {code}: {what}")

    def grid_x(self, hkv: int) -> int:
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        return max(1, sms * self.per_sm // hkv)

    def launch(self, p: Params, grid_x: int) -> None:
        args = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.byref(p), ctypes.c_void_p))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(self._driver.cuLaunchKernel(self.function, grid_x, p.Hkv, 1, self.threads, 1, 1, self.smem, stream, args, None), "launch")

