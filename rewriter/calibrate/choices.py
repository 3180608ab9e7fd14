"""What every layer is to be coded with, from what the user asked for and what the model's layers are.

Source     ours
Raises     KvsinkError, UnknownName for options that cannot be; UnsupportedError for layers that a method cannot code
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kvsink.cache.sliding import WINDOWED, sliding_refusal, window_of
from kvsink.calibrate.design import gather_needs, key_blocks, needs_calibration, sample_need
from kvsink.calibrate.patterns import PATTERNS, attention_patterns, classify
from kvsink.calibrate.plan import sides as planned_sides
from kvsink.calibrate.statistics import SampleNeed
from kvsink.calibrate.uncalibrated import default_bits
from kvsink.codecs import Codec, SideSpec
from kvsink.codecs.protect import Policy, anchors_for_layer, parse_policies
from kvsink.errors import CalibrationError, KvsinkError, UnknownName, UnsupportedError
from kvsink.methods import Method, get_method, methods
from kvsink.model.anatomy import Anatomy, rope_types
from kvsink.model.decoder import Decoder
from kvsink.model.observed import check_observable
from kvsink.model.rows import visual_tokens

__all__ = ["Chosen", "LayerChoice", "RewriteOptions", "choose", "parse_layers", "refusal", "with_modality"]

PATTERN_PROMPTS = 16  # that layer classes are measured on
TOKENS, LEARNING_TOKENS = 4096, 16384  # of calibration text: for statistics, and where rows are learnt from


@dataclass(frozen=True)
class RewriteOptions:
    """What the user may choose. None means the method's own default."""

    method: str | None = None
    key_bits: float | None = None
    value_bits: float | None = None
    protect: str | None = None
    window: int | None = None
    calibration: str = "builtin"
    calibration_tokens: int | None = None
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


@dataclass
class Chosen:
    """The declarations of every layer, and what they need to be seen of it.

    method: whose sides they are. base: what all layers start as. wanted: key and value side of each layer, None where it is left
    alone. policies: of each layer, which rows stay exact. blocks, samples: what `calibrate` is asked for. notes: for the report.
    """

    method: Method
    base: LayerChoice
    choices: list[LayerChoice]
    wanted: list[tuple[SideSpec, SideSpec] | None]
    policies: list[tuple[Policy, ...]]
    blocks: dict[int, tuple[int, ...]]
    samples: dict[int, SampleNeed]
    sliding: bool
    notes: list[str] = field(default_factory=list)

    def planned(self, layers: str) -> None:
        """Take the widths of an automatic plan, a text as for `--layers`."""
        self.choices, m = parse_layers(layers, len(self.choices), self.base), self.method
        self.wanted = [
            None if w is None else (m.side("key", c.key_bits), m.side("value", c.value_bits))
            for w, c in zip(self.wanted, self.choices, strict=True)
        ]

    @property
    def tokens(self) -> int:
        """Tokens of calibration text where nobody has asked for a number."""
        return LEARNING_TOKENS if self.samples else TOKENS


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


def are_prompts(source: Any) -> bool:
    """Whether a calibration source is prompts: dicts of model inputs."""
    return isinstance(source, list | tuple) and bool(source) and all(isinstance(p, Mapping) for p in source)


def _with_patterns(
    decoder: Decoder, m: Method, choices: list[LayerChoice], source: Any, protected: bool, notes: list[str]
) -> list[LayerChoice]:
    """Choices with their attention pattern filled in, measured where the user has not said it."""
    rule = m.modality
    if rule is None:
        if any(c.pattern for c in choices):
            raise KvsinkError(f"--layers pattern=: method {m.name} treats all attention patterns alike; leave it out")
        return choices
    tokens = visual_tokens(decoder.model.config)
    found = None
    if tokens and not all(c.pattern for c in choices):
        if are_prompts(source):
            found = attention_patterns(decoder.model, source[:PATTERN_PROMPTS], tokens)
        elif isinstance(source, Tensor):
            ids = source if source.dim() == 2 else source[None]
            found = attention_patterns(decoder.model, [{"input_ids": row[None]} for row in ids], tokens)
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


def refusal(config: Any, where: Anatomy, layer: int, sliding: bool = False) -> str:
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


