"""The Triton form of `select_sinks` in Triton's interpreter, chosen before Triton is imported: a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

_CHECK = """
import torch
from kvsink.kernels.select_sinks import launch_row, select_sinks_ref
g = torch.Generator().manual_seed(0)
cases = ((1, 16, [3], torch.float32), (5, 33, [32, 0, 7], torch.float16), (3, 8, list(range(8)), torch.float32))
for b, e, channels, dtype in cases:
    wide = torch.randn(b, 1, 2 * e, generator=g).to(dtype)
    for hidden in (wide[..., :e], wide[..., ::2]):
        valid = torch.rand(b, 1, generator=g) > 0.3
        if b > 1:
            hidden[1, 0, channels[0]], valid[1, 0] = float("nan"), True
        c, w = torch.tensor(channels), torch.rand(len(channels), generator=g) + 0.1
        for seen in (valid, valid[:1].expand(b, -1)):
            for mine, wanted in zip(launch_row(hidden, seen, c, w), select_sinks_ref(hidden, seen, c, w, 5, False)):
                assert mine.dtype == wanted.dtype and torch.equal(mine.isnan(), wanted.isnan())
                assert torch.equal(mine.nan_to_num(7.0), wanted.nan_to_num(7.0)), (mine, wanted)
print("equal")
"""


def test_one_new_row_scores_as_the_definition() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHECK], capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr[-2000:]
