"""The version stands in one place; what is stored carries it, and folders of 0.1.0 are read as before."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvsink
from kvsink.evaluate.evaluation import versions as versions_of_rows
from kvsink.report import versions as versions_of_folders
from tests.models import build, tokens

ROOT = Path(__file__).resolve().parents[2]
EARLIER = Path(__file__).with_name("folder_of_0_1_0")


def test_the_version_stands_in_one_place() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert config["metadata"]["version"] == "attr: kvsink.__version__"
    done = subprocess.run(["git", "grep", "-lF", f'"{kvsink.__version__}"'], cwd=ROOT, capture_output=True, text=True)
    if done.returncode > 1:
        pytest.skip("not a git checkout")
    assert [name for name in done.stdout.split() if name.endswith((".py", ".cfg", ".toml", ".yml"))] == ["rewriter/__init__.py"]


def test_what_is_stored_carries_it() -> None:
    assert versions_of_rows()["kvsink"] == versions_of_folders()["kvsink"] == kvsink.__version__


def test_the_changelog_speaks_of_it() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    released, development = re.fullmatch(r"(\d+\.\d+\.\d+)(\.dev\d+)?", kvsink.__version__).groups()
    assert headings[0] == "Unreleased" and (headings[1] == released) is (development is None)


@pytest.mark.parametrize("method", ["klt", "rtn"])
def test_a_folder_that_0_1_0_wrote_is_read_as_before(method: str, tmp_path: Path) -> None:
    """Plan, tables and config were written by 0.1.0, and the tokens are those that it generated with them."""
    folder = EARLIER / method
    shutil.copytree(folder, tmp_path / "out")
    build("llama").save_pretrained(tmp_path / "weights")
    shutil.copyfile(tmp_path / "weights" / "model.safetensors", tmp_path / "out" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokens(2, 48, seed=3)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert made[:, 48:].tolist() == [[int(t) for t in line.split()] for line in (folder / "tokens.txt").read_text().splitlines()]
