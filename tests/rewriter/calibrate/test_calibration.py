"""Calibration: stages are found, statistics are those of a direct computation, exact rows stay out, bad input is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import kvsink
from kvsink.calibrate.calibration import calibrate, find_stages
from kvsink.calibrate.record import Calibration
from kvsink.codecs.protect import parse_policies
from kvsink.errors import CalibrationError
from kvsink.kernels.rope import rope, unrope
from kvsink.model.runtime import Runtime, runtime_of
from kvsink.model.tables import LayerPlan
from tests.models import HEAD_DIM, LAYERS, build, tokens
from tests.rewriter.calibrate.recorded import (
    BLOCKS,
    CHANNEL,
    FLOAT32_SUMS,
    NOTHING,
    PLANTED,
    ending_in_the_planted_token,
    planted,
    relative,
    sums,
)


def rows_of(ids: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys before RoPE and values [H, N, D] of all windows in float64, with the positions [N] and the runtime's angles."""
    model = build("llama", dtype=torch.float64)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    runtime = Runtime(model, (LayerPlan(None),) * LAYERS, {}, (), "test")
    positions = torch.arange(ids.shape[1])[None]
    cos, sin = (t.double()[:, None] for t in runtime.angles(layer, positions))
    keys = unrope(cache.layers[layer].keys.double(), cos, sin)
    flat = [t.transpose(0, 1).flatten(1, 2) for t in (keys, cache.layers[layer].values.double())]
    angles = torch.stack(runtime.offset_angles(layer, 64, torch.device("cpu")))
    return flat[0], flat[1], positions.expand(len(ids), -1).flatten(), angles


# -- emergence ---------------------------------------------------------------------------------------------------------


def test_a_planted_outlier_is_a_stage() -> None:
    record = calibrate(planted(800.0), ending_in_the_planted_token(), NOTHING, {})
    assert len(record.stages) == 1 and not record.keys and not record.values
    stage = record.stages[0]
    assert (stage.block, stage.channels[0]) == (0, CHANNEL) and abs(stage.size - 800) < 10 and stage.median < 1.5
    assert calibrate(build("llama"), tokens(2, 40), NOTHING, {}).stages == ()


def test_sinks_of_a_window_are_counted_and_told(tmp_path) -> None:
    """Two windows are looked at; the first has one planted token, the second four, of which kvsink:2 keeps two."""
    ids = ending_in_the_planted_token()
    ids[1, [3, 17, 30]] = PLANTED
    record = calibrate(planted(800.0), ids, NOTHING, {})
    assert [s.crowd for s in record.stages] == [4]
    record.save(tmp_path / "record.safetensors")
    assert [s.crowd for s in Calibration.load(tmp_path / "record.safetensors").stages] == [4]
    for protect, told in (("kvsink:2", True), ("kvsink:4", False), ("first:4", False), ("kvsink:auto", False)):
        report = kvsink.rewrite(planted(800.0), "rtn", protect=protect, calibration=ids, check=False)
        said = "block 0 makes up to 4 sinks in a window of calibration, kvsink:2 keeps 2 of them exact"
        assert any(said in note and "--protect kvsink:8+first:1" in note for note in report.notes) == told


def test_a_crowd_of_sinks_is_kept_behind_its_stage() -> None:
    """Seven planted tokens in a window: `kvsink:auto` holds as many rows exact behind the block that makes them."""
    ids = ending_in_the_planted_token()
    ids[1, [3, 9, 17, 22, 30, 35]] = PLANTED
    model = planted(800.0)
    kvsink.rewrite(model, "rtn", protect="kvsink:auto", calibration=ids, check=False)
    layers = [plan.segments for plan in runtime_of(model).plans]
    assert layers[0] == () and all([(s.source, s.count) for s in segments] == [("stage:0", 7)] for segments in layers[1:])


@pytest.mark.parametrize(
    ("largest", "medians", "blocks"),
    [
        ([5, 900, 950, 900, 30], [0.5] * 5, [1]),
        ([5, 40, 300, 800, 830, 30], [0.5] * 6, [3]),  # one rise over several blocks ends at its last
        ([5, 300, 310, 4000, 4100, 30], [0.3] * 6, [1, 3]),  # two stages
        ([5, 90, 91, 90, 30], [0.01] * 5, []),  # below 100
        ([5, 400, 410, 400, 30], [1.0] * 5, []),  # not 500 times the median
        ([900, 910, 905, 30], [0.5] * 4, [0]),
        ([5, 5, 5, 900], [0.5] * 4, []),  # the last block: no layer is behind it
    ],
)
def test_stages(largest: list[float], medians: list[float], blocks: list[int]) -> None:
    found = find_stages(largest, medians, [(i,) for i in range(len(largest))])
    assert [s.block for s in found] == blocks and [s.channels for s in found] == [(b,) for b in blocks]


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(LAYERS))
def test_statistics_equal_a_direct_computation(record: Calibration, layer: int) -> None:
    keys, values, positions, angles = rows_of(tokens(8, 64, seed=1), layer)
    n = keys.shape[1]
    stats = record.keys[layer, 64]
    assert stats.count.tolist() == [8.0] * 64 and float(record.values[layer].count) == n == record.tokens == 512
    mean = keys.mean(1)
    assert relative(stats.mean(), mean) <= FLOAT32_SUMS
    cos, sin = angles
    turned = rope(keys - mean[:, None], cos.double()[positions % 64], sin.double()[positions % 64])
    mu2, covariance = stats.centred(cos, sin)
    assert relative(stats.block_table(cos, sin), rope(mean[:, None].expand(-1, 64, -1), cos.double(), sin.double())) <= FLOAT32_SUMS
    assert (mu2 - turned.mean(1)).abs().max() <= FLOAT32_SUMS * keys.abs().max()
    centred = turned - turned.mean(1, keepdim=True)
    assert relative(covariance, centred.mT @ centred / n) <= FLOAT32_SUMS
    assert relative(record.values[layer].mean(), values.mean(1)) <= FLOAT32_SUMS
    centred = values - values.mean(1, keepdim=True)
    assert relative(record.values[layer].covariance(), centred.mT @ centred / n) <= FLOAT32_SUMS


