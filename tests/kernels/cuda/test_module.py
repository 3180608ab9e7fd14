"""Launches: on the GPU of the module, whichever is the current one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from kvsink.kernels import append_attend
from kvsink.kernels.cuda import module


@pytest.mark.parametrize("index", [0, 1])
def test_a_launch_goes_to_its_own_gpu(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    current, launched = [0], []

    @contextmanager
    def chosen(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    driver = SimpleNamespace(cuLaunchKernel=lambda *arguments: launched.append(current[0]) or 0)
    monkeypatch.setattr(module, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", chosen)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    made = module.Module.__new__(module.Module)
    made.device = torch.device("cuda", index)
    made.launch(None, 1, 1, 32, 0)
    assert launched == [index] and current == [0]


@dataclass(frozen=True)
class _Stream:
    number: int
    device: str = "cuda"

    def wait_stream(self, other: _Stream) -> None:
        pass


@pytest.mark.parametrize("side", [3, 7])
def test_rows_are_coded_beside_attention_whatever_stream_a_graph_is_captured_on(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch hands out streams in turn: the one that a library holds may be the one that captures, here number 7."""
    here, coded, made_next = _Stream(7), [], iter((7, 8))
    on = [here]

    @contextmanager
    def chosen(stream: _Stream) -> Iterator[None]:
        on.append(stream)
        yield
        on.pop()

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", chosen)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream(next(made_next)))
    made = module.Cubin.__new__(module.Cubin)
    made.device, made.overlap, made.turned, made._side = torch.device("cuda"), True, 0, _Stream(side)
    monkeypatch.setattr(made, "_attend_now", lambda *arguments: None)
    monkeypatch.setattr(made, "append", lambda rows: coded.append(on[-1]))
    made.step(None, None, None, 8)
    assert coded == [_Stream(8 if side == 7 else 3)]


def test_launches_of_triton_leave_the_stream_that_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream(7))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream(8))
    monkeypatch.setattr(append_attend, "_streams", lambda device: (_Stream(7), _Stream(3)))
    beside = append_attend._Beside(torch.zeros(1, 1, dtype=torch.int64), [lambda: None] * 3)
    assert beside._sides == [_Stream(8), _Stream(3)]
