"""The rules of the house as functions of a tree: each returns its faults in words, an empty list where there are none."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDERS = {
    "rewriter": "kvsink",
    "passes": "kvsink.passes",
    "kernels": "kvsink.kernels",
    "export": "kvsink.export",
    "tools": "kvsink.tools",
}

LAYERS = (
    ("tools",),
    ("",),
    ("outdir", "explain"),
    ("rewrite",),
    ("hf",),
    ("saving",),
    ("export", "profiling"),
    ("evaluate",),
    ("report",),
    ("graph+passes", "calibrate"),
    ("cache",),
    ("folder",),
    ("model",),
    ("methods",),
    ("codecs",),
    ("kernels", "evaluate.texts"),
    ("errors",),
)
"""From the top: a folder imports folders of the rows below its own. `graph` and `passes` know each other; the texts are data."""

_MUTATORS = {"add", "append", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}


@dataclass(frozen=True)
class File:
    """What the rules look at in one file."""

    imports: tuple[ast.Import | ast.ImportFrom, ...]  # that run, inside functions too
    lines: int
    state: dict[str, str]  # names of the module level that hold hidden state, and of which kind
    marks: frozenset[str]  # attributes of ours that it sets, and any on an argument that is a tensor
    named: tuple[tuple[str, int], ...]  # modules that it imports by a text
    constants: frozenset[str]  # names of the module level that stand for a number, a text or None
    conditions: tuple[frozenset[str], ...]  # what each condition consists of, where that is dotted names and literals alone
    changes: tuple[tuple[str, int], ...]  # dotted names that begin at the module level, of what it binds anew or puts things into


@cache
def read(text: str) -> File:
    """Parse a file once, whatever trees it stands in."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = ast.parse(text)
    state = dict.fromkeys(_changed(module), "is changed by functions: give it a home, or hand it on")
    for name, value in _bound(module):
        if isinstance(value, ast.Constant) and isinstance(value.value, bool):
            state[name] = "is a switch: make it an argument"
    constants = frozenset(name for name, value in _bound(module) if isinstance(value, ast.Constant))
    stored = (n for n in ast.walk(module) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return File(
        tuple(n for n in running(module) if isinstance(n, (ast.Import, ast.ImportFrom))),
        len(text.splitlines()),
        state,
        frozenset(n.attr for n in stored if n.attr.startswith("_kvsink")) | frozenset(_on_tensors(module)),
        tuple(_by_text(module)),
        constants,
        tuple(_conditions(module)),
        tuple(_changes(module)),
    )


class Tree:
    """The modules below a root, and what they import of each other."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths: dict[str, Path] = {}  # module → file, relative to the root
        self.files: dict[str, File] = {}
        for folder in FOLDERS:
            for path in sorted((root / folder).rglob("*.py")):
                name = module_name(path.relative_to(root))
                self.paths[name] = path.relative_to(root)
                self.files[name] = read(path.read_text(encoding="utf-8"))
        self._known: dict[str, dict[str, str]] = {}
        self.imports = {name: dict(self._imports(name)) for name in self.paths}

    def _imports(self, name: str) -> Iterator[tuple[str, int]]:
        """Modules of ours that a module imports, with the line; inside functions too, but not for types alone. The version that
        stands in the package's root is a text, not a module."""
        yield from ((target, line) for target, line in self.files[name].named if target in self.paths and target != name)
        for node in self.files[name].imports:
            for _, target in self._aliases(name, node):
                target = self.split(target)[0]
                if target and target != name:
                    yield target, node.lineno

    def _aliases(self, name: str, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
        """What an import binds in a module: the name there, and the whole name of what it stands for."""
        if isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name, alias.name) for alias in node.names)
            return
        package = (name if self.paths[name].name == "__init__.py" else name.rpartition(".")[0]).split(".")
        base = ".".join(filter(None, (*(package[: len(package) - node.level + 1] if node.level else ()), node.module)))
        for alias in node.names:
            if (base, alias.name) != ("kvsink", "__version__"):
                yield alias.asname or alias.name, f"{base}.{alias.name}"

    def split(self, whole: str) -> tuple[str, str]:
        """A whole name as a module of ours, "" where it is in none, and what is named in it."""
        module = whole
        while module and module not in self.paths:
            module = module.rpartition(".")[0]
        return module, whole[len(module) + 1 :] if module else whole

    def resolved(self, name: str, dotted: str) -> tuple[str, str]:
        """The same of a dotted name as a module spells it."""
        if name not in self._known:
            self._known[name] = dict(pair for node in self.files[name].imports for pair in self._aliases(name, node))
        known, head = self._known[name], dotted
        while head and head not in known:
            head = head.rpartition(".")[0]
        return self.split(known[head] + dotted[len(head) :]) if head else (name, dotted)


def _by_text(module: ast.Module) -> Iterator[tuple[str, int]]:
    """Names given to `import_module`, as far as they stand there."""
    for node in running(module):
        called = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args
        if called and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            yield node.args[0].value, node.lineno


