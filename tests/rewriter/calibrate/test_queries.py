"""What calibration sees of queries: against the model's own projections and a softmax in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvsink
from kvsink.calibrate.calibration import calibrate
from kvsink.calibrate.record import Calibration
from kvsink.codecs.protect import parse_policies
from kvsink.errors import CalibrationError
from kvsink.model.runtime import runtime_of
from tests.models import build, tokens


def test_queries_weigh_what_they_give_to_rows_that_are_coded() -> None:
    """Against the first layer's own projections and a softmax in float64; the first two rows stay exact."""
    model, ids = build("llama"), tokens(4, 64)
    layers = range(len(model.model.layers))
    record = calibrate(model, ids, [parse_policies("first:2")] * len(layers), dict.fromkeys(layers, (64,)))
    inner, kv = model.model, model.config.num_key_value_heads
    attention, x = inner.layers[0].self_attn, inner.layers[0].input_layernorm(inner.embed_tokens(ids))
    q, k = (
        p(x).detach().double().unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj)
    )
    angles = [t.double() for t in inner.rotary_emb(x, torch.arange(64)[None])]
    turned_q, turned_k = apply_rotary_pos_emb(q, k, *angles)
    logits = turned_q @ turned_k.repeat_interleave(q.shape[1] // kv, 1).mT / attention.head_dim**0.5
    mass = logits.masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf).softmax(-1)[..., 2:].sum(-1)  # [B, Hq, S]
    seen = torch.arange(0, 64, 8)
    q, mass = (t[:, :, seen].unflatten(1, (kv, -1)) for t in (q, mass))
    got = record.queries[0]
    wanted = torch.einsum("bhgs,bhgsd,bhgse->hde", mass, q, q)
    assert (got.second - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert int(got.count) == mass[:, 0].numel()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_row_that_queries_attend_to(side: str) -> None:
    model, ids = build("llama"), tokens(2, 40)
    layers = range(len(model.model.layers))
    wanted, got = (
        calibrate(model, prompts, [parse_policies("none")] * len(layers), dict.fromkeys(layers, (64,))).queries[0]
        for prompts in ([{"input_ids": row[None]} for row in ids], [padded(row, side) for row in ids])
    )
    assert (got.second - wanted.second).abs().max() <= 1e-4 * wanted.second.abs().max()


def padded(row: torch.Tensor, side: str) -> dict[str, torch.Tensor]:
    """A prompt with eight tokens of padding, so that the same queries are looked at."""
    no, real = torch.zeros(8, dtype=row.dtype), torch.ones_like(row)
    parts = [(no, row), (no, real)] if side == "left" else [(row, no), (real, no)]
    ids, mask = (torch.cat(p)[None] for p in parts)
    return {"input_ids": ids, "attention_mask": mask}


def test_a_record_without_queries_is_refused() -> None:
    model, ids = build("llama"), tokens(4, 64)
    layers = range(len(model.model.layers))
    record = calibrate(model, ids, [parse_policies("kvsink:5+first:1")] * len(layers), dict.fromkeys(layers, (64,)))
    record.queries.clear()
    with pytest.raises(CalibrationError, match="layer 0 has no query statistics in this record; calibrate with this method again"):
        kvsink.rewrite(model, "klt", calibration=record)


def test_records_keep_and_add_up_queries(tmp_path: Path) -> None:
    model, ids = build("llama"), tokens(8, 64)
    layers = range(len(model.model.layers))
    whole, one, two = (
        calibrate(model, part, [parse_policies("first:1")] * len(layers), dict.fromkeys(layers, (64,)))
        for part in (ids, ids[:4], ids[4:])
    )
    one.save(tmp_path / "one.safetensors")
    one = Calibration.load(tmp_path / "one.safetensors", model)
    one.merge(two)
    for layer in layers:
        assert one.queries[layer].count == whole.queries[layer].count
        assert torch.allclose(one.queries[layer].second, whole.queries[layer].second, rtol=1e-5)


def test_where_attention_shows_no_queries_errors_count_alike() -> None:
    """Eager attention is the model's own function: the report says what is missing, and a record of it is not asked for again."""
    model = build("llama")
    model.set_attn_implementation("eager")
    report = kvsink.rewrite(model, "klt", calibration=tokens(4, 64))
    assert "layers [0, 1]: their attention does not show its queries; errors of their keys count alike" in report.notes
    assert {plan.codec.key.metric for plan in runtime_of(model).plans} == {"none"}
