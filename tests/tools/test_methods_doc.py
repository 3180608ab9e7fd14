"""docs/methods.md says what the registry says."""

from __future__ import annotations

from dataclasses import replace

from kvsink.methods import methods
from kvsink.tools.methods_doc import DOCS, main, onnx_page, page


def test_the_page_is_up_to_date():
    assert DOCS.read_text(encoding="utf-8") == page(), "run python -m kvsink.tools.methods_doc"


def test_every_method_and_every_departure_is_on_it():
    text = page()
    for name, method in methods().items():
        part = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert all(departure in part for departure in method.source.differs)
        assert all(claim.setting in part for claim in method.claims)
        assert f"`{method.protect}`" in part


def test_a_changed_declaration_changes_the_page(tmp_path, capsys):
    known = dict(methods())
    known["rtn"] = replace(known["rtn"], protect="first:7")
    assert page(known) != page()
    old, other = tmp_path / "methods.md", DOCS.with_name("onnx.md")
    old.write_text(page(known))
    assert main(["--check", "--out", str(old)]) == 1
    assert "not up to date" in capsys.readouterr().err
    onnx = tmp_path / "onnx.md"
    onnx.write_text(other.read_text(encoding="utf-8").replace("| `rtn` | yes |", "| `rtn` | no |"), encoding="utf-8")
    files = ["--out", str(old), "--onnx", str(onnx)]
    assert main(files) == 0 == main(["--check", *files])
    assert onnx.read_text(encoding="utf-8") == other.read_text(encoding="utf-8")


def test_nothing_but_the_table_of_the_other_page_is_written():
    text = "before\n\n| method | functions, custom | why not | gqa | why not |\n|---|\n| `gone` | no |\n\nafter | it\n"
    made = onnx_page(text)
    assert made.startswith("before\n\n| method |") and made.endswith("|\n\nafter | it\n")
    assert "`gone`" not in made and "| `rtn` | yes |" in made
