"""The CUDA kernels on a CPU: their own source, one fiber per thread (kernels/cuda/emulate.h). Slow, for small cases."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kvsink.kernels import backends, layout
from kvsink.kernels.cuda import backend, launch, module, variants
from kvsink.kernels.cuda.rows_of_bytes import CodesVariant

FOLDER = Path(module.__file__).parent
HOPPER = variants.Card()


@cache
def _library(variant: variants.Variant | CodesVariant, card: variants.Card = HOPPER) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler to emulate the CUDA kernels with")
    defines = variant.defines() if isinstance(variant, CodesVariant) else variant.defines(card)
    flags = [f"-D{name}={text.replace(' ', '')}" for name, text in defines.items()]
    if isinstance(variant, CodesVariant):
        flags.append("-DKVSINK_CODES_ALONE")
    text = "".join(p.read_text() for p in sorted(FOLDER.iterdir()) if p.is_file()) + "".join(flags)
    out = Path(tempfile.gettempdir()) / f"kvsink-emulated-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not out.exists():
        made = out.with_suffix(f".{id(variant)}.so")
        subprocess.run(
            [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", *flags, str(FOLDER / "emulate.cpp"), "-o", str(made)],
            check=True,
        )
        made.replace(out)
    return ctypes.CDLL(str(out))


def scales_behind(layer: Any, length: int, nan: bool) -> None:
    """What scales the codes of slots from `length` on becomes not a number, or zero again: nothing may read it."""
    for name, side in (("k", layer.codec.key), ("v", layer.codec.value)):
        getattr(layer, f"{name}_scale")[:, :, length:] = float("nan") if nan else 0.0
        if side.kind == "trellis":
            codes, slots = getattr(layer, f"{name}_codes"), torch.arange(length, layer.max_length)
            held = layout.fetch(codes, side.widths, name, side.kind, length, len(slots))
            held[..., -1] = 255 if nan else 0
            layout.store(codes, held, slots, side.widths, name, side.kind)


class Emulated:
    """Stands in for `module.Cubin`; `blocks` per key-value head take part in an attention, `by_warp`: each warp by whole rows.

    single_rows is `module.SINGLE_ROWS`.
    """

    def __init__(
        self, variant: variants.Variant, blocks: int = 3, by_warp: bool = False, single_rows: int = 0, card: variants.Card = HOPPER
    ) -> None:
        self.lib, self.blocks, self.by_warp, self.single_rows = _library(variant, card), blocks, by_warp, single_rows
        self.variant, self.groups = variant, variant.shape(card).groups(variant.repeats)
        self.turned = self.lib.turned_bytes()
        self.partial = torch.full((64 * blocks * self.lib.slot_words(),), -1, dtype=torch.int32)
        self.arrived = torch.zeros(1024, dtype=torch.int32)

    def share(self, heads: int) -> int:
        return self.blocks

    def attend(self, argument: Any, fresh: Any, heads: int) -> None:
        assert self.lib.attend_bytes() == ctypes.sizeof(argument)
        alone = variants.single(argument) and self.lib.single_bytes() and not self.by_warp
        run = self.lib.run_attend_rows if self.by_warp else self.lib.run_attend_single if alone else self.lib.run_attend
        if self.turned and not alone:
            turned = torch.full((argument.B * heads * argument.tiles * self.turned,), 255, dtype=torch.uint8)
            argument.turned = turned.data_ptr()
            self.lib.run_turn(ctypes.byref(argument), self.blocks)
        run(ctypes.byref(argument), ctypes.byref(fresh))

    def step(self, argument: Any, fresh: Any, rows: Any, heads: int) -> None:
        self.append(rows)
        self.attend(argument, fresh, heads)

    def append(self, argument: Any) -> None:
        assert self.lib.row_bytes() == ctypes.sizeof(argument)
        if (
            argument.S == 1
            and (min(1, self.single_rows) if argument.slots else self.single_rows) >= argument.B
            and self.variant.single_row
        ):
            self.lib.run_append_row(ctypes.byref(argument))
            return
        self.lib.run_append(ctypes.byref(argument), -(-argument.B * argument.S * argument.Hkv // argument.per))

    def decode(self, argument: Any, rows: int, heads: int) -> None:
        self.lib.run_decode(ctypes.byref(argument), -(-rows // 8))

    def list_exact(self, argument: Any, sequences: int) -> None:
        assert self.lib.place_bytes() == ctypes.sizeof(argument)
        self.lib.run_list(ctypes.byref(argument), sequences)


def act_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, library: Callable[..., Any], seen: Callable[[Any], None]) -> None:
    """Layers in tiles on the CPU are served as on a GPU, by `library` in place of `launch.library`; seen: told of every call
    that attends."""

    def part(held: backends.Part, said: Callable[..., str], attends: bool = True) -> backends.Part:
        def run(call: Any) -> Any:
            if attends:
                seen(call)
            return held.run(call)

        return backends.Part(lambda f, s, d: said(f, s, None), run, held.knows)

    tiles, *rest = backends.table()
    assert tiles.append is not None and tiles.attend is not None and tiles.step is not None
    tiles = replace(
        tiles,
        append=part(tiles.append, backend.declines, False),
        attend=part(tiles.attend, backend.declines_mask),
        step=part(tiles.step, backend.declines_step),
    )
    monkeypatch.setattr(launch, "library", library)
    monkeypatch.setattr(backends, "table", lambda: (tiles, *rest))
    monkeypatch.setattr(backends, "choose", cache(backends.choose.__wrapped__))


class EmulatedCodes:
    """Stands in for `rows_of_bytes.CodesKernels`."""

    def __init__(self, variant: CodesVariant) -> None:
        self.lib = _library(variant)
        assert self.lib.smem_bytes() <= variant.shared_bytes() <= variants.SHARED_LIMIT

    def rotate(self, call: Any, groups: int) -> None:
        assert self.lib.codes_bytes() == ctypes.sizeof(call)
        self.lib.run_rotate(ctypes.byref(call), groups)

    def attend(self, call: Any, heads: int) -> None:
        assert self.lib.codes_bytes() == ctypes.sizeof(call)
        self.lib.run_codes(ctypes.byref(call), heads)

    def merge(self, call: Any, groups: int) -> None:
        self.lib.run_merge(ctypes.byref(call), groups)
