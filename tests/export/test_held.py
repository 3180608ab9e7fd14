"""A cache that is written in place: one set of tensors from step to step, no copy but where room ends, the text of a copied one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

from kvsink.export import ExportError, OnnxGenerator, onnx
from kvsink.export.held import BLOCK, Held, slots_for
from kvsink.tools import build_ort_ops
from tests.close import FUSED_FLOAT32
from tests.export.test_own_basis import in_eight_bits
from tests.graphs import rewritten
from tests.models import build

COPIED = "in-place optimization not activated"  # what TensorScatter says when its past is not its present
LENGTH = BLOCK + 9


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with sinks and first rows kept exact, and one with a layer that kvsink leaves alone, a window of its own."""
    folder, found = tmp_path_factory.mktemp("held"), {}
    for family, flavour in (("llama", "functions"), ("llama", "custom"), ("gemma3", "functions")):
        if flavour == "custom" and build_ort_ops.compiler() is None:
            continue
        found[f"{family}-{flavour}"] = folder / f"{family}-{flavour}.onnx"
        onnx(rewritten(family, protect="kvsink:2+first:1"), found[f"{family}-{flavour}"], flavour)
    return found


def runner_of(path: Path) -> OnnxGenerator:
    return OnnxGenerator(path, library=build_ort_ops.build() if path.stem.endswith("custom") else None)


def given(a: int, b: int) -> tuple[Any, Any, Any]:
    """Tokens a to b of two rows, the second padded by three."""
    ids = (np.arange(2 * 120).reshape(2, 120) * 7 + 5) % 97
    mask = np.ones((2, b), dtype=np.int64)
    mask[1, :3] = 0
    return ids[:, a:b], mask, np.maximum(mask.cumsum(1) - 1, 0)[:, a:b]


def steps(length: int) -> list[tuple[int, int]]:
    """A prompt, a chunk and single tokens."""
    return [(0, 17), (17, 30), *((i, i + 1) for i in range(30, length))]


@pytest.mark.parametrize("which", ["llama-functions", "llama-custom", "gemma3-functions"])
def test_steps_write_into_one_set_of_tensors(exported: dict[str, Path], which: str) -> None:
    """Beside them a session that is given copies and nothing to write into, with no slot to spare: the same logits and cache."""
    if which not in exported:
        pytest.skip("no C++ compiler")
    runner = runner_of(exported[which])
    past, copied = runner.empty(2), runner.arrays(runner.empty(2))
    outputs = [entry["name"] for entry in runner.manifest["outputs"]]
    seen = set()
    for a, b in steps(LENGTH):
        ids, mask, positions = given(a, b)
        before = past
        logits, past = runner.step(ids, mask, positions, past)
        kept = [name for name in past if not name.rpartition(".")[2].startswith("exact")]
        assert past.tokens == b and past["0.key"].shape()[2] == slots_for(b)
        assert all((past[name] is before[name]) == (b not in (17, BLOCK + 1)) for name in kept)
        seen.add(past["0.key"].data_ptr())
        room = {n: np.concatenate([x, np.zeros_like(x, shape=_more(x, b - a))], axis=min(2, x.ndim - 1)) for n, x in copied.items()}
        room = {n: room[n] if n in kept else copied[n] for n in copied}
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        wanted, *present = runner.session.run(outputs, feeds | {f"past_key_values.{n}": x for n, x in room.items()})
        copied = dict(zip(past, present, strict=True))
        np.testing.assert_allclose(logits, wanted, rtol=FUSED_FLOAT32, atol=FUSED_FLOAT32)
        for name, array in runner.arrays(past).items():
            if array.dtype == np.uint8:
                assert np.array_equal(array, copied[name]), (name, b)
            else:
                np.testing.assert_allclose(array, copied[name], rtol=FUSED_FLOAT32, atol=FUSED_FLOAT32)
    assert len(seen) == 2  # of LENGTH tokens, which are two blocks


def _more(x: Any, count: int) -> tuple[int, ...]:
    axis = min(2, x.ndim - 1)
    return (*x.shape[:axis], count, *x.shape[axis + 1 :])


