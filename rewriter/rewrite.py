"""The engine behind `kvsink.rewrite`, `torch.compile(backend="kvsink")` and `kvsink-rewrite`: calibrate, design, fold, attach.

Source     ours
Raises     KvsinkError children; a model is changed only after every check has passed
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kvsink.cache.ranges import layer_sizes, ranged, seen_sizes
from kvsink.cache.sliding import WINDOWED, sliding_refusal, window_of
from kvsink.calibrate.calibration import Calibration, calibrate
from kvsink.calibrate.design import (
    Design,
    design_key,
    design_value,
    gather_needs,
    key_blocks,
    needs_calibration,
    sample_need,
)
from kvsink.calibrate.patterns import PATTERNS, attention_patterns, classify
from kvsink.calibrate.plan import Plan, candidates, choose_plan
from kvsink.calibrate.plan import sides as planned_sides
from kvsink.calibrate.probing import look, unknown_turnings
from kvsink.calibrate.statistics import SampleNeed
from kvsink.calibrate.streaming import Stream
from kvsink.codecs import Codec, SideSpec
from kvsink.codecs.protect import SinkStage, anchors_for_layer, parse_policies, probe_stage, segments_for_layer
from kvsink.errors import CalibrationError, KvsinkError, ModelError, UnknownName, UnsupportedError
from kvsink.evaluate.selfcheck import Check, check_cache, check_fold, refused_folds
from kvsink.evaluate.texts import builtin_text
from kvsink.kernels.hadamard import hadamard_ref
from kvsink.methods import Method, get_method, methods
from kvsink.model.adapters import inner_model
from kvsink.model.fold import FOLDED, fold_value_rotation, foldable, is_plain, shared_weights
from kvsink.model.observed import check_observable
from kvsink.model.offload import place_of
from kvsink.model.runtime import (
    Anatomy,
    LayerPlan,
    Runtime,
    anatomy,
    attach,
    check_kind,
    detach,
    rope_types,
    towers,
    visual_tokens,
)
from kvsink.model.turning import NONE
from kvsink.report import Report, make_report

__all__ = ["LayerChoice", "RewriteOptions", "parse_layers", "rewrite"]

CALIBRATION_WINDOW = 1024
PATTERN_PROMPTS = 16  # that layer classes are measured on
_FIRST = 16  # rows of a text that keep their place when keys are spread over the context
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
    bits: float | None = None
    plan: str = "uniform"
    profile: str | None = None
    modality: str | None = None
    sliding: bool | None = None
    check: bool = True


@dataclass(frozen=True)
class LayerChoice:
    """The options of one layer after `--layers` has been applied."""

    key_bits: float
    value_bits: float
    protect: str
    window: int
    pattern: str = ""  # "tsa" or "psa"; empty where nobody has said or measured it


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
                kind = {"key_bits": float, "value_bits": float, "protect": str, "window": int, "pattern": str}[name]
                changes[name] = kind(value)
            except (KeyError, ValueError) as error:
                raise KvsinkError(
                    f"--layers {assignment!r} is not one of key_bits=, value_bits=, protect=, window= with a number"
                ) from error
            if name == "pattern" and value not in PATTERNS:
                raise UnknownName("attention pattern", value, PATTERNS, "Write for example --layers 0-1:pattern=tsa.")
        for i in range(begin, end + 1):
            choices[i] = replace(choices[i], **changes)
    return choices


def calibration_windows(model: nn.Module, source: Any, tokens: int, tokenizer: Any) -> Tensor:
    """Windows [N, T] of token ids from ids, texts, "builtin" or a text file."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    length = min(CALIBRATION_WINDOW, getattr(config, "max_position_embeddings", None) or CALIBRATION_WINDOW)
    if _are_prompts(source):
        kept = [p["attention_mask"].bool() if "attention_mask" in p else torch.ones_like(p["input_ids"]) > 0 for p in source]
        source = torch.cat([p["input_ids"][keep].cpu() for p, keep in zip(source, kept, strict=True)])
    if isinstance(source, Tensor):
        ids = source if source.dim() == 2 else source.flatten()
    else:
        if isinstance(source, str) and source == "builtin":
            text = builtin_text()
        elif isinstance(source, str | Path):
            from kvsink.evaluate.texts import read_text

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


