"""Write docs/methods.md, one section per registered method, from the declarations, and the table of what leaves in docs/onnx.md:
`python -m kvsink.tools.methods_doc`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvsink.codecs import SideSpec
from kvsink.export import flavour_table
from kvsink.methods import Method, methods

__all__ = ["DOCS", "onnx_page", "page"]

DOCS = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
COMMAND = "python -m kvsink.tools.methods_doc"


def page(known: Mapping[str, Method] | None = None) -> str:
    """The whole file."""
    found = methods() if known is None else known
    lines = [
        "# Methods",
        "",
        f"Made from the declarations in `rewriter/methods/` by `{COMMAND}`; change those, not this file. Figures under",
        '"published" are the sources\' own, on their models and texts; ours are in the comparison (`kvsink-eval --compare`).',
        "",
        ", ".join(f"[{name}](#{name})" for name in found),
    ]
    for method in found.values():
        lines += ["", *section(method)]
    return "\n".join(lines) + "\n"


def onnx_page(text: str) -> str:
    """docs/onnx.md with the table of methods as it is now."""
    return re.sub(r"\| method \| functions.*\n(\|.*\n)*", lambda _: flavour_table() + "\n", text, count=1)


def section(m: Method) -> list[str]:
    """One method."""
    ours = m.source.arxiv == "ours"
    source = "ours" if ours else f"{m.source.title}, [arXiv {m.source.arxiv}](https://arxiv.org/abs/{m.source.arxiv})"
    source += f", {m.source.venue}" if m.source.venue else ""
    source += f"; code {m.source.code}" if m.source.code else ""
    window = f", the newest {m.window} rows exact" if m.window else ""
    lines = [
        f"## {m.name}",
        "",
        f"{m.summary[:1].upper()}{m.summary[1:]}.",
        "",
        f"- source: {source}",
        f"- keys: {side_text(m.key)}",
        f"- values: {side_text(m.value)}",
        f"- by default: {m.key_bits:g}-bit keys, {m.value_bits:g}-bit values, protection `{m.protect}`{window}",
    ]
    for name in m.variants:
        other = m.variant(name)
        lines.append(f"- variant `{other.name}`: keys {side_text(other.key)}; values {side_text(other.value)}")
    if m.source.differs:
        lines += ["- differs from its source:", *(f"  - {text}" for text in m.source.differs)]
    elif not ours:
        lines.append("- differs from its source: see the head of its file")
    if m.claims:
        lines += ["", "| published | value | setting | source |", "|---|---:|---|---|"]
        lines += [f"| {c.metric} | {c.value:g} | {c.setting} | {c.source} |" for c in m.claims]
    return lines


def side_text(side: SideSpec) -> str:
    """The declaration of one side: quantizer first, then every field that departs from the default."""
    fields = {n: v for n, v in side.as_dict().items() if n not in ("bits", "kind", "widths")}
    rest = ", ".join(f"{n} {v}" if not isinstance(v, bool) else n for n, v in fields.items() if v is not False)
    return f"`{side.kind}`" + (f", {rest}" if rest else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; with --check only say whether they are up to date."""
    parser = argparse.ArgumentParser(COMMAND, description=__doc__)
    parser.add_argument("--check", action="store_true", help="Exit with 1 when a file is not up to date.")
    parser.add_argument("--out", type=Path, default=DOCS)
    parser.add_argument("--onnx", type=Path, default=DOCS.with_name("onnx.md"))
    o = parser.parse_args(argv)
    files = {o.out: page(), o.onnx: onnx_page(o.onnx.read_text(encoding="utf-8"))}
    for file, text in files.items():
        if o.check and not (file.is_file() and file.read_text(encoding="utf-8") == text):
            print(f"{file} is not up to date; run {COMMAND}", file=sys.stderr)
            return 1
        if not o.check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
