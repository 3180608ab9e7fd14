"""A folder appears whole or not at all; hidden folders at work are left alone, abandoned ones are swept."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvsink.errors import KvsinkError
from kvsink.folder import place


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("existing", [False, True])
def test_building(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool, existing: bool) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "old").write_text("x")
    if not swaps:
        monkeypatch.setattr(place, "_swap", lambda a, b: False)
    with place.building(out, force=True) as build:
        (build / "new").write_text("y")
        assert names(out) == ["old"] if existing else not out.exists()
        place.sweep(out)  # another run begins: what is at work stays
        assert (build / "new").exists()
    assert names(out) == ["new"] and names(tmp_path) == ["out"] and out.stat().st_mode & 0o777 == 0o755


def test_a_rival_that_came_first_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KvsinkError, match="made by another run meanwhile; pass --force"), place.building(out, force=False) as build:
        (build / "mine").write_text("x")
        with place.building(out, force=False) as other:
            (other / "theirs").write_text("x")
    assert names(out) == ["theirs"] and names(tmp_path) == ["out"]


def test_an_abandoned_folder_is_swept(tmp_path: Path) -> None:
    build, lock = place._locked_folder(tmp_path / "out")
    place.sweep(tmp_path / "out")
    assert build.is_dir()
    assert lock is not None
    place.os.close(lock)  # as when its process dies
    place.sweep(tmp_path / "out")
    assert not build.exists()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), place.building(tmp_path / "deep" / "out", force=True) as build:
        (build / "half").write_text("x")
        raise ZeroDivisionError
    assert names(tmp_path / "deep") == []
