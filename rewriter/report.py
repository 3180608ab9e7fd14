"""What a rewrite did, layer by layer: packed or left alone and why, counted bits, bytes saved, sinks found."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers

from kvsink.cache.served import served_lines
from kvsink.cache.sliding import WINDOWED, window_of
from kvsink.codecs import Codec, SideSpec
from kvsink.model.runtime import Runtime

__all__ = ["LayerReport", "Report", "counted_bits", "describe", "make_report", "versions"]

STATED_LENGTH = 4096  # tokens at which a report counts bits
KEEPING = ("full_attention", "attention", "hybrid", "hybrid_sliding", *WINDOWED)  # kinds of layers that hold keys and values


def counted_bits(
    codec: Codec, heads: int, dim: int, tokens: int = STATED_LENGTH, batch: int = 1, layers: int = 1, value_dim: int | None = None
) -> tuple[float, float]:
    """Bits per element of keys and of values that the cache of one layer holds at `tokens`: every tensor of its state, what
    belongs to neither side counted half to each. All `layers` share positions and which slots are real. value_dim: dim, if not
    given."""
    wide = dim if value_dim is None else value_dim
    rows = batch * heads * tokens
    side = {"k": 0.0, "v": 0.0}
    for name, (shape, dtype, _) in codec.layout(batch, heads, dim, wide, tokens, torch.float16).items():
        bits = 8.0 * math.prod(shape) * dtype.itemsize
        owner = next((s for s in side if name.startswith(f"{s}_") or name.endswith(f"_{s}")), None)
        for s in side:
            side[s] += bits * (0.5 if owner is None else owner == s)
    positions = 40.0 * batch * tokens / layers  # int32, and a byte that says whether the slot is real
    return (side["k"] + positions / 2) / (rows * dim), (side["v"] + positions / 2) / (rows * wide)


@dataclass(frozen=True)
class LayerReport:
    """One attention layer. elements: entries of keys and values it holds at the stated length; 0 where it holds none."""

    layer: int
    path: str
    packed: bool
    key: str
    value: str
    key_bits: float
    value_bits: float
    protect: str
    reason: str
    elements: int = 1


@dataclass
class Report:
    """The whole rewrite, ready for JSON and Markdown."""

    model: str
    method: str
    protect: str
    layers: list[LayerReport] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    calibration_tokens: int = 0
    table_bytes: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)  # which kernels serve the layers here, and why no faster ones do
    versions: dict[str, str] = field(default_factory=dict)
    check: Any = None  # a kvsink.evaluate.selfcheck.Check

    @property
    def bits(self) -> float:
        """Mean counted bits per cached element over all layers that hold keys and values, 16 for those left alone."""
        whole = sum(r.elements for r in self.layers)
        return sum(r.elements * (r.key_bits + r.value_bits) / 2 for r in self.layers) / whole if whole else 16.0

    def share(self, rows: list[LayerReport]) -> float:
        """The part of the cache's bits that some of the layers hold."""
        of = [r.elements * (r.key_bits + r.value_bits) for r in rows]
        whole = sum(r.elements * (r.key_bits + r.value_bits) for r in self.layers)
        return sum(of) / whole if whole else 0.0

    @property
    def smaller(self) -> float:
        """How many times smaller than a 16-bit cache."""
        return 16.0 / self.bits

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **asdict(self),
            "bits_per_element": round(self.bits, 4),
            "times_smaller": round(self.smaller, 3),
            "bits_counted_at_tokens": STATED_LENGTH,
        }

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.as_dict(), indent=2)

    def to_markdown(self) -> str:
        """A page for people."""
        lines = [
            f"# kvsink: {self.model}",
            "",
            f"Method `{self.method}`, protection `{self.protect}`: {self.bits:.2f} bits per cached element at "
            f"{STATED_LENGTH} tokens, {self.smaller:.1f}x smaller than 16 bit. Calibrated on "
            f"{f'{self.calibration_tokens} tokens' if self.calibration_tokens else 'nothing'}; "
            f"static tables {self.table_bytes / 2**20:.1f} MiB.",
            "",
        ]
        for s in self.stages:
            lines.append(
                f"- Sinks emerge at the output of block {s['block']}: channel {s['channels'][0]}, |H| up to {s['size']:.0f} "
                f"(median {s['median']:.2f})."
            )
        lines += [f"- {note}" for note in [*self.notes, *([str(self.check)] if self.check is not None else [])]]
        lines += [
            "",
            "| layer | keys | values | key bits | value bits | exact rows | left alone because |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in self.layers:
            lines.append(
                f"| {r.layer} `{r.path}` | {r.key} | {r.value} | {r.key_bits:.3f} | {r.value_bits:.3f} | {r.protect or '-'} | "
                f"{r.reason or '-'} |"
            )
        lines += ["", *(f"- {line}" for line in self.served)]
        return "\n".join(lines).rstrip() + "\n"


def make_report(
    runtime: Runtime, name: str, dtype: torch.dtype, device: torch.device, protect: str, tokens: int, notes: Sequence[str]
) -> Report:
    """The report of a rewritten model of that name, whose weights are computed in `dtype` on `device`."""
    where = runtime.anatomy
    report = Report(
        model=name,
        method=runtime.method,
        protect=protect,
        stages=[asdict(s) for s in runtime.stages],
        calibration_tokens=tokens,
        table_bytes=runtime.table_nbytes(),
        notes=list(notes),
        versions=versions(),
    )
    packed = sum(plan.codec is not None for plan in runtime.plans)
    config = runtime.config.get_text_config(decoder=True)
    for i, plan in enumerate(runtime.plans):
        kind, (_, kv, key_dim, value_dim) = where.layer_types[i], where.layers[i]
        tokens = min(STATED_LENGTH, window_of(config, kind)) if kind in WINDOWED else STATED_LENGTH
        elements = 0 if where.absent[i] or kind not in KEEPING else where.layers[i].elements * tokens
        if plan.codec is None:
            row = LayerReport(i, where.attentions[i], False, "16 bit", "16 bit", 16.0, 16.0, "", plan.reason, elements)
        else:
            key_bits, value_bits = counted_bits(plan.codec, kv, key_dim, layers=packed, value_dim=value_dim)
            row = LayerReport(
                i,
                where.attentions[i],
                True,
                describe(plan.codec.key),
                describe(plan.codec.value),
                key_bits,
                value_bits,
                ", ".join([s.key for s in plan.segments] + ([str(plan.codec.anchors)] if plan.codec.anchors else [])),
                "",
                elements,
            )
        report.layers.append(row)
    windowed = [r for r, kind in zip(report.layers, where.layer_types, strict=True) if kind in WINDOWED and not r.packed]
    if (share := report.share(windowed)) > 0.2:
        report.notes.append(
            f"{len(windowed)} layers with windows stay in 16 bit and hold {100 * share:.0f} % of the cache at {STATED_LENGTH} "
            "tokens; --sliding packs them too"
        )
    report.served = served_lines(runtime, dtype, device, compiled=False)
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
        words += [spec.spread] if spec.spread != "none" else []
    if spec.reorder:
        words.append("reordered")
    if spec.couple:
        widths = f"{spec.couple}c{spec.code_bits}b" + (" shared" if spec.shared else "")
    else:
        widths = "".join(str(w) for w in spec.widths) if len(set(spec.widths)) > 1 else f"{spec.widths[0]} bit"
    words.append(f"{spec.kind} {widths}" + (" gain" if spec.gain else ""))
    if spec.outliers:
        words.append(f"{100 * spec.outliers:g} % outliers")
    if spec.norm:
        words.append("token norms")
    if spec.varn:
        words.append(f"scales of tokens and channels in {spec.varn} steps")
    if spec.by_token_block and spec.axis == "channel":
        words.append(f"per channel over {spec.group_tokens} tokens")
    if spec.flush:
        words.append(f"in blocks of {spec.flush}")
    if spec.exponent:
        words.append(f"in units of 2^{spec.exponent}")
    if spec.newest:
        words.append(f"newest {spec.newest} exact")
    return ", ".join(words)


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    from kvsink import __version__

    return {
        "kvsink": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
