"""OSCAR: rotations by its formulas in float64 from the model's own projections, and bits as its paper counts them."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvsink
from kvsink.calibrate.calibration import calibrate
from kvsink.codecs import Codec, SideSpec
from kvsink.codecs.protect import parse_policies
from kvsink.errors import UnsupportedError
from kvsink.kernels.hadamard import hadamard_ref
from kvsink.model.runtime import runtime_of
from kvsink.report import counted_bits
from tests.models import HEAD_DIM, build, tokens


def test_rotations_are_those_of_queries_and_of_scored_values() -> None:
    """C_K = sum q^T q; C_V = sum of v^T v weighed by k C_K k^T of its window; R = U H: R^T C R is H^T Lam H, of equal diagonal."""
    model, ids = build("llama"), tokens(3, 64)
    record = calibrate(model, ids, [parse_policies("first:4")] * 2, dict.fromkeys(range(2), (0,)))
    attention, x = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    q, k, v = (
        p(x).detach().double().unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *(t.double() for t in model.model.rotary_emb(x, torch.arange(64)[None])))
    q = q[:, :, ::8].unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # every eighth query, by KV head
    window = torch.einsum("bhnd,bhne->bhde", q, q)
    rows, values = k[:, :, 4:], v[:, :, 4:]
    weight = torch.einsum("bhsd,bhde,bhse->bhs", rows, window, rows)
    weight = weight / weight.mean(-1, keepdim=True)
    wanted = window.sum(0), torch.einsum("bhs,bhsd,bhse->hde", weight, values, values)
    kvsink.rewrite(model, "oscar-int2", calibration=record, protect="first:4", fold=False)
    tables = runtime_of(model).tables
    for side, moment in zip("kv", wanted, strict=True):
        basis = tables[f"layers.0.{side}_basis"].double()
        assert f"layers.0.{side}_unbasis" not in tables
        assert (basis.mT @ basis - torch.eye(HEAD_DIM)).abs().max() <= 1e-5
        lam = torch.linalg.eigvalsh(moment).flip(-1)
        behind = hadamard_ref(hadamard_ref(torch.diag_embed(lam), HEAD_DIM).mT, HEAD_DIM)
        assert (basis.mT @ moment @ basis - behind).abs().max() <= 1e-4 * lam.max()
        flat = behind.diagonal(dim1=-2, dim2=-1)
        assert torch.allclose(flat, flat.mean(-1, keepdim=True).expand_as(flat))


@pytest.mark.parametrize(("dim", "short", "long"), [(128, 3.50, 2.29), (64, 3.75, 2.54)])
def test_counted_bits_are_those_of_the_paper_and_what_its_exact_rows_cost(dim: int, short: float, long: float) -> None:
    """2.28 at 131,072 tokens is 3.5 at 4,096: 320 rows in 16 bit, as many codes beside them, positions."""
    m = kvsink.get_method("oscar-int2")
    codec = Codec(*(m.side(which, 2).resolved(8, dim) for which in ("key", "value")), segments=(64,), window=m.window)
    at = [sum(counted_bits(codec, 8, dim, n, layers=36)) / 2 for n in (4096, 131072)]
    assert at == pytest.approx([short, long], abs=0.01)


def test_what_directions_cannot_be_of() -> None:
    with pytest.raises(UnsupportedError, match="a spread needs transform='klt' and a kind with one step a token"):
        SideSpec(bits=2, kind="lloyd", transform="klt", spread="hadamard")
    with pytest.raises(UnsupportedError, match="spread 'dct' is not one of none, hadamard, balanced"):
        SideSpec(bits=2, kind="uniform", transform="klt", spread="dct")
    with pytest.raises(UnsupportedError, match="a metric needs transform='klt'"):
        SideSpec(bits=2, kind="uniform", metric="directions")
