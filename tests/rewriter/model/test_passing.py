"""A cache is given under the name that a model takes, and nothing of ours makes transformers warn of a name that goes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from kvsink.model.passing import cache_name, cache_of, given_cache
from kvsink.tools.rewrite import main as rewrite_main
from tests.models import build
from tests.tools.conftest import tiny_dir  # noqa: F401

ROOT = Path(__file__).resolve().parents[3]


class _New(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None) -> None: ...


class _Old(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...


class _Adapted(nn.Module):
    """Takes anything, as adapters do."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def get_base_model(self) -> nn.Module:
        return self.base

    def forward(self, *args: Any, **kwargs: Any) -> None: ...


def test_the_signature_says_the_name() -> None:
    for model, name in ((_New(), "cache"), (_Old(), "past_key_values")):
        assert cache_name(model) == cache_name(torch.compile(model)) == cache_name(_Adapted(model)) == name
        assert given_cache(model, 5) == {name: 5}


def test_a_cache_comes_back_under_either_name() -> None:
    assert cache_of(SimpleNamespace(cache=1)) == cache_of(SimpleNamespace(past_key_values=1)) == 1
    assert cache_of(SimpleNamespace(logits=1)) is None


def test_the_example_of_the_readme_warns_of_nothing(tiny_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    flags = ["--calibration-tokens", "512", "--eval-windows", "0", "--device", "cpu"]
    assert rewrite_main([str(tiny_dir), str(tmp_path / "out"), *flags]) == 0
    found = re.search(r"```python\n(import kvsink.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    code = found[1].replace("cache=cache", f"{cache_name(build('llama'))}=cache") + "print(cache.get_seq_length())\n"
    run = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "arning" not in run.stderr and "deprecated" not in run.stderr
    *_, numbers, length = run.stdout.splitlines()
    bits, held, spare = numbers.split()[-3:]
    assert 0 < float(bits) < 32 and int(held) > 0 and int(spare) > int(held) and 0 < int(re.findall(r"\d+", length)[0]) < 256
