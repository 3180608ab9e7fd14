"""Launches: on the GPU of the module, whichever is the current one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

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
