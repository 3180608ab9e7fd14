"""The engine behind `kvsink.rewrite`, `torch.compile(backend="kvsink")` and `kvsink-rewrite`: calibrate, design, fold, attach.

Source     ours
Raises     KvsinkError children; a model is changed only after every check has passed
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kvsink.calibration import Calibration, calibrate
from kvsink.codecs import Codec, SideSpec
from kvsink.design import design_key, design_value, key_blocks, needs_calibration
from kvsink.errors import CalibrationError, KvsinkError, ModelError, UnsupportedError
from kvsink.fold import fold_value_rotation, foldable
from kvsink.kernels.hadamard import hadamard_ref
from kvsink.methods import Method, get_method
from kvsink.protect import parse_policies, segments_for_layer
from kvsink.report import LayerReport, Report, counted_bits
from kvsink.runtime import Anatomy, LayerPlan, Runtime, anatomy, attach
from kvsink.texts import builtin_text

__all__ = ["LayerChoice", "RewriteOptions", "parse_layers", "rewrite"]

CALIBRATION_WINDOW = 1024
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RewriteOptions:
    """What the user may choose. None means the method's own default."""

    method: str = "klt"
    key_bits: float | None = None
    value_bits: float | None = None
    protect: str | None = None
    window: int | None = None
    calibration: str = "builtin"
    calibration_tokens: int = 16384
    layers: str = ""
    fold: bool = True


@dataclass(frozen=True)
class LayerChoice:
    """The options of one layer after `--layers` has been applied."""

    key_bits: float
    value_bits: float
    protect: str
    window: int


def parse_layers(text: str, count: int, base: LayerChoice) -> list[LayerChoice]:
    """Apply `--layers "0-1:key_bits=4,protect=none;29:value_bits=8"` to `count` layers that start as `base`."""
    choices = [base] * count
    for part in filter(None, text.replace(" ", "").split(";")):
        span, _, assignments = part.partition(":")
        first, _, last = span.partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or not assignments:
            raise KvsinkError(f"--layers {part!r} cannot be read; write for example 0-1:key_bits=4,value_bits=8")
        begin, end = int(first), int(last or first)
        if not begin <= end < count:
            raise KvsinkError(f"--layers {part!r} names layers outside 0 to {count - 1}")
        changes: dict[str, Any] = {}
        for assignment in assignments.split(","):
            name, _, value = assignment.partition("=")
            try:
                kind = {"key_bits": float, "value_bits": float, "protect": str, "window": int}[name]
                changes[name] = kind(value)
            except (KeyError, ValueError) as error:
                raise KvsinkError(
                    f"--layers {assignment!r} is not one of key_bits=, value_bits=, protect=, window= with a number"
                ) from error
        for i in range(begin, end + 1):
            choices[i] = replace(choices[i], **changes)
    return choices


def calibration_windows(model: nn.Module, source: Any, tokens: int, tokenizer: Any) -> Tensor:
    """Windows [N, T] of token ids from ids, texts, "builtin" or a text file."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    length = min(CALIBRATION_WINDOW, getattr(config, "max_position_embeddings", None) or CALIBRATION_WINDOW)
    if isinstance(source, Tensor):
        ids = source if source.dim() == 2 else source.flatten()
    else:
        if isinstance(source, str) and source == "builtin":
            text = builtin_text()
        elif isinstance(source, str | Path):
            from kvsink.texts import read_text

            text = read_text(source)
        else:
            text = "\n\n".join(source)
        tokenizer = tokenizer or _tokenizer_of(model)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    if ids.dim() == 1:
        if ids.numel() < length:
            length = ids.numel()
        count = min(ids.numel(), tokens) // max(1, length)
        if count == 0:
            raise CalibrationError(f"{ids.numel()} calibration tokens, {tokens} asked for: give a longer text")
        if ids.numel() < tokens and isinstance(source, str | Path) and source != "builtin":
            raise CalibrationError(
                f"calibration text {source} has {ids.numel()} tokens, {tokens} were asked for; give a longer text or "
                f"--calibration-tokens {ids.numel()}"
            )
        ids = ids[: count * length].reshape(count, length)
    if ids.numel() == 0:
        raise CalibrationError("0 calibration tokens: give token ids [N, T], or a longer text")
    vocabulary = config.vocab_size
    if wrong := ids[(ids < 0) | (ids >= vocabulary)].tolist():
        raise CalibrationError(
            f"calibration token {wrong[0]} is outside the vocabulary of {vocabulary}; wrong tokenizer?"
        )
    return ids


def _tokenizer_of(model: nn.Module) -> Any:
    name = getattr(model.config, "_name_or_path", "")
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"no tokenizer found for {name or type(model).__name__!r}; pass tokenizer=, or calibration= as token ids"
        ) from error


def check_weights(model: nn.Module) -> None:
    """Raise ModelError when a weight is NaN or infinite."""
    for name, p in model.named_parameters():
        if p.is_floating_point() and not torch.isfinite(p).all():
            raise ModelError(f"weight {name} holds NaN or infinite numbers; the checkpoint is damaged, fetch it again")


def _refusal(where: Anatomy, layer: int) -> str:
    """Why a layer cannot be packed, or an empty string."""
    kind = where.layer_types[layer] if layer < len(where.layer_types) else "full_attention"
    if kind != "full_attention":
        return f"{kind.replace('_', ' ')}: its window already bounds its size, kept in 16 bit"
    return ""


def _rope_refusal(config: Any) -> str:
    """Why this model's angles cannot be undone by position alone, or an empty string."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope] if "rope_type" in rope or "type" in rope else [r for r in rope.values() if isinstance(r, dict)]
    for r in kinds:
        kind = r.get("rope_type", r.get("type"))
        if kind in ("dynamic", "longrope"):
            return f"rope type {kind} changes its angles with the length"
    return ""


