"""The rules of the house, each broken once on a copy of the tree: the rule says so, and is silent again when the copy is mended."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contracts import rules, test_house

Faults = Callable[[rules.Tree], list[str]]
Break = tuple[str, str, Faults, str]  # file, what is added to it, the rule, what it is to say


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("house")
    for folder in (*rules.FOLDERS, "tests"):
        shutil.copytree(test_house.ROOT / folder, root / folder, ignore=_but_sources)
    return root


SOURCES = ".py", ".c", ".h", ".cuh", ".cpp"


def _but_sources(folder: str, names: list[str]) -> list[str]:
    return [n for n in names if not n.endswith(SOURCES) and not Path(folder, n).is_dir()]


def _sources(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if p.suffix in SOURCES]


@pytest.fixture
def house(copy: Path) -> Iterator[Path]:
    """The copy; what a test has added to it is gone afterwards."""
    before = {p: p.read_bytes() for p in _sources(copy)}
    yield copy
    for path in _sources(copy):
        if path not in before:
            path.unlink()
    for path, held in before.items():
        if not path.exists() or path.read_bytes() != held:
            path.write_bytes(held)


def circles(tree: rules.Tree) -> list[str]:
    return rules.ties(tree, test_house.circle())


def long_files(tree: rules.Tree) -> list[str]:
    return rules.long_files(tree, test_house.LONG)


def untested(tree: rules.Tree) -> list[str]:
    return rules.untested(tree, test_house.elsewhere())


def state(tree: rules.Tree) -> list[str]:
    return rules.state(tree, test_house.STATE)


def marks(tree: rules.Tree) -> list[str]:
    return rules.marks(tree, test_house.MARKS)


BREAKS: dict[str, Break] = {
    "a forbidden import": (
        "rewriter/codecs/spec.py",
        "from kvsink.model.anatomy import Anatomy\n",
        rules.layering,
        "imports kvsink.model.anatomy, which does not stand below codecs",
    ),
    "one inside a function": (
        "rewriter/cache/ranges.py",
        "def late():\n    from kvsink import report\n    return report\n",
        rules.layering,
        "imports kvsink.report, which does not stand below cache",
    ),
    "one where types are not checked": (
        "rewriter/cache/ranges.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    from kvsink import report\n",
        rules.layering,
        "imports kvsink.report, which does not stand below cache",
    ),
    "one by a relative name": (
        "rewriter/methods/rtn.py",
        "from ..calibrate import plan\n",
        rules.layering,
        "imports kvsink.calibrate.plan, which does not stand below methods",
    ),
    "a front end in a pass": (
        "passes/center.py",
        "import kvsink.export.onnx\n",
        rules.layering,
        "imports kvsink.export, which does not stand below graph+passes",
    ),
    "a folder that nobody placed": (
        "rewriter/odd/thing.py",
        '"""A thing."""\n',
        rules.layering,
        "'odd' stands in no row of LAYERS",
    ),
    "a circle": (
        "rewriter/model/turning.py",
        "def late():\n    from kvsink.model import tables\n    return tables\n",
        circles,
        "kvsink.model.tables kvsink.model.turning",
    ),
    "another tie of the known circle": (
        "kernels/read.py",
        "def late():\n    from .append import append_plain\n    return append_plain\n",
        circles,
        "kvsink.kernels.read imports kvsink.kernels.append: another tie of a circle",
    ),
    "a tie along the others": (
        "kernels/cuda/backend.py",
        "from ..read import put_rows\n",
        circles,
        "kvsink.kernels.cuda.backend imports kvsink.kernels.read: another tie of a circle",
    ),
    "a module more in the circle": (
        "kernels/rope.py",
        "def late():\n    from .attend import TILE\n    return TILE\n",
        circles,
        "kvsink.kernels.rope",
    ),
    "a long file": ("kernels/rope.py", "#\n" * 350, long_files, "kernels/rope.py has"),
    "a long file that is not Python": ("kernels/cuda/arch.cuh", "//\n" * 350, long_files, "kernels/cuda/arch.cuh has"),
    "one by a text": (
        "rewriter/codecs/spec.py",
        "import importlib\ndef late():\n    return importlib.import_module('kvsink.model.anatomy')\n",
        rules.layering,
        "imports kvsink.model.anatomy, which does not stand below codecs",
    ),
    "an entry of a table that changes": (
        "kernels/rope.py",
        "_all, _seen = {}, {'a': []}\ndef note(x):\n    _seen['a'].append(x)\n",
        state,
        "kernels/rope.py:_seen is changed by functions",
    ),
    "any attribute on a tensor": (
        "rewriter/cache/layer.py",
        "def mark(keys: Tensor):\n    keys.origin_of_rows = 1\n",
        marks,
        "rewriter/cache/layer.py:origin_of_rows is set on an object that is not ours",
    ),
    "one set by its name": (
        "rewriter/cache/layer.py",
        "def mark(keys: Tensor):\n    setattr(keys, 'place', 1)\n",
        marks,
        "rewriter/cache/layer.py:place is set on an object that is not ours",
    ),
    "a module without a test": (
        "rewriter/model/extra.py",
        '"""Something that nobody tests."""\n',
        untested,
        "has no tests/rewriter/model/test_extra.py",
    ),
    "a table that changes": (
        "kernels/rope.py",
        "_seen = {}\ndef note(x):\n    _seen[x] = 1\n",
        state,
        "kernels/rope.py:_seen is changed by functions",
    ),
    "a list that grows": ("passes/center.py", "_all = list()\ndef note(x):\n    _all.append(x)\n", state, "passes/center.py:_all"),
    "a global": ("export/check.py", "_now = None\ndef note(x):\n    global _now\n    _now = x\n", state, "export/check.py:_now"),
    "a switch": ("kernels/read.py", "FAST = True\n", state, "kernels/read.py:FAST is a switch"),
    "a switch that is a number": (
        "kernels/read.py",
        "FAST = 1\ndef way():\n    return 2 if FAST else 3\n",
        state,
        "kernels/read.py:FAST is a switch",
    ),
    "a switch that is a text": (
        "kernels/read.py",
        "WAY = 'fast'\ndef way():\n    return TILE > 1 and (WAY == 'fast' or not TILE)\n",
        lambda tree: [fault for fault in state(tree) if "WAY" in fault],
        "kernels/read.py:WAY is a switch",
    ),
    "a switch of another module": (
        "kernels/attend.py",
        "def way():\n    from . import read\n    return 2 if read.TILE else 3\n",
        state,
        "kernels/read.py:TILE is a switch",
    ),
    "a constant that another module binds anew": (
        "tools/bench_sequence.py",
        "from kvsink.kernels.cuda import module\ndef quick():\n    module.SINGLE_ROWS = 0\n",
        state,
        "changes SINGLE_ROWS of kvsink.kernels.cuda.module",
    ),
    "one bound anew by its name": (
        "tools/bench_sequence.py",
        "import kvsink.kernels.cuda.module\ndef quick():\n    setattr(kvsink.kernels.cuda.module, 'SINGLE_ROWS', 0)\n",
        state,
        "changes SINGLE_ROWS of kvsink.kernels.cuda.module",
    ),
    "a table that another module puts into": (
        "kernels/cuda/launch.py",
        "def keep(key, held):\n    module._LOADED[key] = held\n",
        state,
        "changes _LOADED of kvsink.kernels.cuda.module",
    ),
    "one that was imported by name": (
        "passes/center.py",
        "from kvsink.passes.base import _PASSES as known\ndef forget():\n    known.clear()\n",
        state,
        "changes _PASSES of kvsink.passes.base",
    ),
    "an entry of one": (
        "rewriter/graph/pipeline.py",
        "def more(name):\n    from kvsink.codecs import quantizers\n    quantizers.QUANTIZERS[name].fields.append(name)\n",
        state,
        "changes QUANTIZERS.fields of kvsink.codecs.quantizers",
    ),
    "an entry of one taken out": (
        "rewriter/graph/pipeline.py",
        "from kvsink.codecs import quantizers\ndel quantizers.QUANTIZERS['uniform']\n",
        state,
        "changes QUANTIZERS of kvsink.codecs.quantizers",
    ),
    "a mark on a tensor": (
        "rewriter/cache/layer.py",
        "def mark(keys):\n    keys._kvsink_note = 1\n",
        marks,
        "rewriter/cache/layer.py:_kvsink_note is set on an object that is not ours",
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_rule_is_noticed(house: Path, what: str) -> None:
    file, added, rule, said = BREAKS[what]
    path = house / file
    path.parent.mkdir(exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else None
    assert rule(rules.Tree(house)) == []
    path.write_text((before or "") + added, encoding="utf-8")
    (fault,) = rule(rules.Tree(house))
    assert said in fault
    if before is None:
        path.unlink()


def test_a_mirrored_file_without_a_test_is_noticed(house: Path) -> None:
    (house / "rewriter/model/extra.py").write_text('"""Something that nobody tests."""\n', encoding="utf-8")
    (house / "tests/rewriter/model/test_extra.py").write_text('"""Nothing yet."""\n', encoding="utf-8")
    assert untested(rules.Tree(house)) == ["tests/rewriter/model/test_extra.py holds no test"]


def test_a_new_method_needs_no_test_of_its_own(house: Path) -> None:
    for folder in ("methods", "model"):
        (house / "rewriter" / folder / "extra.py").write_text('"""Something that nobody tests."""\n', encoding="utf-8")
    (fault,) = untested(rules.Tree(house))
    assert fault.startswith("rewriter/model/extra.py has no tests/rewriter/model/test_extra.py, and no line in")


def test_what_is_allowed_is_not_a_fault(house: Path) -> None:
    """An import for types alone, a name that a function has as its argument, a table that nobody changes, a number that is
    compared with one that is not fixed, a table of a function's own that is called as a module is."""
    with (house / "kernels" / "rope.py").open("a", encoding="utf-8") as file:
        file.write("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kvsink.report import Report\n")
        file.write("TABLE = {1: 2}\ndef change(TABLE):\n    TABLE[1] = 3\n")
        file.write("MOST = 8\ndef many(n):\n    return n > MOST or n or MOST\n")
        file.write("from kvsink.kernels import read\ndef own():\n    read = {}\n    read[1] = 2\n    return read\n")
        file.write("def given(read):\n    read.clear()\n    read.TILE = 3\n")
    tree = rules.Tree(house)
    assert rules.layering(tree) == [] and state(tree) == []


def test_a_test_that_is_taken_away_is_missed(house: Path) -> None:
    (house / "tests" / "kernels" / "test_rope.py").unlink()
    faults = untested(rules.Tree(house))
    assert any(f.startswith("kernels/rope.py has no tests/kernels/test_rope.py") for f in faults)
    assert any(f.startswith("kernels/stages.py: its test") for f in faults)  # which names it as the one elsewhere


def test_a_test_elsewhere_that_no_longer_imports_its_module(house: Path) -> None:
    test = house / "tests" / "kernels" / "test_quantize.py"
    text = test.read_text(encoding="utf-8")
    assert "kvsink.kernels.dequantize" in text
    test.write_text(text.replace("kvsink.kernels.dequantize", "kvsink.kernels"), encoding="utf-8")
    assert untested(rules.Tree(house)) == [
        "kernels/dequantize.py: tests/kernels/test_quantize.py does not import it; say why it tests it all the same"
    ]
