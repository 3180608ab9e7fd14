"""The hooks that tell a cache what it cannot see of the running forward pass.

A cache receives keys after RoPE and values, nothing else. The hooks add, for one forward pass: the true positions and
angles of the new rows, which of them are padding, and the candidates for exact rows that the emergence blocks reveal.
They do nothing for any other cache, and `torch.compile` traces through them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from kvsink.kernels.selection import top_rows
from kvsink.model.attention import causal_mask
from kvsink.model.candidates import passes, pivot_scores, rank
from kvsink.model.frame import Frame
from kvsink.model.offload import number_of, place_of
from kvsink.model.rows import MODALITY_MASKS, check_mask, mask_of, real_rows, visual_rows
from kvsink.model.turning import tables_of, turned_by

__all__ = ["EndFrame", "Massive", "Modality", "NewFrame", "Observe", "Pivots", "Positions", "Stage", "Written"]


class _Hook:
    """A hook of one module that finds the module's arguments by name, however they are passed."""

    def __init__(self, module: nn.Module) -> None:
        names = [n for n in inspect.signature(module.forward).parameters if n not in ("self", "args", "kwargs")]
        self.place = {name: i for i, name in enumerate(names)}

    def given(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument `name` of a call, or None."""
        if name in kwargs:
            return kwargs[name]
        at = self.place.get(name, len(args))
        return args[at] if at < len(args) else None

    def cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The kvsink cache of a call, or None. Its frame is written through `shared`: dynamo of torch 2.11 does not trace
        the setter of a property."""
        for name in ("cache", "past_key_values", "layer_past"):  # transformers 5.24 and later, before, and older families
            found = self.given(name, args, kwargs)
            if getattr(found, "is_kvsink", False):
                return found
        return None


class NewFrame(_Hook):
    """Pre-hook of the base model: a fresh frame, with what the attention mask says of padding."""

    def __init__(self, module: nn.Module, turns: bool = False, rotary: nn.Module | None = None) -> None:
        super().__init__(module)
        self.turns, self.rotary = turns, rotary

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = self.cache(args, kwargs)
        if cache is None:
            return None
        rows = self.given("input_ids", args, kwargs)
        rows = self.given("inputs_embeds", args, kwargs) if rows is None else rows
        frame = Frame()
        if rows is not None:
            mask = self.given("attention_mask", args, kwargs)
            frame.valid = real_rows(mask, rows.shape[0], rows.shape[1], cache)
            visual = getattr(cache, "visual", None)
            if visual is not None:
                check_mask(visual, rows.shape)
                frame.visual = visual
            axes = self.given("position_ids", args, kwargs)
            axes = axes.long() if isinstance(axes, Tensor) and axes.is_floating_point() else axes
            if isinstance(axes, Tensor) and axes.dim() == 2:  # not every model hands them on to its attention
                frame.positions = axes
            elif self.turns and isinstance(axes, Tensor) and axes.dim() == 3:
                first = axes[-3] if axes.shape[0] >= 3 else axes[0]
                like = rows if rows.is_floating_point() else number_of(module)
                frame.positions, frame.one_axis = first, True
                found = turned_by(self.rotary, like, first) if self.rotary is not None else None
                frame.cos, frame.sin = found if found is not None else (None, None)
        if hasattr(cache, "begin"):
            batch = rows.shape[0] if rows is not None else None
            if not torch.compiler.is_compiling():
                cache.begin(frame, batch)
            elif batch is not None:
                cache.fit_batch(batch)
        cache.shared.frame = frame
        asks = rows is not None and rows.shape[1] > 1 and not torch.compiler.is_compiling()
        if asks and getattr(cache, "attends_itself", bool)():
            mask = self.given("attention_mask", args, kwargs)
            if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())):
                named = {n: args[i] for n, i in self.place.items() if i < len(args)}
                return (), {**named, **kwargs, "attention_mask": causal_mask(rows.shape[1], cache.get_max_length(), rows.device)}
        return None


class Modality(_Hook):
    """Pre-hook of every module around the decoder that is given token ids: which of them stand for images and video.

    The processor's own mask (mm_token_type_ids, or token_type_ids of Gemma) decides where it is given, else the model's image
    and video tokens. The language model of a vision-language model receives embeddings, so ids are read where they still are.
    """

    def __init__(self, module: nn.Module, tokens: tuple[int, ...]) -> None:
        super().__init__(module)
        self.tokens = tokens

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache, ids = self.cache(args, kwargs), self.given("input_ids", args, kwargs)
        if cache is None or ids is None or cache.visual is not None:
            return
        for name in MODALITY_MASKS:
            kinds = self.given(name, args, kwargs)
            if isinstance(kinds, Tensor):
                cache.visual = mask_of(kinds, ids, cache.get_seq_length())
                return
        cache.visual = visual_rows(ids, self.tokens)


