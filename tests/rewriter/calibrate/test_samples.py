"""Samples: which rows are drawn, gradients are autograd's own, error factors are those of a loop over all pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvsink.calibrate.calibration import calibrate
from kvsink.calibrate.design import gather_needs, sample_need
from kvsink.calibrate.record import Calibration
from kvsink.calibrate.samples import WATCH, error_factors
from kvsink.calibrate.statistics import SampleNeed, Samples
from kvsink.codecs import SideSpec
from kvsink.codecs.protect import parse_policies
from kvsink.errors import CalibrationError
from kvsink.kernels.rope import rope, unrope
from kvsink.model.runtime import Runtime
from kvsink.model.tables import LayerPlan
from tests.models import HEAD_DIM, HEADS, KV_HEADS, LAYERS, build, tokens

BOTH = dict.fromkeys(range(LAYERS), (64,))
NOTHING = [()] * LAYERS
T = 64  # tokens of a window
ALL = SampleNeed(1, fisher=True, error=True)


def drawn(family: str = "llama", ids: Tensor | None = None, policy: str = "none", **options: Any) -> Calibration:
    ids = tokens(3, T, seed=1) if ids is None else ids
    samples = options.pop("samples", dict.fromkeys(range(LAYERS), ALL))
    return calibrate(build(family), ids, [parse_policies(policy)] * LAYERS, BOTH, samples=samples, **options)


class _Shifted(DynamicLayer):
    """A cache layer that adds a constant to the keys and values it is given, and remembers them."""

    def __init__(self, shift: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.shift = shift

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen = key_states, value_states
        if self.shift is not None:
            key_states, value_states = key_states + self.shift[0], value_states + self.shift[1]
        return super().update(key_states, value_states)


def loss_of(model: Any, ids: Tensor, shifts: list[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, list[Any]]:
    layers = [_Shifted(s) for s in shifts]
    logits = model(ids, past_key_values=Cache(layers=layers), use_cache=True).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    return loss, [layer.seen for layer in layers]


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_are_the_models_own() -> None:
    ids, record = tokens(3, T, seed=1), drawn()
    model = build("llama")
    runtime = Runtime(model, (LayerPlan(None),) * LAYERS, {}, (), "test")
    cos, sin = runtime.angles(1, torch.arange(T)[None])
    for window in range(3):
        with torch.no_grad():
            _, seen = loss_of(model, ids[window : window + 1], [None] * LAYERS)
        k, v = seen[1]
        rows = record.samples[1].take((record.samples[1].windows == window).nonzero().flatten())
        assert sorted(rows.positions.tolist()) == list(range(T))
        assert (rows.keys - unrope(k, cos, sin)[0, :, rows.positions].transpose(0, 1)).abs().max() <= 1e-5
        assert torch.equal(rows.values, v[0, :, rows.positions].transpose(0, 1))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_rows_do_not_depend_on_the_batch(batch: int) -> None:
    plain = dict.fromkeys(range(LAYERS), SampleNeed())
    one, two = drawn(samples=plain).samples[0], drawn(samples=plain, batch=batch).samples[0]
    assert torch.equal(one.positions, two.positions) and torch.equal(one.windows, two.windows)
    assert (one.keys - two.keys).abs().max() <= 1e-5 and one.key_fisher is None and one.key_error is None


def test_a_cap_takes_as_many_of_every_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvsink.calibrate.samples.Collector.__init__.__defaults__", (10,))
    rows = drawn(samples={1: SampleNeed()}).samples[1]
    assert rows.windows is not None and torch.bincount(rows.windows).tolist() == [3, 3, 4]
    assert len(set(zip(rows.windows.tolist(), rows.positions.tolist(), strict=True))) == 10


def test_protected_rows_are_left_out() -> None:
    record = drawn(policy="first:4+massive:2")
    for rows in record.samples.values():
        assert int(rows.positions.min()) == 4 and len(rows) <= 3 * (T - 4)
    assert drawn(policy="first:4").samples[0].windows.bincount().tolist() == [T - 4] * 3


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3"])  # phi3: half of the channels are rotary
def test_fisher_is_the_squared_gradient(family: str) -> None:
    """Of every entry, against autograd through a shift of the key before RoPE; of some, against a difference of losses."""
    ids, record = tokens(1, T, seed=1), drawn(family, tokens(1, T, seed=1))
    model = build(family)
    runtime = Runtime(model, (LayerPlan(None),) * LAYERS, {}, (), "test")
    cos, sin = runtime.angles(0, torch.arange(T)[None])

    def loss(layer: int, k: Tensor, v: Tensor) -> Tensor:
        shifts: list[Any] = [None] * LAYERS
        shifts[layer] = (rope(k, cos, sin), v)
        return loss_of(model, ids, shifts)[0]

    for layer in range(LAYERS):
        rows = record.samples[layer]
        k, v = (torch.zeros(1, KV_HEADS, T, HEAD_DIM, requires_grad=True) for _ in range(2))
        gradients = torch.autograd.grad(loss(layer, k, v), (k, v))
        for side, held in ((0, rows.key_fisher), (1, rows.value_fisher)):
            wanted = gradients[side][0, :, rows.positions].transpose(0, 1).square()
            assert held is not None and (held - wanted).abs().max() <= 1e-4 * wanted.max()
            at = int(wanted.flatten().argmax())
            row, head, channel = at // (KV_HEADS * HEAD_DIM), at // HEAD_DIM % KV_HEADS, at % HEAD_DIM
            losses = []
            for sign in (-1, 1):
                shift = torch.zeros(2, 1, KV_HEADS, T, HEAD_DIM)
                shift[side, 0, head, rows.positions[row], channel] = sign * 0.03
                with torch.no_grad():
                    losses.append(float(loss(layer, shift[0], shift[1])))
            slope = (losses[1] - losses[0]) / 0.06  # the losses are float32 numbers near 300, whose rounding is 0.5 % of this slope
            assert abs(abs(slope) - float(held.flatten()[at]) ** 0.5) <= 0.02 * abs(slope)


def test_padding_of_a_batch_and_windows_do_not_mix() -> None:
    """The gradient of a window is the same whatever other windows are calibrated with it."""
    ids = tokens(3, T, seed=1)
    alone, together = drawn(ids=ids[1:2]).samples[0], drawn(ids=ids, batch=3).samples[0]
    rows = together.take((together.windows == 1).nonzero().flatten())
    for name in ("key_fisher", "value_fisher", "key_error", "value_error"):
        a = getattr(alone, name)[alone.positions.argsort()]
        assert (a - getattr(rows, name)[rows.positions.argsort()]).abs().max() <= 1e-5 * a.abs().max()


def brute_force(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    h, n = k.shape[1], k.shape[2]
    key, value = torch.zeros(n, h, dtype=torch.float64), torch.zeros(n, h, dtype=torch.float64)
    for query_head in range(q.shape[1]):
        head = query_head // (q.shape[1] // h)
        for i in range(n):
            a = (q[0, query_head, i] @ k[0, head, : i + 1].T * scale).softmax(-1)
            inner = v[0, head, : i + 1].T @ torch.diag(a) @ (torch.eye(i + 1).double() - a[None].expand(i + 1, -1))
            for j in range(i + 1):
                key[j, head] += scale * inner[:, j].abs().sum() * q[0, query_head, i].norm()
                value[j, head] += a[j]
    return key, value


@pytest.mark.parametrize("chunk", [3, 128])
def test_error_factors_are_those_of_the_theorem(chunk: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 11, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    wanted = brute_force(q, k, v, 0.3)
    causal = torch.ones(1, 1, 11, 11, dtype=torch.bool).tril()
    for mask in (None, causal, torch.where(causal, 0.0, -1e30)):
        for got, want in zip(error_factors(q, k, v, 0.3, mask, chunk), wanted, strict=True):
            assert got.shape == (1, 11, 2) and (got[0] - want).abs().max() <= 1e-5 * want.max()


def test_error_factors_see_the_models_queries() -> None:
    """Every query spends one unit of attention, and scaling the queries of a head scales what its keys' errors reach."""
    model, ids = build("llama"), tokens(1, T, seed=1)
    seen = {}

    def spy(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        cos, sin = kwargs["position_embeddings"]
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        x = kwargs["hidden_states"]
        q, k, v = (p(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        seen["qkv"] = q.double(), k.double(), v.double()

    model.model.layers[1].self_attn.register_forward_hook(spy, with_kwargs=True)
    record = calibrate(model, ids, NOTHING, BOTH, samples={1: SampleNeed(error=True)})
    key, value = brute_force(*seen["qkv"], HEAD_DIM**-0.5)
    rows = record.samples[1]
    order = rows.positions.argsort()
    assert rows.key_error is not None and rows.value_error is not None and rows.key_fisher is None
    assert (rows.key_error[order] - key).abs().max() <= 1e-4 * key.max()
    assert (rows.value_error[order] - value).abs().max() <= 1e-4 * value.max()
    assert abs(float(rows.value_error.sum()) - HEADS * T) <= 1e-3


# -- the model afterwards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_as_before(attention: str) -> None:
    model = build("llama", attention).requires_grad_(True)
    model.lm_head.weight.requires_grad_(False)
    calibrate(model, tokens(3, T), NOTHING, BOTH, samples={0: ALL})
    assert model.config._attn_implementation == attention
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any("_kvsink_watch" in m.__dict__ for m in model.modules())


def test_what_cannot_be_watched_is_refused() -> None:
    model = build("gemma2")
    with pytest.raises(CalibrationError, match="attention with softcap cannot be weighed by its error"):
        calibrate(model, tokens(3, T), NOTHING, {1: (64,)}, samples={1: SampleNeed(error=True)})
    assert model.config._attn_implementation == "eager" != WATCH
    assert len(calibrate(model, tokens(3, T), NOTHING, {1: (64,)}, samples={1: SampleNeed(fisher=True)}).samples[1]) == 3 * T


@pytest.mark.parametrize(
    ("policy", "rows", "words"),
    [
        ("none", 193, "192 calibration tokens are too few for codebooks of 193 centroids; give at least 193"),
        ("first:4", 190, r"layer 0: 180 rows are fewer than the 190 centroids of its codebook; calibrate on at least 202 tokens"),
    ],
)
def test_too_few_rows(policy: str, rows: int, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        drawn(policy=policy, samples={0: SampleNeed(rows)})


def test_samples_without_statistics_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"samples are asked of layers \[1\] that record no statistics"):
        calibrate(build("llama"), tokens(3, T), NOTHING, {0: (64,)}, samples={1: ALL})


# -- the record --------------------------------------------------------------------------------------------------------


def test_samples_come_back_from_disk(tmp_path: Path) -> None:
    record = drawn()
    record.save(tmp_path / "record.safetensors")
    again = Calibration.load(tmp_path / "record.safetensors", build("llama"))
    assert set(again.samples) == set(record.samples)
    for layer, rows in record.samples.items():
        back = again.samples[layer].tensors()
        assert set(back) == set(rows.tensors()) and len(back) == 8
        assert all(torch.equal(back[n], t) for n, t in rows.tensors().items())


def test_a_damaged_sample_is_refused(tmp_path: Path) -> None:
    record = drawn()
    record.samples[0].values[3, 0, 0] = float("nan")
    record.save(tmp_path / "record.safetensors")
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        Calibration.load(tmp_path / "record.safetensors")


def test_shards_merge() -> None:
    ids = tokens(3, T, seed=1)
    whole, one, two = drawn(ids=ids), drawn(ids=ids[:1]), drawn(ids=ids[1:])
    one.merge(two)
    assert one.tokens == whole.tokens and float(one.values[0].count) == float(whole.values[0].count) == 3 * T
    a, b = one.samples[1], whole.samples[1]
    assert a.windows is not None and b.windows is not None and torch.bincount(a.windows).tolist() == [T] * 3
    key = (a.windows * T + a.positions).argsort(), (b.windows * T + b.positions).argsort()
    for name, t in a.tensors().items():
        if t.is_floating_point():
            other = b.tensors()[name][key[1]]
            assert (t[key[0]] - other).abs().max() <= 1e-5 * other.abs().max()
    with pytest.raises(CalibrationError, match="records hold samples of different layers"):
        one.merge(drawn(samples={0: ALL}))
    with pytest.raises(CalibrationError, match="of different weights"):
        one.merge(drawn("qwen2"))


def test_merging_keeps_the_cap() -> None:
    rows = Samples(torch.randn(30, 1, 4), torch.randn(30, 1, 4), torch.arange(30), windows=torch.arange(30) // 10)
    both = rows.merge(replace(rows, key_error=torch.ones(30, 1)), most=40)
    assert len(both) == 40 and both.key_error is None and both.windows is not None
    assert both.windows.max() == 5 and 5 < int((both.windows < 3).sum()) < 35


def test_needs_are_gathered() -> None:
    assert SampleNeed(4, fisher=True) | SampleNeed(9, error=True) == SampleNeed(9, True, True)
    plain = SideSpec(bits=2, kind="uniform")
    klt = SideSpec(bits=2, domain="block", block=64, center=True, transform="klt", kind="lloyd")
    assert sample_need(plain, SideSpec()) is None
    assert gather_needs([(plain, plain), (klt, plain)], 2, 16) == ((64,), None)
