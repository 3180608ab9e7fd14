"""Write the figures of README.md, docs/performance.md, serving.md, compare.md and quality.md from rows that were measured:
`python -m kvsink.tools.pages`.

A block stands between `<!-- rows: NAME -->` and `<!-- end of rows -->`, one function each in `kvsink.tools.page_blocks`; nothing is
measured here. With matplotlib the plots are drawn too. New rows go to tools/results/, under the names that `page_blocks` reads.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from kvsink.errors import KvsinkError
from kvsink.tools.bench_plot import plot_kernels, plot_shapes
from kvsink.tools.compare import RECORDS
from kvsink.tools.compare_records import read_records
from kvsink.tools.compare_report import write_report
from kvsink.tools.page_blocks import BLOCKS, ROOT, picture_rows
from kvsink.tools.quality_page import markdown

__all__ = ["COMPARED", "PAGES", "QUALITY", "ROOT", "main", "prose", "written"]

PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "serving.md")
QUALITY = ROOT / "docs" / "quality.jsonl"
COMPARED = (ROOT / "docs", ROOT / "docs" / "shift")
_BLOCK = re.compile(r"(?<=<!-- rows: )([\w-]+)( -->\n)(.*?)(?=<!-- end of rows -->)", re.DOTALL)


def written(text: str, folder: Path, blocks: Mapping[str, Callable[[Path], str]] = BLOCKS) -> str:
    """The page with its blocks as the rows say; folder: where the page stands, which links begin from. Raises KvsinkError."""

    def block(found: re.Match[str]) -> str:
        if found[1] not in blocks:
            raise KvsinkError(f"no rows are known as {found[1]!r}; known: {', '.join(blocks)}")
        return f"{found[1]}{found[2]}{blocks[found[1]](folder).rstrip()}\n"

    return _BLOCK.sub(block, text)


def prose(text: str) -> str:
    """The page without its blocks."""
    return _BLOCK.sub("", text)


def main() -> None:
    """Rewrite the pages, and the plots where matplotlib is there."""
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8"), page.parent), encoding="utf-8")
    for folder in COMPARED:
        write_report(folder, read_records(folder / RECORDS))
    QUALITY.with_suffix(".md").write_text(markdown(read_records(QUALITY)), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        return
    for name, draw in (("kernels", plot_kernels), ("shapes", plot_shapes)):
        for stem, rows in picture_rows(name).items():
            draw(rows, ROOT / "docs" / f"{stem}.png")


if __name__ == "__main__":
    main()
