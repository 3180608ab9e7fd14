"""What `mkdocs build` needs besides docs/: pages and files of the repository, and the package as it is imported.

Pages       README.md is the first page; CONTRIBUTING.md and CHANGELOG.md are pages too. A file outside docs/ that a page links to
            (rows of a measurement, a source) comes along below repository/, so that every link of a page on disk works on the site
Links       those of a page are written for its place in the repository; a link to nothing stays as it is, and `--strict` refuses it
Sources     the folders that setup.cfg maps are copied to build/documented/kvsink, where mkdocstrings reads them
Docstrings  paragraphs of fields such as "Shapes     x [B, T]" are shown as they are written
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import griffe

__all__ = [
    "PAGES",
    "FieldLines",
    "documented",
    "linked",
    "on_files",
    "on_page_markdown",
    "on_startup",
    "place",
    "with_fields",
    "with_links",
]

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
_WHOLE = re.compile(r"\[([^\]]*)\]\(([^)\s#:]+)\)")
_FIELD = re.compile(r"[A-Z][a-z]+ {2,}\S")


def place(path: str) -> str:
    """Where a file of the repository stands on the site; both are paths from the root, with slashes."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}")


def _target(page: str, link: str) -> str:
    return os.path.normpath(PurePosixPath(page).parent / link).replace(os.sep, "/")


def linked(page: str, root: Path = ROOT) -> set[str]:
    """Files outside docs/ that `page`, a path in the repository, links to and that are there."""
    found = {_target(page, link) for link in _LINK.findall((root / page).read_text(encoding="utf-8"))}
    return {path for path in found if not path.startswith(("docs/", "..")) and (root / path).is_file()}


def with_links(text: str, page: str, root: Path = ROOT) -> str:
    """The text of `page` with links to files of the repository as they are on the site; of a link to a folder its words stay."""

    def link(found: re.Match[str]) -> str:
        path = _target(page, found[0])
        return os.path.relpath(place(path), PurePosixPath(place(page)).parent) if (root / path).is_file() else found[0]

    def folder(found: re.Match[str]) -> str:
        return found[1] if (root / _target(page, found[2])).is_dir() else found[0]

    return _LINK.sub(link, _WHOLE.sub(folder, text))


def with_fields(text: str) -> str:
    """A docstring whose paragraphs of fields ("Shapes     x [B, T]") are shown as they are written."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(f"```text\n{part}\n```" if _FIELD.match(part) else part for part in paragraphs)


def documented(root: Path = ROOT) -> Path:
    """Copy the Python files of every folder that setup.cfg maps to where mkdocstrings looks, as they are imported."""
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    pairs = re.findall(r"^([\w.]+) = (\w+)$", config["options"]["package_dir"], re.MULTILINE)
    place = root / "build" / "documented"
    shutil.rmtree(place, ignore_errors=True)
    for name, folder in pairs:
        for file in (root / folder).rglob("*.py"):
            copy = place.joinpath(*name.split("."), file.relative_to(root / folder))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    return place


class FieldLines(griffe.Extension):
    """Docstrings as `with_fields` writes them."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_fields(obj.docstring.value)


def on_startup(**_: Any) -> None:
    """mkdocs: before mkdocstrings looks which of its folders are there."""
    documented()


def on_files(files: Any, config: Any) -> None:
    """mkdocs: the pages of the repository's root, and what any page links to outside docs/."""
    from mkdocs.structure.files import File

    waiting, seen = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())], set(PAGES)
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    while waiting:
        for path in sorted(linked(waiting.pop()) - seen):
            seen.add(path)
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
            waiting += [path] if path.endswith(".md") else []


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs: the text of a page before it is rendered."""
    uri = page.file.src_uri
    homes = {place(path): path for path in PAGES}
    return with_links(markdown, homes.get(uri) or (uri.removeprefix("repository/") if page.file.generated_by else f"docs/{uri}"))
