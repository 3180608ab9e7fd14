"""docs/methods.md says what the registry says."""

from __future__ import annotations

from dataclasses import replace

from kvsink.methods import methods
from kvsink.tools.methods_doc import DOCS, main, page


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
    old = tmp_path / "methods.md"
    old.write_text(page(known))
    assert main(["--check", "--out", str(old)]) == 1
    assert "not up to date" in capsys.readouterr().err
    assert main(["--out", str(old)]) == 0 == main(["--check", "--out", str(old)])