def choose(decoder: Decoder, m: Method, asked: RewriteOptions, calibration: Any, notes: list[str]) -> Chosen:
    """Sides, exact rows and statistics of every layer, for a method and what the user asked for.

    calibration: as `kvsink.rewrite` takes it; prompts with images are looked at where layers are told apart by them.
    """
    where, config, n = decoder.where, decoder.config, len(decoder.where.attentions)
    key_bits, value_bits = default_bits(m, calibration)
    base = LayerChoice(
        key_bits if asked.key_bits is None else asked.key_bits,
        value_bits if asked.value_bits is None else asked.value_bits,
        m.protect if asked.protect is None else asked.protect,
        m.window if asked.window is None else asked.window,
    )
    if base.key_bits == base.value_bits == 16 and asked.protect is None:
        base = replace(base, protect="none")  # everything is exact already
    if asked.plan == "auto" and isinstance(calibration, str) and calibration in ("none", "random"):
        raise CalibrationError(
            f"--plan auto measures widths of layers on text, and calibration is {calibration!r}; use --plan uniform"
        )
    choices = _layers_of(asked, n, base)
    if decoder.stream is not None and (asked.plan == "auto" or m.modality is not None):
        what = "--plan auto" if asked.plan == "auto" else m.name
        raise UnsupportedError(f"{what} runs the whole model again and again; use --whole")
    choices = _with_patterns(decoder, m, choices, calibration, asked.protect is not None, notes)
    sliding = asked.sliding
    if sliding is None:
        sliding = all(refusal(config, where, i) for i in range(n)) and any(not refusal(config, where, i, True) for i in range(n))
    wanted: list[tuple[SideSpec, SideSpec] | None] = []
    samples: dict[int, SampleNeed] = {}
    for i, choice in enumerate(choices):
        wanted.append(None if refusal(config, where, i, sliding) else _sides(decoder, m, i, choice, samples))
    if all(w is None for w in wanted):
        raise UnsupportedError(
            f"{type(decoder.model).__name__}: every layer is left alone ({refusal(config, where, 0)}); there is nothing to rewrite"
        )
    policies = [parse_policies(c.protect) for c in choices]
    if any(anchors_for_layer(p) for p, w in zip(policies, wanted, strict=True) if w is not None):
        check_observable(decoder.model)
    blocks = {
        i: key_blocks(*w) for i, w in enumerate(wanted) if w is not None and (needs_calibration(w[0]) or needs_calibration(w[1]))
    }
    if asked.plan == "auto":
        for i, w in enumerate(wanted):
            if w is None:
                continue
            served, need = gather_needs(planned_sides(m, *where.layers[i][1:3]), *where.layers[i][1:3])
            blocks[i] = tuple(sorted({*blocks.get(i, ()), *served}))
            if need is not None:
                samples[i] = samples.get(i, need) | need
    return Chosen(m, base, choices, wanted, policies, blocks, samples, sliding, notes)


def _layers_of(asked: RewriteOptions, count: int, base: LayerChoice) -> list[LayerChoice]:
    """The choice of every layer. Raises for options that contradict each other."""
    if asked.plan not in ("uniform", "auto"):
        raise UnknownName("plan", asked.plan, ("uniform", "auto"))
    if asked.plan == "uniform" and asked.bits is not None:
        raise KvsinkError(f"bits={asked.bits:g} is a budget for plan='auto'; pass --plan auto, or --key-bits and --value-bits")
    if asked.plan == "auto" and asked.layers:
        raise KvsinkError("plan='auto' chooses the widths of every layer itself; leave --layers out, or use --plan uniform")
    choices = parse_layers(asked.layers, count, base)
    if (least := min(c.window for c in choices)) < 0:
        raise KvsinkError(f"window={least} is negative; give the number of recent tokens to keep exact")
    return choices


def _sides(decoder: Decoder, m: Method, i: int, choice: LayerChoice, samples: dict[int, SampleNeed]) -> tuple[SideSpec, SideSpec]:
    """Key and value side of a layer that is packed; what its quantizers learn from is added to `samples`."""
    where = decoder.where
    if choice.pattern == "tsa" and visual_tokens(decoder.model.config):
        key, value = m.modal_side("key", choice.key_bits), m.modal_side("value", choice.value_bits)
    elif choice.pattern == "tsa" and m.modality is not None:
        key, value = m.side("key", m.modality.text_bits), m.side("value", m.modality.text_bits)
    else:
        key, value = m.side("key", choice.key_bits), m.side("value", choice.value_bits)
    rope_reason = _rope_refusal(decoder.config, where, i)
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
                f"layer {i} ({where.attentions[i]}): sliding window of {window_of(decoder.config, where.layer_types[i])}: "
                f"{reason}; use --method klt or rtn, or leave sliding layers alone"
            )
    if (need := sample_need(*resolved)) is not None:
        samples[i] = need
    return key, value
