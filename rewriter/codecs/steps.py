"""The exact stages of a codec in order, on the way in and on the way back: the one list that the cache runs, that passes put into
graphs and that exported graphs are made of.

Formula    see `kvsink.codecs.codec`; the table of means stands for all means at once, so it comes back in one stage
Shapes     as in `kvsink.kernels.stages`, whose names the stages call; x may be a tensor or a node of a graph
Exact      as there
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .spec import SideSpec

__all__ = ["At", "Stage", "asks_positions", "functions_of", "stages_back", "stages_in"]


@dataclass(frozen=True)
class At:
    """What stages are given beside rows: tables by name, positions, the rows' own angles, and the tokens of a block."""

    tables: Mapping[str, Any]
    positions: Any = None
    cos: Any = None
    sin: Any = None
    block: int = 1


@dataclass(frozen=True)
class Stage:
    """One stage. by: the pass that puts it into a graph; run(do, x, at): the stage itself, by the functions of `do`, which has
    the names of `kvsink.kernels.stages`."""

    by: str
    run: Callable[[Any, Any, At], Any]


def stages_in(s: SideSpec, prefix: str, roped: bool = False) -> tuple[Stage, ...]:
    """From rows of side "k" or "v" to what its quantizer takes. roped: keys come after RoPE, not before."""
    if prefix == "k":
        out = _keys_in(s, roped)
    else:
        out = [Stage("center", lambda do, x, at: do.center(x, at.tables["v_mean"]))] if s.center else []
    if s.transform in ("klt", "grouped"):
        if prefix == "k" and s.center:
            out.append(Stage("rotate", lambda do, x, at: do.center(x, at.tables["k_mean2"])))
        out.append(Stage("rotate", lambda do, x, at: do.project(x, at.tables[f"{prefix}_basis"])))
    elif s.transform == "hadamard" and not s.folded:
        out.append(Stage("rotate", lambda do, x, at: do.hadamard_heads(x, s.order, s.heads_per_group)))
    if s.reorder and prefix == "k":
        out.append(Stage("reorder", lambda do, x, at: do.reorder_heads(x, at.tables["k_perm"])))
    return tuple(out)


def stages_back(s: SideSpec, prefix: str, own: bool = False) -> tuple[Stage, ...]:
    """From what a quantizer gives back to rows, keys after RoPE. own: all rows are new and turn by their own angles; else those
    of block starts are in a table."""
    out = []
    if s.reorder and prefix == "k":
        out.append(Stage("reorder", lambda do, x, at: do.reorder_heads(x, at.tables["k_unperm"])))
    if s.transform in ("klt", "grouped"):
        back = f"{prefix}_unbasis" if s.own_inverse else f"{prefix}_basis"
        out.append(Stage("rotate", lambda do, x, at: do.unproject(x, at.tables[back])))
    elif s.transform == "hadamard" and not s.folded:
        out.append(Stage("rotate", lambda do, x, at: do.hadamard_heads(x, s.order, s.heads_per_group, inverse=True)))
    if prefix == "k":
        out += _keys_back(s, own)
    elif s.center:
        out.append(Stage("center", lambda do, x, at: do.add(x, do.row_of(at.tables["v_mean"]))))
    return tuple(out)


def functions_of(s: SideSpec, prefix: str) -> tuple[str, ...]:
    """Names of `kvsink.kernels.stages` that the stages of side "k" or "v" call, on every way in and back."""
    return tuple(sorted(asked_by(s, prefix).names))


def asks_positions(s: SideSpec, prefix: str) -> bool:
    """Whether a stage of the side depends on where rows stand."""
    return asked_by(s, prefix).positions


@cache
def asked_by(s: SideSpec, prefix: str) -> _Asked:
    """What the stages of a side ask for, found by running them on nothing."""
    asked, at = _Asked(), At(_Anything(), _POSITIONS, _ROWS, _ROWS)
    ways = [stages_in(s, prefix, roped) for roped in (False, True)] + [stages_back(s, prefix, own) for own in (False, True)]
    for stage in (stage for way in ways for stage in way):
        stage.run(asked, _ROWS, at)
    return asked


_POSITIONS = object()
_ROWS = object()  # stands for any rows: stages hand them on to the functions of `do` and look at nothing


class _Asked:
    """Functions that do nothing; their names are kept, and whether one was given positions."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.positions = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        self.names.add(name)

        def nothing(*given: Any, **options: Any) -> Any:
            self.positions = self.positions or any(x is _POSITIONS for x in (*given, *options.values()))
            return _ROWS

        return nothing


class _Anything(dict[str, Any]):
    """A table for every name."""

    def __missing__(self, name: str) -> Any:
        return _ROWS


def _keys_in(s: SideSpec, roped: bool) -> list[Stage]:
    mean = Stage("center", lambda do, x, at: do.center(x, at.tables["k_mean"]))
    if s.domain == "block":
        out = [Stage("attach", lambda do, x, at: do.unrope_rows(x, at.cos, at.sin))] if roped else []
        out += [mean] if s.center else []
        if s.block > 1:
            angles = "offset_cos", "offset_sin"
            out.append(Stage("rotate", lambda do, x, at: do.rope_offset(x, *(at.tables[n] for n in angles), at.positions, s.block)))
        return out
    if s.transform == "klt":  # centred by the mean after RoPE, with the basis
        return [] if roped else [Stage("center", lambda do, x, at: do.rope_rows(x, at.cos, at.sin))]
    if roped:
        there = Stage("center", lambda do, x, at: do.center_roped(x, at.tables["k_mean"], at.cos, at.sin))
        return [there] if s.center else []
    return [*([mean] if s.center else ()), Stage("center", lambda do, x, at: do.rope_rows(x, at.cos, at.sin))]


def _keys_back(s: SideSpec, own: bool) -> list[Stage]:
    def to_start(do: Any, x: Any, at: At) -> Any:
        return do.rope_start(x, at.tables["start_cos"], at.tables["start_sin"], at.positions, at.block)

    def means(do: Any, x: Any, at: At) -> Any:
        return do.add(x, do.table_rows(at.tables["k_table"], at.positions))

    def turned_means(do: Any, x: Any, at: At) -> Any:
        return do.add(x, to_start(do, do.table_rows(at.tables["k_table"], at.positions), at))

    def own_means(do: Any, x: Any, at: At) -> Any:
        return do.add(x, do.rope_rows(do.row_of(at.tables["k_mean"]), at.cos, at.sin))

    def own_angles(do: Any, x: Any, at: At) -> Any:
        if s.block > 1:
            back = do.negated(at.tables["offset_sin"])
            x = do.rope_offset(x, at.tables["offset_cos"], back, at.positions, s.block)
        return do.rope_rows(x, at.cos, at.sin)

    if s.transform == "klt" and s.domain == "post":
        return [Stage("rotate", lambda do, x, at: do.add(x, do.row_of(at.tables["k_mean2"])))] if s.center else []
    if s.domain == "block":
        last = Stage("rotate", own_angles if own else to_start)
        return [Stage("center", means), last] if s.center else [last]
    return [Stage("center", own_means if own else turned_means)] if s.center else []
