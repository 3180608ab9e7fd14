"""A calibration record on disk: it comes back whole, and a wrong or damaged one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import kvsink
from kvsink.calibrate.calibration import calibrate
from kvsink.calibrate.record import Calibration
from kvsink.errors import CalibrationError
from tests.models import build, tokens
from tests.rewriter.calibrate.recorded import BLOCKS, FLOAT32_SUMS, NOTHING, ending_in_the_planted_token, planted, relative, sums


@pytest.mark.parametrize("batch", [1, 3])
def test_shards_merge_into_the_whole(record: Calibration, batch: int) -> None:
    ids = tokens(8, 64, seed=1)
    one, two = (calibrate(build("llama"), part, NOTHING, BLOCKS, batch=batch) for part in (ids[:3], ids[3:]))
    for name, stats in one.keys.items():
        stats.merge(two.keys[name])
    for name, values in one.values.items():
        values.merge(two.values[name])
    for got, wanted in zip(sums(one), sums(record), strict=True):
        assert relative(got, wanted) <= FLOAT32_SUMS


def test_a_record_comes_back_whole(record: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "record.safetensors"
    record.save(file)
    again = Calibration.load(file, build("llama"))
    assert all(torch.equal(a, b) for a, b in zip(sums(again), sums(record), strict=True))
    assert set(again.keys) == set(record.keys) and (again.tokens, again.stages) == (record.tokens, record.stages)
    assert (again.largest, again.medians) == (record.largest, record.medians)
    with_stage = calibrate(planted(800.0), ending_in_the_planted_token(), NOTHING, {})
    with_stage.save(file)
    assert Calibration.load(file).stages == with_stage.stages


def test_a_record_serves_as_calibration(record: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "record.safetensors"
    record.save(file)
    plans, tables = [], []
    for source in (tokens(8, 64, seed=1), record, str(file)):
        model = build("llama")
        kvsink.rewrite(model, "klt", calibration=source, protect="none")
        plans.append(model._kvsink_runtime.plans)
        tables.append(model._kvsink_runtime.tables)
    assert plans[0] == plans[1] == plans[2]
    assert all(torch.equal(tables[0][n], tables[2][n]) for n in tables[0]) and set(tables[0]) == set(tables[2])


def test_a_record_of_another_model_is_refused(record: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "record.safetensors"
    record.save(file)
    with pytest.raises(CalibrationError, match="made from other weights"):
        Calibration.load(file, build("mistral"))
    with pytest.raises(CalibrationError, match="layer 0 has no key statistics"):
        kvsink.rewrite(build("llama"), "klt", calibration=Calibration((), {}, {}, record.fingerprint, 512))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "cannot be read"),
        ("truncated", "cannot be read"),
        ("not-safetensors", "cannot be read"),
        ("format", "not a calibration record of this version"),
        ("nan", "NaN or infinite"),
        ("lacks-a-sum", "cannot be read"),
        ("meta", "cannot be read"),
    ],
)
def test_a_corrupted_record_is_refused(record: Calibration, tmp_path: Path, damage: str, words: str) -> None:
    file = tmp_path / "record.safetensors"
    record.save(file)
    with safe_open(str(file), framework="pt") as opened:
        meta = dict(opened.metadata())
    tensors = load_file(str(file))
    match damage:
        case "missing":
            file.unlink()
        case "truncated":
            file.write_bytes(file.read_bytes()[:-8])
        case "not-safetensors":
            file.write_text("counts")
        case "format":
            meta["format"] = "kvsink-calibration-0"
        case "nan":
            tensors["keys.0.64.second"][0, 0, 0] = float("nan")
        case "lacks-a-sum":
            del tensors["values.1.total"]
        case "meta":
            meta["stages"] = "[{"
    if damage in ("format", "nan", "lacks-a-sum", "meta"):
        save_file(tensors, str(file), metadata=meta)
    with pytest.raises(CalibrationError, match=words) as caught:
        Calibration.load(file, build("llama"))
    assert str(file) in str(caught.value)
