"""TaSQ as its page counts it, with its codebooks; Fisher weights of groups; rows by its formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import kvsink
from kvsink.calibrate import codebooks
from kvsink.codecs import Codec
from kvsink.kernels.stages import rope_rows, unrope_rows
from kvsink.model.runtime import runtime_of
from kvsink.report import counted_bits
from tests.graphs import rewritten
from tests.models import HEAD_DIM
from tests.states import read_codes, rows


@pytest.mark.parametrize("dim", [64, 128])
def test_counted_bits_are_the_formula(dim: int) -> None:
    """Ten bits for eight channels, and of keys one norm a token: 1.26 at 8 heads of 128; books are 4 bits at 4,096 tokens."""
    m, heads, n = kvsink.get_method("tasq"), 8, 4096
    sides = [m.side(which, 1.25).resolved(heads, dim) for which in ("key", "value")]
    found = counted_bits(Codec(*sides, window=64), heads, dim, n)
    small = 32 * 64 + 64 + 40 * n  # slots of the ring, the length, positions and real slots
    beside = 16 * 64 / n + small / (2 * heads * dim * n)
    assert found == pytest.approx([1.25 + 16 / (heads * dim) + beside, 1.25 + beside], abs=1e-9)
    assert 16 * 1024 * 8 * (dim // 8) / (n * dim) == 4.0


def test_books_hold_numbers_of_float16_of_the_size_that_is_said() -> None:
    model = rewritten("llama", method="tasq")
    tables = runtime_of(model).tables
    assert tables["layers.0.k_book"].shape == (2, HEAD_DIM // 8, 1024, 8)
    for side in ("k", "v"):
        book = tables[f"layers.0.{side}_book"]
        assert torch.equal(book, book.half().float()) and 2 * book.numel() == 2048 * 2 * HEAD_DIM


def test_rows_are_those_of_the_formula() -> None:
    """Weighed, normed over both heads, the nearest centroid of every group, and all of it taken back, in float64."""
    model = rewritten("llama", method="tasq", window=0)
    runtime = runtime_of(model)
    codec = replace(runtime.plans[1].codec, segments=())
    p = dict(zip(codec.param_names(), runtime.params(1, codec, 64, torch.device("cpu")), strict=True))
    k, v = rows(1, 30, heads=2)
    positions = torch.arange(30)[None]
    angles = runtime.angles(1, positions)
    found = read_codes(codec, p, k, v, positions, *angles)[0]
    x = unrope_rows(k.double(), *angles)[0]  # [H, N, D]
    z = torch.stack([x[h] @ p["k_basis"][h].double() for h in range(2)])
    n = z.square().mean((0, 2)).sqrt().half().double()[None, :, None]
    book = p["k_book"].double()
    chosen = [
        torch.cat(
            [book[h, i, torch.cdist((z / n)[h, :, 8 * i : 8 * i + 8], book[h, i]).argmin(-1)] for i in range(HEAD_DIM // 8)], -1
        )
        for h in range(2)
    ]
    back = torch.stack([(n[0] * c) @ torch.linalg.inv(p["k_basis"][h].double()) for h, c in enumerate(chosen)])
    wanted = rope_rows(back[None], *angles)
    apart = (found.double() - wanted).abs().amax(-1) / wanted.abs().max()
    assert apart.median() <= 1e-4 and (apart > 1e-3).double().mean() <= 0.1  # a norm may round the other way, and a code with it


def test_fisher_weights_follow_the_chain_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """dL/dz of z = k B is dL/dk B^-T: squared, F_k over w^2 in the order of the groups; the norm comes on top in the book."""
    seen = {}

    def spy(x: torch.Tensor, w: torch.Tensor, spec: Any) -> torch.Tensor:
        seen[spec.kind] = w
        return torch.zeros(2, 2, 1024, 8)

    monkeypatch.setattr(codebooks, "learn_book", spy)
    record = {}
    plain = codebooks.row_weights

    def keep(side: str, spec: Any, layer: int, found: Any) -> torch.Tensor:
        record[side, layer] = plain(side, spec, layer, found)
        return record[side, layer]

    monkeypatch.setattr(codebooks, "row_weights", keep)
    model = rewritten("llama", method="tasq", check=False)
    basis = runtime_of(model).tables["layers.1.k_basis"].double()
    raw = record["k", 1].double()
    for head in range(2):
        order = basis[head].argmax(0)
        weight = basis[head].sum(0)
        wanted = raw[head][:, order] / weight.square()
        assert torch.allclose(seen["vector-normed"][head].double(), wanted, rtol=1e-4)
