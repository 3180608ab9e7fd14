"""Steps over a cache in tiles without a GPU: what is bound, captured, put back and used again; the session is a stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="needs kvsink[onnx]")
pytest.importorskip("onnxruntime", reason="needs kvsink[onnx]")

import onnxruntime as ort

from kvsink.export import ExportError, OnnxGenerator, onnx
from kvsink.export.replay import PAST
from tests.export.test_tiles import model_of

CUDA = (("CUDAExecutionProvider", {"enable_cuda_graph": "1"}),)


class Session:
    """Records the number of every graph that ran; each run offers a row to the exact ones, as a step does."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails = False

    def io_binding(self) -> Any:
        return Binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        if self.fails:
            raise RuntimeError("out of luck")
        self.ran.append(options.get_run_config_entry("gpu_graph_id"))
        slot = binding.inputs[PAST + "0.exact_slot"]
        slot.update_inplace(slot.numpy() + 1)


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        assert value is self.inputs.get(name.replace("present.", PAST), value)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("replay") / "model.onnx"
    onnx(model_of("trellis"), made, "custom", dtype="float16")
    return made


@pytest.fixture
def runner(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    session = Session()
    monkeypatch.setattr("kvsink.export.runner.open_session", lambda *_: (ort, session, "cpu"))
    made = OnnxGenerator(path, CUDA, library="ops.so")
    made.session = session
    return made


def go(runner: Any, past: Any) -> Any:
    at = past.tokens
    return runner.step(np.zeros((1, 1), dtype=np.int64), np.ones((1, at + 1)), np.full((1, 1), at), past)[1]


def slots(past: Any) -> list[int]:
    return past["0.exact_slot"].numpy()[0].tolist()


def test_a_cache_is_captured_once_and_its_row_offered_once(runner: Any) -> None:
    one = go(runner, runner.empty(1, 5))
    assert runner.session.ran == ["1", "1"] and slots(one) == [0] * len(slots(one))  # -1, and one row
    two = go(runner, one)
    assert runner.session.ran == ["1", "1", "1"] and slots(two) == [1] * len(slots(two))
    go(runner, runner.empty(1, 5))
    assert runner.session.ran[3:] == ["2", "2"]


def test_a_capture_that_fails_leaves_the_cache_as_it_was(runner: Any) -> None:
    past = runner.empty(1, 5)
    runner.session.fails = True
    with pytest.raises(ExportError, match="onnxruntime stopped in model.onnx: out of luck"):
        go(runner, past)
    runner.session.fails = False
    assert slots(past) == [-1] * len(slots(past)) and not past.lost
    assert slots(go(runner, past)) == [0] * len(slots(past))


def test_of_a_cache_that_was_gone_on_from_a_copy_alone_goes_another_way(runner: Any) -> None:
    past = runner.empty(1, 5)
    other = runner.copy(past)
    one = go(runner, past)
    with pytest.raises(ExportError, match=r"written over by a later step; copy\(\) a cache"):
        go(runner, past)
    assert slots(other) == [-1] * len(slots(one)) and slots(go(runner, other)) == slots(one)


def test_a_cache_that_grows_leaves_the_one_before_alone(runner: Any) -> None:
    past = runner.empty(1, 128)
    past.tokens = 128
    longer = go(runner, past)
    assert longer["0.key"].shape()[2] == 256 and not past.lost
    assert slots(past) == [-1] * len(slots(past)) and slots(longer) == [0] * len(slots(past))


def test_a_text_takes_the_tensors_of_the_last_one_where_they_have_room(runner: Any) -> None:
    first = runner.past = go(runner, runner.begin(1, 200))
    assert first["0.key"].shape()[2] == 256  # an eighth more, in whole tiles
    other = runner.begin(1, 200)  # the first has not ended
    assert other["0.key"] is not first["0.key"] and not first.lost and runner.begin(1, 200)["0.key"] is not other["0.key"]
    runner.past = first
    first.end()
    again = runner.begin(1, 256)
    assert all(again[name] is first[name] for name in first) and first.lost and again.tokens == 0
    assert slots(again) == [-1] * len(slots(first)) and np.isneginf(again["0.exact_score"].numpy()).all()
    with pytest.raises(ExportError, match="written over by a later step"):
        go(runner, first)
    runner.past = go(runner, again)
    runner.past.end()
    assert runner.session.ran == ["1", "1", "1"]  # the graph of the first text
    for batch, length in ((1, 257), (2, 10)):
        assert runner.begin(batch, length)["0.key"] is not first["0.key"]


def test_tensors_that_are_put_into_a_cache_are_bound(runner: Any) -> None:
    past = go(runner, runner.empty(1, 5))
    past["0.exact_slot"] = runner.value(np.full_like(past["0.exact_slot"].numpy(), 40))
    assert slots(go(runner, past)) == [41] * len(slots(past)) and runner.session.ran == ["1", "1", "2", "2"]


def test_what_a_step_cannot_tell_is_asked_for(runner: Any) -> None:
    past = runner.empty(1, 5)
    with pytest.raises(ExportError, match="does not say how much of it is held; give a mask"):
        runner.step(np.array([[5]]), None, None, dict(past))
    for shape in ((0, 1), (1, 0)):
        with pytest.raises(ExportError, match="one row and one token at least"):
            runner.step(np.zeros(shape, dtype=np.int64), None, None, past)
    go(runner, past)
    with pytest.raises(ExportError, match=r"copy\(\) it before that step"):
        runner.copy(past)