_OF_TENSORS = {"data", "grad", "requires_grad"}  # torch's own


def _on_tensors(module: ast.Module) -> Iterator[str]:
    """Attributes that functions set on arguments said to be tensors."""
    for function in ast.walk(module):
        if not isinstance(function, ast.FunctionDef):
            continue
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        tensors = {
            a.arg for a in arguments if a.annotation is not None and ast.unparse(a.annotation) in ("Tensor", "Tensor | None")
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in tensors:
                yield from {node.attr} - _OF_TENSORS
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and ast.unparse(node.args[0]) in tensors:
                yield ast.unparse(node.args[1]).strip("'")


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree but for the bodies of `if TYPE_CHECKING`, which do not run."""
    for child in ast.iter_child_nodes(tree):
        skips = isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        if not skips:
            yield child
            yield from running(child)
        for other in child.orelse if skips else ():  # type: ignore[attr-defined]
            yield other
            yield from running(other)


def module_name(path: Path) -> str:
    """kvsink.… of a file, its path below the root."""
    folder, *rest = path.with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in rest if part != "__init__")])


def layer(name: str) -> str:
    """The entry of `LAYERS` that a module belongs to."""
    parts = name.split(".")[1:]
    if not parts:
        return ""
    if parts[:2] == ["evaluate", "texts"]:
        return "evaluate.texts"
    return "graph+passes" if parts[0] in ("graph", "passes") else parts[0]


def layering(tree: Tree) -> list[str]:
    """Imports of a folder that does not stand below."""
    row = {name: i for i, names in enumerate(LAYERS) for name in names}
    faults = [f"{path}: {layer(name)!r} stands in no row of LAYERS" for name, path in tree.paths.items() if layer(name) not in row]
    for name, targets in tree.imports.items():
        for target, line in targets.items():
            mine, other = layer(name), layer(target)
            if mine in row and other in row and mine != other and row[mine] >= row[other]:
                faults.append(f"{tree.paths[name]}:{line} imports {target}, which does not stand below {mine or 'kvsink'}")
    return faults


def ties(tree: Tree, known: Mapping[str, Collection[str]]) -> list[str]:
    """Circles beside the known one, and imports inside that one which nobody named. known: by module, what it imports of it."""
    found = circles(tree)
    unknown = [circle - set(known) for circle in found]
    faults = [f"{' '.join(sorted(names))} in a circle that CIRCLE does not have" for names in unknown if names]
    for name, named in known.items():
        inside = {target for target in tree.imports.get(name, ()) if target in known}
        faults += [f"{name} imports {target}: another tie of a circle" for target in sorted(inside - set(named))]
        faults += [f"{name} no longer imports {target}" for target in sorted(set(named) - inside)]
    return faults


def circles(tree: Tree) -> list[frozenset[str]]:
    """Sets of modules that import each other in a circle, imports inside functions counted."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[frozenset[str]] = []

    def visit(name: str) -> None:  # Tarjan
        number[name] = low[name] = len(number)
        stack.append(name)
        for target in tree.imports[name]:
            if target not in number:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], number[target])
        if low[name] == number[name]:
            at = stack.index(name)
            circle, stack[at:] = frozenset(stack[at:]), []
            if len(circle) > 1:
                found.append(circle)

    for name in tree.paths:
        if name not in number:
            visit(name)
    return found


def long_files(tree: Tree, reasons: Mapping[str, str], most: int = 350) -> list[str]:
    """Files above `most` lines that nobody gave a reason for, and reasons that are no longer needed."""
    long = {str(tree.paths[name]): file.lines for name, file in tree.files.items() if file.lines > most}
    for path in (
        p for folder in FOLDERS for end in ("c", "h", "cuh", "cpp") for p in sorted((tree.root / folder).rglob(f"*.{end}"))
    ):
        count = len(path.read_text(encoding="utf-8").splitlines())
        long |= {str(path.relative_to(tree.root)): count} if count > most else {}
    unsaid = {path: count for path, count in long.items() if path not in reasons}
    faults = [f"{path} has {count} lines, more than {most}: split it, or say why not" for path, count in unsaid.items()]
    return faults + [f"{path} needs no reason to be long" for path in reasons if path not in long]


