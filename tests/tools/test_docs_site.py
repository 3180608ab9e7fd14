"""The documentation site: links of a page on disk are right on the site, and every public name and op has its place."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("griffe", reason="needs kvsink[docs]")

from torch.library import CustomOpDef

import kvsink
from kvsink import kernels
from kvsink.kernels import op_specs
from kvsink.tools.docs_site import documented, linked, place, with_fields, with_links

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small repository: a first page, two pages of docs/, rows, and a folder of notes."""
    for path, text in {
        "README.md": "[a](docs/a.md#part) [notes](tools/lab/NOTES.md) [no](docs/none.md) [out](https://a.b/c.md) [c](CHANGELOG.md)",
        "CHANGELOG.md": "",
        "docs/a.md": "[first](../README.md) [rows](../tools/rows.jsonl) ![b](sub/b.png) [here](#part) [up](../../etc)",
        "docs/sub/b.md": "[a](../a.md) [rows](../../tools/rows.jsonl#L2)",
        "docs/sub/b.png": "",
        "tools/rows.jsonl": "",
        "tools/lab/NOTES.md": "[a](../../docs/a.md) [rows](../rows.jsonl) [`tools/`](../../tools/) [no](../none/)",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("page", "at", "text"),
    [
        (
            "README.md",
            "index.md",
            "[a](a.md#part) [notes](repository/tools/lab/NOTES.md) [no](docs/none.md) [out](https://a.b/c.md) [c](changelog.md)",
        ),
        (
            "docs/a.md",
            "a.md",
            "[first](index.md) [rows](repository/tools/rows.jsonl) ![b](sub/b.png) [here](#part) [up](../../etc)",
        ),
        ("docs/sub/b.md", "sub/b.md", "[a](../a.md) [rows](../repository/tools/rows.jsonl#L2)"),
        ("tools/lab/NOTES.md", "repository/tools/lab/NOTES.md", "[a](../../../a.md) [rows](../rows.jsonl) `tools/` [no](../none/)"),
    ],
)
def test_links_lead_to_the_same_file(tree: Path, page: str, at: str, text: str) -> None:
    assert place(page) == at
    assert with_links((tree / page).read_text(), page, tree) == text


def test_what_comes_along(tree: Path) -> None:
    assert linked("README.md", tree) == {"CHANGELOG.md", "tools/lab/NOTES.md"}
    assert linked("docs/a.md", tree) == {"README.md", "tools/rows.jsonl"}


def test_fields_are_shown_as_written() -> None:
    text = "What it does.\n\nFormula    y = x\n           and more\nShapes     x [B]\n\nPlain words."
    assert with_fields(text) == (
        "What it does.\n\n```text\nFormula    y = x\n           and more\nShapes     x [B]\n```\n\nPlain words."
    )
    assert with_fields("Not a field.") == "Not a field."


def test_sources_lie_as_they_are_imported(tmp_path: Path) -> None:
    (tmp_path / "setup.cfg").write_text("[options]\npackage_dir =\n    kvsink = engine\n    kvsink.ops = ops\n")
    for file in ("engine/__init__.py", "engine/deep/a.py", "ops/b.py", "ops/c.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(file)
    folder = documented(tmp_path) / "kvsink"
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == {"__init__.py": "engine/__init__.py", "deep/a.py": "engine/deep/a.py", "ops/b.py": "ops/b.py"}


def shown(page: str) -> dict[str, Any]:
    """Every name that a page of the reference documents, with what it is."""
    found: dict[str, Any] = {}
    for name in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE):
        module, _, last = name.rpartition(".")
        try:
            found[name] = importlib.import_module(name)
        except ModuleNotFoundError:
            found[name] = getattr(importlib.import_module(module), last)
    return found


def test_every_public_name_is_in_the_reference() -> None:
    names, modules = shown("api.md"), shown("ops.md")
    for name in kvsink.__all__:
        if name in ("codecs", "kernels"):
            assert any(shown_name.startswith(f"kvsink.{name}.") for shown_name in modules), name
        elif name == "KvsinkError":
            assert kvsink.KvsinkError is names["kvsink.errors"].KvsinkError
        else:
            assert any(thing is getattr(kvsink, name) for thing in names.values()), f"{name} is missing in docs/api.md"


def test_every_op_is_in_the_reference() -> None:
    listed = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
    ops = [thing for name in kernels.__all__ if isinstance(thing := getattr(kernels, name), CustomOpDef)]
    homes = {spec.ref.__module__ for spec in op_specs().values()} | {op._init_fn.__module__ for op in ops}
    assert len(homes) > 10 and {home for home in homes if f"::: {home}\n" not in listed} == set()
