"""Run a model over text and keep what the codecs need: emergence stages, key and value statistics, a fingerprint.

Formula    emergence stage: a block whose largest |H| ends a rise by at least 2x per block, is above 100 and above 500 times
           the median of |H| at that block (Sun et al. 2024 say 100 and about 1000; a first, smaller stage needs less)
Source     KVSink, arXiv 2508.04257 section 3; several stages per model are ours
Differs    rows that will stay exact are left out of every statistic
Shapes     ids int64 [N, T] windows of tokens
Raises     CalibrationError for too few tokens, and for NaN or infinite activations
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer

from kvsink.cache.hybrid import states_of
from kvsink.calibrate.queries import QueryStats, see_queries
from kvsink.calibrate.record import Calibration
from kvsink.calibrate.samples import Collector, frozen, watched
from kvsink.calibrate.statistics import KeyStats, SampleNeed, ValueStats
from kvsink.calibrate.streaming import Job, Stream
from kvsink.codecs.protect import Policy, SinkStage, segments_for_layer
from kvsink.errors import CalibrationError
from kvsink.kernels.rope import rope, unrope
from kvsink.model.anatomy import Anatomy
from kvsink.model.attention import NOTES, install_attention
from kvsink.model.candidates import order_candidates
from kvsink.model.decoder import Decoder
from kvsink.model.frame import Frame
from kvsink.model.runtime import Runtime
from kvsink.model.tables import LayerPlan

__all__ = ["calibrate", "find_stages", "gather"]

Progress = Callable[[str, int, int], None]
MASSIVE = 0.2  # of the largest activation of a stage: rows above it are sinks


# -- emergence ---------------------------------------------------------------------------------------------------------


def find_stages(largest: list[float], medians: list[float], channels: list[tuple[int, ...]]) -> tuple[SinkStage, ...]:
    """Emergence stages from the largest and median |H| per block output; channels are the largest ones of each block."""
    stages = []
    for l in range(len(largest) - 1):
        before = largest[l - 1] if l else 0.0
        rises, still = largest[l] >= 2 * before, largest[l + 1] >= 2 * largest[l]
        if rises and not still and largest[l] > 100 and largest[l] > 500 * medians[l]:
            stages.append(SinkStage(l, channels[l], largest[l], medians[l]))
    return tuple(stages)


class _BlockRecorder:
    """Forward hooks that keep, per block output, the largest |H| per channel and per row, and the mean of its medians."""

    def __init__(self, decoder: Decoder) -> None:
        self.peak: dict[int, Tensor] = {}
        self.rows: dict[int, list[Tensor]] = {}
        self.median: dict[int, list[float]] = {}
        self.handles = [
            decoder.model.get_submodule(name).register_forward_hook(self._record(i)) for i, name in enumerate(decoder.where.blocks)
        ]

    def _record(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = (output[0] if isinstance(output, tuple) else output).float().abs()
            if not torch.isfinite(hidden).all():
                raise CalibrationError(f"block {i} puts out NaN or infinite activations; check the weights or calibrate in float32")
            peak = hidden.flatten(0, -2).amax(0).cpu()
            self.peak[i] = torch.maximum(self.peak[i], peak) if i in self.peak else peak
            self.rows.setdefault(i, []).append(hidden.amax(-1).reshape(-1).cpu())
            self.median.setdefault(i, []).append(float(hidden.flatten()[:: max(1, hidden.numel() // 65536)].median()))

        return hook

    def crowd(self, stage: SinkStage) -> int:
        """The most rows of a window that are massive behind a stage's block."""
        return max((int((rows > MASSIVE * stage.size).sum()) for rows in self.rows.get(stage.block, [])), default=0)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


class _Recording(DynamicLayer):
    """A cache layer that hands everything to the statistics and keeps nothing."""

    def __init__(self, owner: _RecordingCache, layer: int) -> None:
        super().__init__()
        self.owner, self.layer = owner, layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        collector = self.owner.collector
        if collector is not None:
            key_states, value_states = collector.track(self.layer, key_states, value_states)
        with torch.no_grad():
            self.owner.record(self.layer, key_states, value_states.detach())
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