def with_modality(m: Method, name: str | None) -> Method:
    """The method with the layer classes of another: text-salient layers take that one's text bits, and keep this one's rows."""
    if name is None:
        return m
    if name == "none":
        return replace(m, modality=None)
    other = get_method(name)
    if other.modality is None:
        known = [n for n, o in methods().items() if o.modality is not None]
        raise UnknownName("plan by modality", name, ["none", *known])
    if m.modality is not None:
        return replace(m, modality=other.modality)
    plan = replace(other.modality, protect=m.protect, coarse=False)
    return replace(m, name=f"{m.name} by modality", modality=plan)


def _are_prompts(source: Any) -> bool:
    return isinstance(source, list | tuple) and bool(source) and all(isinstance(p, Mapping) for p in source)


def _with_patterns(
    model: nn.Module, m: Method, choices: list[LayerChoice], source: Any, protected: bool, notes: list[str]
) -> list[LayerChoice]:
    """Choices with their attention pattern filled in, measured where the user has not said it."""
    rule = m.modality
    if rule is None:
        if any(c.pattern for c in choices):
            raise KvsinkError(f"--layers pattern=: method {m.name} treats all attention patterns alike; leave it out")
        return choices
    tokens = visual_tokens(model.config)
    found = None
    if tokens and not all(c.pattern for c in choices):
        if _are_prompts(source):
            found = attention_patterns(model, source[:PATTERN_PROMPTS], tokens)
        elif isinstance(source, Tensor):
            ids = source if source.dim() == 2 else source[None]
            found = attention_patterns(model, [{"input_ids": row[None]} for row in ids], tokens)
        if found is None:
            notes.append("the calibration shows no image: every layer is taken as pivot-salient; give prompts with images")
    out = []
    for i, c in enumerate(choices):
        pattern = c.pattern or (classify(found[i], rule.ratio, rule.share) if found else "psa")
        if pattern == "tsa" and not protected and c.protect == m.protect:
            c = replace(c, protect=rule.protect)
        out.append(replace(c, pattern=pattern))
    if found:
        salient = [i for i, c in enumerate(out) if c.pattern == "tsa"]
        notes.append(f"text-salient layers, which keep text at {rule.text_bits:g} bit: {salient or 'none'}")
    return out


def _tokenizer_of(model: nn.Module) -> Any:
    name = getattr(model.config, "_name_or_path", "")
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"no tokenizer found for {name or type(model).__name__!r}; pass tokenizer=, or calibration= as token ids"
        ) from error


def check_weights(model: nn.Module) -> None:
    """Raise ModelError when a weight is NaN or infinite; weights in a format of their own are not looked into."""
    for name, p in model.named_parameters():
        if is_plain(p) and not p.is_meta and not torch.isfinite(p).all():
            raise ModelError(f"weight {name} holds NaN or infinite numbers; the checkpoint is damaged, fetch it again")


def _unfoldable(attention: nn.Module, shared: frozenset[int], streamed: bool) -> str | None:
    """Why a value rotation cannot go into the weights of an attention module, or None."""
    if reason := foldable(attention):
        return reason
    for name, p in attention.named_parameters():
        if name in FOLDED and id(p) in shared:
            return f"{name} is shared with another module"
        if name in FOLDED and p.is_meta and not streamed:
            return f"{name} is offloaded and cannot be written here"
    return None


def _refusal(config: Any, where: Anatomy, layer: int, sliding: bool = False) -> str:
    """Why a layer is not packed, or an empty string. sliding: whether sliding-window layers are to be packed."""
    kind = where.layer_types[layer] if layer < len(where.layer_types) else "full_attention"
    if where.absent[layer]:
        return where.absent[layer]
    if kind in ("linear_attention", "mamba", "conv"):
        return f"{kind.replace('_', ' ')}: its state does not grow with the length, passed through"
    if kind in ("full_attention", "attention", "hybrid") or (kind in WINDOWED and sliding):
        return ""
    named = kind.replace("_", " ")
    if kind in WINDOWED:
        return f"{named}: its window of {window_of(config, kind)} tokens already bounds its size, kept in 16 bit"
    return f"{named}: its cache holds something else than every token's keys and values, kept in 16 bit"