def test_a_block_of_one_is_the_key_before_rope(record: Calibration) -> None:
    keys, *_ = rows_of(tokens(8, 64, seed=1), 1)
    mu2, covariance = record.keys[1, 1].centred(torch.ones(1, HEAD_DIM), torch.zeros(1, HEAD_DIM))
    assert mu2.abs().max() <= FLOAT32_SUMS * keys.abs().max()
    centred = keys - keys.mean(1, keepdim=True)
    assert relative(covariance, centred.mT @ centred / keys.shape[1]) <= FLOAT32_SUMS


# -- rows that stay exact ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["kvsink:1", "massive:1"])
def test_exact_rows_are_left_out(policy: str) -> None:
    """The planted token ends each window, so no other row can see it: scaled by 1000 it must change nothing at all."""
    ids = ending_in_the_planted_token()

    def run(size: float, text: str) -> Calibration:
        return calibrate(planted(size), ids, [parse_policies(text)] * LAYERS, {1: (64,)})

    one, two = run(800.0, policy), run(800_000.0, policy)
    assert float(one.values[1].count) == ids.numel() - len(ids) == float(one.keys[1, 64].count.sum())
    assert all(torch.equal(a, b) for a, b in zip(sums(one), sums(two), strict=True))
    one, two = run(800.0, "none"), run(800_000.0, "none")
    assert float(one.values[1].count) == ids.numel()
    assert not all(torch.equal(a, b) for a, b in zip(sums(one), sums(two), strict=True))


def test_first_rows_are_left_out() -> None:
    record = calibrate(build("llama"), tokens(4, 32), [parse_policies("first:3")] * LAYERS, {0: (64,), 1: (64,)})
    assert record.keys[0, 64].count.tolist() == [0.0] * 3 + [4.0] * 29 + [0.0] * 32


def test_each_layer_leaves_out_its_own_rows() -> None:
    policies = [parse_policies("none"), parse_policies("first:3")]
    record = calibrate(build("llama"), tokens(4, 32), policies, {0: (64,), 1: (64,)})
    assert (float(record.values[0].count), float(record.values[1].count)) == (4 * 32, 4 * 29)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_too_few_tokens() -> None:
    need = 4 * HEAD_DIM
    words = f"{need - 4} calibration tokens are too few for head_dim={HEAD_DIM}; give at least {need}"
    with pytest.raises(CalibrationError, match=words):
        calibrate(build("llama"), tokens(1, need - 4), NOTHING, BLOCKS)
    assert calibrate(build("llama"), tokens(1, need), NOTHING, BLOCKS).tokens == need


@pytest.mark.parametrize("block", [0, 64])
def test_one_token_again_and_again(block: int) -> None:
    """Its values are one row, whose covariance no transform can be made of; two tokens in turn are served."""
    model, one = build("llama"), torch.full((2, 64), 7)
    with pytest.raises(CalibrationError, match="^128 calibration tokens give one value .*condition number inf.*none$"):
        calibrate(model, one, NOTHING, {0: (block,), 1: (block,)})
    one[:, ::2] = 9
    assert calibrate(model, one, NOTHING, {0: (block,), 1: (block,)}).tokens == 128


def test_nan_activations() -> None:
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="block 1 puts out NaN"):
        calibrate(model, tokens(2, 64), NOTHING, BLOCKS)


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    for broken in (False, True):
        if broken:
            model.model.layers[1].mlp.down_proj.weight[0, 0] = before["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
            with pytest.raises(CalibrationError):
                calibrate(model, tokens(2, 64), NOTHING, BLOCKS)
        else:
            calibrate(model, tokens(2, 64), NOTHING, BLOCKS)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not hasattr(model, "_kvsink_runtime")


def test_a_rewritten_model_keeps_its_plan_through_calibration() -> None:
    model = build("llama")
    kvsink.rewrite(model, "rtn")
    runtime = model._kvsink_runtime
    calibrate(model, tokens(2, 64), NOTHING, BLOCKS)
    assert model._kvsink_runtime is runtime


# -- the record on disk ------------------------------------------------------------------------------------------------
