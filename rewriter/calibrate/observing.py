"""The statistics that the chosen declarations need: read from a record, or taken from the model over text or prompts.

Source     ours
Shapes     windows int64 [N, T] of token ids
Raises     CalibrationError for text, tokens or records that cannot be used; ModelError for damaged weights
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kvsink.calibrate.calibration import gather
from kvsink.calibrate.choices import Chosen, are_prompts
from kvsink.calibrate.record import Calibration
from kvsink.calibrate.uncalibrated import WINDOW, is_none, random_ids, tokens_for
from kvsink.codecs.protect import MOST, SinkStage, probe_stage
from kvsink.errors import CalibrationError
from kvsink.evaluate.texts import builtin_text, read_text
from kvsink.evaluate.texts.chats import chat_tokens, is_chats
from kvsink.evaluate.texts.mix import mixed_text
from kvsink.model.decoder import Decoder
from kvsink.model.rows import visual_tokens

__all__ = ["CALIBRATION_WINDOW", "Progress", "calibration_windows", "observe"]

CALIBRATION_WINDOW = 1024
_BUILT_IN: dict[Any, Callable[[], str]] = {"builtin": builtin_text, "mix": mixed_text}
Progress = Callable[[str, int, int], None]


def observe(
    decoder: Decoder,
    chosen: Chosen,
    calibration: Any,
    tokens: int,
    tokenizer: Any,
    batch: int = 1,
    progress: Progress | None = None,
    stages: Callable[[nn.Module], tuple[SinkStage, ...]] | None = None,
) -> Calibration:
    """The record that the declarations of all layers are designed from; empty where they need none.

    calibration, tokens, tokenizer, batch: as `kvsink.rewrite` takes them. stages: tells the emergence stages, where a profile
    holds them.
    """
    policies, notes = chosen.policies, chosen.notes
    kinds = {p.kind for ps in policies for p in ps}
    if decoder.stream is None:
        decoder.check_weights()
    record = Calibration((), {}, {}, torch.zeros(0), 0)
    known = None if stages is None else stages(decoder.model)
    if known is not None and not chosen.blocks:
        record.stages = known
    elif chosen.blocks or kinds & {"kvsink", "sinks", "pivots"}:
        if isinstance(calibration, Calibration):
            record = calibration
        elif isinstance(calibration, str | Path) and str(calibration).endswith(".safetensors"):
            record = Calibration.load(calibration, decoder.model if decoder.stream is None else None)
        else:
            if is_none(calibration):
                tokens = tokens_for(decoder.where.layers, max((n.rows for n in chosen.samples.values()), default=0))
                notes.append(f"no text: what is known of the layers comes from {tokens} tokens drawn at random")
            seen = are_prompts(calibration) and visual_tokens(decoder.model.config)
            ids = calibration if seen else calibration_windows(decoder, calibration, tokens, tokenizer)
            record = gather(decoder, ids, policies, chosen.blocks, batch, progress, chosen.samples, known)
        if known is not None and record.stages != known:
            record = replace(record, stages=known)
    if (named := sorted(kinds & {"kvsink", "sinks"})) and not record.stages:
        notes.append(f"no massive activation was found: {' and '.join(named)} protection has nothing to keep and is off")
    keeping = [p for ps in policies for p in ps if p.kind == "kvsink"]
    for stage in record.stages if keeping else ():
        most = max(keeping, key=lambda p: p.count or MOST)
        if stage.crowd > (kept := most.count or stage.kept):
            notes.append(
                f"block {stage.block} makes up to {stage.crowd} sinks in a window of calibration, {most} keeps {kept} of them"
                " exact, and longer contexts hold more; --protect"
                f" kvsink:{2 ** stage.crowd.bit_length()}+first:1 keeps more of them"
            )
    found = {i: (w, record.measurable(i, *w)) for i, w in enumerate(chosen.wanted) if w is not None}
    if blind := [i for i, (asked, kept) in found.items() if asked[0] != kept[0]]:
        notes.append(f"layers {blind}: their attention does not show its queries; errors of their keys count alike")
    if blind := [i for i, (asked, kept) in found.items() if asked[1] != kept[1]]:
        notes.append(f"layers {blind}: no queries, or no plain projection behind attention; errors of their values count alike")
    if any(p.kind == "pivots" and probe_stage(p, record.stages) is None for ps in policies for p in ps):
        notes.append("no activation passes the thresholds of pivots: they have nothing to keep but the first row")
    return record


def begun(windows: Tensor, tokenizer: Any) -> Tensor:
    """Windows of text [N, T] as `generate()` gives text to a model: the first token of each makes room for the one that the
    tokenizer puts before every text, where it puts one. Gemma 3 is out of its depth without it."""
    own, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return windows if whole[:1] == own[:1] else _led(windows, whole[0])


def _led(windows: Tensor, token: int) -> Tensor:
    windows = windows.clone()
    windows[:, 0] = token
    return windows


def calibration_windows(decoder: Decoder, source: Any, tokens: int, tokenizer: Any, window: int = CALIBRATION_WINDOW) -> Tensor:
    """Windows [N, T] of token ids from ids, texts, "builtin", "mix", "random", "none", a text file or chats; those of text begin as
    the tokenizer begins one, and those of random tokens too, or else with the token that the config names."""
    config, begin, first = decoder.config, False, None
    length = min(window, getattr(config, "max_position_embeddings", None) or window)
    if are_prompts(source):
        kept = [p["attention_mask"].bool() if "attention_mask" in p else torch.ones_like(p["input_ids"]) > 0 for p in source]
        source = torch.cat([p["input_ids"][keep].cpu() for p, keep in zip(source, kept, strict=True)])
    if isinstance(source, str) and source in ("random", "none"):
        length = min(length, WINDOW) if is_none(source) else length
        ids, begin = random_ids(decoder.model.config, tokens), tokenizer is not None
        first = None if begin else getattr(config, "bos_token_id", None)
    elif isinstance(source, Tensor):
        ids = source if source.dim() == 2 else source.flatten()
    else:
        tokenizer, begin = tokenizer or _tokenizer_of(decoder), True
        ids = torch.tensor(_text_tokens(source, tokenizer), dtype=torch.int64)
    if ids.dim() == 1:
        if ids.numel() < length:
            length = ids.numel()
        count = min(ids.numel(), tokens) // max(1, length)
        if count == 0:
            raise CalibrationError(f"{ids.numel()} calibration tokens, {tokens} asked for: give a longer text")
        if ids.numel() < tokens and isinstance(source, str | Path) and source not in _BUILT_IN:
            raise CalibrationError(
                f"calibration text {source} has {ids.numel()} tokens, {tokens} were asked for; give a longer text or "
                f"--calibration-tokens {ids.numel()}"
            )
        ids = ids[: count * length].reshape(count, length)
        ids = begun(ids, tokenizer) if begin else ids if first is None else _led(ids, first)
    if ids.numel() == 0:
        raise CalibrationError("0 calibration tokens: give token ids [N, T], or a longer text")
    vocabulary = config.vocab_size
    if wrong := ids[(ids < 0) | (ids >= vocabulary)].tolist():
        raise CalibrationError(f"calibration token {wrong[0]} is outside the vocabulary of {vocabulary}; wrong tokenizer?")
    return ids


def _text_tokens(source: Any, tokenizer: Any) -> list[int]:
    """Token ids of a text of ours, a text file, a file of chats, or texts."""
    if isinstance(source, str | Path) and is_chats(source):
        return chat_tokens(source, tokenizer)
    if isinstance(source, str | Path):
        text = _BUILT_IN[source]() if source in _BUILT_IN else read_text(source)
    else:
        text = "\n\n".join(source)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _tokenizer_of(decoder: Decoder) -> Any:
    name = getattr(decoder.model.config, "_name_or_path", "")
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"no tokenizer found for {name or type(decoder.model).__name__!r}; pass tokenizer=, or calibration= as token ids"
        ) from error