class _RecordingHybrid(LinearAttentionLayer, _Recording):
    """The same with the recurrent state that some layers hold beside their keys."""

    def __init__(self, owner: _RecordingCache, layer: int) -> None:
        _Recording.__init__(self, owner, layer)
        LinearAttentionLayer.__init__(self, **states_of(owner.config, layer))


class _RecordingCache(Cache):
    is_kvsink = True  # the hooks of the runtime fill the frame

    def __init__(
        self, runtime: Runtime, into: Calibration, blocks: dict[int, tuple[int, ...]], collector: Collector | None
    ) -> None:
        kinds, self.config = runtime.anatomy.layer_types, runtime.config
        super().__init__(layers=[(_RecordingHybrid if k == "hybrid" else _Recording)(self, i) for i, k in enumerate(kinds)])
        self.runtime, self.into, self.blocks, self.collector = runtime, into, blocks, collector
        self.frame: Frame | None = None
        self.shared = self  # where the hooks put the frame, as in a KVSinkCache

    def record(self, layer: int, given: Tensor, v: Tensor) -> None:
        k = given.detach()
        frame = self.frame or Frame()
        b, _, s, _ = k.shape
        positions = frame.positions
        if positions is None:
            positions = torch.arange(s, device=k.device)[None]
        cos, sin = frame.cos, frame.sin
        if cos is None or sin is None:
            cos, sin = self.runtime.angles(layer, positions)
        else:
            cos, sin = self.runtime.canonical(layer, cos, sin)
        order = self.runtime.order(layer, k.device)
        k = k if order is None else k.index_select(-1, order[0])
        keep = torch.ones(b, s, dtype=torch.bool, device=k.device)
        for segment in self.runtime.plans[layer].segments:
            key = segment.key if segment.source != "massive" else f"{segment.key}@{layer}"
            pair = frame.candidates.get(key)
            if pair is None:
                number = positions if frame.valid is None else frame.valid.cumsum(1) - 1
                pair = frame.candidates[key] = order_candidates(frame, number, b, segment)
            exact = torch.zeros_like(keep).scatter_(1, pair[1], pair[0] > float("-inf"))
            keep &= ~exact
        if frame.valid is not None:
            keep &= frame.valid
        cos, sin = cos[:, None].float(), sin[:, None].float()
        keys = unrope(k.float(), cos, sin)
        for block in self.blocks[layer]:
            if not block:  # as attention sees them
                one = torch.ones(1, cos.shape[-1], device=k.device)
                self.into.keys[layer, 0].add(k, torch.zeros_like(positions).expand(b, s), keep, one, torch.zeros_like(one))
                continue
            offset_cos, offset_sin = self.runtime.offset_angles(layer, block, k.device)
            self.into.keys[layer, block].add(keys, positions.expand(b, s), keep, offset_cos, offset_sin)
        self.into.values[layer].add(v, keep)
        if self.collector is not None:
            back = partial(_back, order=order, cos=cos, sin=sin)
            self.collector.draw(layer, keys, v, positions.expand(b, s), keep, back)
        if self.blocks[layer]:
            seen = partial(see_queries, self.into.queries[layer], k, keep, frame.valid, order=order, cos=cos, sin=sin)
            NOTES.leave(given, seen)


