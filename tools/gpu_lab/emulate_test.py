"""Checks the kernel's source on a CPU through emulate.h: every mode, ragged rows, starts, exact rows, several grids."""
from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from layout import CENTRED, KLT, PLAIN, bind, make_case, reference, relative_error

HERE = Path(__file__).parent


def build(mode: int, kw, vw, **defs) -> ctypes.CDLL:
    out = Path(tempfile.mkdtemp()) / "emulated.so"
    flags = [f"-D{k}={v}" for k, v in dict(MODE=mode, KW=",".join(map(str, kw)), VW=",".join(map(str, vw)), **defs).items()]
    subprocess.run(["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-w", *flags, str(HERE / "emulate.cpp"), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def main() -> int:
    two, four = (2,) * 16, (4,) * 16
    mixed = (4, 4, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1)
    bad = 0
    for mode, kw, vw, defs in [(CENTRED, two, two, {}), (KLT, mixed, two, {}), (PLAIN, two, two, dict(STEP_PAIRS=1)), (KLT, two, two, dict(WARPS=4)),
                               (CENTRED, four, four, dict(ITEM_PAIRS=2)), (CENTRED, two, two, dict(HEADS_PER_KV=3)), (CENTRED, (1,) * 16, (1,) * 16, {})]:
        lib = build(mode, kw, vw, **defs)
        r = defs.get("HEADS_PER_KV", 4)
        for (b, length, ragged, start), grid in itertools.product([(1, 100, False, False), (3, 700, True, True), (40, 300, True, True), (1, 2900, False, False)], [1, 3, 20]):
            c = make_case(mode, b, 2, r, length, seed=length + grid, ragged=ragged, start=start, key_widths=kw, value_widths=vw,
                          dtype=torch.bfloat16 if grid == 3 and ragged else torch.float16)
            c["out"] = torch.full_like(c["q"], float("nan"))
            p, keep = bind(c, grid)
            assert lib.param_bytes() == ctypes.sizeof(p)
            for _ in range(2):                           # the second launch sees the counters the first one left
                lib.run_emulated(ctypes.byref(p), grid)
            err = relative_error(c["out"], reference(c))
            ok = err <= (5e-3 if c["q"].dtype == torch.bfloat16 else 2e-3)
            bad += not ok
            print(f"mode {mode} kw {kw[0]}..{kw[-1]} vw {vw[0]} {defs} B{b} T{length} grid {grid}: {err:.2e} {'ok' if ok else 'WRONG'}", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
