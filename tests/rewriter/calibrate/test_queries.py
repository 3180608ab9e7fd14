"""What calibration sees of queries: against the model's own projections and a softmax in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def projected(model: Any, ids: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries before and after RoPE and keys after it, by the first layer's own projections, in float64. first: position of a row's
    first token."""
    attention, x = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    q, k = (
        p(x).detach().double().unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj)
    )
    angles = [t.double() for t in model.model.rotary_emb(x, first + torch.arange(ids.shape[1])[None])]
    return q, *apply_rotary_pos_emb(q, k, *angles)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_moments_after_rope_and_of_causal_pairs(side: str) -> None:
    """Queries as attention sees them, keys likewise, and every query turned back by the position of every key that it sees."""
    model, ids = build("llama"), tokens(2, 40)
    layers = range(len(model.model.layers))
    given: Any = ids if side == "none" else [padded(row, side) for row in ids]
    record = calibrate(model, given, [parse_policies("first:2")] * len(layers), dict.fromkeys(layers, (0, 64)))
    q, turned_q, turned_k = projected(model, ids, 8 if side == "left" else 0)  # transformers counts the padding in front
    kv, seen = model.config.num_key_value_heads, torch.arange(0, 40, 8)
    rows = turned_q[:, :, seen].unflatten(1, (kv, -1))
    got = record.queries[0]
    assert got.roped is not None and got.causal is not None
    wanted = torch.einsum("bhgsd,bhgse->hde", rows, rows)
    assert (got.roped - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    causal = torch.zeros_like(got.causal)
    x = q.transpose(1, 2)  # R_p^T R_t x is x turned by t - p
    for t in seen.tolist():
        distance = torch.arange(t + 1)
        cos, sin = (a[0].double() for a in model.model.rotary_emb(x, distance[None]))
        half = x.shape[-1] // 2
        row = x[:, t, :, None]  # [B, Hq, 1, D]
        pairs = row * cos + torch.cat([-row[..., half:], row[..., :half]], -1) * sin
        causal += pairs.square().sum((0, 2)).unflatten(0, (kv, -1)).sum(1)
    assert (got.causal - causal).abs().max() <= 1e-5 * causal.max()
    keys = turned_k[:, :, 2:]
    stats = record.keys[0, 0]
    assert int(stats.count.sum()) == keys.shape[0] * keys.shape[2]
    assert (stats.second - torch.einsum("bhsd,bhse->hde", keys, keys)).abs().max() <= 1e-5 * stats.second.abs().max()
    assert (stats.mean() - keys.mean((0, 2))).abs().max() <= 1e-5


def test_what_reads_values_is_the_output_projection() -> None:
    """An error e of a value costs ||e W^T||^2 summed over the query heads that read it."""
    model = build("llama")
    record = calibrate(model, tokens(4, 40), [parse_policies("none")] * 2, {0: (0,), 1: (0,)})
    attention, kv = model.model.layers[0].self_attn, model.config.num_key_value_heads
    dim, reads = attention.head_dim, record.queries[0].reads
    assert reads is not None
    each = attention.o_proj.in_features // dim // kv
    for head in range(kv):
        e, wanted = torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(head)), 0.0
        for q in range(head * each, (head + 1) * each):
            out = torch.zeros(attention.o_proj.in_features, dtype=torch.float64)
            out[q * dim : (q + 1) * dim] = e
            wanted += float((attention.o_proj.weight.double() @ out).square().sum())
        assert float(e @ reads[head] @ e) == pytest.approx(wanted, rel=1e-9)


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


@pytest.mark.parametrize("bits", [{}, {"key_bits": 16}])
def test_an_older_record_is_refused_where_later_sums_are_needed(tmp_path: Path, bits: dict[str, int]) -> None:
    model, ids, file = build("llama"), tokens(4, 64), tmp_path / "old.safetensors"
    record = calibrate(model, ids, [parse_policies("first:1")] * 2, {0: (0, 64), 1: (0, 64)})
    for q in record.queries.values():
        q.roped = q.causal = q.scored = q.reads = None
    record.save(file)
    with pytest.raises(CalibrationError, match=r"layer 0 has no (query|output projection) statistics in this record; calibrate"):
        kvsink.rewrite(model, "wush", calibration=file, protect="first:1", **bits)


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
        for name in ("roped", "causal", "reads"):
            mine, both = (getattr(r.queries[layer], name) for r in (one, whole))
            assert torch.allclose(mine, both, rtol=1e-4, atol=1e-6 * float(both.abs().max()))


def test_where_attention_shows_no_queries_errors_count_alike() -> None:
    """Eager attention is the model's own function: the report says what is missing, and a record of it is not asked for again."""
    model = build("llama")
    model.set_attn_implementation("eager")
    report = kvsink.rewrite(model, "klt", calibration=tokens(4, 64))
    assert "layers [0, 1]: their attention does not show its queries; errors of their keys count alike" in report.notes
    assert {plan.codec.key.metric for plan in runtime_of(model).plans} == {"none"}
