"""Folding the value rotation into the weights keeps the model the same function, to float64."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kvsink
from kvsink.errors import UnsupportedError
from kvsink.evaluate.folding import unfoldable
from kvsink.kernels.hadamard import hadamard_matrix
from kvsink.model.anatomy import anatomy
from kvsink.model.fold import fold_value_rotation, foldable
from tests.close import EXACT_FLOAT64, HALF_SCALE, largest_difference
from tests.models import HEAD_DIM, KV_HEADS, build, tokens


def attentions(model: Any) -> list[Any]:
    return [model.get_submodule(name) for name in anatomy(model).attentions]


@pytest.mark.parametrize("order", [HEAD_DIM, 8])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_logits_do_not_change(family: str, order: int) -> None:
    model = build(family, dtype=torch.float64)
    if family == "qwen2":
        assert all(a.v_proj.bias is not None for a in attentions(model))
    ids = tokens(2, 20, seed=1)
    with torch.no_grad():
        before, weight = model(ids).logits, attentions(model)[0].v_proj.weight.clone()
        for attention in attentions(model):
            assert foldable(attention) is None
            fold_value_rotation(attention, order)
        after = model(ids).logits
    assert largest_difference(after, before) <= EXACT_FLOAT64 * max(1.0, float(before.abs().max()))
    assert largest_difference(attentions(model)[0].v_proj.weight, weight) > 0.01


def test_values_are_turned_forwards() -> None:
    model = build("qwen2", dtype=torch.float64)
    attention = attentions(model)[0]
    x = torch.randn(5, attention.v_proj.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = attention.v_proj(x)
    fold_value_rotation(attention, HEAD_DIM)
    turned = (before.unflatten(-1, (KV_HEADS, HEAD_DIM)) @ hadamard_matrix(HEAD_DIM)).flatten(-2)
    assert largest_difference(attention.v_proj(x), turned) <= EXACT_FLOAT64


def test_weights_are_rounded_once_to_the_storage() -> None:
    plain, stored, wide = (attentions(build("llama"))[0] for _ in range(3))
    fold_value_rotation(stored, HEAD_DIM, torch.float16)
    fold_value_rotation(wide, HEAD_DIM)
    assert stored.v_proj.weight.dtype == torch.float32
    assert torch.equal(stored.v_proj.weight, stored.v_proj.weight.half().float())
    doubled = copy.deepcopy(plain).double()
    fold_value_rotation(doubled, HEAD_DIM)
    for name in ("v_proj", "o_proj"):
        exact = getattr(doubled, name).weight
        assert torch.equal(getattr(stored, name).weight, exact.half().float())
        assert torch.equal(getattr(wide, name).weight, exact.float())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: delattr(a, "v_proj"), "v_proj is nothing, not a plain Linear"),
        (lambda a: setattr(a, "o_proj", nn.Identity()), "o_proj is Identity, not a plain Linear"),
        (lambda a: setattr(a, "v_norm", nn.Identity()), "values are normalised after v_proj"),
    ],
)
def test_what_cannot_be_folded_says_why(change: Any, words: str) -> None:
    attention = attentions(build("llama"))[0]
    change(attention)
    assert foldable(attention) == words


def test_a_fused_projection_is_not_folded() -> None:
    assert foldable(attentions(build("phi3"))[0]) == "v_proj is nothing, not a plain Linear"


class Int8Linear(nn.Linear):
    """A linear layer whose weight is codes of 8 bits and a scale per output channel, as quantizers of weights leave it."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None, dtype=plain.weight.dtype)
        scale = plain.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((plain.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = plain.bias

    def forward(self, x: Any) -> Any:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Codes(torch.Tensor):
    """A weight in a format of its own that stands in a plain nn.Linear; what works on numbers refuses it."""

    @staticmethod
    def __new__(cls, codes: Any, scale: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, requires_grad=False)

    def __init__(self, codes: Any, scale: Any) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Codes(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{func} on codes")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *rest = args
            return nn.functional.linear(x, weight.codes.to(x.dtype) * weight.scale, *rest)
        return super().__torch_function__(func, types, args, kwargs or {})


def as_modules(attention: Any) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(attention, name, Int8Linear(getattr(attention, name)))


def as_weights(attention: Any) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        coded = Int8Linear(getattr(attention, name))
        getattr(attention, name).weight = nn.Parameter(Codes(coded.weight.data, coded.scale.data), requires_grad=False)


def with_torchao(attention: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        quantization.quantize_(getattr(attention, name), quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize("method", ["rotatekv", "klt", "rtn"])
@pytest.mark.parametrize("quantize", [as_modules, as_weights, with_torchao], ids=lambda f: f.__name__)
def test_quantized_weights_stay_and_the_rotation_runs_online(quantize: Any, method: str) -> None:
    """The numbers are those of the unfolded form over the same weights in plain floating point."""
    model, plain = build("llama"), build("llama")
    for attention in attentions(model):
        quantize(attention)
    with torch.no_grad():
        for one, two in zip(attentions(model), attentions(plain), strict=True):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):  # what the quantized layer multiplies by, column by column
                unit = torch.eye(getattr(one, name).in_features)
                getattr(two, name).weight.copy_(getattr(one, name)(unit).T)
    options: dict[str, Any] = {"key_bits": 2, "value_bits": 2, "calibration": tokens(8, 64, seed=2)}
    report = kvsink.rewrite(model, method, **options)
    kvsink.rewrite(plain, method, fold=False, **options)
    rotated = any(p.codec.value.transform == "hadamard" for p in model._kvsink_runtime.plans)
    assert rotated == (method != "rtn")
    assert any(note.startswith("value rotation runs online: ") for note in report.notes) == rotated
    assert not any(p.codec.value.folded for p in model._kvsink_runtime.plans)
    assert model._kvsink_runtime.plans == plain._kvsink_runtime.plans
    outs = []
    with torch.no_grad():
        for m in (model, plain):
            cache = kvsink.KVSinkCache.for_model(m, max_length=64)
            outs.append(torch.cat([m(part, past_key_values=cache).logits for part in tokens(1, 40, seed=1).split(8, 1)], 1))
    bound = HALF_SCALE if quantize is with_torchao else 0.0  # torchao multiplies by the scale after the sum
    assert largest_difference(*outs) <= bound * float(outs[1].abs().max())
    exact = build("llama")(tokens(1, 40, seed=1)).logits
    assert largest_difference(outs[1], exact) > 1e-3  # the codes were read


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (as_modules, "v_proj is Int8Linear, not a plain Linear"),
        (as_weights, "the weight of v_proj is Codes, not plain floating point"),
        (
            lambda a: setattr(a.o_proj, "weight", nn.Parameter(a.o_proj.weight.to(torch.int8), False)),
            "the weight of o_proj is torch.int8, not plain floating point",
        ),
    ],
)
def test_quantized_projections_are_not_folded(change: Any, words: str) -> None:
    attention = attentions(build("llama"))[0]
    change(attention)
    assert foldable(attention) == words


def test_shared_and_offloaded_projections_are_not_folded() -> None:
    """Two layers with one value projection would be turned twice, and weights elsewhere not at all."""
    model, plain = build("llama", dtype=torch.float64), build("llama", dtype=torch.float64)
    for m in (model, plain):
        attentions(m)[1].v_proj.weight = attentions(m)[0].v_proj.weight
    report = kvsink.rewrite(model, "rotatekv", key_bits=16, value_bits=8, calibration=tokens(4, 32, seed=2))
    assert "value rotation runs online: v_proj.weight is shared with another module" in report.notes
    ids = tokens(1, 20, seed=1)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    attention = attentions(build("llama", dtype=torch.float64))[0].to("meta")
    assert unfoldable(attention, frozenset(), streamed=True) is None
    assert unfoldable(attention, frozenset(), streamed=False) == "v_proj.weight is offloaded and cannot be written here"


def test_a_cache_has_the_dtype_of_the_numbers_and_not_of_codes() -> None:
    model = build("llama")
    kvsink.rewrite(model, "rtn", protect="first:1")
    model.register_parameter("codes", nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False))
    assert next(model.parameters()).dtype == torch.int8
    assert kvsink.KVSinkCache.for_model(model, max_length=32).packed_layers()[0].exact_k.dtype == torch.float32


def test_a_folder_of_quantized_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    config = {"model_type": "llama", "quantization_config": {"quant_method": "torchao"}}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="quantized by torchao") as raised:
        kvsink.rewrite_dir(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()
