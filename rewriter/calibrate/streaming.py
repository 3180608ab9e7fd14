"""Run a model that does not fit into memory: one decoder layer at a time, every window of text through it before the next.

Formula    h_0 = embedding of each window; h_{l+1} = block_l(h_l), the blocks outermost, so that weights are read once per pass
           what a block is given beside its input (angles, mask, cache) comes from one pass of the model itself in which every
           block only notes its arguments and hands its input on; the logits come from a last pass in which the last block
           hands on what it has put out
Source     ours; the noting pass is the usual trick of layer-wise weight quantization (GPTQ, arXiv 2210.17323)
Shapes     ids int64 [N, T]; hidden states [1, T, E] of N windows stay in memory, float32
Exact      yes: the same modules and hooks run on the same numbers as in one forward pass per window
Declines   checkpoints that are not safetensors files, or whose tensors transformers does not turn into the model's parameters
           (`kvsink.folder.conversion`); models whose blocks do not hand one tensor from each to the next
Raises     ModelError for NaN or infinite weights; UnsupportedError for what it declines
Cost       memory: one layer in float32 and its largest tensor in the dtype of the file, N·T·E·4 bytes; where logits are asked
           for, the head in float32 behind the last layer. Of the embedding the rows of the tokens that occur
"""

from __future__ import annotations

import ctypes
import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvsink.calibrate.skeleton import skeleton
from kvsink.errors import ModelError, UnsupportedError
from kvsink.folder.checkpoint import Checkpoint
from kvsink.folder.conversion import Weights
from kvsink.model.anatomy import anatomy
from kvsink.model.fingerprint import fingerprint
from kvsink.model.passing import given_cache

__all__ = ["Job", "Stream", "stream_of"]

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc alone has it
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _give_back() -> None:
    """Ask glibc to return what it holds of freed tensors; without it, a process grows by the activations of many windows."""
    if _trim is not None:
        _trim(0)


@dataclass
class Job:
    """One window: its tokens [1, T], the cache that looks on (or None), their positions where they are not those behind the cache,
    and what is to be called before each of its layers."""

    rows: Tensor
    cache: Any = None
    begin: Callable[[], None] = lambda: None
    positions: Tensor | None = None
    mask: Tensor | None = None
    hidden: Tensor | None = None
    frame: Any = None
    calls: list[dict[str, Any]] = field(default_factory=list)


