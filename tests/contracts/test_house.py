"""The rules of the house that a machine can check: layering, names, docstrings, sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"rewriter": "kvsink", "passes": "kvsink.passes", "kernels": "kvsink.kernels", "export": "kvsink.export",
            "tools": "kvsink.tools"}  # fmt: skip
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


def test_codecs_and_protection_stand_below_the_engine() -> None:
    below = ("kvsink.codecs", "kvsink.errors", "kvsink.kernels")
    for path in [p for p in modules("rewriter") if p.parent.name == "codecs"]:
        for name in ours(path):
            assert any(name == b or name.startswith(b + ".") for b in below), f"{path.name} imports {name}"


def test_nothing_imports_the_tools() -> None:
    for path in FILES:
        if path.relative_to(ROOT).parts[0] != "tools":
            assert not any(name.startswith("kvsink.tools") for name in ours(path)), path.name


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