def _rope_refusal(config: Any, where: Anatomy, layer: int) -> str:
    """Why a layer's angles cannot be undone by position alone, or an empty string."""
    turning = where.turnings[layer]
    if turning is not None and not turning.channels:
        return ""
    for kind in sorted(rope_types(config) & {"dynamic", "longrope"}):
        return f"rope type {kind} changes its angles with the length"
    return ""


def _profiled_stages(profile: str | Path | dict[str, Any], model: nn.Module) -> tuple[SinkStage, ...]:
    from kvsink.profiling import load_profile, profile_stages

    return profile_stages(profile if isinstance(profile, dict) else load_profile(profile), model)


def rewrite(
    model: nn.Module, method: str | Method = "klt", *, key_bits: float | None = None, value_bits: float | None = None,
    protect: str | None = None, window: int | None = None, calibration: Any = "builtin", calibration_tokens: int = 16384,
    layers: str = "", tokenizer: Any = None, fold: bool = True, storage_dtype: torch.dtype | None = None, batch: int = 1,
    progress: Progress | None = None, bits: float | None = None, plan: str = "uniform", plan_ids: Tensor | None = None,
    designs: dict[Any, Design] | None = None, profile: str | Path | dict[str, Any] | None = None, stream: Stream | None = None,
    sliding: bool | None = None, modality: str | None = None, where: Anatomy | None = None, check: bool = True,
) -> Report:  # fmt: skip
    """Rewrite a causal language model in memory; its `generate()` then runs on the packed cache.

    method: a name of `kvsink.methods()` or a Method. key_bits, value_bits: average bits, 16 keeps a side exact. protect: rows
    kept exact, such as "kvsink:5+first:1". window: recent rows kept exact. calibration: "builtin", a text file, a list of
    texts, token ids [N, T], prompts (dicts of model inputs), or a `Calibration`. layers: per-layer changes,
    "0-1:key_bits=4". fold: put value rotations into
    the weights (the model stays the same function). storage_dtype: dtype the weights will be saved in, when it is narrower.
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
    m = with_modality(method if isinstance(method, Method) else get_method(method), modality)
    model = inner_model(model)
    check_kind(model)
    earlier = model.__dict__.get("_kvsink_runtime")
    if earlier is not None and any(p.codec is not None and p.codec.value.folded for p in earlier.plans):
        raise UnsupportedError(
            f"this model has been rewritten by {earlier.method}, which turned its value weights; load the model again, or "
            "rewrite the first time with fold=False"
        )
    where = look(model, anatomy(model), stream) if where is None else where
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
    if unknown := unknown_turnings(where):
        kept = [NONE if t is None else t for t in where.turnings]
        where = replace(where, turnings=tuple(kept))
        unread = f"keys of layers {unknown} turn with position in a way that is not known here: they are coded as they are turned"
    else:
        unread = ""
    if plan not in ("uniform", "auto"):
        raise UnknownName("plan", plan, ("uniform", "auto"))
    if plan == "uniform" and bits is not None:
        raise KvsinkError(f"bits={bits:g} is a budget for plan='auto'; pass --plan auto, or --key-bits and --value-bits")
    if plan == "auto" and layers:
        raise KvsinkError("plan='auto' chooses the widths of every layer itself; leave --layers out, or use --plan uniform")
    choices = parse_layers(layers, n, base)
    if (least := min(c.window for c in choices)) < 0:
        raise KvsinkError(f"window={least} is negative; give the number of recent tokens to keep exact")
    if stream is not None and (plan == "auto" or m.modality is not None):
        raise UnsupportedError(f"{'--plan auto' if plan == 'auto' else m.name} runs the whole model again and again; use --whole")
    notes = [
        f"{name}: {count} attention layers are left alone, an encoder attends over its input at once and keeps no cache"
        for name, count in towers(model).items()
    ]
    notes += [unread] if unread else []
    choices = _with_patterns(model, m, choices, calibration, protect is not None, notes)
    if sliding is None:
        sliding = all(_refusal(config, where, i) for i in range(n)) and any(not _refusal(config, where, i, True) for i in range(n))
    wanted: list[tuple[SideSpec, SideSpec] | None] = []
    samples: dict[int, SampleNeed] = {}
    for i, choice in enumerate(choices):
        if _refusal(config, where, i, sliding):
            wanted.append(None)
            continue
        if choice.pattern == "tsa" and visual_tokens(model.config):
            key, value = m.modal_side("key", choice.key_bits), m.modal_side("value", choice.value_bits)
        elif choice.pattern == "tsa" and m.modality is not None:
            key, value = m.side("key", m.modality.text_bits), m.side("value", m.modality.text_bits)
        else:
            key, value = m.side("key", choice.key_bits), m.side("value", choice.value_bits)
        rope_reason = _rope_refusal(config, where, i)
        if rope_reason and key.packed and (key.domain == "block" or key.center):
            raise UnsupportedError(
                f"layer {i} ({where.attentions[i]}): {rope_reason}, which {m.name} keys need to undo; use --method rtn"
            )
        _, kv, key_dim, value_dim = where.layers[i]
        resolved = key.resolved(kv, key_dim), value.resolved(kv, value_dim)
        if where.layer_types[i] in WINDOWED:
            trial = Codec(*resolved, anchors=anchors_for_layer(parse_policies(choice.protect)))
            if reason := sliding_refusal(trial):
                raise UnsupportedError(
                    f"layer {i} ({where.attentions[i]}): sliding window of {window_of(config, where.layer_types[i])}: {reason}; "
                    "use --method klt or rtn, or leave sliding layers alone"
                )
        if (need := sample_need(*resolved)) is not None:
            samples[i] = need
        wanted.append((key, value))
    if all(w is None for w in wanted):
        raise UnsupportedError(
            f"{type(model).__name__}: every layer is left alone ({_refusal(config, where, 0)}); there is nothing to rewrite"
        )
    policies = [parse_policies(c.protect) for c in choices]
    uses_stages = any(p.kind in ("kvsink", "pivots") for ps in policies for p in ps)
    if any(anchors_for_layer(p) for p, w in zip(policies, wanted, strict=True) if w is not None):
        check_observable(model)
    blocks = {
        i: key_blocks(w[0])
        for i, w in enumerate(wanted)
        if w is not None and (needs_calibration(w[0]) or needs_calibration(w[1]))
    }
    if plan == "auto":
        for i, w in enumerate(wanted):
            if w is None:
                continue
            served, need = gather_needs(planned_sides(m, *where.layers[i][1:3]), *where.layers[i][1:3])
            blocks[i] = tuple(sorted({*blocks.get(i, ()), *served}))
            if need is not None:
                samples[i] = samples.get(i, need) | need
        designs = {} if designs is None else designs
    if stream is None:
        check_weights(model)
    record = Calibration((), {}, {}, torch.zeros(0), 0)
    known = None if profile is None else _profiled_stages(profile, model)
    if known is not None and not blocks:
        record.stages = known
    elif blocks or uses_stages:
        if isinstance(calibration, Calibration):
            record = calibration
        elif isinstance(calibration, str | Path) and str(calibration).endswith(".safetensors"):
            record = Calibration.load(calibration, model if stream is None else None)
        else:
            seen = _are_prompts(calibration) and visual_tokens(model.config)
            ids = calibration if seen else calibration_windows(model, calibration, calibration_tokens, tokenizer)
            record = calibrate(model, ids, policies, blocks, batch, progress, samples, known, stream, where)
        if known is not None and record.stages != known:
            record = replace(record, stages=known)
    kinds = {p.kind for ps in policies for p in ps}
    if "kvsink" in kinds and not record.stages:
        notes.append("no massive activation was found: kvsink protection has nothing to keep and is off")
    if any(p.kind == "pivots" and probe_stage(p, record.stages) is None for ps in policies for p in ps):
        notes.append("no activation passes the thresholds of pivots: they have nothing to keep but the first row")
    if plan == "auto":
        if plan_ids is None:
            source = "builtin" if isinstance(calibration, Calibration) or str(calibration).endswith(".safetensors") else calibration
            plan_ids = calibration_windows(model, source, calibration_tokens, tokenizer)
        found = _auto_plan(model, m, base, record, plan_ids, bits, progress, designs, sliding, where)
        notes.append(found.note)
        choices = parse_layers(found.layers, n, base)
        wanted = [
            None if w is None else (m.side("key", c.key_bits), m.side("value", c.value_bits))
            for w, c in zip(wanted, choices, strict=True)
        ]
    coded = [i for i, w in enumerate(wanted) if w is not None]
    sizes = {i: pair for i in coded if (pair := seen_sizes(record, i)) is not None}
    if stream is None:
        sizes |= layer_sizes(model, (i for i in coded if i not in sizes))
    probe = Runtime(model, tuple(LayerPlan(None) for _ in range(n)), {}, (), m.name, where)
    device = place_of(model) if stream is None else torch.device("cpu")
    designed: dict[int, tuple[Design, Design]] = {}
    made = {} if designs is None else designs
    for i, w in enumerate(wanted):
        if w is None:
            continue
        if i in sizes:
            w = ranged(w[0], sizes[i][0]), ranged(w[1], sizes[i][1], values=True)
        angles = partial(probe.offset_angles, i, device=torch.device("cpu"))
        _, kv, key_dim, value_dim = where.layers[i]
        key_design, value_design = made.get((i, "key", w[0])), made.get((i, "value", w[1]))
        if key_design is None:
            turn = partial(_turn, probe, config, i)
            key_design = made[i, "key", w[0]] = design_key(w[0], i, kv, key_dim, record, angles, device, turn)
        if value_design is None:
            value_design = made[i, "value", w[1]] = design_value(w[1], i, kv, value_dim, record, device)
        if progress is not None and samples:
            progress("learning codebooks", i + 1, n)
        designed[i] = key_design, value_design
    orders = {i: v.spec.order for i, (_, v) in designed.items() if v.spec.transform == "hadamard" and v.spec.heads_per_group == 1}
    online, checked, logits = _online(model, where, orders if fold else {}, storage_dtype, stream, check)
    if online:
        some = "" if len(online) == len(orders) else f" in layers {sorted(online)}"
        notes.append(f"value rotation runs online{some}: {online[min(online)]}")
    plans: list[LayerPlan] = []
    tables: dict[str, Tensor] = {}
    for i in range(n):
        if i not in designed:
            plans.append(LayerPlan(None, (), _refusal(config, where, i)))
            continue
        key_design, value_design = designed[i]
        value_spec, value_tables = value_design.spec, dict(value_design.tables)
        if fold and i in orders and i not in online:
            value_spec = replace(value_spec, folded=True)
            if "v_mean" in value_tables:
                value_tables["v_mean"] = hadamard_ref(value_tables["v_mean"], value_spec.order)
        segments = segments_for_layer(policies[i], i, record.stages)
        codec = Codec(
            key_design.spec, value_spec, tuple(s.count for s in segments), choices[i].window,
            anchors=anchors_for_layer(policies[i]),
        )  # fmt: skip
        tables.update({f"layers.{i}.{name}": t for name, t in {**key_design.tables, **value_tables}.items()})
        plans.append(LayerPlan(codec, segments))
    runtime = Runtime(model, tuple(plans), {k: t.to(device) for k, t in tables.items()}, record.stages, m.name, where)
    folded_layers = {i: order for i, order in orders.items() if fold and i not in online}
    if stream is not None:
        stream.folds = [(where.attentions[i], order) for i, order in folded_layers.items()]
        stream.check_rest()
    with _folded(model, where, folded_layers if stream is None else {}, storage_dtype) as keep:
        attach(model, runtime)
        try:
            if check:
                whole = check_fold(model, where, logits, storage_dtype) if logits is not None and folded_layers else None
                checked = replace(_checked(model, runtime, stream, notes), fold=checked.fold, folded=whole, online=online)
        except BaseException:
            detach(model)
            raise
        keep()
    from kvsink.hf import install_generate

    install_generate(model)
    report = make_report(model, runtime, base.protect, record.tokens, notes)
    report.check = checked if check else Check(skipped="--no-check: nothing was compared with the stock model")
    runtime.extra = {"check": report.check.as_dict()}  # goes into a folder that the model is saved to
    report.seconds = time.monotonic() - begun
    return report


def _online(
    model: nn.Module, where: Anatomy, orders: Mapping[int, int], storage: torch.dtype | None, stream: Stream | None, check: bool
) -> tuple[dict[int, str], Check, Tensor | None]:
    """Layers whose value rotation cannot go into the weights, each with the reason: by what their modules are, then by trial; and
    the logits of the model before any does."""
    shared = shared_weights(model)
    found: dict[int, str] = {}
    for i in orders:
        if reason := _unfoldable(model.get_submodule(where.attentions[i]), shared, stream is not None):
            found[i] = reason
    left = {i: order for i, order in orders.items() if i not in found}
    if not left or not check:
        return found, Check(), None
    refused, worst, logits = refused_folds(model, where, left, storage, stream)
    return {**found, **refused}, Check(fold=worst if len(refused) < len(left) else None), logits


def _checked(model: nn.Module, runtime: Runtime, stream: Stream | None, notes: list[str]) -> Check:
    """The self-check; where attention over codes fails it, once more with keys and values handed out whole."""
    try:
        return check_cache(model, runtime, stream)
    except UnsupportedError as error:
        where = runtime.anatomy
        packed = frozenset(i for i, p in enumerate(runtime.plans) if p.codec is not None)
        if stream is not None or packed <= where.apart or not runtime.asks:
            raise
        runtime.anatomy = replace(where, apart=where.apart | packed)
        try:
            found = check_cache(model, runtime, stream)
        except UnsupportedError:
            raise error from None
    notes.append("attention is handed keys and values read back whole: the model computes more from them than attention alone")
    return found


@contextmanager
def _folded(
    model: nn.Module, where: Anatomy, orders: Mapping[int, int], storage: torch.dtype | None
) -> Iterator[Callable[[], None]]:
    """Weights with the value rotations of layers in them; they are as before at the end unless the caller says to keep them."""
    attentions = [model.get_submodule(where.attentions[i]) for i in orders]
    before = [{n: p.detach().clone() for n, p in a.named_parameters() if n in FOLDED} for a in attentions]
    try:
        for attention, order in zip(attentions, orders.values(), strict=True):
            fold_value_rotation(attention, order, storage)
        yield before.clear
    finally:
        with torch.no_grad():
            for attention, held in zip(attentions, before, strict=False):
                for name, p in attention.named_parameters():
                    if name in held:
                        p.copy_(held[name])


def _turn(runtime: Runtime, config: Any, layer: int, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Positions spread over the context the model serves, and their angles; the first rows, sinks among them, stay in place."""
    limit = getattr(config, "max_position_embeddings", None) or CALIBRATION_WINDOW
    spread = torch.randint(_FIRST, max(_FIRST + 1, limit), positions.shape, generator=torch.Generator().manual_seed(0))
    at = torch.where(positions < _FIRST, positions, spread)
    return at, runtime.angles(layer, at[None])


def _auto_plan(
    model: nn.Module, m: Method, base: LayerChoice, record: Calibration, ids: Tensor, bits: float | None,
    progress: Progress | None, designs: dict[Any, Design] | None, sliding: bool, where: Anatomy,
) -> Plan:  # fmt: skip
    """Widths per layer within a budget; the model is as it was before."""
    earlier = model.__dict__.get("_kvsink_runtime")
    if m.modality is not None:
        raise UnsupportedError(f"method {m.name} gives its layers widths by their attention pattern; use --plan uniform")
    run = partial(
        rewrite, model, m, key_bits=base.key_bits, value_bits=base.value_bits, protect=base.protect, window=base.window,
        calibration=record, fold=False, designs=designs, sliding=sliding, where=where, check=False,
    )  # fmt: skip
    training = model.training
    model.eval()
    try:
        return choose_plan(model, run, (base.key_bits, base.value_bits), ids, bits, candidates(m), progress)
    finally:
        detach(model)
        model.train(training)
        if earlier is not None:
            attach(model, earlier)