class Stream:
    """A model without weights, and the checkpoint they come from when their turn comes."""

    def __init__(self, model: Any, checkpoint: Checkpoint, device: torch.device) -> None:
        self.model, self.checkpoint, self.device = model, checkpoint, device
        self.weights = Weights(model, checkpoint)
        self.where = anatomy(model)
        self.checked: set[str] = set()
        self.folds: list[tuple[str, int]] = []  # attention modules whose value rotation is to go into the weights
        named = dict(model.named_parameters())
        self._stored, self._places = _shared(model, named)
        if absent := sorted(n for n, p in named.items() if not self._fits(n, p)):
            raise UnsupportedError(
                f"{checkpoint.folder} stores {absent[0]} under another name, shape or kind than the model has it, so it cannot be "
                "read layer by layer; use a machine where it fits whole (--whole)"
            )
        self.names = list(named)
        self._read_buffers()

    def _fits(self, name: str, p: nn.Parameter) -> bool:
        found = next((n for n in self._stored[name] if n in self.weights), None)
        if found is None or self.weights.shapes[found] != tuple(p.shape) or not self.weights.floating(found):
            return False
        self._stored[name] = [found]
        return True

    def _read_buffers(self) -> None:
        """Buffers are small and stay: those that are stored come from the checkpoint, all of them move to the device."""
        for path, module in self.model.named_modules():
            for last, buffer in list(module._buffers.items()):
                if buffer is None:
                    continue
                name = f"{path}.{last}" if path else last
                if name in self.weights and last not in module._non_persistent_buffers_set:
                    buffer = self.weights.read(name).to(buffer.dtype, copy=True)
                module._buffers[last] = buffer.to(self.device)

    # -- weights -------------------------------------------------------------------------------------------------------

    def read(self, name: str) -> Tensor:
        """One parameter in the dtype of the file; its memory may be the file's until it is copied."""
        return self.weights.read(self._stored[name][0])

    @contextmanager
    def loaded(self, names: Sequence[str]) -> Iterator[None]:
        """The named parameters real, in float32, for the length of the context; the largest are read first."""
        held: list[tuple[nn.Module, str, nn.Parameter]] = []
        sizes = {n: self.weights.nbytes(self._stored[n][0]) for n in names}
        try:
            for name in sorted(names, key=lambda n: -sizes[n]):
                tensor = self.read(name)
                self._check(name, tensor)
                real = nn.Parameter(tensor.to(self.device, torch.float32, copy=True), requires_grad=False)
                del tensor
                for module, last in self._places[name]:
                    held.append((module, last, module._parameters[last]))  # type: ignore[arg-type]
                    module._parameters[last] = real
                del real
            _give_back()
            yield
        finally:
            for module, last, meta in held:
                module._parameters[last] = meta

    def _check(self, name: str, tensor: Tensor) -> None:
        if name not in self.checked:
            for part in tensor.reshape(-1).split(1 << 20):
                if not torch.isfinite(part).all():
                    raise ModelError(f"weight {name} holds NaN or infinite numbers; the checkpoint is damaged, fetch it again")
            self.checked.add(name)

    def check_rest(self) -> None:
        """Look at the weights that no pass has used."""
        for name in self.names:
            if name not in self.checked:
                self._check(name, self.read(name))

    def inside(self, prefix: str) -> list[str]:
        """Parameters of one module."""
        return [n for n in self.names if n.startswith(prefix + ".")]

    def fingerprint(self, within: str = "") -> Tensor:
        """As `kvsink.model.fingerprint.fingerprint` of the loaded model."""
        return fingerprint(self.model, self.read, within)

    # -- the pass ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self,
        jobs: Sequence[Job],
        tell: Callable[[int, int], None] = lambda done, total: None,
        after: Callable[[int, int], None] | None = None,
        logits: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """Every window through every layer; `after` is called with window and layer, `logits` with window and [1, T, V]."""
        self._note(jobs)
        blocks = self.where.blocks
        steps = len(blocks) + (logits is not None)
        for i, name in enumerate(blocks):
            block = self.model.get_submodule(name)
            with self.loaded(self.inside(name)):
                for w, job in enumerate(jobs):
                    job.begin()
                    shared = getattr(job.cache, "shared", None)  # of a cache that the runtime's hooks fill
                    if shared is not None:
                        shared.frame = job.frame
                    out = block(job.hidden, **job.calls[i])
                    job.hidden = out[0] if isinstance(out, tuple) else out
                    if shared is not None:
                        shared.frame = None
                    if after is not None:
                        after(w, i)
                    del out
                    _give_back()
            tell(i + 1, steps)
        if logits is not None:
            self._head(jobs, logits)
            tell(steps, steps)
        for job in jobs:
            job.hidden, job.calls = None, []

    def _note(self, jobs: Sequence[Job]) -> None:
        """Embed the windows and note what every block is called with."""
        base = self.model.get_submodule(self.where.base) if self.where.base else self.model
        self._embed(jobs)
        current: list[Job] = []
        names = [_argument_names(self.model.get_submodule(name)) for name in self.where.blocks]
        with self._instead([self._noting(current, i, n) for i, n in enumerate(names)]), self.loaded(self._outer()):
            for job in jobs:
                current[:] = [job]
                given: dict[str, Any] = {"use_cache": job.cache is not None, **given_cache(base, job.cache)}
                given |= {} if job.positions is None else {"position_ids": job.positions}
                given |= {} if job.mask is None else {"attention_mask": job.mask}
                base(inputs_embeds=job.hidden, **given)
        for job in jobs:
            if len(job.calls) != len(names):
                raise UnsupportedError(f"{type(self.model).__name__} does not call each of its layers once; use --whole")
            if job.frame is not None:
                job.frame.candidates.clear()

    def _embed(self, jobs: Sequence[Job]) -> None:
        """The rows of the embedding that occur, in float32 under new numbers, and the windows through them."""
        embedding = self.model.get_input_embeddings()
        (at,) = (n for n, m in self.model.named_modules() if m is embedding)
        (name,) = (n for n, m, last in self._homes() if m is embedding and last == "weight")
        used, back = torch.cat([job.rows.flatten() for job in jobs]).unique(return_inverse=True)
        if not isinstance(embedding, nn.Embedding) or self.inside(at) not in ([], [name]):
            raise UnsupportedError(f"the embedding of {type(self.model).__name__} is more than a table; use --whole")
        rows = self.read(name)[used].float()
        if not torch.isfinite(rows).all():
            raise ModelError(f"weight {name} holds NaN or infinite numbers; the checkpoint is damaged, fetch it again")
        meta, padding = embedding._parameters["weight"], embedding.padding_idx
        try:
            embedding._parameters["weight"] = nn.Parameter(rows.to(self.device), requires_grad=False)
            embedding.padding_idx = None  # a number of the whole table
            for job, ids in zip(jobs, back.split([job.rows.numel() for job in jobs]), strict=True):
                job.hidden = embedding(ids.view(job.rows.shape).to(self.device))
        finally:
            embedding._parameters["weight"], embedding.padding_idx = meta, padding

    def _homes(self) -> Iterator[tuple[str, nn.Module, str]]:
        for name, places in self._places.items():
            for module, last in places:
                yield name, module, last

    def _outer(self) -> list[str]:
        """What the decoder has beside its blocks and its embedding: norms, learned positions."""
        inner = {n for name in self.where.blocks for n in self.inside(name)}
        embedding = self.model.get_input_embeddings()
        table = {n for n, module, _ in self._homes() if module is embedding}
        return [n for n in self.inside(self.where.base) if n not in inner and n not in table]

    def _head(self, jobs: Sequence[Job], logits: Callable[[int, Tensor], None]) -> None:
        """Norm, head and whatever else the model does behind its last block."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise UnsupportedError(f"{type(self.model).__name__} has no head that gives logits; pass a causal language model")
        own = [n for n, module, _ in self._homes() if any(module is m for m in head.modules())]
        current: list[Job] = []

        def on(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden

        def last(*args: Any, **kwargs: Any) -> Any:
            return current[0].hidden

        names = [_argument_names(self.model.get_submodule(name))[0] for name in self.where.blocks]
        steps = [_by_name(on, name) for name in names[:-1]]
        with self._instead([*steps, last]), self.loaded(list(dict.fromkeys([*self._outer(), *own]))):
            for w, job in enumerate(jobs):
                current[:] = [job]
                assert job.hidden is not None
                logits(w, self.model(inputs_embeds=torch.zeros_like(job.hidden), use_cache=False).logits)
                job.hidden = None

    @contextmanager
    def _instead(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """Every block answers with a function of ours, and its hooks are not called."""
        blocks = [self.model.get_submodule(name) for name in self.where.blocks]
        hooks = [{name: getattr(b, name) for name in _HOOKS} for b in blocks]
        try:
            for block, forward in zip(blocks, forwards, strict=True):
                for name in _HOOKS:
                    setattr(block, name, OrderedDict())
                block.forward = forward
            yield
        finally:
            for block, saved in zip(blocks, hooks, strict=True):
                block.__dict__.pop("forward", None)
                for name, held in saved.items():
                    setattr(block, name, held)

    def _noting(self, current: list[Job], layer: int, names: list[str]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            job = current[0]
            kwargs.update(zip(names, args, strict=False))
            hidden = kwargs.pop(names[0])
            if len(args) > len(names) or len(job.calls) != layer or (layer and hidden is not job.hidden):
                raise UnsupportedError(
                    f"{type(self.model).__name__} does more between its layers than hand a tensor on; use --whole"
                )
            shared = getattr(job.cache, "shared", None)
            if shared is not None:
                job.frame = shared.frame
            job.hidden = hidden
            job.calls.append(kwargs)
            return hidden

        return forward


def _argument_names(block: nn.Module) -> list[str]:
    """Names of the arguments of a block, the hidden states first."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [n for n, p in inspect.signature(type(block).forward).parameters.items() if p.kind in kinds and n != "self"]


