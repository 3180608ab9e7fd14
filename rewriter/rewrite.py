"""The engine behind `kvsink.rewrite` and `kvsink-rewrite` in five steps: check, choose, observe, design, apply.

Source     ours
Raises     KvsinkError children; a model is changed only after every check has passed
"""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvsink.calibrate.choices import Chosen, RewriteOptions, are_prompts, choose, with_modality
from kvsink.calibrate.design import Design
from kvsink.calibrate.designed import design
from kvsink.calibrate.observing import Progress, calibration_windows, observe
from kvsink.calibrate.places import count_places
from kvsink.calibrate.plan import planned
from kvsink.calibrate.probing import check as check_model
from kvsink.calibrate.record import Calibration
from kvsink.calibrate.streaming import Stream
from kvsink.calibrate.uncalibrated import is_none
from kvsink.codecs.protect import SinkStage
from kvsink.errors import UnsupportedError
from kvsink.evaluate.applying import apply
from kvsink.hf import install_generate
from kvsink.methods import DEFAULT, Method, get_method
from kvsink.model.anatomy import Anatomy, rewritable
from kvsink.model.decoder import Decoder
from kvsink.report import Report

__all__ = ["RewriteOptions", "rewrite"]


def rewrite(
    model: nn.Module,
    method: str | Method | None = None,
    *,
    key_bits: float | None = None,
    value_bits: float | None = None,
    protect: str | None = None,
    window: int | None = None,
    calibration: Any = "builtin",
    calibration_tokens: int | None = None,
    layers: str = "",
    tokenizer: Any = None,
    fold: bool = True,
    storage_dtype: torch.dtype | None = None,
    batch: int = 1,
    progress: Progress | None = None,
    bits: float | None = None,
    plan: str = "uniform",
    plan_ids: Tensor | None = None,
    designs: dict[Any, Design] | None = None,
    profile: str | Path | dict[str, Any] | None = None,
    stream: Stream | None = None,
    sliding: bool | None = None,
    modality: str | None = None,
    where: Anatomy | None = None,
    check: bool = True,
) -> Report:
    """Rewrite a causal language model in memory; its `generate()` then runs on the packed cache.

    method: a name of `kvsink.methods()` or a Method; None: klt. key_bits, value_bits: average bits, 16 keeps a side exact. protect:
    rows kept exact, such as "kvsink:5+first:1". window: recent rows kept exact.
    calibration: "builtin", "mix", a text file, chats, a list of texts, token ids [N, T], prompts (dicts of model inputs), a
    `Calibration`, "random" tokens, or "none": no text, few random tokens where a method asks for statistics.
    calibration_tokens: None takes 4,096, and 16,384 where codebooks or levels are learnt. layers: per-layer changes,
    "0-1:key_bits=4". fold: put value rotations into the weights (the model stays the same function). storage_dtype: dtype the
    weights will be saved in, when it is narrower.
    plan: "uniform", or "auto" for widths per layer within `bits` counted bits (None: those of the uniform plan); it is measured
    on plan_ids [N, T], by default the calibration text.
    designs: codecs by layer and side that earlier calls with the same record have made, so that they are not made again.
    sliding: pack sliding-window layers too; None does so where a model has no others.
    profile: a profile.json of this model or its record; its emergence stages are taken instead of looked for.
    where: what an earlier look at the same model found. check: compare with the stock model before anything is kept.
    modality: a method whose bits by layer class are laid over this one's codec, such as "akvq-vl"; "none" leaves its own out.
    stream: gives a model without weights its layers one at a time; what would be folded into them waits in `stream.folds`.

    Returns a Report. Raises KvsinkError children; the model is then unchanged.
    """
    begun = time.monotonic()
    m = with_modality(method if isinstance(method, Method) else get_method(method or DEFAULT), modality)
    asked = RewriteOptions(
        m.name, key_bits, value_bits, protect, window, layers=layers, fold=fold, bits=bits, plan=plan, sliding=sliding, check=check
    )
    designs = {} if designs is None else designs
    decoder = Decoder(*rewritable(model, where), stream)
    if (ranks := getattr(model, "_tp_size", None) or 1) > 1:
        raise UnsupportedError(f"{decoder.name} is split over {ranks} processes; rewrite it in one, and load its folder split")
    notes = check_model(decoder, where is not None)
    chosen = choose(decoder, m, asked, calibration, notes)
    stages = None if profile is None else partial(_profiled_stages, profile)
    calibration_tokens = calibration_tokens or chosen.tokens
    record = observe(decoder, chosen, calibration, calibration_tokens, tokenizer, batch, progress, stages)
    if plan == "auto":
        source = "builtin" if isinstance(calibration, Calibration) or str(calibration).endswith(".safetensors") else calibration
        ids = calibration_windows(decoder, source, calibration_tokens, tokenizer) if plan_ids is None else plan_ids
        _plan(decoder, chosen, record, ids, bits, designs, progress)
    designed = design(decoder, chosen, record, designs, progress)
    report = apply(decoder, chosen, record, designed, fold, storage_dtype, check)
    counted = record.stages and stream is None and not is_none(calibration)
    if counted and any(p.kind == "sinks" for ps in chosen.policies for p in ps):
        _count(decoder, calibration, calibration_tokens, tokenizer, report)
    install_generate(decoder.model)
    report.seconds = time.monotonic() - begun
    return report


def _plan(
    decoder: Decoder,
    chosen: Chosen,
    record: Calibration,
    ids: Tensor,
    bits: float | None,
    designs: dict[Any, Design],
    progress: Progress | None,
) -> None:
    """Give the layers the widths of an automatic plan, found by rewriting the model with others; it is as it was afterwards."""
    base = chosen.base
    run = partial(
        rewrite,
        decoder.model,
        chosen.method,
        key_bits=base.key_bits,
        value_bits=base.value_bits,
        protect=base.protect,
        window=base.window,
        calibration=record,
        fold=False,
        designs=designs,
        sliding=chosen.sliding,
        where=decoder.where,
        check=False,
    )
    found = planned(decoder, run, chosen.method, (base.key_bits, base.value_bits), ids, bits, progress)
    chosen.notes.append(found.note)
    chosen.planned(found.layers)


def _count(decoder: Decoder, calibration: Any, tokens: int, tokenizer: Any, report: Report) -> None:
    """Count the places that pages of a serving engine need for the rows of `sinks`, where there is text to count over."""
    if isinstance(calibration, Calibration) or str(calibration).endswith(".safetensors") or are_prompts(calibration):
        return
    runtime = decoder.runtime
    assert runtime is not None
    ids = calibration_windows(decoder, calibration, tokens, tokenizer)
    found = count_places(decoder, ids, [plan.segments for plan in runtime.plans], runtime.stages)
    runtime.extra["pages"] = asdict(found)
    report.notes.append(found.note)


def _profiled_stages(profile: str | Path | dict[str, Any], model: nn.Module) -> tuple[SinkStage, ...]:
    from kvsink.profiling import load_profile, profile_stages

    return profile_stages(profile if isinstance(profile, dict) else load_profile(profile), model)
