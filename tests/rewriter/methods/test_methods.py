"""The table of methods: files are found, wrong names get the nearest three, a new file needs no list."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import kvsink
from kvsink.errors import KvsinkError, UnknownName
from kvsink.methods import registry
from tests.models import build, tokens

PACKAGE = sys.modules["kvsink.methods"]  # `kvsink.methods` itself is the function

TOY = '''"""A toy: six bits, everything centred."""

from kvsink.codecs import SideSpec
from kvsink.methods.registry import Method, Paper, register_method

TOY = register_method(
    Method(
        name="toy",
        summary="centred, six bits",
        source=Paper("ours"),
        key=SideSpec(bits=2, center=True, kind="uniform"),
        value=SideSpec(bits=2, center=True, kind="uniform"),
        key_bits=6,
        value_bits=6,
        protect="first:1",
    )
)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder whose files are methods for the length of a test."""
    monkeypatch.setattr(PACKAGE, "__path__", [*PACKAGE.__path__, str(tmp_path)])
    before = dict(registry._METHODS)
    yield tmp_path
    registry._METHODS.clear()
    registry._METHODS.update(before)
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(f"kvsink.methods.{file.stem}", None)
        vars(PACKAGE).pop(file.stem, None)


def test_files_and_names() -> None:
    stems = {p.stem for p in Path(registry.__file__).parent.glob("*.py")} - {"__init__", "registry"}
    files = {stem.replace("_", "-") for stem in stems}
    assert set(kvsink.methods()) == files >= {"rtn", "rotatekv", "klt", "centred"}
    assert list(kvsink.methods()) == sorted(files)
    with pytest.raises(TypeError):
        kvsink.methods()["x"] = None  # type: ignore[index]


def test_an_unknown_method_names_the_three_nearest() -> None:
    words = r"unknown method 'rotatkv'; nearest known: rotatekv, [\w:-]+, [\w:-]+\. kvsink.methods"
    with pytest.raises(UnknownName, match=words) as caught:
        kvsink.get_method("rotatkv")
    assert len(caught.value.nearest) == 3
    with pytest.raises(UnknownName, match="nearest known: klt"):
        kvsink.rewrite(build("llama"), "kl")


def test_a_side_keeps_its_clip_where_no_other_is_said() -> None:
    method = kvsink.get_method("rtn")
    clipped = replace(method, key=replace(method.key, clip=0.9), clip_at={2: 0.8})
    assert [clipped.side("key", bits).clip for bits in (2, 3, 4)] == [0.8, 0.9, 0.9]
    assert [clipped.side("value", bits).clip for bits in (2, 4)] == [0.8, 1.0]


def test_a_variant_changes_what_it_gives_and_nothing_else() -> None:
    method = kvsink.get_method("klt")
    for name, changes in method.variants.items():
        other = kvsink.get_method(f"klt:{name}")
        assert other == replace(method, name=f"klt:{name}", variants={}, **changes)
        differ = {f.name for f in fields(other) if getattr(other, f.name) != getattr(method, f.name)}
        assert differ == {"name", "variants", *changes}
    kinds = {n: tuple(kvsink.get_method(f"klt:{n}").side(s, 2).kind for s in ("key", "value")) for n in method.variants}
    assert kinds == {"best": ("lloyd", "gauss"), "codebooks": ("lloyd", "vector"), "even": ("lloyd-even", "uniform")}


def test_an_unknown_variant_names_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="unknown variant 'klt:evn'; nearest known: klt:even, klt:best, klt:codebooks"):
        kvsink.get_method("klt:evn")
    with pytest.raises(UnknownName, match="unknown variant 'rtn:even'; nearest known: rtn"):
        kvsink.get_method("rtn:even")
    with pytest.raises(UnknownName, match="unknown method 'klt-even'; nearest known: klt:even"):  # its name in 0.1
        kvsink.get_method("klt-even")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="method rtn is registered twice"):
        kvsink.register_method(kvsink.get_method("rtn"))


def test_a_new_file_is_a_new_method(folder: Path) -> None:
    (folder / "toy.py").write_text(TOY)
    assert "toy" in kvsink.methods()
    model, ids = build("llama"), tokens(1, 8)
    report = kvsink.rewrite(model, "toy", calibration=tokens(8, 64, seed=1))
    assert report.method == "toy" and all(row.key == "centred, uniform 6 bit" for row in report.layers)
    out = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    assert out.sequences.shape == (1, 13) and isinstance(out.past_key_values, kvsink.KVSinkCache)


def test_a_broken_file_is_named(folder: Path) -> None:
    (folder / "toy.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(KvsinkError, match=r"toy.py cannot be imported \(ModuleNotFoundError: .*nothing_of_this_name"):
        kvsink.methods()


@pytest.mark.parametrize("bits", [0, -1, 0.1, 8.5, 9, 15, 17, float("nan"), float("inf")])
def test_impossible_bits(bits: float) -> None:
    for which in ("key", "value"):
        with pytest.raises(KvsinkError, match=f"{which} bits=.* is impossible: choose 1 to 8, or 16"):
            kvsink.get_method("klt").side(which, bits)


def test_clipping_belongs_to_its_bits() -> None:
    m = kvsink.get_method("rotatekv")
    assert [m.side("key", b).clip for b in (1, 2, 3, 4, 8)] == [0.8, 0.8, 1.0, 1.0, 1.0]
    assert m.side("value", 16) == kvsink.codecs.SideSpec()