def untested(tree: Tree, elsewhere: Mapping[str, tuple[str, str]]) -> list[str]:
    """Modules without a test file in the mirrored place. elsewhere: by path of the module, or of its folder with a
    slash, a test file that stands in another place, and why it tests the module where it does not import it."""
    faults = []
    for name, path in tree.paths.items():
        mirrored = Path("tests", *path.parts[:-1], f"test_{path.stem}.py")
        if path.name == "__init__.py" or (tree.root / mirrored).is_file():
            if path.name != "__init__.py" and "def test_" not in (tree.root / mirrored).read_text(encoding="utf-8"):
                faults.append(f"{mirrored} holds no test")
            if str(path) in elsewhere:
                faults.append(f"{path} has its test in the mirrored place")
            continue
        known = elsewhere.get(str(path)) or elsewhere.get(f"{path.parent}/")
        if known is None:
            faults.append(f"{path} has no {mirrored}, and no line in tests/contracts/elsewhere.txt")
            continue
        test, why = known
        if not (tree.root / test).is_file():
            faults.append(f"{path}: its test {test} does not exist")
        elif not why and name not in imported((tree.root / test).read_text(encoding="utf-8")):
            faults.append(f"{path}: {test} does not import it; say why it tests it all the same")
    return faults + [f"{path} does not exist" for path in elsewhere if not (tree.root / path).exists()]


def imported(text: str) -> set[str]:
    """Absolute names that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def state(tree: Tree, homes: Mapping[str, str]) -> list[str]:
    """Hidden state: tables of a module that its functions change, `global`, switches, and what a module changes of another one,
    there or here. homes: "path:name" and why it may be."""
    found = {f"{tree.paths[name]}:{x}": what for name, file in tree.files.items() for x, what in file.state.items()}
    for name, file in tree.files.items():
        for parts in file.conditions:  # of constants alone: it comes out the same unless somebody binds one anew
            owners = [tree.resolved(name, part) for part in parts]
            if all(owner in tree.files and x in tree.files[owner].constants for owner, x in owners):
                found |= {f"{tree.paths[owner]}:{x}": "is a switch: make it an argument" for owner, x in owners}
        for dotted, line in file.changes:
            owner, x = tree.resolved(name, dotted)
            if owner in tree.files and owner != name and x:
                found[f"{tree.paths[name]}:{line}"] = f"changes {x} of {owner}: let a function there do it"
    faults = [f"{where} {what}" for where, what in found.items() if where not in homes]
    return faults + [f"{where} is no longer there" for where in homes if where not in found]


def _bound(module: ast.Module) -> Iterator[tuple[str, ast.expr | None]]:
    for node in module.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(name, ast.Name):
                        yield name.id, node.value


def _dotted(node: ast.AST) -> str:
    """`a.b.c` as it is spelled, an entry of a table taken for the table; "" for anything else."""
    while isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute):
        return f"{base}.{node.attr}" if (base := _dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def _conditions(module: ast.Module) -> Iterator[frozenset[str]]:
    for node in ast.walk(module):
        tests: list[ast.expr] = []
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            tests = [*node.test.values] if isinstance(node.test, ast.BoolOp) else [node.test]
        elif isinstance(node, ast.BoolOp):  # its last operand is what it gives
            tests = node.values[:-1]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            tests = [node.operand]
        for test in tests:
            parts = [test.left, *test.comparators] if isinstance(test, ast.Compare) else [test]
            names = [_dotted(part) for part in parts if not isinstance(part, ast.Constant)]
            if names and all(names):
                yield frozenset(names)


def _changes(node: ast.AST, local: frozenset[str] = frozenset()) -> Iterator[tuple[str, int]]:
    """local: names that functions around a node bind themselves."""
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        local |= {n.arg for n in ast.walk(node.args) if isinstance(n, ast.arg)}
        local |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    held: ast.AST | None = None
    if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)):
        held = node
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MUTATORS:
        held = node.func.value
    elif isinstance(node, ast.Call) and _dotted(node.func) in ("setattr", "delattr"):
        held = ast.Attribute(node.args[0], ast.unparse(node.args[1]).strip("'\""))
    dotted = "" if held is None else _dotted(held)
    if dotted and dotted.partition(".")[0] not in local:
        yield dotted, node.lineno  # type: ignore[attr-defined]
    for child in ast.iter_child_nodes(node):
        yield from _changes(child, local)


def _changed(module: ast.Module) -> set[str]:
    """Names of the module level that a function declares global, puts items into, or calls a changing method of."""
    known, found = {name for name, _ in _bound(module)}, set[str]()
    for function in ast.walk(module):
        if not isinstance(function, (ast.FunctionDef, ast.Lambda)):
            continue
        arguments = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}
        for node in ast.walk(function):
            held: ast.expr | None = None
            if isinstance(node, ast.Global):
                found |= set(node.names)
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
                held = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MUTATORS:
                held = node.func.value
            while isinstance(held, ast.Subscript):  # an entry of a table is part of it
                held = held.value
            if isinstance(held, ast.Name):
                found |= {held.id} & known - arguments
    return found


def marks(tree: Tree, owners: Mapping[str, str]) -> list[str]:
    """Attributes of ours on objects that are not ours. owners: "path:attribute" and on what it stands; never a tensor."""
    found = {f"{tree.paths[name]}:{mark}" for name, file in tree.files.items() for mark in file.marks}
    faults = [f"{where} is set on an object that is not ours: hand it on" for where in sorted(found) if where not in owners]
    return faults + [f"{where} is no longer set" for where in owners if where not in found]
