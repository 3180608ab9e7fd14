"""The C kernel of the CPU equals the definition for every width, and says in words what it does not serve."""

from __future__ import annotations

import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import kvsink
from kvsink.codecs import STATE_NAMES, Codec, SideSpec
from kvsink.kernels import backends
from kvsink.kernels.attend import attend_ref
from kvsink.kernels.cpu import attend as attend_cpu
from kvsink.kernels.cpu.attend import attend, declines
from kvsink.kernels.cpu.c_library import FOLDER, c_library
from tests.close import FUSED_FLOAT32
from tests.kernels.test_attend import MASKS, SCALE, make_mask
from tests.states import CPU, GPU, SLOTS, asking, filled, shape_of

OPTIONS: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
    ("klt:best", (("protect", "first:2+massive:3"), ("window", 5))),
    *((("klt:best"), (("key_bits", bits), ("value_bits", 4))) for bits in (1.5, 2, 2.25, 3, 4, 5, 6)),
    *((("centred"), (("key_bits", bits), ("value_bits", bits), ("protect", "first:1"))) for bits in (1, 3, 5, 6, 7, 8)),
    ("rtn", (("key_bits", 2), ("value_bits", 4), ("window", 4))),
    ("klt:codebooks", (("key_bits", 1), ("value_bits", 2))),
    ("klt:even", (("key_bits", 2.25), ("value_bits", 2))),
    ("klt:even", (("key_bits", 0.5), ("value_bits", 1))),  # a run of 0 bits
    ("centred:even", (("key_bits", 2), ("value_bits", 3))),
    ("klt:codebooks", (("key_bits", 1.25), ("value_bits", 1), ("windows", 18))),
    *((("klt"), (("key_bits", key), ("value_bits", value))) for key, value in ((2, 2), (1.5, 4), (3.5, 3))),
)
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options)}" for name, options in OPTIONS]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=IDS)
def test_c_equals_the_definition(method: str, options: tuple, kind: str) -> None:
    for strict, lengths in ((False, (37, 20, 1)), (True, (3, 1))):
        layer, k, v = filled(method, options, batch=2, lengths=lengths, strict=strict)
        q = torch.randn(2, 2 * k.shape[1], 1, k.shape[3], generator=torch.Generator().manual_seed(1))
        codec = Codec.parse(layer.codec_text)
        if codec.value.folded:
            assert codec.value.transform == "hadamard"
        assert declines(codec.format, shape_of(q), CPU) == ""
        mask = make_mask(kind, 2, q.shape[1], int(layer.length), 1, SLOTS)
        rest = (q, k[:, :, -1:], v[:, :, -1:], layer.state(), layer.params, mask, SCALE)
        wanted = attend_ref(*rest, mask is None, layer.codec_text)
        got = attend(asking(*rest, codec))
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        assert (got - wanted).abs().max() <= FUSED_FLOAT32 * v.abs().max()


@pytest.mark.parametrize(
    "widths", [(1,), (2, 3), (1, 1, 1), (2,) * 8, (4, 4, 3, 3, 2, 2, 1, 1, 1), (4, 3, 3, 2), (3,) * 16, (6, 5, 4, 3), (5, 6), (6,)]
)
def test_walks_of_any_length_equal_the_definition(widths: tuple[int, ...]) -> None:
    """Rows of any bytes are walks; odd numbers of rows and of steps, and a width that the last run has alone."""
    side, g = SideSpec(bits=2, kind="trellis", widths=widths), torch.Generator().manual_seed(len(widths))
    codec, dim, rows = Codec(side, side), 8 * len(widths), 77
    state = {n: torch.full(s, f, dtype=t) for n, (s, t, f) in codec.layout(2, 2, dim, dim, rows, torch.float32).items()}
    for n in ("k_codes", "v_codes"):
        state[n].random_(0, 256, generator=g)
        state[n][..., -1] = torch.randint(112, 160, state[n].shape[:-1], generator=g)
        state[n][0, 0, 5, -1] = 0
    state["positions"] = torch.arange(rows, dtype=torch.int32).expand(2, -1).contiguous()
    state["real"] = torch.ones(2, rows, dtype=torch.bool)
    state["length"] = torch.tensor(rows - 1)
    q, k, v = (torch.randn(2, h, 1, dim, generator=g) for h in (6, 2, 2))
    params = [torch.rand(2, dim, generator=g) + 0.5 for _ in codec.param_names()]
    rest = (q, k, v, [state[n] for n in STATE_NAMES], params, None, 0.05)
    wanted, got = attend_ref(*rest, True, codec.text()), attend(asking(*rest, codec))
    assert (got - wanted).abs().max() <= FUSED_FLOAT32 * wanted.abs().max()


