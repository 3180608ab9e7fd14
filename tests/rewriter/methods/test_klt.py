"""klt below 1.5 bits: keys in codebooks, in the metric of the queries, by the formula and through every way they are read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvsink.cache.cache import KVSinkCache
from kvsink.model.runtime import runtime_of
from tests.close import FUSED_FLOAT32, largest_difference
from tests.graphs import rewritten
from tests.models import HEAD_DIM, tokens
from tests.states import read_codes, rows


def test_rows_are_those_of_the_formula() -> None:
    """Of the first block, whose frame is the row itself: centred, in the basis, the nearest centroid of every run, and back by the
    inverse of the basis, in float64."""
    runtime = runtime_of(rewritten("llama", method="klt", key_bits=1.25, value_bits=1.25))
    codec = replace(runtime.plans[1].codec, segments=())
    assert (codec.key.kind, codec.key.metric, codec.key.couple) == ("vector", "attention", 8)
    p = dict(zip(codec.param_names(), runtime.params(1, codec, 64, torch.device("cpu")), strict=True))
    k, v = rows(1, 30, heads=2)
    positions = torch.arange(30)[None]
    (found,) = read_codes(codec, p, k, v, positions, *runtime.angles(1, positions))[0]
    mean, basis, book = p["k_table"][:, :30].double(), p["k_basis"].double(), p["k_book"].double()
    z = ((k[0].double() - mean) @ basis).unflatten(-1, (-1, 8)).transpose(1, 2)  # [H, D/8, N, 8]
    near = torch.cdist(z, book).argmin(-1)
    chosen = book.gather(2, near[..., None].expand(-1, -1, -1, 8)).transpose(1, 2).flatten(2)
    wanted = chosen @ torch.linalg.inv(basis) + mean
    assert wanted.shape == (2, 30, HEAD_DIM) and (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (found - chosen @ basis.mT - mean).abs().max() > 1e-2 * wanted.abs().max()  # the transpose is another matrix


@pytest.mark.parametrize("bits", [1, 1.25])
def test_kernels_read_them_as_they_are_decoded(bits: float) -> None:
    logits = []
    for attention in ("sdpa", "eager"):  # "eager" attends to decoded rows
        model = rewritten("llama", method="klt", key_bits=bits, value_bits=bits)
        model.set_attn_implementation(attention)
        held = KVSinkCache.for_model(model, 2, 64)
        with torch.no_grad():
            logits.append([model(tokens(2, n, seed=n), past_key_values=held).logits for n in (20, 1, 1)])
    assert largest_difference(*logits) <= FUSED_FLOAT32 * float(logits[1][0].abs().max())