@pytest.mark.parametrize("which", ["llama-functions", "llama-custom"])
def test_nothing_of_the_cache_is_copied(exported: dict[str, Path], which: str, capfd: pytest.CaptureFixture[str]) -> None:
    """onnxruntime says when it copies the past of an operator: of tensors bound as past and present it does not."""
    import onnxruntime

    if which not in exported:
        pytest.skip("no C++ compiler")
    runner = runner_of(exported[which])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    if which.endswith("custom"):
        options.register_custom_ops_library(str(build_ort_ops.build()))
    runner.session = onnxruntime.InferenceSession(str(exported[which]), options, providers=["CPUExecutionProvider"])
    _, past = runner.step(*given(0, 17), runner.empty(2))
    capfd.readouterr()
    runner.step(*given(17, 18), past)
    assert COPIED not in capfd.readouterr().err
    ids, mask, positions = given(17, 18)
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    runner.session.run(None, feeds | {f"past_key_values.{n}": value.numpy() for n, value in past.items()})
    assert COPIED in capfd.readouterr().err  # so it would have been said


def test_at_eight_bits_the_stock_model_says_the_same(tmp_path: Path) -> None:
    """Token by token over the end of a block."""
    onnx(rewritten("llama", method=in_eight_bits()), tmp_path / "model.onnx")
    runner, ids = OnnxGenerator(tmp_path / "model.onnx"), given(0, LENGTH)[0][:1]
    with torch.no_grad():
        stock = build("llama")(torch.tensor(ids)).logits.numpy()
    past, found = runner.empty(1), []
    for a, b in steps(LENGTH):
        logits, past = runner.step(ids[:, a:b], np.ones((1, b)), np.arange(a, b)[None], past)
        found.append(logits)
    assert np.abs(np.concatenate(found, axis=1) - stock).max() <= 0.02 * np.abs(stock).max()


def test_caches_of_two_texts_are_two(exported: dict[str, Path]) -> None:
    runner = runner_of(exported["llama-functions"])
    alone = [runner.generate([prompt], 8, eos_token_id=-1)[0] for prompt in ([5, 6, 7], [9, 10])]
    one, two = (runner.stream([prompt], 8, eos_token_id=-1) for prompt in ([5, 6, 7], [9, 10]))
    together = list(zip(one, two, strict=True))
    assert [[step[i][0] for step in together] for i in (0, 1)] == alone


def test_of_two_steps_from_one_cache_the_later_is_left(exported: dict[str, Path]) -> None:
    """What the earlier one left is refused, and what it was copied from before goes on."""
    runner = runner_of(exported["llama-functions"])
    _, past = runner.step(*given(0, 17), runner.empty(2))
    ids, mask, positions = given(17, 18)
    aside = runner.copy(past)
    first, one = runner.step(ids, mask, positions, past)
    _, further = runner.step(*given(18, 19), one)
    runner.step(ids + 1, mask, positions, past)
    for lost in (one, further):
        with pytest.raises(ExportError, match=r"written over by a later step; copy\(\) a cache"):
            runner.step(*given(lost.tokens, lost.tokens + 1), lost)
    assert np.array_equal(runner.step(ids, mask, positions, aside)[0], first)


def test_room_is_counted_apart(exported: dict[str, Path]) -> None:
    """Bytes and bits are those of the tokens held; a cache that is given as plain values holds what its tensors hold."""
    runner = runner_of(exported["llama-functions"])
    _, past = runner.step(*given(0, 17), runner.empty(2))
    tight = {name: runner.value(np.ascontiguousarray(array)) for name, array in runner.arrays(past).items()}
    assert runner.nbytes(past) == runner.nbytes(tight) == sum(array.nbytes for array in runner.arrays(past).values())
    assert runner.bits_per_element(past) == runner.bits_per_element(tight) > 2
    more, grown = (runner.step(*given(17, 18), cache) for cache in (past, tight))
    assert np.array_equal(more[0], grown[0]) and isinstance(grown[1], Held) and grown[1].tokens == 18
    assert runner.empty(2, 100)["positions"].shape() == [2, 100]
    assert [slots_for(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [0, BLOCK, BLOCK, 2 * BLOCK]
