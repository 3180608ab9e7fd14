"""Run a model that does not fit into memory: one decoder layer at a time, every window of text through it before the next.

Formula    h_0 = embedding of each window; h_{l+1} = block_l(h_l), the blocks outermost, so that weights are read once per pass
           what a block is given beside its input (angles, mask, cache) comes from one pass of the model itself in which every
           block only notes its arguments and hands its input on
Source     ours; the noting pass is the usual trick of layer-wise weight quantization (GPTQ, arXiv 2210.17323)
Shapes     ids int64 [N, T]; hidden states [1, T, E] of N windows stay in memory, float32
Exact      yes: the same modules and hooks run on the same numbers as in one forward pass per window
Declines   checkpoints that are not safetensors files, or name their tensors otherwise than the model its parameters; models
           whose blocks do not hand one tensor from each to the next
Raises     ModelError for NaN or infinite weights; UnsupportedError for what it declines
Cost       memory: one layer in float32, the embedding in its own dtype (while windows are embedded), N·T·E·4 bytes
"""

from __future__ import annotations

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

from kvsink.checkpoint import Checkpoint
from kvsink.errors import ModelError, UnsupportedError
from kvsink.runtime import anatomy

__all__ = ["Job", "Needs", "Stream", "available_memory", "skeleton", "stream_of"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def available_memory(device: torch.device) -> int:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdigit():
            found.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register are shapes alone; buffers (angles, for one) stay real."""
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        plain(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def skeleton(folder: str | Path) -> Any:
    """The model of a folder in float32 without its weights."""
    from transformers import AutoConfig

    from kvsink.loading import model_class, refusal

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with _parameters_on_meta():
            model = model_class(Path(folder)).from_config(config, dtype=torch.float32)
    except Exception as error:  # transformers raises its own kinds
        raise ModelError(refusal(Path(folder), error)) from error
    model.tie_weights()
    model.config._name_or_path = str(folder)
    return model.eval()


@dataclass
class Job:
    """One window: its tokens [1, T], the cache that looks on (or None), and what is to be called before each of its layers."""

    rows: Tensor
    cache: Any = None
    begin: Callable[[], None] = lambda: None
    hidden: Tensor | None = None
    frame: Any = None
    calls: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Needs:
    """Bytes a rewrite needs: memory with the whole model and by layers, disk for what is written."""

    whole: int
    by_layer: int
    disk: int

    def __str__(self) -> str:
        one, two, three = (n / 2**30 for n in (self.whole, self.by_layer, self.disk))
        return f"about {one:.1f} GiB of memory with the whole model, {two:.1f} GiB layer by layer, and {three:.1f} GiB of disk"


class Stream:
    """A model without weights, and the checkpoint they come from when their turn comes."""

    def __init__(self, model: Any, checkpoint: Checkpoint, device: torch.device) -> None:
        self.model, self.checkpoint, self.device = model, checkpoint, device
        self.where = anatomy(model)
        self.checked: set[str] = set()
        self.folds: list[tuple[str, int]] = []  # attention modules whose value rotation is to go into the weights
        named = dict(model.named_parameters())
        if absent := sorted(n for n, p in named.items() if not self._fits(n, p)):
            raise UnsupportedError(
                f"{checkpoint.folder} stores {absent[0]} under another name, shape or kind than the model has it, so it cannot be "
                "read layer by layer; use a machine where it fits whole (--whole)"
            )
        self.names = list(named)

    def _fits(self, name: str, p: nn.Parameter) -> bool:
        entry = self.checkpoint.entries.get(name)
        return entry is not None and entry.shape == tuple(p.shape) and entry.dtype is not None and entry.dtype.is_floating_point

    # -- weights -------------------------------------------------------------------------------------------------------

    @contextmanager
    def loaded(self, names: Sequence[str], dtype: torch.dtype | None = torch.float32) -> Iterator[None]:
        """The named parameters real for the length of the context; dtype None keeps that of the file."""
        held: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for name in names:
                (tensor,) = self.checkpoint.tensors([name]).values()
                self._check(name, tensor)
                path, _, last = name.rpartition(".")
                module = self.model.get_submodule(path)
                held.append((module, last, module._parameters[last]))
                real = tensor.to(self.device, tensor.dtype if dtype is None else dtype, copy=True)
                module._parameters[last] = nn.Parameter(real, requires_grad=False)
                del tensor
            yield
        finally:
            for module, last, meta in held:
                module._parameters[last] = meta

    def _check(self, name: str, tensor: Tensor) -> None:
        if name not in self.checked:
            for part in tensor.reshape(-1).split(1 << 24):
                if not torch.isfinite(part).all():
                    raise ModelError(
                        f"weight {name} holds NaN or infinite numbers; the checkpoint is damaged, fetch it again"
                    )
            self.checked.add(name)

    def check_rest(self) -> None:
        """Look at the weights that no pass has used."""
        for name in self.names:
            if name not in self.checked:
                (tensor,) = self.checkpoint.tensors([name]).values()
                self._check(name, tensor)

    def inside(self, prefix: str) -> list[str]:
        """Parameters of one module."""
        return [n for n in self.names if n.startswith(prefix + ".")]

    def fingerprint(self) -> Tensor:
        """As `kvsink.calibration.fingerprint` of the loaded model."""
        from kvsink.calibration import fingerprint

        return fingerprint(self.model, lambda name: self.checkpoint.tensors([name])[name])

    # -- the pass ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, jobs: Sequence[Job], tell: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Every window through every layer."""
        self._note(jobs)
        blocks = self.where.blocks
        for i, name in enumerate(blocks):
            block = self.model.get_submodule(name)
            with self.loaded(self.inside(name)):
                for job in jobs:
                    job.begin()
                    if job.cache is not None:
                        job.cache.shared.frame = job.frame
                    out = block(job.hidden, **job.calls[i])
                    job.hidden = out[0] if isinstance(out, tuple) else out
                    if job.cache is not None:
                        job.cache.shared.frame = None
            tell(i + 1, len(blocks))
        for job in jobs:
            job.hidden, job.calls = None, []

    def _note(self, jobs: Sequence[Job]) -> None:
        """Embed the windows and note what every block is called with."""
        base = self.model.get_submodule(self.where.base) if self.where.base else self.model
        embedding = self.model.get_input_embeddings()
        (at,) = (n for n, m in self.model.named_modules() if m is embedding)
        with self.loaded(self.inside(at), None):
            for job in jobs:
                job.hidden = embedding(job.rows.to(self.device)).float()
        inner = {n for name in self.where.blocks for n in self.inside(name)}
        outer = [n for n in self.inside(self.where.base) if n not in inner and not n.startswith(at + ".")]
        blocks = [self.model.get_submodule(name) for name in self.where.blocks]
        hooks = [{name: getattr(b, name) for name in _HOOKS} for b in blocks]
        current: list[Job] = []
        try:
            for i, block in enumerate(blocks):
                for name in _HOOKS:
                    setattr(block, name, OrderedDict())
                block.forward = self._noting(current, i, _argument_names(block))
            with self.loaded(outer):
                for job in jobs:
                    current[:] = [job]
                    base(inputs_embeds=job.hidden, past_key_values=job.cache, use_cache=job.cache is not None)
        finally:
            for block, saved in zip(blocks, hooks, strict=True):
                block.__dict__.pop("forward", None)
                for name, held in saved.items():
                    setattr(block, name, held)
        for job in jobs:
            if len(job.calls) != len(blocks):
                raise UnsupportedError(f"{type(self.model).__name__} does not call each of its layers once; use --whole")
            if job.frame is not None:
                job.frame.candidates.clear()

    def _noting(self, current: list[Job], layer: int, names: list[str]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            job = current[0]
            kwargs.update(zip(names, args, strict=False))
            hidden = kwargs.pop(names[0])
            if len(args) > len(names) or len(job.calls) != layer or (layer and hidden is not job.hidden):
                raise UnsupportedError(
                    f"{type(self.model).__name__} does more between its layers than hand a tensor on; use --whole"
                )
            if job.cache is not None:
                job.frame = job.cache.shared.frame
            job.hidden = hidden
            job.calls.append(kwargs)
            return hidden

        return forward


def _argument_names(block: nn.Module) -> list[str]:
    """Names of the arguments of a block, the hidden states first."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [n for n, p in inspect.signature(type(block).forward).parameters.items() if p.kind in kinds and n != "self"]


def needs(model: Any, checkpoint: Checkpoint, tokens: int, window: int) -> Needs:
    """What a rewrite of the model takes on a CPU, where weights are float32; activations of `tokens` in windows of `window`."""
    config = model.config.get_text_config(decoder=True)
    where = anatomy(model)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    layer = max(sum(s for n, s in sizes.items() if n.startswith(b + ".")) for b in where.blocks)
    embedding = max((e.nbytes for e in checkpoint.entries.values()), default=0)
    hidden, width = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    busy = 4 * window * (4 * hidden + 4 * width)  # of the window that is in a layer
    stats = 8 * len(where.blocks) * where.kv_heads * where.head_dim * (2 * where.head_dim + 64)
    base = 600 << 20  # Python, torch and transformers
    return Needs(
        whole=base + 4 * sum(sizes.values()) + busy + 4 * window * config.vocab_size + stats,
        by_layer=base + max(embedding, 4 * layer) + 4 * tokens * hidden + busy + stats,
        disk=checkpoint.nbytes + stats,
    )


def stream_of(folder: str | Path, device: torch.device) -> Stream:
    """A folder's model, ready to run by layers. Raises UnsupportedError where that cannot be."""
    checkpoint = Checkpoint.find(folder)
    if checkpoint is None:
        raise UnsupportedError(f"{folder} has no safetensors files, which reading by layers needs; use --whole")
    return Stream(skeleton(folder), checkpoint, device)
