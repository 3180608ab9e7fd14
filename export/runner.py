"""`OnnxGenerator`: text out of an exported model with numpy and onnxruntime alone; the packed cache stays where it was computed.

Every step binds one set of tensors as its past and as its present: new rows are written behind the old ones, and nothing of the
cache is copied, to the host or anywhere, but when its room is used up (`kvsink.export.held`). Flavour gqa in float32 joins them,
as its operator does. Prompts of different length are padded on the left.

Shapes     prompts: lists of token ids; logits float32 [B, S, V]
Raises     ExportError for a missing or foreign file, a cache of the wrong dtype, layout or place, prompts that do not fit
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvsink.export import held as room
from kvsink.export.errors import ExportError
from kvsink.export.held import Held
from kvsink.export.manifest import read_manifest
from kvsink.export.replay import PAST, PRESENT, Steps
from kvsink.export.sampling import choose
from kvsink.export.session import Provider, open_session

__all__ = ["OnnxGenerator"]


class OnnxGenerator:
    """Runs model.onnx with its manifest beside it.

    providers: of onnxruntime, best first, each alone or with its options; threads: of one operator, 0 lets onnxruntime choose;
    library: the custom-op library that brings the nodes of flavour custom, as `python -m kvsink.tools.build_ort_ops` builds it;
    profile: begin of the name of a file of times by node, which `session.end_profiling()` writes.
    """

    def __init__(
        self,
        path: str | Path,
        providers: Sequence[Provider] = ("CPUExecutionProvider",),
        threads: int = 0,
        library: str | Path | None = None,
        profile: str | Path | None = None,
    ) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        given = None if library is None else Path(library)
        self._ort, self.session, self.device = open_session(self.path, self.manifest, providers, threads, given, profile)
        self.tiled = "kernels" in self.manifest  # codes in tiles, read by kernels for CUDA
        self.lean = not self.manifest.get("padding", True)  # rows of equal length, whose slots are their positions
        self.one_row = self.manifest["flavour"] == "gqa" or self.tiled
        self._multiple = int(self.manifest.get("slot_multiple", room.BLOCK))
        self.embeds = any(e["name"] == "inputs_embeds" for e in self.manifest["inputs"])
        self.graphs = self.lean and any(
            isinstance(p, tuple) and str(p[1].get("enable_cuda_graph", "0")).lower() in ("1", "true") for p in providers
        )
        outputs = {e["name"] for e in self.manifest["outputs"]}
        self.last_logits = "last_logits" if "last_logits" in outputs else "logits"
        self._binds_once = self.tiled or "last_logits" in outputs  # gqa of before takes its length from the mask
        self._steps = Steps(self)
        self.in_place = self.manifest["flavour"] != "gqa" or self.lean
        self.past = Held({}, 0)  # the cache of the last text
        self._past = {e["name"].removeprefix(PAST): e for e in self.manifest["inputs"] if e["name"].startswith(PAST)}

    # -- the cache -----------------------------------------------------------------------------------------------------

    def value(self, array: Any, device: str = "") -> Any:
        """A numpy array as an onnxruntime value on the runner's device or another; on the CPU it is the array's own memory."""
        if not array.size:  # nothing to copy
            return self._ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype.type, device or self.device, 0)
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device or self.device, 0)

    def begin(self, batch: int, length: int) -> Held:
        """An empty cache for a text of `length` tokens, with room where that costs nothing. Flavours gqa and custom in float16 take
        the tensors of the last text, `past`, where it has ended and they have room: that one is lost then."""
        return self._steps.begin(batch, length) if self.lean else self.empty(batch)

    def empty(self, batch: int, length: int = 0) -> Held:
        """The cache of `batch` rows that hold nothing; room for `length` tokens, and a step makes more where it needs it."""
        if length and not self.in_place:
            raise ExportError(f"{self.path.name} joins new rows to the past and has no room; leave the length out")
        out, length = {}, room.slots_for(length, self._multiple) if self.tiled else length
        for name, entry in self._past.items():
            shape = [d if isinstance(d, int) else batch if d == "batch" else length for d in entry["shape"]]
            fill = {"exact_slot": -1, "exact_score": -np.inf}.get(name.rpartition(".")[2], 0)
            out[name] = self.value(np.full(shape, fill, dtype=room.dtype_of(entry)))
        return Held(out, 0)

    def copy(self, past: Mapping[str, Any]) -> Held:
        """The same cache in tensors of its own: to go two ways from one text."""
        if isinstance(past, Held) and past.lost:
            raise ExportError("this cache was written over by a later step; copy() it before that step")
        slots = past["0.key"].shape()[2] if self.in_place else _tokens(past)
        return Held(room.grown(past, self._past, slots, self.value), _tokens(past))

    def arrays(self, past: Mapping[str, Any]) -> dict[str, Any]:
        """A cache as numpy arrays, without the room behind its tokens."""
        return room.arrays(past, self._past, self._slots(past))

    def nbytes(self, past: Mapping[str, Any]) -> int:
        """Bytes of a cache, without the room behind its tokens."""
        return room.nbytes(past, self._past, self._slots(past))

    def _slots(self, past: Mapping[str, Any]) -> int:
        """Slots that a cache cannot do without: a tile is whole."""
        return room.slots_for(_tokens(past), self._multiple) if self.tiled else _tokens(past)

    def bits_per_element(self, past: Mapping[str, Any]) -> float:
        """Bits of a cache for every element of keys and values it stands for."""
        elements = past["0.key"].shape()[0] * _tokens(past) * self.manifest["elements_per_token"]
        return 8.0 * self.nbytes(past) / elements if elements else 0.0

    def _check(self, past: Mapping[str, Any]) -> None:
        if unknown := set(past) ^ set(self._past):
            raise ExportError(f"the cache and {self.path.name} disagree about {PAST}{min(unknown)}; begin with empty()")
        length: dict[str, int] = {}
        for name, value in past.items():
            if not hasattr(value, "data_type"):
                raise ExportError(f"{PAST}{name} is a {type(value).__name__}, not a value of onnxruntime; make one with value()")
            entry, shape = self._past[name], value.shape()
            kind, found = room.dtype_of(entry), room.dtype_of({"dtype": value.data_type()[7:-1]})  # tensor(uint8) → uint8
            if found != kind:
                raise ExportError(f"{PAST}{name} is {found}, the model takes {kind}; begin with empty()")
            if (place := value.device_name().lower()) != self.device:
                raise ExportError(f"{PAST}{name} is on {place}, the model runs on {self.device}; make it with value() or empty()")
            sizes = zip(shape, entry["shape"], strict=False)
            known = [wanted if isinstance(wanted, int) else length.setdefault(wanted, size) for size, wanted in sizes]
            if list(shape) != known or len(shape) != len(entry["shape"]):
                raise ExportError(f"{PAST}{name} is {list(shape)}, the model takes {entry['shape']}; begin with empty()")

    def _check_rows(self, ids: Any, mask: Any, positions: Any) -> None:
        shape = np.shape(ids)
        if len(shape) != 2 + self.embeds:
            kind = "embeddings [B, S, E]" if self.embeds else "token ids [B, S]"
            raise ExportError(f"{self.path.name} takes {kind}, not an array of shape {list(shape)}")
        if 0 in shape:
            raise ExportError(f"{self.path.name} takes one row and one token at least, not an array of shape {list(shape)}")
        masked = mask is None or (np.ndim(mask) == 2 and len(mask) == shape[0])
        if not masked or (positions is not None and np.shape(positions) != shape[:2]):
            raise ExportError(
                f"token ids, mask and positions of shapes {list(shape)}, {list(np.shape(mask))} and {list(np.shape(positions))}; "
                "positions have the shape of the tokens, and the mask as many rows"
            )
        if self.embeds:
            return
        ids, size = np.asarray(ids), self.manifest["vocab_size"]
        if ids.dtype.kind not in "iu" and ids.size:
            raise ExportError(f"token ids are {ids.dtype}; {self.path.name} takes whole numbers")
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            token = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise ExportError(f"token {token} is outside the vocabulary of {size}; wrong tokenizer?")

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self, ids: Any, mask: Any, positions: Any, past: Mapping[str, Any], last: bool = False) -> tuple[Any, Held]:
        """New tokens int64 [B, S] behind a past: (logits [B, S, V], the cache that holds them too).

        mask, positions: None where no row is padded, so that every token stands behind the ones before it. Logits are float32, or
        float64 of a graph in float64. A model exported with embeds=True takes embeddings float32 [B, S, E] in the place of tokens.
        The mask has a column for every token of the past and every new one. The past is used up: its tensors are those of the
        cache that is returned, or copied there where they had no room. last: logits [B, 1, V] of the last token alone; those of a
        long prompt are many.
        """
        if not isinstance(past, Held) or past.bound is None or not past.bound.binds(past):
            self._check(past)  # else these tensors were looked at when they were bound
            if isinstance(past, Held):
                past.bound = None
        self._check_rows(ids, mask, positions)
        if isinstance(past, Held) and past.lost:
            raise ExportError("this cache was written over by a later step; copy() a cache from which to go two ways")
        if mask is None and self.in_place and not isinstance(past, Held):
            raise ExportError(
                "a cache with room does not say how much of it is held; give a mask, or what empty() or step() returned"
            )
        new = np.shape(ids)[1]
        total = _tokens(past) + new if mask is None else np.shape(mask)[1]
        behind = np.broadcast_to(np.arange(total - new, total), np.shape(ids)[:2])
        positions = behind if positions is None else positions
        if np.size(positions) and int(np.max(positions)) >= self.manifest["max_positions"]:
            limit = self.manifest["max_positions"]
            raise ExportError(
                f"the cache is full: position {int(np.max(positions))} is beyond the {limit} that {self.path.name} serves; begin a "
                "new text, or export with more tokens="
            )
        if self.lean and mask is not None and not np.all(mask):
            raise ExportError(f"{self.path.name} has no attention bias for padding; give rows of equal length, or export float32")
        if self.lean and not np.array_equal(positions, behind):
            raise ExportError(
                f"{self.path.name} tells rows apart by their slots: {new} new tokens behind {total - new} have the positions "
                f"{total - new} to {total - 1}"
            )
        batch, _, slots = past["0.key"].shape()[:3]
        stored = past.tokens if isinstance(past, Held) else total - new if self.in_place else slots
        if batch != len(ids) or total != stored + new or not 0 <= stored <= slots:
            raise ExportError(
                f"an attention mask of shape {[len(ids), total]} with {len(ids)} rows of {new} new tokens behind a "
                f"cache of {batch} rows of {min(max(stored, 0), slots)}; it takes a column for every token of the cache and every "
                "new one"
            )
        if self.one_row and stored and min(np.shape(ids)[:2]) > 1:
            raise ExportError(
                f"GroupQueryAttention takes several tokens behind a past for one row only, not for {len(ids)}; feed rows one by "
                "one, one token at a time, or whole prompts"
            )
        given = past
        if self.in_place and total > slots:
            past = room.grown(past, self._past, room.slots_for(total, self._multiple), self.value)
        if self._binds_once and new == 1:
            past = past if isinstance(past, Held) else Held(past, stored)
            logits, after = self._steps.step(ids, positions, past)
            return logits, self._behind(past, after, given)
        binding = self.session.io_binding()
        if self.embeds:
            binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(ids, dtype=np.float32))
        else:
            binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, dtype=np.int64))
        mask = np.ones((batch, total), dtype=np.int64) if mask is None else mask
        for name, array in (("attention_mask", mask), ("position_ids", positions)):
            binding.bind_cpu_input(name, np.ascontiguousarray(array, dtype=np.int64))
        for name, value in past.items():
            binding.bind_ortvalue_input(PAST + name, value)
        scores = self.last_logits if last else "logits"
        outputs = [n for n in (e["name"] for e in self.manifest["outputs"]) if n == scores or not n.endswith("logits")]
        kept = {PRESENT + n for n, e in self._past.items() if self.in_place and (self.tiled or room.axis_of(e) is not None)}
        for name in outputs:
            if name in kept:
                binding.bind_ortvalue_output(name, past[name.removeprefix(PRESENT)])
            else:
                binding.bind_output(name, "cpu" if name == scores else self.device, 0)
        self.run(binding)
        values = dict(zip(outputs, binding.get_outputs(), strict=True))
        logits = values.pop(scores).numpy()
        logits = logits[:, -1:] if last else logits
        logits = logits.astype(np.float32) if logits.dtype == np.float16 else logits
        found = {name.removeprefix(PRESENT): value for name, value in values.items()}
        after = Held({n: past[n] if PRESENT + n in kept else value for n, value in found.items()}, total)
        return logits, self._behind(past, after, given) if kept else after

    def _behind(self, past: Mapping[str, Any], after: Held, given: Mapping[str, Any]) -> Held:
        """`after`, which a step wrote into the tensors of `past`; these are of the cache that was given, or copies."""
        if isinstance(past, Held):
            after.bound = past.bound
            if past is given:
                past.leads_to(after)
                past.overwritten = past.overwritten or self.tiled  # its exact rows have been written over
            after.text = past.text
        return after

    def run(self, binding: Any, graph: str = "-1") -> None:
        """Run what is bound; graph: number of the CUDA graph that it is, "-1" for none. Raises ExportError."""
        options = self._ort.RunOptions()
        if self.graphs:
            options.add_run_config_entry("gpu_graph_id", graph)
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:
            first = str(error).strip().splitlines()[0][:200]
            raise ExportError(f"onnxruntime stopped in {self.path.name}: {first}") from error

    # -- generation ----------------------------------------------------------------------------------------------------

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        chunk: int | None = None,
    ) -> Iterator[list[int | None]]:
        """Yield the next token of every row, step by step; None for rows that have ended.

        temperature 0 is greedy; else tokens are drawn from the top_k (0: all) most likely within the mass top_p. The prompt is
        fed `chunk` tokens at a time, 256 or on CUDA 4,096 (of several rows in flavour gqa or on CUDA, whole). eos_token_id: the
        model's own by default; -1: none.
        """
        if self.embeds:
            raise ExportError(f"{self.path.name} takes embeddings; embed tokens and pictures with the model and call step()")
        ids, mask = self._pad(prompts, max_new_tokens)
        chunk = chunk if chunk is not None else 4096 if self.lean else 256
        stop = self.manifest["eos_token_id"] if eos_token_id is None else eos_token_id
        ends = {stop} if isinstance(stop, int) else set(stop or ())
        if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or chunk < 1:
            raise ExportError(f"temperature={temperature:g}, top_k={top_k}, top_p={top_p:g}, chunk={chunk}: out of range")
        rng = np.random.default_rng(seed)
        padded, positions = not mask.all(), np.maximum(mask.cumsum(1) - 1, 0)
        past = self.past = self.begin(len(ids), ids.shape[1] + max_new_tokens)
        try:
            chunk = ids.shape[1] if self.one_row and len(ids) > 1 else chunk
            for at in range(0, ids.shape[1], chunk):
                part = slice(at, at + chunk)
                seen = mask[:, : at + chunk] if padded else None
                logits, past = self.step(ids[:, part], seen, positions[:, part], past, last=True)
            self.past = past
            last, done = positions[:, -1:], np.zeros(len(ids), dtype=bool)
            for left in range(max_new_tokens - 1, -1, -1):
                token = choose(logits[:, -1], temperature, top_k, top_p, rng)
                yield [None if over else int(t) for over, t in zip(done, token, strict=True)]
                done |= np.isin(token, list(ends))
                if done.all() or not left:
                    return
                mask = np.concatenate([mask, np.ones_like(last)], axis=1) if padded else None
                last = last + 1
                logits, past = self.step(token[:, None], mask, last, past)
                self.past = past
        finally:
            past.end()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int = 64, **options: Any) -> list[list[int]]:
        """The new tokens of every prompt, to its end token; options as in `stream`."""
        rows: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(prompts, max_new_tokens, **options):
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return rows

    def _pad(self, prompts: Sequence[Sequence[int]], new: int) -> tuple[Any, Any]:
        longest = max((len(p) for p in prompts), default=0)
        if not longest or min(len(p) for p in prompts) < 1 or new < 1:
            raise ExportError(f"{len(prompts)} prompts and {new} new tokens: every prompt needs a token, and one must be asked for")
        limit = self.manifest["max_positions"]
        if longest + new > limit:
            raise ExportError(f"a prompt of {longest} and {new} new tokens exceed the {limit} positions {self.path.name} serves")
        ids = np.full((len(prompts), longest), self.manifest["pad_token_id"], dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :], mask[i, longest - len(prompt) :] = prompt, 1
        if ids.min() < 0 or ids.max() >= self.manifest["vocab_size"]:
            size = self.manifest["vocab_size"]
            raise ExportError(f"token {int(ids.max())} is outside the vocabulary of {size}; wrong tokenizer?")
        return ids, mask


def _tokens(past: Mapping[str, Any]) -> int:
    return past.tokens if isinstance(past, Held) else int(past["0.key"].shape()[2])
