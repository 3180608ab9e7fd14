"""Damaged files of every kind kvsink reads: each is refused by a KvsinkError, or means the same as the undamaged one.

Kinds      plan (kvsink.json), tables (kvsink_calibration.safetensors), config (quantization_config of config.json), report
           (kvsink_report.json), record (a calibration record), cache (a saved cache), profile (profile.json)
Damage     bits turned, bytes cut off, added, zeroed or moved, JSON values replaced, removed or nested, and a pickle that would
           leave a trace if anything ever ran it
Source     ours
"""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvsink.errors import KvsinkError
from kvsink.model.passing import given_cache
from kvsink.tools.stress.models import tiny_folder, tokens

__all__ = ["KINDS", "Bench"]

KINDS = ("plan", "tables", "config", "report", "record", "cache", "profile")
_JUNK: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    7,
    10**30,
    -(10**12),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "first",
    "\u0000",
    "../../etc",
    [],
    [[]],
    {},
    {"a": 1},
    [1, 2, 3],
    ["rtn"],
)


class _Trace:
    """A pickle of this would write a file when it is read as one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


class Bench:
    """One good copy of every file, and what reading it has to give."""

    def __init__(self, folder: Path) -> None:
        import kvsink
        from kvsink.calibrate.calibration import calibrate
        from kvsink.calibrate.record import Calibration
        from kvsink.codecs.protect import SinkStage, parse_policies
        from kvsink.folder.loading import load_model
        from kvsink.model.fingerprint import fingerprint
        from kvsink.model.runtime import runtime_of
        from kvsink.outdir import rewrite_dir
        from kvsink.profiling import FORMAT

        self.folder, self.trace = folder, folder / "trace"
        source, text = tiny_folder(folder / "model"), folder / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 8)
        options = kvsink.RewriteOptions(method="klt", protect="first:2", calibration=str(text), calibration_tokens=512)
        self.out = folder / "out"
        rewrite_dir(source, self.out, options)
        self.model = load_model(self.out)
        self.runtime = runtime_of(self.model)
        self.plain = load_model(source)
        ids = tokens(1, 24, seed=3)
        cache = kvsink.KVSinkCache.for_model(self.model)
        with torch.no_grad():
            self.model(ids, **given_cache(self.model, cache))
            self.logits = [m(ids).logits for m in (self.model, self.plain)]
        self.ids = ids
        cache.save(folder / "cache.safetensors")
        self.cache = cache.tensors()
        none = [parse_policies("none")] * 2
        record = calibrate(self.plain, tokens(4, 64), none, {0: (64,), 1: (64,)})
        record.save(folder / "record.safetensors")
        self.record: Any = record
        self.load_record: Callable[[Path], Any] = lambda path: Calibration.load(path, self.plain)
        self.stages = (SinkStage(0, (3, 5), 400.0, 0.5),)
        profile = {
            "format": FORMAT,
            "status": "complete",
            "fingerprint": fingerprint(self.plain).tolist(),
            "stages": [{**asdict(s), "channels": list(s.channels)} for s in self.stages],
        }
        (folder / "profile.json").write_text(json.dumps(profile))
        self.files = {
            "plan": self.out / "kvsink.json",
            "tables": self.out / "kvsink_calibration.safetensors",
            "config": self.out / "config.json",
            "report": self.out / "kvsink_report.json",
            "record": folder / "record.safetensors",
            "cache": folder / "cache.safetensors",
            "profile": folder / "profile.json",
        }
        self.good = {kind: path.read_bytes() for kind, path in self.files.items()}

    # -- damage --------------------------------------------------------------------------------------------------------

    def damaged(self, kind: str, pick: random.Random) -> tuple[bytes, str]:
        """Other bytes in place of a good file, and what was done to it."""
        good = self.good[kind]
        if pick.random() < 0.02 and kind != "config":
            return pickle.dumps(_Trace(self.trace)), "a pickle"
        if kind in ("plan", "config", "report", "profile") and (kind == "config" or pick.random() < 0.7):
            record = json.loads(good)
            what = _change(record["quantization_config"] if kind == "config" else record, pick)
            return json.dumps(record).encode(), what
        if kind in ("tables", "record", "cache") and pick.random() < 0.4:
            size = int.from_bytes(good[:8], "little")
            header = json.loads(good[8 : 8 + size])
            what = _change(header, pick)
            text = json.dumps(header).encode()
            return len(text).to_bytes(8, "little") + text + good[8 + size :], f"header: {what}"
        return _bytes(good, pick)

    # -- the trial -----------------------------------------------------------------------------------------------------

    def run(self, seed: int) -> str | None:
        """Damage one file, read it, put it back. What went wrong, or None."""
        pick = random.Random(seed)
        kind = pick.choice(KINDS)
        data, what = self.damaged(kind, pick)
        path = self.files[kind]
        label = f"seed {seed}: {kind} ({what})"
        try:
            path.write_bytes(data)
            verdict = getattr(self, f"_{kind}")(path)
        except KvsinkError as error:
            verdict = None if "\n" not in str(error) and str(error) else f"its message has no or several lines: {error!r}"
        except Exception as error:  # whatever it is, it is what this looks for
            verdict = f"{type(error).__name__}: {error}"
        finally:
            path.write_bytes(self.good[kind])
        if self.trace.exists():
            self.trace.unlink()
            verdict = "code in the file was run"
        return None if verdict is None else f"{label}: {verdict}"

    def _plan(self, path: Path) -> str | None:
        from kvsink.folder.sidecar import read_sidecar

        found = read_sidecar(self.model, self.files["plan"], self.files["tables"])
        same = found.plans == self.runtime.plans and found.stages == self.runtime.stages and found.method == self.runtime.method
        same = same and set(found.tables) == set(self.runtime.tables)
        same = same and all(torch.equal(t, self.runtime.tables[n]) for n, t in found.tables.items())
        return None if same else "another plan or other tables were taken"

    _tables = _plan

    def _config(self, path: Path) -> str | None:
        from kvsink.folder.loading import load_model

        with torch.no_grad():
            found = load_model(self.out)(self.ids).logits
        return None if any(torch.equal(found, logits) for logits in self.logits) else "other numbers came out"

    def _report(self, path: Path) -> str | None:
        return self._plan(path)  # nothing reads a report: the folder works whatever it says

    def _record(self, path: Path) -> str | None:
        found = self.load_record(path)
        return None if _equal_records(found, self.record) else "other statistics were taken"

    def _cache(self, path: Path) -> str | None:
        from kvsink.cache.cache import KVSinkCache

        found = KVSinkCache.load(path, self.model).tensors()
        same = set(found) == set(self.cache) and all(torch.equal(t, self.cache[n]) for n, t in found.items())
        return None if same else "another cache was taken"

    def _profile(self, path: Path) -> str | None:
        from kvsink.profiling import load_profile, profile_stages

        found = profile_stages(load_profile(path), self.plain)
        sound = all(0 <= s.block < 2 and s.channels and min(s.channels) >= 0 and max(s.channels) < 64 for s in found)
        return None if sound else f"impossible stages {found}"

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _equal_records(a: Any, b: Any) -> bool:
    if a.stages != b.stages or a.tokens != b.tokens or a.largest != b.largest or a.medians != b.medians:
        return False
    if set(a.keys) != set(b.keys) or set(a.values) != set(b.values) or not torch.equal(a.fingerprint, b.fingerprint):
        return False
    sums = [(a.keys[n], b.keys[n], ("count", "first", "second")) for n in a.keys]
    totals = [(a.values[n], b.values[n], ("count", "total", "second")) for n in a.values]
    return all(torch.equal(getattr(x, n), getattr(y, n)) for x, y, names in [*sums, *totals] for n in names)


def _places(record: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    return [place for key, value in items for place in [(*at, key), *_places(value, (*at, key))]]


def _change(record: Any, pick: random.Random) -> str:
    """Replace, remove, rename or nest one value somewhere in a JSON record, in place."""
    place = pick.choice(_places(record))
    parent = record
    for key in place[:-1]:
        parent = parent[key]
    last, how = place[-1], pick.choice(("replace", "replace", "replace", "remove", "rename", "nest", "nudge"))
    if how == "remove":
        del parent[last]
    elif how == "rename" and isinstance(parent, dict):
        parent[f"{last}x"] = parent.pop(last)
    elif how == "nest":
        for _ in range(pick.choice((1, 3, 400))):
            parent[last] = [parent[last]]
    elif how == "nudge" and isinstance(parent[last], int | float):
        parent[last] += pick.choice((-1, 1, 1000))
    else:
        parent[last] = pick.choice(_JUNK)
    return f"{how} {'.'.join(map(str, place))}"


def _bytes(good: bytes, pick: random.Random) -> tuple[bytes, str]:
    data, at = bytearray(good), pick.randrange(len(good))
    how = pick.choice(("turn", "turn", "cut", "empty", "add", "zero", "move", "noise"))
    if how == "turn":
        for _ in range(pick.choice((1, 1, 8))):
            data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "empty":
        data.clear()
    elif how == "add":
        data += pick.randbytes(pick.randint(1, 64))
    elif how == "zero":
        end = min(len(data), at + pick.randint(1, 512))
        data[at:end] = bytes(end - at)
    elif how == "move":
        data[at:] = data[at:][::-1]
    else:
        data[at : at + 16] = pick.randbytes(16)
    return bytes(data), f"{how} at {at}"
