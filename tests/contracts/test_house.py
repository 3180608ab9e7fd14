"""The rules of the house that a machine can check: layering, circles, sizes, tests, hidden state, names, docstrings.

The rules stand in `rules.py`; `test_rules.py` breaks each of them on a copy of the tree.
"""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contracts import rules

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "rewriter": "kvsink",
    "passes": "kvsink.passes",
    "kernels": "kvsink.kernels",
    "export": "kvsink.export",
    "tools": "kvsink.tools",
}
LONG = {
    "export/bodies.py": "one ONNX body per op, each a few lines; the table of all of them reads best in one place",
    "export/graph.py": "one table from ops to nodes of ONNX, and what builds the graph by it",
    "kernels/backends.py": "the reasons of every backend side by side, in the order they are asked",
    "kernels/cpu/append.c": "one new row coded: every kind beside the others, by the same few steps",
    "kernels/cpu/attend.c": "one query over codes: the readers of every kind, inlined into one loop",
    "kernels/cuda/codes.cuh": "one kernel over rows of bytes; what a compiler makes of it changes with every part taken out",
    "kernels/cuda/rows.cuh": "one new row coded by one warp: every stage of the way in",
    "kernels/cuda/schedule.cuh": "the three ways blocks share superblocks, over one step",
    "kernels/cuda/rows_of_bytes.py": "one kernel: what it takes, its launch and its fallbacks",
    "kernels/triton/append_kernels.py": "one Triton kernel with the device functions it is made of",
    "kernels/triton/attend_kernels.py": "one Triton kernel with the device functions it is made of",
    "rewriter/codecs/codec.py": "one class: both directions of every stage of a codec",
    "rewriter/graph/sites.py": "the only place that recognises attention; variants share their steps",
    "tools/bench.py": "one command line, each of its commands a thin one",
    "tools/ort_ops/kernels.h": "the arithmetic of the operators, which onnxruntime's build takes as one header",
    "tools/ort_ops/ops.cpp": "the operators' registration and checks, in the form that onnxruntime's C API asks for",
    "tools/page_blocks.py": "one block of the documentation's tables after another",
    "tools/stress/operations.py": "the twin of a cache and the operations on both, in step",
}
"""Files above 350 lines, and why they are not split."""

CIRCLE = {
    "append": "backends",
    "append_attend": "backends cuda.rows_of_bytes triton.append",
    "attend": "backends read",
    "backends": "append append_attend attend cpu.append cpu.attend cuda.backend cuda.launch cuda.rows_of_bytes triton.append "
    "triton.attend",
    "read": "backends",
    "cpu.append": "append backends",
    "cpu.attend": "backends",
    "cuda.backend": "backends cuda.launch",
    "cuda.byte_tables": "triton.attend",
    "cuda.launch": "append attend backends read triton.append",
    "cuda.rows_of_bytes": "backends cuda.byte_tables triton.attend",
    "triton.append": "backends triton.attend",
    "triton.attend": "backends",
}
"""Below kvsink.kernels, the one circle and all that its modules import of each other: a cache op asks the backends when it is
called, and a backend hands what it declines to the reference. The table of backends alone closes it, when it is first asked."""

STATE = {
    "kernels/backends.py:_TOLD": "warnings that were given once",
    "kernels/base.py:_SPECS": "the registry of ops",
    "kernels/base.py:_resolver": "how an argument's tables are found by name; set once by the registry of codecs",
    "kernels/cpu/append.py:_defined": "whether a reference runs in place of native code; by a context manager",
    "kernels/cuda/module.py:_LOADED": "kernels that were loaded, by variant and device",
    "kernels/cuda/rows_of_bytes.py:_LOADED": "kernels that were loaded, by variant and device",
    "kernels/hadamard.py:_CORES": "matrices made once per device, through kernels/lasting.py",
    "kernels/levels.py:_SHARED": "code levels made once per device, through kernels/lasting.py",
    "kernels/triton/attend.py:_made": "tables in the kernel's order, as long as those they were made of",
    "passes/base.py:_PASSES": "the registry of passes",
    "rewriter/codecs/quantizers.py:QUANTIZERS": "the registry of quantizers",
    "rewriter/graph/backend.py:_reports": "reports of compiled graphs, for explain()",
    "rewriter/graph/backend.py:_told": "warnings that were given once",
    "rewriter/methods/registry.py:_METHODS": "the registry of methods",
    "rewriter/model/adapters.py:_MODELS": "models whose projections are watched, weakly held",
    "tools/bench_model.py:_records": "calibration records of one run of a benchmark",
}
"""Tables of modules that change, and what they are."""

MARKS = {
    "rewriter/calibrate/samples.py:_kvsink_watch": "attention module, while calibration watches it",
    "rewriter/model/adapters.py:_kvsink_runtime": "model",
    "rewriter/model/attention.py:_kvsink": "transformers' attention function that ours replaces",
    "rewriter/model/observed.py:_kvsink_attention": "model: the attention it had",
    "rewriter/model/observed.py:_kvsink_observer": "attention module",
    "rewriter/model/runtime.py:_kvsink_handles": "model",
    "rewriter/model/runtime.py:_kvsink_observer": "attention module",
    "rewriter/model/runtime.py:_kvsink_runtime": "model",
}
"""Attributes of ours on modules of a model; none on a tensor."""

