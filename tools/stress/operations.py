"""Random sequences of cache operations, each checked against the plain model of `kvsink.tools.stress.dense`.

A `Twin` holds a `KVSinkCache` and its plain model and applies every operation to both. Rows are random and fed to the layers
the way a model feeds them, through a frame with positions, angles, padding of any kind (`kvsink.tools.stress.rows`) and
candidates; attention is asked for in both ways a model may ask. An operation that must be refused has to raise KvsinkError and
leave every tensor as it was.

Source     ours
Raises     AssertionError naming operation and layer when cache and model part
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsink.cache.cache import KVSinkCache
from kvsink.errors import KvsinkError
from kvsink.kernels import read
from kvsink.methods import get_method
from kvsink.model.candidates import position_hash
from kvsink.model.frame import Frame
from kvsink.tools.stress.dense import DenseLayer
from kvsink.tools.stress.models import HEAD_DIM, HEADS, KV_HEADS, rewritten
from kvsink.tools.stress.rows import FORMS, Rows

__all__ = ["CASES", "OPERATIONS", "Case", "Twin", "run_sequence"]

BOUND = 1e-5  # of the largest value: float32 sums in another order, as in tests/close.py
MOST_ROWS = 8


@dataclass(frozen=True)
class Case:
    """A codec with its protection, and the kind of cache it lives in."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()
    strict: bool = False
    max_length: int | None = None

    def __str__(self) -> str:
        words = [self.method, *(f"{k}={v}" for k, v in self.options)]
        words += ["strict"] if self.strict else []
        return " ".join([*words, f"max_length={self.max_length}"])


_CODECS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rtn", {"protect": "first:2", "window": 0}),
    ("rtn", {"protect": "none", "window": 5}),
    ("rtn", {"key_bits": 16, "value_bits": 4, "protect": "massive:3"}),
    ("centred", {"protect": "first:1+massive:3"}),
    ("klt", {"protect": "random:4+first:2", "window": 3}),
    ("klt", {"protect": "massive:2", "key_bits": 2}),
    ("rotatekv", {"protect": "massive:4+random:3"}),
    ("kivi", {"protect": "first:3"}),
    ("kivi", {"protect": "massive:3", "window": 40}),
    ("kivi", {"protect": "first:2+massive:2", "together": 8}),
    ("oscar", {"protect": "first:2"}),
    ("oscar", {"protect": "random:3", "together": 16}),
    ("cq", {"protect": "first:1+massive:2", "key_bits": 1, "value_bits": 1}),
    ("kvquant", {"protect": "first:1", "window": 2}),
    ("kvquant", {"protect": "massive:3"}),
    ("kvquant-10%", {"protect": "first:2", "together": 8}),
    ("rtn", {"protect": "anchors:10%+first:1", "window": 4}),
)
CASES: tuple[Case, ...] = tuple(
    Case(method, tuple(options.items()), strict, length)
    for method, options in _CODECS
    for strict in (False, True)
    for length in (None, 96)
)


