"""What the compiler makes of the CUDA kernels for six generations of cards: registers, spills and shared memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvsink.codecs import Codec
from kvsink.kernels.backends import Device, LayerFormat, Shape
from kvsink.kernels.cuda import backend, launch, module, variants
from kvsink.kernels.cuda.rows_of_bytes import CodesVariant
from kvsink.methods import get_method

CARDS = {
    "8.0": variants.Card(80, 166912),
    "8.6": variants.Card(86, 101376),
    "8.9": variants.Card(89, 101376),
    "9.0": variants.Card(),
    "10.0": variants.Card(100),
    "12.0": variants.Card(120, 101376),
}
"""Bytes of shared memory that a block can have: CUDA's programming guide, table of technical data."""

TRELLIS = 3  # mode 2 with codes of a trellis on both sides
# mode, bits of keys and values, channels, query heads per key-value head
CELLS = [
    (mode, bits, dim, repeats)
    for mode, bits in ((0, 2), (1, 2), (1, 4), (2, 2), (2, 4), (1, 8), (TRELLIS, 2), (TRELLIS, 4))
    for dim in (64, 80, 96, 128, 256)
    for repeats in (1, 4, 8)
    if not (mode == 0 and dim != 128)
]
CELLS += [
    *((1, 3, 128, 4), (2, 3, 256, 8), (TRELLIS, 3, 96, 4)),
    *((1, 2, 128, 5), (2, 2, 64, 5), (TRELLIS, 4, 128, 5)),
    *((1, 4, 128, 16), (2, 2, 128, 16), (TRELLIS, 2, 256, 16)),
]
METHODS = ("rtn", "centred:even", "klt:even", "klt")
"""By mode, whose codes are such; all runs of 8 channels have as many bits here."""
KERNELS = {"attend_packed", "attend_single", "append_rows", "append_row", "decode_rows"}
SAMPLE = {(1, 2, 128, 4), (2, 2, 128, 8), (1, 4, 256, 8), (TRELLIS, 2, 128, 4)}  # on 9.0, and of them on other cards
ELSEWHERE = {("8.0", (TRELLIS, 2, 128, 4)), ("8.9", (1, 2, 128, 4)), ("12.0", (2, 2, 128, 8))}


def _cells() -> list[object]:
    out = []
    for card in CARDS:
        for cell in CELLS:
            quick = (cell in SAMPLE and card == "9.0") or (card, cell) in ELSEWHERE
            out.append(pytest.param(card, *cell, marks=() if quick else pytest.mark.slow, id=f"{card}-" + "-".join(map(str, cell))))
    return out


def _format(mode: int, bits: int, dim: int) -> LayerFormat:
    """How a layer of a cell is stored, of eight key-value heads."""
    sides = []
    for which in ("key", "value"):
        side = get_method(METHODS[mode]).side(which, bits).resolved(8, dim)
        sides.append(replace(side, widths=(bits,) * (dim // 8), folded=which == "value" and side.transform == "hadamard"))
    return Codec(*sides).format.in_tiles()


def _declined(card: str, mode: int, bits: int, dim: int, repeats: int) -> str:
    """What a user of the card reads in place of the kernels of a cell."""
    device = Device("cuda", (int(card[:-2]), int(card[-1])), shared=CARDS[card].shared)
    return backend.declines(_format(mode, bits, dim), Shape(8 * repeats, 8, dim, dim, dim, torch.float16), device)


@pytest.mark.parametrize("card", CARDS)
def test_a_card_declines_the_cells_that_its_blocks_do_not_hold_and_no_other(card: str) -> None:
    found = {cell: reason for cell in CELLS if (reason := _declined(card, *cell))}
    assert set(found) == ({(1, 8, 256, repeats) for repeats in (1, 4, 8)} if card in ("8.6", "8.9", "12.0") else set())
    for cell, reason in found.items():
        least = 120032 if cell[3] == 1 else 132512
        assert reason == f"{least} bytes of shared memory, more than the 101376 that a block can have"


@pytest.mark.parametrize(("card", "mode", "bits", "dim", "repeats"), _cells())
def test_every_cell_compiles_within_its_card(
    card: str, mode: int, bits: int, dim: int, repeats: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := _declined(card, mode, bits, dim, repeats):
        pytest.skip(reason)
    made, variant = CARDS[card], launch.variant_of(_format(mode, bits, dim), repeats)
    assert variant.key_trellis == variant.value_trellis == (mode == TRELLIS) and variant.mode == min(mode, 2)
    assert variant.shared_bytes(variant.shape(made)) <= made.shared
    if shutil.which("nvcc") is None:
        if module._nvrtc() is None:
            pytest.skip("neither nvcc nor NVRTC is installed")
        monkeypatch.setenv("KVSINK_CACHE", str(tmp_path))
        image = module.compile_cubin(variant.source(made), made.arch)
        assert image[:4] == b"\x7fELF" and all(name.encode() in image for name in KERNELS)
        return  # NVRTC does not tell of registers
    unit, out = tmp_path / "unit.cu", tmp_path / "unit.cubin"
    unit.write_text(variant.source(made))
    arch = f"-gencode=arch=compute_{made.arch[3:]},code={made.arch}"
    told = subprocess.run(
        [str(shutil.which("nvcc")), "-std=c++17", "-O3", arch, "-cubin", "-Xptxas", "-v", str(unit), "-o", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr[:2000]
    spills, registers, name = {}, {}, ""
    for line in told.stderr.splitlines():
        if found := re.search(r"entry function '(\w+)'", line):
            name = found[1]
        elif found := re.search(r"(\d+) bytes spill stores", line):
            spills[name] = max(int(found[1]), spills.get(name, 0))
        elif found := re.search(r"Used (\d+) registers", line):
            registers[name] = int(found[1])
    assert set(registers) >= KERNELS
    assert max(registers.values()) <= 255
    # Kernels of one row may spill a little. Where registers move between warps (9.0 and 10.0) the service warps, which have few and
    # wait most of the time, spill theirs.
    most = 1600 if made.target in (90, 100) else 640
    assert max(spills.values()) <= most, spills


CODES = CodesVariant(
    repeats=4,
    key_runs=(2,) * 16,
    key_couple=2,
    key_books=False,
    key_scales=1,
    value_couple=2,
    value_books=False,
    value_scales=2,
    dense=False,
    basis=False,
    mean=True,
    starts=True,
)
MIXED = (6, 5, 4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1)
SOURCES = {
    "tiles": lambda: variants.Variant(2, (2,) * 16, (2,) * 16, 4).source(variants.Card()),
    "a trellis": lambda: variants.Variant(2, MIXED, (2,) * 16, 4, key_trellis=True, value_trellis=True).source(variants.Card()),
    "rows of bytes": lambda: variants.unit(CODES.defines(), ("arch.cuh", "channels.cuh", "codes.cuh")),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("compiler", ["nvcc", "nvrtc"])
def test_both_compilers_take_the_sources(compiler: str, source: str) -> None:
    """NVRTC, the first choice, forgives what nvcc does not: arrays of the host in device code."""
    if compiler == "nvcc":
        if (nvcc := shutil.which("nvcc")) is None:
            pytest.skip("nvcc is not installed")
        image = module._by_nvcc(nvcc, SOURCES[source](), "sm_90a")
    else:
        if (lib := module._nvrtc()) is None:
            pytest.skip("NVRTC is not installed")
        image = module._by_nvrtc(lib, SOURCES[source](), "sm_90a")
    assert image[:4] == b"\x7fELF" and b"attend_" in image
