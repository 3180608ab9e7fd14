"""The declaration of one side (keys or values) of a layer's codec: a small frozen record that validates itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from kvsink.errors import UnsupportedError
from kvsink.kernels.hadamard import hadamard_core
from kvsink.kernels.quantize import SIGMA_KINDS
from kvsink.kernels.sparse import INDEX_LIMIT

from .quantizers import QUANTIZERS, VECTOR_KINDS

__all__ = ["SideSpec", "group_size_for", "hadamard_order"]

DOMAINS = ("post", "block")
TRANSFORMS = ("none", "hadamard", "klt", "grouped")
METRICS = ("none", "attention", "directions")
SPREADS = ("none", "hadamard", "balanced")
AXES = ("token", "channel")
VECTOR_SETTINGS = {
    4.0: (2, 8),
    2.25: (4, 9),
    2.0: (4, 8),
    1.5: (8, 12),
    1.25: (8, 10),
    1.0: (8, 8),
    0.75: (16, 12),
    0.375: (32, 12),
}
"""Bits per element → channels coupled and bits of their one code."""

WEIGHTS = ("none", "fisher", "fisher-raw", "error")


def group_size_for(wanted: int, dim: int) -> int:
    """The largest divisor of `dim` that is at most `wanted`: the channels that share one scale."""
    return max(g for g in range(1, min(wanted, dim) + 1) if dim % g == 0)


def hadamard_order(dim: int) -> int:
    """The largest Hadamard order that divides `dim` and leaves at least 8 channels a run."""
    for order in range(dim, 7, -1):
        if dim % order == 0:
            try:
                hadamard_core(order)
            except ValueError:
                continue
            return order
    raise UnsupportedError(
        f"no Hadamard order divides {dim} channels; use a method without a Hadamard transform, such as rtn or klt keys"
    )


@dataclass(frozen=True)
class SideSpec:
    """How keys or values of one layer are coded.

    domain     "post": after RoPE. "block": rotated only by the offset inside a block of `block` tokens (keys only);
               block=1 is the key before RoPE. Values are always "post".
    center     subtract the calibrated mean (of keys: the mean before RoPE; of klt keys in domain "post" the one after it).
    transform  "none", "hadamard" over `heads_per_group` heads in runs of `order` channels, "klt" (calibrated eigenbasis), "grouped"
               (channels by their weight, pairs that turn together in groups of codebooks; see kvsink.calibrate.grouping).
    metric     what errors are measured by: "none", all alike; "attention", by the second moment of what reads them: of keys the
               queries that meet them, of values the output projection. A klt basis is then not orthogonal and has its own inverse.
               "directions": the eigenvectors of that moment alone, of values of their own moment weighed by scores.
    spread     what stands behind a klt basis, for kinds with one step a token: "hadamard"; "balanced", components divided by the
               fourth root of their variance and then a Hadamard matrix: all channels are alike, and their errors too.
    reorder    sort the channels of all heads by their calibrated signed mean before they are grouped.
    kind       "none" keeps 16 bit; else a quantizer of `kvsink.kernels.quantize`.
    widths     bits of each run of 8 channels; equal everywhere unless the kind is "lloyd", "lloyd-even" or "trellis".
    folded     the transform already sits in the weights, nothing is to be done at run time.
    visual_bits, visual_clip   levels and clip ratio of visual rows; 0 codes them like text (kind "modal" only).
    axis       "token": ranges run along the channels of a token. "channel": along `group_tokens` tokens of a channel.
    flush      rows are coded in blocks of this many tokens and stay exact until their block is full; 0: at once.
    newest     so many newest rows of this side stay exact.
    norm       divide each token by its norm over all heads first; the norm is stored (keys with axis "channel" only).
    varn       steps of variance normalisation of `group_tokens` tokens before ranges are taken (kvsink.kernels.varn); 0: none.
               Each token of a head gets a scale of its own where ranges run along tokens, else each channel of a head.
    couple     kinds "vector" and "vector-normed" (which stores one norm a token): channels that share one code of `code_bits`
               bits; 0 takes both from `bits` (see VECTOR_SETTINGS).
    shared     kind "vector": one codebook for all heads.
    outliers   kind "nuq": share of entries outside the range that the code points cover; the farthest are kept in 16 bit.
    outlier_tokens  tokens whose outliers share one record, at most; a power of two.
    exponent   codes and tables are of rows times 2^-exponent, where rows are too large or too small for float16 scales.
    flat       kinds with a deviation per channel: all channels have one, that of the layer's size, and nothing is calibrated.
    unbiased   kind "trellis": levels are read 1 / (1 - D) times as large, D the mean squared error of their width: errors do not
               depend on the number itself then, and average out over the rows that attention sums.
    weights    how a quantizer that learns weighs calibration rows: "none", "fisher" (squared gradient of the loss; of entries
               normalised by a range r, times r^2), "fisher-raw" (without r^2), "error" (reach into the attention output).
    """

    bits: float = 16.0
    domain: str = "post"
    block: int = 64
    center: bool = False
    transform: str = "none"
    metric: str = "none"
    spread: str = "none"
    unbiased: bool = False
    flat: bool = False
    heads_per_group: int = 1
    order: int = 0
    reorder: bool = False
    kind: str = "none"
    group_size: int = 128
    clip: float = 1.0
    gain: bool = False
    widths: tuple[int, ...] = ()
    folded: bool = False
    visual_bits: int = 0
    visual_clip: float = 1.0
    axis: str = "token"
    group_tokens: int = 0
    flush: int = 0
    newest: int = 0
    norm: bool = False
    varn: int = 0
    couple: int = 0
    code_bits: int = 0
    shared: bool = False
    outliers: float = 0.0
    outlier_tokens: int = 128
    weights: str = "none"
    exponent: int = 0

    def __post_init__(self) -> None:
        def refuse(what: str) -> None:
            raise UnsupportedError(f"{what} in {self!r}")

        if self.domain not in DOMAINS:
            refuse(f"domain {self.domain!r} is not one of {', '.join(DOMAINS)}")
        if self.transform not in TRANSFORMS:
            refuse(f"transform {self.transform!r} is not one of {', '.join(TRANSFORMS)}")
        if self.metric not in METRICS:
            refuse(f"metric {self.metric!r} is not one of {', '.join(METRICS)}")
        if self.metric != "none" and self.transform not in ("klt", "grouped"):
            refuse("a metric needs transform='klt', whose basis it changes")
        if self.transform == "grouped" and (self.domain != "block" or self.block != 1 or self.center):
            refuse("groups are of keys before RoPE that are not centred: set domain='block', block=1, center=False")
        if self.spread not in SPREADS:
            refuse(f"spread {self.spread!r} is not one of {', '.join(SPREADS)}")
        if self.spread != "none" and (self.transform != "klt" or self.kind in (*SIGMA_KINDS, *VECTOR_KINDS)):
            refuse("a spread needs transform='klt' and a kind with one step a token")
        if self.unbiased and self.kind != "trellis":
            refuse("unbiased levels need kind='trellis'")
        if self.flat and (self.kind not in SIGMA_KINDS or self.center or self.transform == "klt" or self.reorder):
            refuse(f"flat=True needs a kind of {', '.join(SIGMA_KINDS)} and nothing that is calibrated")
        if self.weights not in WEIGHTS:
            refuse(f"weights {self.weights!r} is not one of {', '.join(WEIGHTS)}")
        if not 0 <= self.outliers < 1:
            refuse(f"outliers={self.outliers} is outside [0, 1)")
        if self.outliers and self.kind != "nuq":
            refuse("outliers need kind='nuq', whose ranges can leave entries out")
        if self.outlier_tokens < 1 or self.outlier_tokens & (self.outlier_tokens - 1):
            refuse(f"outlier_tokens={self.outlier_tokens} is not a power of two")
        if (self.couple > 0) != (self.code_bits > 0) or self.couple < 0:
            refuse(f"couple={self.couple} and code_bits={self.code_bits} are given together or not at all")
        if self.couple and (self.code_bits > 12 or self.bits != self.code_bits / self.couple):
            refuse(f"{self.code_bits} bits for {self.couple} channels are not {self.bits:g} bits each, of codes of 1 to 12 bits")
        if self.kind != "none" and self.kind not in QUANTIZERS:
            refuse(f"quantizer {self.kind!r} is not one of none, {', '.join(QUANTIZERS)}")
        if self.kind != "none" and (reason := QUANTIZERS[self.kind].check(self)):
            refuse(reason)
        if self.kind == "none" and self.bits != 16:
            refuse(f"bits={self.bits:g} without a quantizer")
        if self.kind != "none" and not 0.125 <= self.bits <= 8:
            refuse(f"bits={self.bits:g} is impossible: choose 1 to 8, or 16 to keep rows exact")
        if self.block < 1:
            refuse(f"block={self.block} is not positive")
        if self.kind not in ("none", *SIGMA_KINDS) and len(set(self.widths)) > 1:
            refuse("mixed widths need the lloyd quantizer")
        if self.transform == "klt" and self.domain == "block" and not self.center:
            refuse("klt keys are centred: center=False")
        if not 0 < self.clip <= 1:
            refuse(f"clip={self.clip} is outside (0, 1]")
        if not 0 < self.visual_clip <= 1:
            refuse(f"visual_clip={self.visual_clip} is outside (0, 1]")
        if (self.kind == "modal") != (self.visual_bits > 0) or not 0 <= self.visual_bits <= self.bits:
            refuse(f"visual_bits={self.visual_bits} with quantizer {self.kind!r} of {self.bits:g} bits")
        if self.axis not in AXES:
            refuse(f"axis {self.axis!r} is not one of {', '.join(AXES)}")
        if min(self.flush, self.newest, self.group_tokens, self.varn) < 0:
            refuse("flush, newest, group_tokens and varn cannot be negative")
        if self.norm and (self.axis != "channel" or self.varn):
            refuse("norm needs axis='channel' and no scales of varn beside it")
        if self.axis == "channel" or self.varn:
            self._check_token_blocks(refuse)
        elif self.group_tokens:
            refuse("group_tokens needs axis='channel' or varn")

    def _check_token_blocks(self, refuse: Callable[[str], None]) -> None:
        if self.kind != "uniform" or self.clip != 1:
            refuse("blocks of tokens need kind='uniform' without clipping")
        if self.domain != "post" or self.center:
            refuse("blocks of tokens are coded after RoPE and without centring: set domain='post', center=False")
        if self.group_tokens < 1 or self.flush < 1 or self.flush % self.group_tokens:
            near = max(1, round(self.flush / max(1, self.group_tokens))) * max(1, self.group_tokens)
            refuse(f"a block of {self.flush} tokens is not a multiple of its groups of {self.group_tokens}; use flush={near}")

    @property
    def packed(self) -> bool:
        """False when this side stays in 16 bit."""
        return self.kind != "none"

    @property
    def by_token_block(self) -> bool:
        """True when rows are coded together with their neighbours in time."""
        return self.packed and (self.axis == "channel" or self.varn > 0)

    @property
    def shares_heads(self) -> str:
        """Why no key-value head of a row is coded without the others; empty where each is."""
        if not self.packed:
            return ""
        if self.reorder or (self.heads_per_group > 1 and not self.folded):
            return "are turned across heads"
        if self.outliers:
            return "have outliers, which share a record"
        kind = QUANTIZERS[self.kind]
        return "share numbers of a token among heads" if self.norm or (kind.scale_of_token and kind.row_scales(self, 0)) else ""

    @property
    def own_inverse(self) -> bool:
        """True when the basis of a klt is not orthogonal and rows come back by another table."""
        return self.metric == "attention" or self.spread == "balanced"

    @property
    def pre_rope(self) -> bool:
        """True when encoding needs the key before RoPE."""
        return self.packed and self.domain == "block"

    def resolved(self, heads: int, dim: int) -> SideSpec:
        """The same declaration with group size, Hadamard order and equal widths filled in for a head shape.

        Raises UnsupportedError, with the nearest setting that works, when the shape cannot carry it.
        """
        if not self.packed:
            return self
        if dim % 8:
            raise UnsupportedError(f"head_dim={dim} is not divisible by 8, which packing needs; keep 16 bit (bits=16)")
        spec = replace(self, group_size=group_size_for(self.group_size, dim))
        if self.transform == "hadamard":
            groups = max(g for g in range(1, min(self.heads_per_group, heads) + 1) if heads % g == 0)
            order = hadamard_order(dim)
            if groups > 1 and order == dim:
                try:
                    hadamard_core(groups * dim)
                    order = groups * dim
                except ValueError:
                    groups = 1
            else:
                groups = 1
            spec = replace(spec, heads_per_group=groups, order=order)
        if self.kind in VECTOR_KINDS:
            couple, code_bits = self._coupling(dim)
            return replace(spec, couple=couple, code_bits=code_bits)
        if self.outliers:
            if heads * dim > INDEX_LIMIT:
                raise UnsupportedError(
                    f"{heads} heads of {dim} channels are more than the {INDEX_LIMIT} an outlier's index can name; use outliers=0"
                )
            fits = 1 << ((INDEX_LIMIT // (heads * dim)).bit_length() - 1)
            spec = replace(spec, outlier_tokens=min(self.outlier_tokens, fits))
        if not self.widths and self.kind not in SIGMA_KINDS:
            if self.bits != int(self.bits):
                raise UnsupportedError(
                    f"bits={self.bits:g} is not whole, which the {self.kind} quantizer needs; "
                    f"use {f'{int(self.bits)} or ' if self.bits >= 1 else ''}{int(self.bits) + 1}"
                )
            spec = replace(spec, widths=(int(self.bits),) * (dim // 8))
        return spec

    def _coupling(self, dim: int) -> tuple[int, int]:
        if self.couple and dim % self.couple == 0:
            return self.couple, self.code_bits
        fitting = {bits: pair for bits, pair in VECTOR_SETTINGS.items() if dim % pair[0] == 0}
        nearest = min(fitting, key=lambda bits: abs(bits - self.bits))
        if self.couple or (self.bits in VECTOR_SETTINGS and self.bits not in fitting):
            couple = self.couple or VECTOR_SETTINGS[self.bits][0]
            raise UnsupportedError(f"head_dim={dim} does not split into runs of {couple} channels; use bits={nearest:g}")
        if self.bits not in VECTOR_SETTINGS:
            raise UnsupportedError(
                f"bits={self.bits:g} has no codebook setting; use {nearest:g} (known: "
                f"{', '.join(f'{bits:g} = {c}c{b}b' for bits, (c, b) in VECTOR_SETTINGS.items())})"
            )
        return VECTOR_SETTINGS[self.bits]

    def as_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults, JSON-ready."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> SideSpec:
        """Rebuild a declaration; unknown fields are an error."""
        known = {f.name for f in fields(cls)}
        if unknown := set(record) - known:
            raise UnsupportedError(f"unknown codec fields {sorted(unknown)}; this file is of another version of kvsink")
        record = dict(record)
        if "widths" in record:
            record["widths"] = tuple(int(w) for w in record["widths"])
        return cls(**record)