def test_large_logits_and_rows_that_see_nothing_stay_finite() -> None:
    layer, k, v = filled("klt:best", (), batch=2, lengths=(40, 1))
    q = 300 * torch.randn(2, 2 * k.shape[1], 1, k.shape[3], generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 1, 1, SLOTS, dtype=torch.bool)
    mask[1] = False
    rest = (q, k[:, :, -1:], v[:, :, -1:], layer.state(), layer.params, mask, 1.0)
    got, wanted = attend(asking(*rest, Codec.parse(layer.codec_text))), attend_ref(*rest, False, layer.codec_text)
    assert torch.isfinite(got).all() and (got[1] == 0).all()
    # Logits of some hundred: their rounding, not that of the values, is what differs.
    assert (got[0] - wanted[0]).abs().max() <= 1e-3 * v.abs().max()


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [("rotatekv", (), "a rotation across heads"), ("klt:best", (("value_bits", 16),), "rows of kind none")],
)
def test_what_it_does_not_serve_is_named(method: str, options: tuple, reason: str) -> None:
    layer, k, _ = filled(method, options, batch=1, lengths=(5, 1))
    codec = Codec.parse(layer.codec_text)
    assert declines(codec.format, shape_of(k[:, :, :1]), CPU) == reason


def test_several_rows_and_float64_take_another_path() -> None:
    layer, k, _ = filled("klt:best", (), batch=1, lengths=(5, 1))
    codec = Codec.parse(layer.codec_text)
    assert declines(codec.format, shape_of(k[:, :, :2]), CPU) == "more than one new row"
    assert "float32" in declines(codec.format, shape_of(k[:, :, :1], dtype=torch.float64), CPU)
    assert declines(codec.format, shape_of(k[:, :, :1]), GPU) == "the device is cuda"


def test_without_a_compiler_one_warning_and_the_same_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layer, k, v = filled("klt:best", (), batch=1, lengths=(9, 1))
    q = torch.randn(1, 2 * k.shape[1], 1, k.shape[3], generator=torch.Generator().manual_seed(1))
    call = (q, k[:, :, -1:], v[:, :, -1:], layer.state(), layer.params, None, SCALE, True, layer.codec_text)
    wanted = kvsink.kernels.attend(*call)
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(backends, "choose", cache(backends.choose.__wrapped__))
    c_library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no C compiler found"):
            got = kvsink.kernels.attend(*call)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kvsink.kernels.attend(*call)
        assert declines(layer.codec.format, shape_of(k[:, :, -1:]), CPU) == "no C compiler"
    finally:
        c_library.cache_clear()
    assert (got - wanted).abs().max() <= FUSED_FLOAT32 * v.abs().max()


def test_a_built_library_is_kept_and_used_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVSINK_CACHE", str(tmp_path))
    c_library.cache_clear()
    try:
        assert attend_cpu._library() is not None
        (built,) = (tmp_path / "kernels").iterdir()
        stamp = built.stat().st_mtime_ns
        c_library.cache_clear()
        assert attend_cpu._library() is not None and built.stat().st_mtime_ns == stamp
    finally:
        c_library.cache_clear()


def test_the_sources_ship_with_the_package() -> None:
    names = [f"{p.name!r}" for p in sorted(FOLDER.glob("*.[ch]"))]
    code = "from kvsink.kernels.cpu import c_library; print(sorted(p.name for p in c_library.FOLDER.glob('*.[ch]')))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == f"[{', '.join(names)}]\n" and "'half.h'" in names