def rewrite(
    model: nn.Module, method: str | Method = "klt", *, key_bits: float | None = None, value_bits: float | None = None,
    protect: str | None = None, window: int | None = None, calibration: Any = "builtin", calibration_tokens: int = 16384,
    layers: str = "", tokenizer: Any = None, fold: bool = True, storage_dtype: torch.dtype | None = None, batch: int = 1,
    progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Rewrite a causal language model in memory; its `generate()` then runs on the packed cache.

    method: a name of `kvsink.methods()` or a Method. key_bits, value_bits: average bits, 16 keeps a side exact. protect: rows
    kept exact, such as "kvsink:5+first:1". window: recent rows kept exact. calibration: "builtin", a text file, a list of
    texts, token ids [N, T], or a `Calibration`. layers: per-layer changes, "0-1:key_bits=4". fold: put value rotations into
    the weights (the model stays the same function). storage_dtype: dtype the weights will be saved in, when it is narrower.

    Returns a Report. Raises KvsinkError children; the model is then unchanged.
    """
    begun = time.monotonic()
    m = method if isinstance(method, Method) else get_method(method)
    where = anatomy(model)
    earlier = model.__dict__.get("_kvsink_runtime")
    if earlier is not None and any(p.codec is not None and p.codec.value.folded for p in earlier.plans):
        raise UnsupportedError(
            f"this model has been rewritten by {earlier.method}, which turned its value weights; load the model again, or "
            "rewrite the first time with fold=False"
        )
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    base = LayerChoice(
        m.key_bits if key_bits is None else key_bits,
        m.value_bits if value_bits is None else value_bits,
        m.protect if protect is None else protect,
        m.window if window is None else window,
    )
    if base.key_bits == base.value_bits == 16 and protect is None:
        base = replace(base, protect="none")  # everything is exact already
    n = len(where.attentions)
    choices = parse_layers(layers, n, base)
    if (least := min(c.window for c in choices)) < 0:
        raise KvsinkError(f"window={least} is negative; give the number of recent tokens to keep exact")
    wanted: list[tuple[SideSpec, SideSpec] | None] = []
    for i, choice in enumerate(choices):
        if _refusal(where, i):
            wanted.append(None)
            continue
        key, value = m.side("key", choice.key_bits), m.side("value", choice.value_bits)
        rope_reason = _rope_refusal(config)
        if rope_reason and key.packed and (key.domain == "block" or key.center):
            raise UnsupportedError(
                f"layer {i} ({where.attentions[i]}): {rope_reason}, which {m.name} keys need to undo; use --method rtn"
            )
        key.resolved(where.kv_heads, where.head_dim), value.resolved(where.kv_heads, where.head_dim)  # refuse early
        wanted.append((key, value))
    if all(w is None for w in wanted):
        raise UnsupportedError(
            f"{type(model).__name__}: every layer is left alone ({_refusal(where, 0)}); there is nothing to rewrite"
        )
    policies = [parse_policies(c.protect) for c in choices]
    uses_stages = any(p.kind == "kvsink" for ps in policies for p in ps)
    blocks = {
        i: key_blocks(w[0])
        for i, w in enumerate(wanted)
        if w is not None and (needs_calibration(w[0]) or needs_calibration(w[1]))
    }
    check_weights(model)
    record = Calibration((), {}, {}, torch.zeros(0), 0)
    if blocks or uses_stages:
        if isinstance(calibration, Calibration):
            record = calibration
        elif isinstance(calibration, str | Path) and str(calibration).endswith(".safetensors"):
            record = Calibration.load(calibration, model)
        else:
            ids = calibration_windows(model, calibration, calibration_tokens, tokenizer)
            record = calibrate(model, ids, policies, blocks, batch, progress)
    notes = []
    if uses_stages and not record.stages:
        notes.append("no massive activation was found: kvsink protection has nothing to keep and is off")
    probe = Runtime(model, tuple(LayerPlan(None) for _ in range(n)), {}, (), m.name)
    device = next(model.parameters()).device
    plans: list[LayerPlan] = []
    tables: dict[str, Tensor] = {}
    folds: list[tuple[nn.Module, int]] = []
    for i, w in enumerate(wanted):
        if w is None:
            plans.append(LayerPlan(None, (), _refusal(where, i)))
            continue
        key_design = design_key(
            w[0],
            i,
            where.kv_heads,
            where.head_dim,
            record,
            partial(probe.offset_angles, i, device=torch.device("cpu")),
        )
        value_design = design_value(w[1], i, where.kv_heads, where.head_dim, record)
        value_spec, value_tables = value_design.spec, dict(value_design.tables)
        attention = model.get_submodule(where.attentions[i])
        if value_spec.transform == "hadamard":
            reason = foldable(attention) if fold else "folding is off"
            if reason is None and value_spec.heads_per_group == 1:
                folds.append((attention, value_spec.order))
                value_spec = replace(value_spec, folded=True)
                if "v_mean" in value_tables:
                    value_tables["v_mean"] = hadamard_ref(value_tables["v_mean"], value_spec.order)
            elif reason and reason != "folding is off" and i == 0:
                notes.append(f"value rotation runs online: {reason}")
        segments = segments_for_layer(policies[i], i, record.stages)
        codec = Codec(key_design.spec, value_spec, tuple(s.count for s in segments), choices[i].window)
        tables.update({f"layers.{i}.{name}": t for name, t in {**key_design.tables, **value_tables}.items()})
        plans.append(LayerPlan(codec, segments))
    for attention, order in folds:
        fold_value_rotation(attention, order, storage_dtype)
    runtime = Runtime(model, tuple(plans), {k: t.to(device) for k, t in tables.items()}, record.stages, m.name)
    attach(model, runtime)
    from kvsink.hf import install_generate

    install_generate(model)
    report = make_report(model, runtime, base.protect, record.tokens, notes)
    report.seconds = time.monotonic() - begun
    return report


def make_report(model: nn.Module, runtime: Runtime, protect: str, tokens: int, notes: Sequence[str]) -> Report:
    """The report of a rewritten model."""
    where = runtime.anatomy
    report = Report(
        model=getattr(model.config, "_name_or_path", "") or type(model).__name__,
        method=runtime.method,
        protect=protect,
        stages=[asdict(s) for s in runtime.stages],
        calibration_tokens=tokens,
        table_bytes=runtime.table_nbytes(),
        notes=list(notes),
        versions=versions(),
    )
    packed = sum(plan.codec is not None for plan in runtime.plans)
    for i, plan in enumerate(runtime.plans):
        if plan.codec is None:
            row = LayerReport(i, where.attentions[i], False, "16 bit", "16 bit", 16.0, 16.0, "", plan.reason)
        else:
            key_bits, value_bits = counted_bits(plan.codec, where.kv_heads, where.head_dim, layers=packed)
            row = LayerReport(
                i, where.attentions[i], True, describe(plan.codec.key), describe(plan.codec.value), key_bits, value_bits,
                ", ".join(s.key for s in plan.segments), "",
            )  # fmt: skip
        report.layers.append(row)
    return report


def describe(spec: SideSpec) -> str:
    """A side in a few words, stage by stage."""
    if not spec.packed:
        return "16 bit"
    words = []
    if spec.center:
        words.append("centred")
    if spec.domain == "block":
        words.append("before RoPE" if spec.block == 1 else f"block {spec.block}")
    if spec.transform != "none":
        words.append(spec.transform + (f" x{spec.heads_per_group} heads" if spec.heads_per_group > 1 else ""))
    if spec.reorder:
        words.append("reordered")
    widths = "".join(str(w) for w in spec.widths) if len(set(spec.widths)) > 1 else f"{spec.widths[0]} bit"
    words.append(f"{spec.kind} {widths}" + (" gain" if spec.gain else ""))
    if spec.norm:
        words.append("token norms")
    if spec.by_token_block:
        words.append(f"per channel over {spec.group_tokens} tokens")
    if spec.flush:
        words.append(f"in blocks of {spec.flush}")
    if spec.newest:
        words.append(f"newest {spec.newest} exact")
    return ", ".join(words)


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    from kvsink import __version__

    return {
        "kvsink": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
