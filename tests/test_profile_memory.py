"""What a profile by layers holds, measured from outside: one layer and the activations, whatever the size of the checkpoint."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvsink.tools.stress.models import tiny_folder
from kvsink.tools.synthetic import write

pytestmark = pytest.mark.slow

HIDDEN, WIDTH, WINDOWS, TOKENS, HEADS = 4096, 14336, 2, 128, 32
_RUN = """
import sys
from kvsink.tools.profile import main
assert main(sys.argv[1:]) == 0
(line,) = (l for l in open("/proc/self/status") if l.startswith("VmHWM"))  # ru_maxrss would count the parent's, too
print("peak", int(line.split()[1]) * 1024)
"""


def peak(folder: Path, out: Path) -> int:
    """Peak resident bytes of a process that profiles a folder by layers."""
    args = ["--stream", "--windows", str(WINDOWS), "--window-tokens", str(TOKENS), "--no-page", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", _RUN, str(folder), str(out), *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rpartition("peak ")[2])


@pytest.mark.parametrize("experts", [0, 8])
def test_memory_is_that_of_a_layer(tmp_path: Path, experts: int) -> None:
    """Below 1.3 layers in float32 beside the bare program and the activations, as docs/profile.md counts them."""
    tiny, big = tmp_path / "tiny", tmp_path / "big"
    tiny_folder(tiny)
    try:
        width = WIDTH // 8 if experts else WIDTH
        write(big, 1.3, HIDDEN, width, 1, experts)
        layer = 4 * (HIDDEN * HIDDEN * 5 // 2 + 3 * HIDDEN * WIDTH)  # attention with a quarter of the key heads, feed-forward
        inside = 4 * TOKENS * 4 * (HIDDEN + WIDTH) + 3 * 4 * HEADS * TOKENS * 128
        activations = 4 * WINDOWS * TOKENS * HIDDEN + inside + 8 * WINDOWS * 4 * HEADS * TOKENS
        taken = peak(big, tmp_path / "one") - peak(tiny, tmp_path / "two")
    finally:
        shutil.rmtree(big, ignore_errors=True)
    # the lower bound: a layer was held at all; the bare program has its own peak before the first layer is read
    assert 0.9 * layer < taken < 1.3 * layer + activations