FILES = sorted(p for folder in PACKAGES for p in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[folder], *(part for part in rest if part != "__init__")])


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of everything a file imports; an `if TYPE_CHECKING` block does not run and does not count."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST, nested: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        nested = nested or isinstance(node, (ast.FunctionDef, ast.Lambda))
        if not (nested and top_level_only):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
                name = ".".join(filter(None, (parent, node.module)))
                found.add(name)
                found.update(f"{name}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, nested)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def ours(path: Path, **options: bool) -> set[str]:
    return {name for name in imports(path, **options) if name == "kvsink" or name.startswith("kvsink.")}


def modules(folder: str) -> list[Path]:
    return [path for path in FILES if path.relative_to(ROOT).parts[0] == folder]


def test_the_tree_is_found() -> None:
    assert {p.relative_to(ROOT).parts[0] for p in FILES} == set(PACKAGES) and len(FILES) > 40
    assert "kvsink.kernels.base" in imports(ROOT / "kernels" / "quantize.py")  # relative imports are resolved


@pytest.mark.parametrize("path", FILES + TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name == "__init__.py" and not text.strip():
        return
    doc = ast.get_docstring(ast.parse(text))
    assert doc and len(doc.splitlines()[0]) >= 20, "the first line of the docstring is a sentence"


@pytest.fixture(scope="module")
def tree() -> rules.Tree:
    return rules.Tree(ROOT)


def elsewhere() -> dict[str, tuple[str, str]]:
    """Modules whose test file does not stand in the mirrored place, from elsewhere.txt."""
    lines = (ROOT / "tests" / "contracts" / "elsewhere.txt").read_text(encoding="utf-8").splitlines()[1:]
    rows = [[cell.strip() for cell in f"{line} | ".split("|")] for line in lines]
    return {module: (test, why) for module, test, why, *_ in rows}


def test_folders_import_only_what_stands_below_them(tree: rules.Tree) -> None:
    assert rules.layering(tree) == []


def circle() -> dict[str, set[str]]:
    """`CIRCLE` by whole names."""
    return {f"kvsink.kernels.{name}": {f"kvsink.kernels.{n}" for n in named.split()} for name, named in CIRCLE.items()}


def test_no_modules_import_each_other_in_a_circle(tree: rules.Tree) -> None:
    assert rules.ties(tree, circle()) == []
    cut = copy.copy(tree)
    cut.imports = {**tree.imports, "kvsink.kernels.backends": {}}
    assert rules.circles(cut) == []  # its table closes the circle, and nothing else does


def test_long_files_have_a_reason(tree: rules.Tree) -> None:
    assert rules.long_files(tree, LONG) == []


def test_every_module_has_its_test(tree: rules.Tree) -> None:
    assert rules.untested(tree, elsewhere()) == []


def test_nothing_is_kept_where_nobody_looks(tree: rules.Tree) -> None:
    assert rules.state(tree, STATE) == []
    assert rules.marks(tree, MARKS) == []


def test_kernels_import_nothing_of_ours() -> None:
    for path in modules("kernels"):
        assert all(name.startswith("kvsink.kernels") for name in ours(path)), path.name


def test_passes_do_not_know_the_front_ends() -> None:
    allowed = ("kvsink.passes", "kvsink.kernels", "kvsink.codecs", "kvsink.errors", "kvsink.graph.sites", "kvsink.graph.targets")
    for path in modules("passes"):
        for name in ours(path):
            assert any(name == a or name.startswith(a + ".") for a in allowed), f"{path.name} imports {name}"


def test_methods_are_declarations() -> None:
    for path in modules("rewriter"):
        if path.parent.name == "methods" and path.name not in ("__init__.py", "registry.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 80, path.name
            for name in ours(path):
                assert name.startswith(("kvsink.codecs", "kvsink.methods.registry")), f"{path.name} imports {name}"
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert not [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))], path.name


@pytest.mark.parametrize("path", FILES + TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_folder_is_imported_by_its_everyday_name(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
        for name in names:
            assert name.partition(".")[0] not in PACKAGES, f"line {node.lineno} imports {name}; import kvsink.…"


def test_triton_and_extras_are_not_needed_to_import() -> None:
    extras = {"triton", "onnx", "onnxscript", "onnxruntime", "gguf", "matplotlib", "jinja2", "accelerate", "peft", "flashinfer"}
    for path in FILES:
        found = imports(path, top_level_only=True)
        in_triton = path.parent.name == "triton" and path.name.endswith("_kernels.py")
        if not (in_triton or path.name.startswith("triton_")):  # Triton code, which others import where they launch it
            assert not any(name.startswith("kvsink.kernels.triton.") and name.endswith("_kernels") for name in found), path.name
            assert not {name.partition(".")[0] for name in found} & extras, path.name


def test_importing_from_the_root_of_a_checkout() -> None:
    """There `kernels` resolves to our folder, and transformers imports a package of that name when it finds one."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, kvsink\n"
        "from kvsink.kernels import hadamard\n"
        "assert torch.ops.kvsink.append_.default is kvsink.kernels.append_._opoverload\n"
        "assert hadamard(torch.ones(8), 8).shape == (8,)\n"
        "import kernels; assert not hasattr(kernels, 'hadamard'), 'the ops were registered twice'\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