def _by_name(function: Callable[..., Any], first: str) -> Callable[..., Any]:
    """The function, with its first argument possibly given by name."""
    return lambda *args, **kwargs: function(*args) if args else function(kwargs[first])


def _shared(
    model: nn.Module, named: dict[str, nn.Parameter]
) -> tuple[dict[str, list[str]], dict[str, list[tuple[nn.Module, str]]]]:
    """Of every parameter, all its names, and the modules that hold it under which attribute (tied weights: several)."""
    first = {id(p): n for n, p in named.items()}
    names: dict[str, list[str]] = {n: [n] for n in named}
    places: dict[str, list[tuple[nn.Module, str]]] = {n: [] for n in named}
    for path, module in model.named_modules():
        for last, p in module._parameters.items():
            if p is not None:
                own, at = f"{path}.{last}" if path else last, first[id(p)]
                places[at].append((module, last))
                if own not in names[at]:
                    names[at].append(own)
    return names, places


def stream_of(folder: str | Path, device: torch.device) -> Stream:
    """A folder's model, ready to run by layers. Raises UnsupportedError where that cannot be."""
    checkpoint = Checkpoint.find(folder)
    if checkpoint is None:
        raise UnsupportedError(f"{folder} has no safetensors files, which reading by layers needs; use --whole")
    return Stream(skeleton(folder), checkpoint, device)
