"""The C kernel over pages equals the definition: dtypes, long sequences in parts, many query heads, chunks, large logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvsink.kernels.backends import Shape
from kvsink.kernels.cpu.pages import attend, declines
from kvsink.kernels.pages import Batch, attend_pages_ref
from tests.close import FUSED_FLOAT32
from tests.paged import fed, served
from tests.states import CPU, GPU, HEAD_DIM, KV_HEADS

CODED = (("klt", ()), ("klt:best", (("key_bits", 2.25),)))


def asked(repeats: int, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(repeats)
    return torch.randn(rows, repeats * KV_HEADS, HEAD_DIM, generator=g).to(dtype)


@pytest.mark.parametrize("repeats", [1, 3, 8])
@pytest.mark.parametrize(("method", "options"), CODED)
def test_long_sequences_are_shared_out_in_parts(method: str, options: tuple, repeats: int) -> None:
    """One short job and one of seven pages, of which a thread takes some; and chunks that begin inside a page."""
    s = served(method, options, count=12)
    for chunks in ([1, 1], [3, 37]):
        batch, made = fed(s, [3, 801], chunks)
        q = asked(repeats, sum(chunks))
        got, wanted = (f(s.codec, s.params, s.pages, q, batch, 0.3) for f in (attend, attend_pages_ref))
        assert (got - wanted).abs().max() <= FUSED_FLOAT32 * max(float(v.abs().max()) for _, v, _ in made)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_and_exact_rows_of_sixteen_bits(dtype: torch.dtype) -> None:
    s = served("klt", (), places=2, dtype=dtype)
    batch, made = fed(s, [200], [20], share=0.1)
    q = asked(2, 20, dtype)
    got, wanted = (
        attend(s.codec, s.params, s.pages, q, batch, 0.3),
        attend_pages_ref(s.codec, s.params, s.pages, q.float(), batch, 0.3),
    )
    assert got.dtype == dtype
    assert (got.float() - wanted).abs().max() <= torch.finfo(dtype).eps * float(made[0][1].abs().max())


def test_queries_need_not_lie_side_by_side_and_results_go_where_they_are_wanted() -> None:
    s = served("klt")
    batch, _ = fed(s, [140, 9], [2, 9])
    wide = asked(6, 11)
    q, out = wide[:, : 2 * KV_HEADS], torch.full((13, 2 * KV_HEADS, HEAD_DIM), 7.0)
    got = attend(s.codec, s.params, s.pages, q, batch, 0.3, out[:11])
    assert got.data_ptr() == out.data_ptr() and bool((out[11:] == 7.0).all())
    assert torch.equal(got, attend(s.codec, s.params, s.pages, q.contiguous(), batch, 0.3))


def test_a_row_has_one_result_whatever_it_is_asked_with() -> None:
    """Rows of one job, of several, and each in a call of its own: the softmax of a row takes its slots in the same order."""
    s = served("klt")
    batch, made = fed(s, [100], [33])
    q = asked(2, 33)
    together = attend(s.codec, s.params, s.pages, q, batch, 0.3)
    for t in (0, 15, 16, 32):
        one = attend(s.codec, s.params, s.pages, q[t : t + 1], Batch([0, 1], [68 + t], batch.tables), 0.3)
        assert (one[0] - together[t]).abs().max() <= FUSED_FLOAT32 * made[0][1].abs().max()


def test_large_logits_stay_finite() -> None:
    s = served("klt")
    batch, made = fed(s, [300], [5], share=0.2)
    q = 300 * asked(2, 5)
    got, wanted = (f(s.codec, s.params, s.pages, q, batch, 1.0) for f in (attend, attend_pages_ref))
    assert torch.isfinite(got).all() and (got - wanted).abs().max() <= 1e-3 * made[0][1].abs().max()


def test_what_it_does_not_read_is_named() -> None:
    shape = Shape(4, 2, 16, 16, 16, torch.float32, rows=2)
    known, unknown = served("klt").codec.format, served("static").codec.format
    assert declines(known, shape, CPU) == "" and declines(known, shape, GPU) == "the device is cuda"
    assert declines(unknown, shape, CPU) == "rows of kind static"
    dense = replace(known, key=replace(known.key, block=1))
    assert declines(dense, shape, CPU) == "blocks of 1 tokens"