class EndFrame(_Hook):
    """Forward hook of the base model: the frame is over."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = self.cache(args, kwargs)
        if cache is not None:
            if not torch.compiler.is_compiling():
                getattr(cache, "check_sizes", bool)()
            cache.shared.frame = None
            cache.visual = None
            if not torch.compiler.is_compiling():
                for layer in cache.layers:
                    getattr(layer, "check_asked", bool)()


class Observe(_Hook):
    """Pre-hook of an attention module whose layer keeps anchors: its cache layer is the one to look at the queries."""

    def __init__(self, module: nn.Module, layer: int) -> None:
        super().__init__(module)
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = self.cache(args, kwargs)
        layer = cache.layers[self.layer] if cache is not None else None
        module._kvsink_observer.see = getattr(layer, "observe", None)  # type: ignore[union-attr]


class Positions(_Hook):
    """Pre-hook of an attention module: the positions it is about to use, and the angles where it turns by them."""

    def __init__(self, module: nn.Module, turned: bool) -> None:
        super().__init__(module)
        self.turned = turned

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = self.cache(args, kwargs)
        if cache is None or cache.shared.frame is None:
            return
        if cache.shared.frame.one_axis:
            return
        found = tables_of(self.given("position_embeddings", args, kwargs)) if self.turned else None
        if found is not None:
            cache.shared.frame.cos, cache.shared.frame.sin = found
        positions = self.given("position_ids", args, kwargs)
        if positions is not None and positions.dim() in (2, 3):  # axes that the model makes itself are equal
            found = positions if positions.dim() == 2 else positions[-1]
            cache.shared.frame.positions = found.long() if found.is_floating_point() else found


class Stage(_Hook):
    """Forward hook of an emergence block: its output ranks the new rows."""

    def __init__(self, module: nn.Module, key: str, channels: tuple[int, ...], count: int) -> None:
        super().__init__(module)
        self.key, self.count = key, count
        device = place_of(module)  # where the rows will be: a copy per step would break CUDA graphs
        self.channels, self.weights = torch.tensor(channels[:1], device=device), torch.ones(1, device=device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = self.cache(args, kwargs)
        if cache is None or cache.shared.frame is None:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        cache.shared.frame.candidates[self.key] = rank(hidden, cache.shared.frame, self.channels, self.weights, self.count, False)


class Written(_Hook):
    """Forward hook of an emergence block: rows of which its feed-forward layer wrote more than `least` into the outlier channel.

    What that layer writes is seen by `see`, a forward hook of its last projection. All that pass have one score, so that of a
    sequence the first stay.
    """

    def __init__(self, module: nn.Module, key: str, channel: int, least: float, count: int) -> None:
        super().__init__(module)
        self.key, self.channel, self.least, self.count = key, channel, least, count
        self.written: Tensor | None = None  # [B, S], between the two

    def see(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.written = output[..., self.channel].detach()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache, written = self.cache(args, kwargs), self.written
        self.written = None
        if cache is None or cache.shared.frame is None or written is None:
            return
        passed = passes(written, self.least)
        passed = passed if cache.shared.frame.valid is None else passed & cache.shared.frame.valid
        score = torch.zeros_like(written, dtype=torch.float32).masked_fill(~passed, float("-inf"))
        cache.shared.frame.candidates[self.key] = top_rows(score, self.count)


class Massive(_Hook):
    """Pre-hook of a block: the largest entries of its input name rows for this layer alone."""

    def __init__(self, module: nn.Module, key: str, count: int) -> None:
        super().__init__(module)
        self.key, self.count = key, count
        device = place_of(module)
        self.channels = torch.zeros(1, dtype=torch.int64, device=device)
        self.weights = torch.ones(1, device=device)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = self.cache(args, kwargs)
        if cache is None or cache.shared.frame is None:
            return
        hidden = self.given("hidden_states", args, kwargs)
        cache.shared.frame.candidates[self.key] = rank(hidden, cache.shared.frame, self.channels, self.weights, self.count, True)


class Pivots(_Hook):
    """Forward hook of the probe block: rows of a prompt whose largest |h| stands out; a step of one token adds none."""

    def __init__(self, module: nn.Module, key: str, count: int, least: float, ratio: float) -> None:
        super().__init__(module)
        self.key, self.count, self.least, self.ratio = key, count, least, ratio

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = self.cache(args, kwargs)
        if cache is None or cache.shared.frame is None:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] == 1:
            score = torch.full(hidden.shape[:2], float("-inf"), device=hidden.device)
        else:
            score = pivot_scores(hidden, cache.shared.frame.valid, self.least, self.ratio)
        cache.shared.frame.candidates[self.key] = top_rows(score, self.count)
