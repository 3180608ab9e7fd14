"""The stress tool: samples of every trial, and that each trial sees what it is there to see."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvsink.cache.layer import KVSinkLayer
from kvsink.calibrate import record
from kvsink.folder import sidecar
from kvsink.tools.stress import files as files_module
from kvsink.tools.stress.__main__ import main
from kvsink.tools.stress.endurance import generate_long
from kvsink.tools.stress.files import KINDS, Bench
from kvsink.tools.stress.kills import Yard
from kvsink.tools.stress.operations import CASES, Case, Twin, run_sequence
from kvsink.tools.stress.rows import FORMS

# -- operations --------------------------------------------------------------------------------------------------------

FEW = [c for c in CASES if c.method in ("rtn", "klt", "centred", "kivi", "cq", "kvquant")]


class Operations(RuleBasedStateMachine):
    """Operations in the order that hypothesis likes, against the plain model; a failure is shrunk to few."""

    @initialize(case=st.sampled_from(FEW), batch=st.integers(1, 3), seed=st.integers(0, 1000))
    def make(self, case: Case, batch: int, seed: int) -> None:
        self.twin = Twin(case, batch, seed)

    @rule(n=st.one_of(st.just(1), st.integers(2, 40)), asked=st.booleans(), form=st.sampled_from(FORMS))
    def append(self, n: int, asked: bool, form: str) -> None:
        self.twin.append(n, asked, form)

    @rule(n=st.integers(1, 60))
    def crop(self, n: int) -> None:
        self.twin.crop(n)

    @rule()
    def crop_too_far(self) -> None:
        self.twin.crop_too_far()

    @rule()
    def reset(self) -> None:
        self.twin.reset()

    @rule()
    def reorder(self) -> None:
        self.twin.reorder()

    @rule()
    def repeat(self) -> None:
        self.twin.repeat()

    @rule(masked=st.booleans())
    def select(self, masked: bool) -> None:
        self.twin.select(masked)

    @rule(n=st.integers(1, 140), form=st.sampled_from(FORMS))
    def join(self, n: int, form: str) -> None:
        self.twin.join(n, form)

    @rule()
    def save_and_load(self) -> None:
        self.twin.save_and_load()

    @invariant()
    def equal(self) -> None:
        if hasattr(self, "twin"):
            self.twin.check()


Operations.TestCase.settings = settings(
    max_examples=25, stateful_step_count=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestOperations = Operations.TestCase


@pytest.mark.parametrize("seed", range(40))
def test_sequences(seed: int) -> None:
    assert run_sequence(seed) is None


def test_a_full_cache_in_the_trial_is_refused() -> None:
    """The trial of too many rows is not empty: rows that fit would be an error of it."""
    twin = Twin(next(c for c in CASES if c.max_length is not None))
    with pytest.raises(AssertionError, match="3 rows went into a full cache"):
        twin._overflow(3)


BUGS: dict[str, tuple[str, Any]] = {
    "a crop that keeps exact rows": (
        "crop",
        lambda self, n: (self.length.fill_(n if n > 0 else int(self.length) + n), setattr(self, "_held", int(self.length))),
    ),
    "a reset that keeps recent rows": ("reset", lambda self: (self.length.zero_(), setattr(self, "_held", 0))),
    "a reorder of nothing": ("reorder_cache", lambda self, index: None),
    "attention that forgets the length": ("_advance", lambda self, rows: None),
    "a join that forgets exact rows": (
        "_take",
        lambda self, state, slots, take=KVSinkLayer._take: take(
            self, {**state, "exact_slot": state["exact_slot"].clamp_max(-1)}, slots
        ),
    ),
    "padding taken for rows": ("_mark_padding", lambda self, frame, new: None),
    "first rows counted by slots": ("_order", lambda self, frame, new: torch.arange(new)[None] + self.length),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVSinkLayer, *BUGS[bug])
    assert any(run_sequence(seed) for seed in range(60))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_files(bench: Bench, start: int) -> None:
    assert [wrong for seed in range(start, start + 50) if (wrong := bench.run(seed))] == []


def test_good_files_are_read(bench: Bench) -> None:
    for kind in KINDS:
        assert getattr(bench, f"_{kind}")(bench.files[kind]) is None


def test_damage_without_checksums_would_go_unnoticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sidecar, record):
        monkeypatch.setattr(module, "check_digest", lambda *args: None)
    assert any("was taken" in w or "were taken" in w for seed in range(300) if (w := bench.run(seed)))


def test_a_pickle_that_runs_is_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def careless(path: Path) -> None:
        pickle.loads(path.read_bytes())

    monkeypatch.setattr(bench, "_plan", careless)
    monkeypatch.setattr(bench, "damaged", lambda kind, pick: (pickle.dumps(files_module._Trace(bench.trace)), "a pickle"))
    seed = next(s for s in range(100) if random.Random(s).choice(KINDS) == "plan")
    assert "code in the file was run" in str(bench.run(seed))


# -- kills -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Yard:
    return Yard(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize(
    ("trial", "seeds"),
    [
        ("kill", 1),
        ("full_disk", 3),
        *(pytest.param(t, n, marks=pytest.mark.slow) for t, n in (("kill", 3), ("rivals", 3), ("readers", 1))),
    ],
)
def test_folders_are_whole_or_absent(yard: Yard, trial: str, seeds: int) -> None:
    assert [wrong for seed in range(seeds) if (wrong := getattr(yard, trial)(seed))] == []


def test_half_a_folder_is_noticed(yard: Yard) -> None:
    yard.clear()
    assert yard.wait(yard.start("rtn")) == 0
    assert yard.sound(("rtn",), absent=False) is None and "neither" in str(yard.sound(("rotatekv",), absent=False))
    (yard.out / "kvsink.json").unlink()
    assert "does not load" in str(yard.sound(("rtn",), absent=False))
    yard.clear()
    assert yard.sound((), absent=True) is None and yard.sound((), absent=False) == "OUT_DIR is gone"


# -- endurance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["klt", "kivi"])
def test_a_generation_does_not_drift(method: str) -> None:
    assert generate_long(600, method, every=150) is None


def test_a_drift_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvsink.tools.stress import endurance

    due = endurance._bytes_due
    monkeypatch.setattr(endurance, "_bytes_due", lambda *args: due(*args) - 1)
    assert "bytes are held" in str(generate_long(20, "rtn"))


def reuse_alone(rounds: int, method: str, before: str = "") -> str:
    """What `reuse` finds wrong in a process of its own: beside some thousand other tests, what those leave behind moves as well."""
    program = f"from kvsink.tools.stress.endurance import reuse\n{before}\nprint(reuse({rounds}, {method!r}).wrong())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=300)
    return done.stdout.strip() or done.stderr


def test_reuse_does_not_grow() -> None:
    assert reuse_alone(120, "klt") == "None"


KEEPING = """
from kvsink.cache.layer import KVSinkLayer
kept, reset = [], KVSinkLayer.reset
KVSinkLayer.reset = lambda self: (kept.append([object()]), reset(self))
"""


def test_growth_is_noticed() -> None:
    assert "objects more" in reuse_alone(150, "rtn", KEEPING)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["klt", "rtn"])
def test_a_long_generation_does_not_drift(method: str) -> None:
    assert generate_long(20_000, method) is None


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["operations", "--count", "3", "--length", "3"]) == 0
    assert "3 sequences, 0 failures" in capsys.readouterr().out


def test_the_command_line_fails_when_a_trial_does(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVSinkLayer, "reorder_cache", lambda self, index: None)
    assert main(["operations", "--count", "60"]) == 2
    said = capsys.readouterr()
    assert "seed " in said.out and "of 60 sequences failed; see above" in said.err
