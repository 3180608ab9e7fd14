"""What a method is, and the table of all of them, filled by walking this folder on first use."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from kvsink.codecs import SideSpec
from kvsink.codecs.quantizers import QUANTIZERS
from kvsink.errors import KvsinkError, UnknownName

__all__ = ["DEFAULT", "Claim", "Method", "Modality", "Paper", "get_method", "methods", "register_method"]

DEFAULT = "klt"  # where the user names no method


@dataclass(frozen=True)
class Paper:
    """Where a method comes from and how ours departs from it."""

    arxiv: str
    title: str = ""
    venue: str = ""
    code: str = ""
    differs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A published figure: never ours. `setting` names model, text and bits as the source does."""

    metric: str
    value: float
    setting: str
    source: str


@dataclass(frozen=True)
class Modality:
    """How a method treats text-salient layers of a vision-language model; see `kvsink.calibrate.patterns` for ratio and share.

    text_bits: of text rows there, visual rows keep the method's own bits; protect: what such layers keep exact. coarse:
    whether a visual row there uses the levels of its own bits alone; its place is as wide as a text row's either way.
    """

    text_bits: float = 4.0
    ratio: float = 2.0
    share: float = 0.5
    protect: str = "none"
    coarse: bool = True


@dataclass(frozen=True)
class Method:
    """A composition of codec and protection, declared once.

    key, value: the codec of each side; its bits are a placeholder that the user's choice replaces. clip_at: clip ratio by
    whole bits where it is not the side's own (value_clip_at: that of values, where theirs differ). protect: the default protection.
    key_below, value_below, key_above, value_above: (bits, side): keys or values of fewer or of more bits are coded by that side
    instead. modality: set when layers are told apart by how they look at text and images. variants: for experiments, by name, what
    else the method may be made of: "klt:even" is `klt` with the fields that its variant even gives.
    """

    name: str
    summary: str
    source: Paper
    key: SideSpec
    value: SideSpec
    key_bits: float = 2.0
    value_bits: float = 2.0
    protect: str = "none"
    window: int = 0
    clip_at: Mapping[int, float] = field(default_factory=dict)
    value_clip_at: Mapping[int, float] | None = None
    claims: tuple[Claim, ...] = ()
    key_below: tuple[float, SideSpec] | None = None
    value_below: tuple[float, SideSpec] | None = None
    key_above: tuple[float, SideSpec] | None = None
    value_above: tuple[float, SideSpec] | None = None
    modality: Modality | None = None
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def side(self, which: str, bits: float) -> SideSpec:
        """The declaration of "key" or "value" at `bits`; 16 keeps that side exact."""
        template, below, above = (
            (self.key, self.key_below, self.key_above) if which == "key" else (self.value, self.value_below, self.value_above)
        )
        if below is not None and bits < below[0]:
            template = below[1]
        if above is not None and bits > above[0]:
            template = above[1]
        if bits == 16:
            return SideSpec()
        if not 0.125 <= bits <= 8:
            raise KvsinkError(f"{which} bits={bits:g} is impossible: choose 1 to 8, or 16 to keep {which}s exact")
        quantizer = QUANTIZERS[template.kind]
        least, most = max(quantizer.least, 0.125), min(quantizer.most, quantizer.average)
        if not least <= bits <= most:
            nearest = least if bits < least else most
            raise KvsinkError(f"{which} bits={bits:g}: {self.name} has {least} to {most} ({template.kind}); use {nearest}")
        clips = self.value_clip_at if which == "value" and self.value_clip_at is not None else self.clip_at
        clip = clips.get(int(bits), template.clip) if template.kind.startswith("uniform") else template.clip
        return replace(template, bits=float(bits), clip=clip)

    def modal_side(self, which: str, bits: float) -> SideSpec:
        """A side of a text-salient layer: text at the modality's bits, visual rows at `bits`."""
        assert self.modality is not None
        text, visual = self.side(which, self.modality.text_bits), self.side(which, bits)
        if not visual.packed or visual.bits >= text.bits:
            return visual
        if not self.modality.coarse or visual.kind != "uniform-int":
            return text
        return replace(text, kind="modal", visual_bits=int(bits), visual_clip=visual.clip)

    def variant(self, name: str) -> Method:
        """The same method with what its variant `name` changes. Raises UnknownName."""
        if name not in self.variants:
            raise UnknownName("variant", f"{self.name}:{name}", [f"{self.name}:{v}" for v in self.variants] or [self.name])
        return replace(self, name=f"{self.name}:{name}", variants={}, **self.variants[name])

    def with_outliers(self, share: str) -> Method:
        """The same method with a share such as "0.5%" of the entries kept in 16 bit; its name says so."""
        try:
            part = float(share.removesuffix("%")) / 100
        except ValueError:
            part = -1.0
        if not 0 <= part <= 0.1 or self.key.kind != "nuq":
            raise KvsinkError(
                f"{self.name}-{share}: outliers are a share of 0 to 10 % of a method with free code points; write for example "
                "kvquant-1%"
            )
        sides = (replace(side, outliers=part if side.kind == "nuq" else 0.0) for side in (self.key, self.value))
        return replace(self, name=f"{self.name}-{share}", key=next(sides), value=next(sides))


_METHODS: dict[str, Method] = {}


def register_method(method: Method) -> Method:
    """Add a method; its name is taken once."""
    if method.name in _METHODS:
        raise ValueError(f"method {method.name} is registered twice")
    _METHODS[method.name] = method
    return method


def methods() -> Mapping[str, Method]:
    """All methods by name. Every file of the folder is imported on first use; an import error names its file."""
    package = importlib.import_module(__package__)
    for info in pkgutil.iter_modules(package.__path__):
        if info.name != "registry":
            try:
                importlib.import_module(f"{__package__}.{info.name}")
            except Exception as error:
                raise KvsinkError(
                    f"method file {info.name}.py cannot be imported ({type(error).__name__}: {error}); mend it or take it away"
                ) from error
    return MappingProxyType(dict(sorted(_METHODS.items())))


def get_method(name: str) -> Method:
    """One method by name; "klt:even" is the variant even of klt, "kvquant-1%" is kvquant with 1 % of the entries kept as outliers.
    Raises UnknownName with the three nearest."""
    known = methods()
    whole, colon, variant = name.partition(":")
    if colon and whole in known:
        return known[whole].variant(variant)
    stem, dash, share = name.rpartition("-")
    if name not in known and dash and share.endswith("%") and stem in known:
        return known[stem].with_outliers(share)
    if name not in known:
        variants = (f"{m.name}:{v}" for m in known.values() for v in m.variants)
        raise UnknownName("method", name, [*known, *variants], "kvsink.methods() lists them all.")
    return known[name]