@cache
def model_of(method: str, options: tuple[tuple[str, Any], ...]) -> Any:
    """The rewritten model of a case, made once. The option `together` makes blocks and records of so many tokens, which fill."""
    given = dict(options)
    n, named = given.pop("together", 0), get_method(method)
    if n and named.key.outliers:
        named = replace(named, **{side: replace(getattr(named, side), outlier_tokens=n) for side in ("key", "value")})
    elif n:
        value = replace(named.value, flush=min(named.value.flush, n), newest=min(named.value.newest, n))
        named = replace(named, key=replace(named.key, group_tokens=n // 2, flush=n), value=value)
    return rewritten(named, layers=1, **given)


@dataclass
class Twin:
    """A cache and its plain model, and what has been done to them."""

    case: Case
    batch: int = 1
    seed: int = 0
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = model_of(self.case.method, self.case.options)
        self.draw = torch.Generator().manual_seed(self.seed)
        self.random = random.Random(self.seed)
        self.cache = KVSinkCache.for_model(self.model, self.batch, self.case.max_length, strict=self.case.strict)
        self._forget()

    def _forget(self) -> None:
        self.rows = Rows.empty(self.batch)
        self.layers = [
            DenseLayer.empty(layer.codec, self._tables(i, layer.codec), self.batch, KV_HEADS, HEAD_DIM)
            for i, layer in enumerate(self.cache.packed_layers())
        ]

    def _tables(self, layer: int, codec: Any) -> Any:
        runtime, names = self.cache.shared.runtime, codec.param_names()

        def tables(positions: int) -> dict[str, Tensor]:
            return dict(zip(names, runtime.params(layer, codec, max(positions, 512), torch.device("cpu")), strict=True))

        return tables

    @property
    def length(self) -> int:
        """Rows held."""
        return self.layers[0].length

    def _rows(self, n: int, heads: int) -> Tensor:
        return torch.randn(self.batch, heads, n, HEAD_DIM, generator=self.draw)

    # -- operations ----------------------------------------------------------------------------------------------------

    def append(self, n: int, asked: bool, form: str) -> None:
        """n new rows of one of FORMS. asked: attention asks the layer itself."""
        first = self.length
        if self.case.max_length is not None and first + n > self.case.max_length:
            self._overflow(n)
            return
        self.rows.add(n, form, self.draw)
        positions, valid = self.rows.before(n, own=True), self.rows.real[:, -n:]
        runtime = self.cache.shared.runtime
        frame = Frame(positions=positions, valid=None if self.rows.plain else valid)
        angles = [runtime.angles(i, positions) for i in range(len(self.layers))]
        for layer in self.cache.packed_layers():
            for segment, key in layer.sources:
                if segment.source not in ("first", "random"):  # those the cache must know by itself
                    score = torch.rand(self.batch, n, generator=self.draw).masked_fill(~valid, float("-inf"))
                    frame.candidates[key] = score.topk(min(segment.count, n), dim=1)
        self.cache.frame = frame
        for i, (layer, dense) in enumerate(zip(self.cache.packed_layers(), self.layers, strict=True)):
            frame.cos, frame.sin = angles[i] if asked else (None, None)
            k, v = self._rows(n, KV_HEADS), self._rows(n, KV_HEADS)
            candidates = [t for segment, key in layer.sources for t in frame.candidates.get(key) or self._by_number(segment, n)]
            found = layer.update(k, v)
            dense.append(k, v, positions, *angles[i], candidates, self.rows.real)
            if layer._asked:
                self._take_anchors(layer, dense)  # some leave the recent rows now
                self._compare(i, (found[0][:, :, : first + n], found[1][:, :, : first + n]), n)
                self._observe(layer, dense, k, v)
            else:
                self._attend(i, layer, dense, valid, first, n)
        self.cache.frame = None

    def _by_number(self, segment: Any, n: int) -> tuple[Tensor, Tensor]:
        """Candidates among the last n slots for `first:N` and `random:N`: by the number of tokens before them."""
        number = self.rows.before(n, own=False)
        first = segment.source == "first"
        score = torch.where(number < segment.count, -number.float(), float("-inf")) if first else position_hash(number)
        score = score.masked_fill(~self.rows.real[:, -n:], float("-inf"))
        return score.topk(min(segment.count, n), dim=1)

    def _observe(self, layer: Any, dense: DenseLayer, k: Tensor, v: Tensor) -> None:
        if layer.codec.anchors is None:
            return
        n = k.shape[2]
        q, full_k, full_v = self._rows(n, HEADS), *dense.seen(n)
        scale, seen = HEAD_DIM**-0.5, self.rows.visible(n)
        out = _attention(q, full_k, full_v, seen, scale)
        layer.observe(q, full_k, full_v, out, seen, scale)
        self._take_anchors(layer, dense)

    def _take_anchors(self, layer: Any, dense: DenseLayer) -> None:
        """Which rows became anchors is the cache's choice; that each is held once, and exact, is checked."""
        if layer.codec.anchors is None:
            return
        places = layer.exact_slot[:, layer.codec.exact_rows :]
        dense.anchors = []
        for i, row in enumerate(places.tolist()):
            taken = [slot for slot in row if slot >= 0]
            assert len(set(taken)) == len(taken), f"a row is held twice: {taken}"
            assert all(slot < dense.length for slot in taken), f"anchors {taken} behind {dense.length}"
            assert bool(self.rows.real[i, taken].all()), f"padding among the anchors {taken}"
            dense.anchors.append(set(taken))

    def _attend(self, i: int, layer: Any, dense: DenseLayer, valid: Tensor, first: int, n: int) -> None:
        if layer.begins():
            assert first == 0, "a cache with rows begins"
            return
        q, scale, seen = self._rows(n, HEADS), HEAD_DIM**-0.5, self.rows.visible(n)
        mask: Tensor | None = seen
        if self.rows.plain and self.random.random() < 0.5:
            mask = None
        elif self.case.max_length is not None:
            mask = torch.nn.functional.pad(seen, (0, self.case.max_length - seen.shape[-1]))
        out = layer.attend(q, mask, scale, mask is None)
        full_k, full_v = dense.seen(n)
        self._learn_outliers(i, layer, dense)
        if layer.codec.key.outliers or layer.codec.value.outliers:
            full_k, full_v = dense.seen(n)
        wanted = _attention(q, full_k, full_v, seen, scale)
        error = ((out - wanted).abs() * valid[:, None, :, None]).max()
        assert float(error) <= BOUND * float(full_v.abs().max()), f"layer {i}: attention differs by {float(error):.3g}"

    def _overflow(self, n: int) -> None:
        before = {name: t.clone() for name, t in self.cache.tensors().items()}
        for layer in self.cache.packed_layers():
            try:
                layer.update(self._rows(n, KV_HEADS), self._rows(n, KV_HEADS))
            except KvsinkError as error:
                assert "do not fit" in str(error), str(error)
            else:
                raise AssertionError(f"{n} rows went into a full cache")
        assert all(torch.equal(t, before[name]) for name, t in self.cache.tensors().items()), "a refusal changed the cache"

    def crop(self, remove: int) -> None:
        """Forget so many of the last rows, or all where a sequence would be left without tokens; asked for in either way."""
        keep = self.length - min(remove, self.length)
        keep = keep if bool(self.rows.real[:, :keep].any(1).all()) else 0
        if self.length == 0 or keep == self.length:
            return
        if keep and self.random.random() < 0.5:
            self.cache.crop(keep)
        else:
            self.cache.crop(keep - self.length)
        for layer, dense in zip(self.cache.packed_layers(), self.layers, strict=True):
            self._learn_outliers(0, layer, dense, dense.length)
            dense.crop(keep)
        self.rows.crop(keep)
        for layer, dense in zip(self.cache.packed_layers(), self.layers, strict=True):
            self._take_anchors(layer, dense)

    def crop_too_far(self) -> None:
        """More than is held: refused."""
        if self.length:
            try:
                self.cache.crop(-self.length - 1)
            except KvsinkError:
                return
            raise AssertionError("cropped more than was held")

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()
        self._forget()

    def reorder(self) -> None:
        """Rows in another order, some more than once, as beams do."""
        rows = [self.random.randrange(self.batch) for _ in range(self.batch)]
        if self._filled():
            self.cache.reorder_cache(torch.tensor(rows))
            self._pick(rows)

    def repeat(self) -> None:
        """Every row twice."""
        if self.batch * 2 <= MOST_ROWS and self._filled():
            self.cache.batch_repeat_interleave(2)
            self._pick([i for i in range(self.batch) for _ in range(2)])

    def select(self, masked: bool) -> None:
        """Some of the rows, named by index or by mask."""
        rows = sorted(self.random.sample(range(self.batch), self.random.randint(1, self.batch)))
        if self._filled():
            index = torch.tensor(rows)
            mask = torch.zeros(self.batch, dtype=torch.bool).index_fill(0, index, True)
            self.cache.batch_select_indices(mask if masked else index)
            self._pick(rows)

    def _filled(self) -> bool:
        return all(layer.is_initialized for layer in self.cache.packed_layers())

    def _pick(self, rows: list[int]) -> None:
        for dense in self.layers:
            dense.pick(rows)
            dense.anchors = [set(dense.anchors[i]) for i in rows] if dense.anchors else []
        self.batch = len(rows)
        self.rows.pick(rows)

    def join(self, n: int, form: str) -> None:
        """Another cache of n rows joins; where it may not, nothing changes."""
        if self.batch >= MOST_ROWS or not self._filled() or not self.length:
            return
        other = Twin(self.case, 1, self.seed + len(self.done))
        other.append(min(n, self.case.max_length or n), True, form)
        before = {name: t.clone() for name, t in self.cache.tensors().items()}
        longest = max(self.length, other.length)
        pads = longest - self.length, longest - other.length
        fits = self._may_join(other, pads)
        try:
            given = self.cache.batch_join(other.cache)
        except KvsinkError as error:
            assert not fits, f"refused: {error}"
            assert all(torch.equal(t, before[name]) for name, t in self.cache.tensors().items()), "a refusal changed the cache"
            return
        assert fits and given == pads, f"joined with pads {given}, not {pads}"
        for dense, joining in zip(self.layers, other.layers, strict=True):
            dense.join(joining, pads)
        self.batch += 1
        self.rows.join(other.rows, pads)

    def _may_join(self, other: Twin, pads: tuple[int, int]) -> bool:
        """Blocks of tokens stay whole, anchors are a share of one length, and both hold the same recent rows, as far as they go."""
        for one, two in zip(self.layers, other.layers, strict=True):
            c, pad = one.codec, max(pads)
            spans = [s.flush for s in (c.key, c.value)] + [s.group_tokens for s in (c.key, c.value) if s.by_token_block]
            spans += [s.outlier_tokens for s in (c.key, c.value) if s.outliers]
            if (pad and c.anchors is not None) or any(pad % span for span in spans if span):
                return False
            rings = [
                {slot + p for slot, _, _ in layer.ring.values() if slot < layer.length}
                for layer, p in zip((one, two), pads, strict=True)
            ]
            if {slot for slot in rings[0] if slot >= pad} != {slot for slot in rings[1] if slot >= pad}:
                return False
        return True

    def save_and_load(self) -> None:
        """Through a file, into the same kind of cache."""
        if not self._filled():
            return
        with tempfile.TemporaryDirectory(prefix="kvsink-stress-") as folder:
            path = Path(folder) / "cache.safetensors"
            self.cache.save(path)
            self.cache = KVSinkCache.load(path, self.model, self.case.max_length)

    # -- comparison ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Length, batch, and every row of every layer."""
        assert int(self.cache.get_seq_length()) == self.length, f"length {int(self.cache.get_seq_length())}, not {self.length}"
        if not self._filled():
            return
        none = torch.zeros(self.batch, KV_HEADS, 0, HEAD_DIM)
        for i, layer in enumerate(self.cache.packed_layers()):
            assert layer.k_codes.shape[0] == self.batch, f"layer {i}: {layer.k_codes.shape[0]} rows, not {self.batch}"
            if self.length:
                k, v = read(none, none, layer.state(), layer.params, layer.codec_text)
                self._compare(i, (k[:, :, : self.length], v[:, :, : self.length]), 0)

    def _compare(self, i: int, found: tuple[Tensor, Tensor], fresh: int) -> None:
        layer, dense = self.cache.packed_layers()[i], self.layers[i]
        self._learn_outliers(i, layer, dense)
        for name, one, two in zip(("keys", "values"), found, dense.seen(fresh), strict=True):
            assert one.shape == two.shape, f"layer {i}: {name} {tuple(one.shape)}, not {tuple(two.shape)}"
            error = ((one - two) * self.rows.real[:, None, :, None]).abs().amax((0, 1, 3))
            if float(error.max()) > BOUND * float(two.abs().max()):
                slot = int(error.argmax())
                raise AssertionError(f"layer {i}: {name} of slot {slot} of {self.length} differ by {float(error[slot]):.3g}")
        for row in range(self.batch):
            held = {slot for slot in layer.exact_slot[row].tolist() if slot >= 0}
            assert held == dense.exact(row), f"layer {i}: row {row} keeps {sorted(held)}, not {sorted(dense.exact(row))}"

    def _learn_outliers(self, i: int, layer: Any, dense: DenseLayer, length: int | None = None) -> None:
        """Where outliers compete for room, a stored entry is its float16 value or its dense code: take which, check it is one."""
        st, p = layer.codec.named(layer.state()), layer.codec.tables(layer.params)
        for name, side, spec in (("k", dense.k, layer.codec.key), ("v", dense.v, layer.codec.value)):
            if not spec.packed or not spec.outliers or not dense.length:
                continue
            assert side.half is not None and side.dense is not None
            x = layer.codec._stored(st, spec, p, name, 0, dense.length)
            bound = BOUND * float(side.half.abs().max())
            sparse, plain = (x - side.half).abs() <= bound, (x - side.dense).abs() <= bound
            for row in range(self.batch):  # what is padding or read from elsewhere may have codes of any kind
                plain[row, :, ~self.rows.real[row, : dense.length]] = True
                for slot in dense.exact(row):
                    plain[row, :, slot] = True
            assert bool((sparse | plain).all()), f"layer {i}: an entry of {name} is neither its outlier nor its code"
            if name == "k":
                side.coded = layer.codec.restore_keys(x, st["positions"][:, : dense.length], p)
            else:
                side.coded = layer.codec.restore_values(x, p)


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    logits = (q @ k.mT * scale).masked_fill(~seen, float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0) @ v


OPERATIONS = (
    "append",
    "append",
    "step",
    "step",
    "step",
    "prompt",
    "crop",
    "crop",
    "crop_too_far",
    "reset",
    "reorder",
    "repeat",
    "select",
    "save",
    "join",
    "join",
)


def _form(pick: random.Random) -> str:
    return pick.choice(FORMS) if pick.random() < 0.5 else "none"


def apply(twin: Twin, name: str, pick: random.Random) -> None:
    """One operation by name, its numbers drawn from `pick`; then everything is compared."""
    asked = pick.random() < 0.5
    if name == "step":
        n = 1
    elif name == "append":
        n = pick.randint(2, 12)
    else:
        n = pick.choice((17, 33, 64, 70) if pick.random() < 0.95 else (270,))
    if name in ("append", "step", "prompt"):
        form = _form(pick)
        twin.done.append(f"append({n}, asked={asked}, form={form})")
        twin.append(n, asked, form)
    elif name == "crop":
        remove = pick.choice((1, 2, 3, pick.randint(1, 80)))
        twin.done.append(f"crop({remove})")
        twin.crop(remove)
    elif name == "select":
        masked = pick.random() < 0.5
        twin.done.append(f"select({masked})")
        twin.select(masked)
    elif name == "join":
        n, form = pick.choice((5, n, twin.length, twin.length + 128)) or 9, _form(pick)
        twin.done.append(f"join({n}, form={form})")
        twin.join(n, form)
    elif name == "save":
        twin.done.append("save_and_load()")
        twin.save_and_load()
    else:
        twin.done.append(f"{name}()")
        getattr(twin, name)()
    twin.check()


def run_sequence(seed: int, length: int = 8) -> str | None:
    """One sequence of `length` operations, drawn from its seed alone; what went wrong and how to see it again, or None."""
    pick = random.Random(seed)
    case = pick.choice(CASES)
    twin = None
    try:
        with torch.no_grad():
            twin = Twin(case, pick.randint(1, 3), seed)
            for _ in range(length):
                apply(twin, pick.choice(OPERATIONS), pick)
    except Exception as error:  # whatever it is, it is what this looks for
        steps = "; ".join(twin.done) if twin is not None else "making the cache"
        return f"seed {seed} ({case}): {type(error).__name__}: {error} after {steps}"
    return None
