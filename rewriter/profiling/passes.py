"""Run windows through a model for whoever watches it: the whole model at once, or a checkpoint one layer at a time.

Both ways call the same functions with the same numbers: `window` before a window goes on, `layer` behind each of its layers,
`logits` at its end. Whole, the windows are outermost; by layers, the layers are. So what counts per window and layer is
written once, in `kvsink.profiling.record` and `.causal`.

Source     ours
Shapes     ids int64 [N, T]; logits [1, T, V]
Exact      yes: by layers the same modules run on the same numbers, in float32
Raises     as the model and `kvsink.calibrate.streaming` do
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvsink.calibrate.memory import Needs, needs
from kvsink.calibrate.streaming import Job, Stream
from kvsink.folder.checkpoint import Checkpoint
from kvsink.model.anatomy import anatomy
from kvsink.model.fingerprint import fingerprint
from kvsink.model.passing import cache_of
from kvsink.profiling.layout import Entry
from kvsink.profiling.watch import down_weight

__all__ = ["BY_LAYER", "WHOLE", "ByLayer", "Passes", "Whole", "passes_of", "profile_needs"]

WHOLE, BY_LAYER = "whole", "layer by layer"
Window = Callable[[int], None]
Layer = Callable[[int, int, Any], None]  # window, layer, what the cache holds of the layer (None without one)
Logits = Callable[[int, Tensor], None]
Tell = Callable[[int, int], None]


class Passes:
    """One model and the way in which it is run: `how` is WHOLE or BY_LAYER."""

    how = ""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.where = anatomy(model)

    def run(
        self,
        ids: Tensor,
        *,
        window: Window | None = None,
        layer: Layer | None = None,
        logits: Logits | None = None,
        cache: bool = False,
        tell: Tell = lambda done, total: None,
    ) -> None:
        """Every window of `ids` through the model. cache: `layer` also gets the keys and values of its window."""
        raise NotImplementedError

    def fingerprint(self) -> Tensor:
        """As `kvsink.model.fingerprint.fingerprint`."""
        raise NotImplementedError

    def down_row(self, entry: Entry, channel: int) -> Tensor:
        """The weights [F] that write one output channel of an entry, float32."""
        raise NotImplementedError


class Whole(Passes):
    """A model in memory."""

    how = WHOLE

    def __init__(self, model: Any) -> None:
        super().__init__(model, next(model.parameters()).device)

    def run(
        self,
        ids: Tensor,
        *,
        window: Window | None = None,
        layer: Layer | None = None,
        logits: Logits | None = None,
        cache: bool = False,
        tell: Tell = lambda done, total: None,
    ) -> None:
        """See `Passes.run`."""
        last: dict[str, Any] = {} if logits is not None else {"logits_to_keep": 1}
        with torch.no_grad():
            for w, row in enumerate(ids):
                if window is not None:
                    window(w)
                out = self.model(input_ids=row[None].to(self.device), use_cache=cache, **last)
                held = getattr(cache_of(out), "layers", ()) if cache else ()
                for l in range(len(self.where.blocks)) if layer is not None else ():
                    layer(w, l, held[l] if l < len(held) else None)  # type: ignore[misc]
                if logits is not None:
                    logits(w, out.logits)
                tell(w + 1, len(ids))

    def fingerprint(self) -> Tensor:
        """See `Passes.fingerprint`."""
        return fingerprint(self.model)

    def down_row(self, entry: Entry, channel: int) -> Tensor:
        """See `Passes.down_row`."""
        return down_weight(self.model, entry)[channel].float()


class ByLayer(Passes):
    """A checkpoint, of which one layer is in memory at a time."""

    how = BY_LAYER

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream.model, stream.device)
        self.stream = stream

    def run(
        self,
        ids: Tensor,
        *,
        window: Window | None = None,
        layer: Layer | None = None,
        logits: Logits | None = None,
        cache: bool = False,
        tell: Tell = lambda done, total: None,
    ) -> None:
        """See `Passes.run`."""
        jobs = [Job(row[None], self._cache() if cache else None) for row in ids]
        for w, job in enumerate(jobs):
            if window is not None:
                job.begin = _of(window, w)

        def after(w: int, l: int) -> None:
            held = jobs[w].cache.layers[l] if cache else None
            if layer is not None:
                layer(w, l, held)
            if held is not None and getattr(held, "keys", None) is not None:
                held.keys = held.values = None  # no later layer reads them

        self.stream.run(jobs, tell, after, logits)

    def _cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def fingerprint(self) -> Tensor:
        """See `Passes.fingerprint`."""
        return self.stream.fingerprint()

    def down_row(self, entry: Entry, channel: int) -> Tensor:
        """See `Passes.down_row`."""
        name = f"{entry.module}.{'down_proj' if entry.stacked else 'weight'}"
        with self.stream.loaded([name]):
            return down_weight(self.model, entry)[channel].clone().cpu()


def _of(window: Window, w: int) -> Callable[[], None]:
    return lambda: window(w)


def passes_of(model: Any) -> Passes:
    """The passes of a model in memory, or of a `Stream`."""
    return ByLayer(model) if isinstance(model, Stream) else Whole(model)


def profile_needs(model: Any, checkpoint: Checkpoint, windows: int, window_tokens: int, width: int = 4) -> Needs:
    """Bytes that a profile takes: those of a calibration, the head with its logits, and the attention sums of the record.

    width: bytes of a weight of the whole model; by layers it is 4.
    """
    found = needs(model, checkpoint, windows * window_tokens, window_tokens)
    config = model.config.get_text_config(decoder=True)
    heads, layers = config.num_attention_heads, len(anatomy(model).blocks)
    sums = 8 * windows * layers * heads * window_tokens
    scores = 3 * 4 * heads * window_tokens * min(window_tokens, 128)
    logits = 3 * 4 * window_tokens * config.vocab_size
    hidden = 4 * windows * window_tokens * config.hidden_size
    head = found.base + hidden + 4 * config.hidden_size * config.vocab_size + logits
    narrow = (4 - width) * sum(p.numel() for p in model.parameters())
    return Needs(found.whole + sums + scores + logits - narrow, max(found.by_layer + scores, head) + sums, 0, found.base)