def _back(gradient: Tensor, order: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of keys [B, H, S, D] as that of the keys before RoPE: turned by the transpose, scaling included."""
    rows = gradient if order is None else gradient.index_select(-1, order[0])
    return rope(rows, cos, -sin)


def _prompts(ids: Tensor | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [{"input_ids": row[None]} for row in ids] if isinstance(ids, Tensor) else list(ids)


def _run(decoder: Decoder, prompt: Mapping[str, Any], logits: bool = False, **options: Any) -> Any:
    """One forward pass; a prompt whose pictures and placeholders do not agree is named. logits: of all tokens are asked for, which
    a model may leave out else."""
    if not logits and "logits_to_keep" in inspect.signature(decoder.model.forward).parameters:
        options["logits_to_keep"] = 1
    inputs = {n: t.to(decoder.device) if isinstance(t, Tensor) else t for n, t in prompt.items()}
    try:
        return decoder.model(**inputs, **options)
    except ValueError as error:
        if len(prompt) == 1:
            raise
        raise CalibrationError(
            f"a calibration prompt cannot be run ({' '.join(str(error).split())[:160]}); its image placeholders must be those "
            "its processor made, none cut off"
        ) from error


def _plain_layer(runtime: Runtime, layer: int) -> Any:
    """transformers' own layer of a kind that keeps everything, or the state of a layer without attention."""
    if runtime.anatomy.layer_types[layer] in ("full_attention", "sliding_attention"):
        return DynamicLayer()
    return DynamicCache(config=runtime.config.get_text_config(decoder=True)).layers[layer]


def _looking_on(
    runtime: Runtime, into: Calibration, blocks: Mapping[int, tuple[int, ...]], collector: Collector | None
) -> _RecordingCache:
    """A cache for one forward pass that hands what it sees to the statistics of the layers in `blocks`."""
    count = len(runtime.plans)
    cache = _RecordingCache(runtime, into, {i: blocks.get(i, ()) for i in range(count)}, collector)
    for layer in range(count):
        if layer not in blocks:
            cache.layers[layer] = _plain_layer(runtime, layer)
    return cache


def _by_layers(
    stream: Stream, ids: Tensor, make: Callable[[], _RecordingCache], collector: Collector | None, tell: Callable[[int, int], None]
) -> None:
    """All windows through all layers, the layers outermost."""

    def begin(window: int) -> Callable[[], None]:
        return lambda: collector.begin(window) if collector is not None else None

    stream.run([Job(row[None], make(), begin(i)) for i, row in enumerate(ids)], tell)


def calibrate(
    model: nn.Module,
    ids: Tensor | Sequence[Mapping[str, Any]],
    policies: Sequence[tuple[Policy, ...]],
    blocks: dict[int, tuple[int, ...]],
    batch: int = 1,
    progress: Progress | None = None,
    samples: Mapping[int, SampleNeed] | None = None,
    known: tuple[SinkStage, ...] | None = None,
    stream: Stream | None = None,
    where: Anatomy | None = None,
) -> Calibration:
    """Run `ids` [N, T], or prompts (inputs of the model, images included), through the model: two windows to find the stages,
    then all for the statistics.

    policies: of each layer, since what stays exact is left out. blocks: block lengths whose key statistics each layer
    needs (0: after RoPE; empty: only stages). samples: layers of `blocks` whose rows are kept too, and with which weights; these
    take windows one at a time, whatever `batch` says. Needs as many tokens as four times the head dimension, and as many as the
    samples ask for. known: stages found by a profile, taken as they are. stream: runs a model without weights by layers.
    where: what is known of the model's layers. Raises CalibrationError.
    """
    return gather(Decoder(model, where, stream), ids, policies, blocks, batch, progress, samples, known)


def gather(
    decoder: Decoder,
    ids: Tensor | Sequence[Mapping[str, Any]],
    policies: Sequence[tuple[Policy, ...]],
    blocks: dict[int, tuple[int, ...]],
    batch: int = 1,
    progress: Progress | None = None,
    samples: Mapping[int, SampleNeed] | None = None,
    known: tuple[SinkStage, ...] | None = None,
) -> Calibration:
    """`calibrate` of a model that has been looked at."""
    where, stream = decoder.where, decoder.stream
    prompts = _prompts(ids)
    given = sum(int(p["attention_mask"].sum()) if "attention_mask" in p else p["input_ids"].numel() for p in prompts)
    wanted = dict(samples or {})
    if absent := set(wanted) - set(blocks):
        raise CalibrationError(f"samples are asked of layers {sorted(absent)} that record no statistics; add them to blocks")
    if wanted and given < (least := max(n.rows for n in wanted.values())):
        raise CalibrationError(f"{given} calibration tokens are too few for codebooks of {least} centroids; give at least {least}")
    widest = max((where.layers[i].key_dim for i, lengths in blocks.items() if lengths), default=0)
    if given < 4 * widest:
        raise CalibrationError(f"{given} calibration tokens are too few for head_dim={widest}; give at least {4 * widest}")
    tell = progress or (lambda what, done, total: None)
    if stream is not None and any(n.fisher for n in wanted.values()):
        raise CalibrationError(
            "weights by the gradient of the loss need the whole model at once; use a method without them, or a larger machine"
        )
    recorder = _BlockRecorder(decoder)
    few = prompts[:2]
    try:
        with torch.no_grad():
            if stream is not None:
                stream.run([Job(p["input_ids"]) for p in few], partial(tell, "finding sinks"))
            for i in range(len(few) if stream is None else 0):
                _run(decoder, few[i], use_cache=False)
                tell("finding sinks", i + 1, len(few))
    finally:
        recorder.close()
    n = len(where.blocks)
    peaks = [recorder.peak.get(i, torch.zeros(1)) for i in range(n)]  # a block may not run on tokens alone
    largest = [float(peak.max()) for peak in peaks]
    medians = [sum(found) / len(found) if (found := recorder.median.get(i)) else 0.0 for i in range(n)]
    top = [tuple(int(c) for c in peak.topk(min(4, peak.numel())).indices) for peak in peaks]
    stages = find_stages(largest, medians, top) if known is None else known
    stages = tuple(replace(s, crowd=recorder.crowd(s)) for s in stages)
    out = Calibration(stages, {}, {}, decoder.fingerprint(), 0, largest, medians)
    for layer, lengths in blocks.items():
        _, kv, key_dim, value_dim = where.layers[layer]
        out.values[layer] = ValueStats.empty(kv, value_dim)
        if lengths:
            out.queries[layer] = QueryStats.empty(kv, key_dim)
        for block in lengths:
            out.keys[layer, block] = KeyStats.empty(max(1, block), kv, key_dim)
    if not blocks:
        return out
    install_attention()
    plans = tuple(LayerPlan(None, segments_for_layer(policies[i], i, stages) if i in blocks else ()) for i in range(n))
    runtime = decoder.carrying(plans, {}, stages, "calibration")
    collector = Collector(wanted, len(prompts)) if wanted else None
    step = 1 if collector is not None and collector.weighs else batch
    if step > 1 and isinstance(ids, Tensor):
        prompts = [{"input_ids": ids[i : i + step]} for i in range(0, len(ids), step)]
    with decoder.attached(runtime), frozen(decoder.model.parameters()), watched(decoder, collector):
        if stream is not None:
            assert isinstance(ids, Tensor)
            make = partial(_looking_on, runtime, out, blocks, collector)
            _by_layers(stream, ids, make, collector, partial(tell, "calibrating"))
            out.tokens += ids.numel()
        at = 0
        for prompt in prompts if stream is None else ():
            rows, start = prompt["input_ids"].to(decoder.device), at
            at += len(rows)
            cache = _looking_on(runtime, out, blocks, collector)
            if collector is not None:
                collector.begin(start)
            fisher = collector is not None and collector.fisher
            with torch.set_grad_enabled(fisher):
                logits = _run(decoder, prompt, fisher, **decoder.given(cache), use_cache=True).logits
                if collector is not None and fisher:
                    collector.backward(logits, rows)
            out.tokens += int(prompt["attention_mask"].sum()) if "attention_mask" in prompt else rows.numel()
            tell("calibrating", at, sum(len(p["input_ids"]) for p in prompts))
    if collector is not None:
        out.samples = collector.samples(out.tokens)
    out.check([heads.key_dim for heads in where.layers])
    return out
