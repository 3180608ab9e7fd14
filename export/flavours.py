"""What can leave as ONNX, and the reason where it cannot: per codec, per model, and as a table over all methods.

functions  nodes of com.kvsink, each with a body in standard operators: stock onnxruntime runs it
custom     the same nodes without bodies, for a runtime that brings kernels for them
gqa        standard operators and com.microsoft::GroupQueryAttention over an int8 or packed int4 cache, standard names
Declines   codecs whose rows are coded together, or whose state the graph does not carry; see `codec_refusal`; of gqa, all but
           fixed steps per channel; see `gqa_refusal`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvsink.cache.sliding import WINDOWED
from kvsink.codecs import Codec
from kvsink.codecs.protect import MOST, Segment, anchors_for_layer, parse_policies
from kvsink.errors import KvsinkError
from kvsink.export.bodies import QUANTIZER_BODIES
from kvsink.export.errors import ExportError
from kvsink.export.nodes import Steps
from kvsink.export.tiles import refuses as tile_refusal
from kvsink.kernels.backends import TABLES_BACK
from kvsink.methods import get_method, methods
from kvsink.model.anatomy import rope_types
from kvsink.model.rows import visual_tokens
from kvsink.model.runtime import Runtime

__all__ = [
    "FLAVOURS",
    "check_expressible",
    "codec_refusal",
    "explain_flavours",
    "flavour_table",
    "gqa_refusal",
    "method_refusal",
    "model_refusal",
    "refusal",
    "takes_functions",
]

FLAVOURS = ("functions", "custom", "gqa")
# Fields and words that came after, whose meaning nodes carry; stages are functions of `Steps`.
CARRIED: tuple[str, ...] = (*TABLES_BACK, "spread", "klt after RoPE", "grouped")
LIBRARY = ("uniform", "uniform-int", "gauss", "lloyd", "lloyd-even", "vector", "static", "trellis")  # as tools/ort_ops knows them
_HEADS, _DIM = 8, 64  # of the model that the table imagines


def codec_refusal(codec: Codec, segments: Sequence[Segment] = ()) -> str:
    """Why a layer's codec cannot be written as a graph, or an empty string."""
    for name, side, told in (("keys", codec.key, codec.format.key), ("values", codec.value, codec.format.value)):
        if not side.packed:
            continue
        if side.by_token_block:
            return f"{name} are coded by blocks of {side.group_tokens} tokens, whose unfinished part the graph does not carry"
        if side.outliers:
            return f"{name} keep outliers in records that compete while the cache grows"
        if side.kind == "modal":
            return f"visual rows of {name} are coded otherwise than text, and the graph sees no images"
        if side.kind not in QUANTIZER_BODIES:
            return f"quantizer {side.kind} of {name} has no body in ONNX operators"
        for what in told.beyond:
            if what not in CARRIED and not hasattr(Steps, what):
                return f"{what!r} of {name} has no node (kvsink.export.nodes.Steps, CARRIED in kvsink.export.flavours)"
    if codec.anchors is not None:
        return "anchors are chosen by the attention they receive, which is observed outside the graph"
    if codec.ring:
        return f"a window of {codec.ring} exact recent rows is not part of the graph; use --window 0"
    for segment in segments:
        if segment.source.startswith(("random", "pivots")):
            return f"protection {segment.source.partition(':')[0]} has no node; use first, kvsink or massive"
    return ""


def gqa_refusal(codec: Codec, segments: Sequence[Segment] = ()) -> str:
    """Why a layer's codec is not what GroupQueryAttention stores, or an empty string."""
    k, v = codec.key, codec.value
    if segments or codec.exact_rows or codec.anchors is not None:
        return "GroupQueryAttention has no store for rows kept exact; use --protect none"
    if codec.ring:
        return f"GroupQueryAttention has no window of {codec.ring} exact recent rows; use --window 0"
    if not k.packed and not v.packed:
        return ""
    for name, side in (("keys", k), ("values", v)):
        if side.packed and side.kind != "static":
            return (
                f"{name} have scales of their own in every row ({side.kind}), GroupQueryAttention has fixed ones; "
                "use --method static"
            )
    if beyond := (*codec.format.key.beyond, *codec.format.value.beyond):
        return f"{beyond[0]!r} is nothing that stands around GroupQueryAttention"
    if k.exponent or v.exponent:
        return "keys or values beyond the range of float16 are kept in other units, which GroupQueryAttention does not know"
    if k.packed != v.packed or k.widths != v.widths:
        return f"GroupQueryAttention has one width for keys and values, here {k.bits:g} and {v.bits:g} bits; give both the same"
    if k.widths[0] not in (4, 8):
        return f"GroupQueryAttention stores 4 or 8 bits, not {k.widths[0]}; use --key-bits 4 --value-bits 4"
    if k.domain != "post" or k.reorder or "klt" in (k.transform, v.transform) or max(k.heads_per_group, v.heads_per_group) > 1:
        return "only centring and a Hadamard rotation inside each head, after RoPE, stand around GroupQueryAttention"
    return ""


def lean_refusal(codec: Codec | None, kind: str) -> str:
    """Why a layer cannot leave in flavour gqa without an attention bias, as CUDA's kernel has it, or an empty string."""
    if kind == "sliding_attention":
        return "its window stands in an attention bias, which GroupQueryAttention has on the CPU only; export float32"
    if codec is not None and codec.key.packed and codec.key.center:
        return (
            "the mean of keys comes back in an attention bias, which GroupQueryAttention has on the CPU only; export float32, "
            "or use --method static:rotated"
        )
    return ""


def refusal(flavour: str, codec: Codec, segments: Sequence[Segment] = ()) -> str:
    """Why a layer's codec cannot leave in a flavour, or an empty string."""
    if flavour == "custom":
        for name, side in (("keys", codec.key), ("values", codec.value)):
            if side.packed and side.kind in QUANTIZER_BODIES and side.kind not in LIBRARY:
                return f"the library of operators has no kernel for quantizer {side.kind} of {name}; use flavour functions"
    return gqa_refusal(codec, segments) if flavour == "gqa" else codec_refusal(codec, segments)


def model_refusal(model: Any, anywhere: bool = False, embeds: bool = False, flavour: str = "functions", lean: bool = False) -> str:
    """Why a model cannot be written as a graph, whatever its codec, or an empty string.

    anywhere: not yet where it must be; embeds: the graph takes embeddings, those of pictures among them; lean: in float16, as
    CUDA's kernels take it.
    """
    config = model.config.get_text_config(decoder=True)
    if visual_tokens(model.config) and not embeds:
        return "it takes images, and the graph has no input for them; export its language part, with embeds=True"
    if embeds and (reason := _embeds_refusal(model, config)):
        return reason
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps its attention logits, which the Attend node does not"
    if (flavour != "gqa" or lean) and any(hasattr(module, "sinks") for module in model.modules()):
        grouped = lean and flavour == "gqa"
        rest = "flavour gqa takes in float32 only" if grouped else "the Attend node does not; use --onnx-flavour gqa"
        return f"its attention has learned sink logits, which {rest}"
    if "dynamic" in rope_types(config):
        return "rope type dynamic computes its angles anew whenever the length grows, which no graph can"
    if config.model_type == "falcon" and config.alibi:
        return "its position bias (ALiBi) is computed in bfloat16, which onnxruntime does not multiply on the CPU"
    weight = next(model.parameters())
    if not anywhere and (str(weight.dtype) != "torch.float32" or weight.device.type != "cpu"):
        return f"its weights are {weight.dtype} on {weight.device}; load it in float32 on the CPU"
    return ""


def _embeds_refusal(model: Any, config: Any) -> str:
    """Why embeddings and positions alone do not tell a graph what a model knows of its pictures, or an empty string."""
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        return "pictures have positions in three axes, and the graph takes one"
    if str(config.model_type).startswith("gemma3"):
        return "the rows of a picture see each other, and the graph is causal"
    return ""


def takes_functions(model: Any) -> bool:
    """Whether attention goes through transformers' attention functions, where a graph can put a node of its own."""
    return bool(getattr(model, "_supports_attention_backend", False))


def check_expressible(
    model: Any, runtime: Runtime, anywhere: bool = False, flavour: str = "functions", lean: bool = False, embeds: bool = False
) -> None:
    """Raise ExportError naming the first layer, or the property of the model, that cannot leave."""
    if reason := model_refusal(model, anywhere, embeds, flavour, lean):
        raise ExportError(f"{type(model).__name__} cannot be exported to ONNX: {reason}")
    if flavour == "gqa" and embeds:
        raise ExportError("flavour gqa takes token ids, as its genai_config.json says; export flavour functions with embeds=True")
    tiled = flavour == "custom" and lean
    if (flavour == "gqa" or tiled) and not takes_functions(model):
        what = "custom in float16" if tiled else "gqa"
        raise ExportError(
            f"{type(model).__name__} cannot be exported to ONNX flavour {what}: its attention does not go through transformers' "
            "attention functions, where one node takes its place; use --onnx-flavour functions"
        )
    for i in range(len(runtime.plans) if tiled else 0):
        if reason := tile_refusal(runtime, i):
            raise ExportError(f"layer {i} ({runtime.method}) cannot be exported to ONNX flavour custom in float16: {reason}")
    for i, plan in enumerate(runtime.plans):
        if plan.codec is not None and (reason := refusal(flavour, plan.codec, plan.segments)):
            what = "ONNX" if flavour != "gqa" else "ONNX flavour gqa"
            raise ExportError(f"layer {i} ({runtime.method}) cannot be exported to {what}: {reason}")
    sinks = any(hasattr(module, "sinks") for module in model.modules())
    for i, plan in enumerate(runtime.plans if sinks and flavour == "gqa" else ()):
        if plan.codec is not None and (plan.codec.key.center or plan.codec.value.center):
            raise ExportError(
                f"layer {i} ({runtime.method}) cannot be exported to ONNX flavour gqa: beside learned sink logits shares of "
                "attention do not sum to one, so means cannot come back behind it; use --method static:rotated"
            )
    for i, plan in enumerate(runtime.plans if lean and flavour == "gqa" else ()):
        kinds = runtime.anatomy.layer_types
        if reason := lean_refusal(plan.codec, kinds[i] if kinds else ""):
            raise ExportError(f"layer {i} ({runtime.method}) cannot be exported to ONNX flavour gqa in float16: {reason}")
    where = runtime.anatomy
    if not where.even:
        found = ", ".join(dict.fromkeys(f"{h.kv} x {h.key_dim}/{h.value_dim}" for h in where.layers))
        raise ExportError(
            f"{type(model).__name__} cannot be exported to ONNX: its layers have KV heads of several shapes (heads x key/value "
            f"width: {found}), and the graph holds one for all; its PyTorch folder works, leave --onnx out"
        )
    for i, kind in enumerate(where.layer_types):
        if kind.startswith("hybrid") or where.absent[i].startswith(("shared", "cross")):
            what = "a recurrent state beside keys" if kind.startswith("hybrid") else where.absent[i]
            raise ExportError(f"layer {i} cannot be exported to ONNX: {what}, which the graph does not carry")
        packed = runtime.plans[i].codec is not None
        if kind in ("linear_attention", "mamba", "conv"):
            state = kind.replace("_", " ")
            raise ExportError(f"layer {i} cannot be exported to ONNX: the graph does not carry the state of its {state}")
        if kind in WINDOWED and packed:
            raise ExportError(f"layer {i} cannot be exported to ONNX: its packed sliding window moves; rewrite with sliding=False")


def explain_flavours(model: Any, runtime: Runtime) -> str:
    """What of a rewritten model leaves as ONNX: the flavours it leaves in, and one line for every reason against the others."""
    leaves: list[str] = []
    refused: dict[str, list[str]] = {}
    for flavour in (*FLAVOURS, "custom:float16"):
        name, _, tiled = flavour.partition(":")
        whole = model_refusal(model, flavour=name, lean=bool(tiled))
        reasons: dict[str, int] = {f"the model: {whole}": 1} if whole else {}
        for i, plan in enumerate(runtime.plans if not whole else ()):
            reason = tile_refusal(runtime, i) if tiled else plan.codec and refusal(name, plan.codec, plan.segments)
            if reason:
                reasons[reason] = reasons.get(reason, 0) + 1
        leaves += [] if reasons else [flavour]
        for reason, count in reasons.items():
            refused.setdefault(f"{count} times: {reason}", []).append(flavour)
    lines = [f"onnx: not as {', '.join(flavours)}, {why}" for why, flavours in refused.items()]
    return "\n".join([f"onnx: leaves as {', '.join(leaves)}" if leaves else "onnx: no flavour", *lines])


def method_refusal(name: str, flavour: str = "functions") -> str:
    """Why a method with its own defaults cannot leave, or an empty string."""
    m = get_method(name)
    key, value = (m.side(which, bits).resolved(_HEADS, _DIM) for which, bits in (("key", m.key_bits), ("value", m.value_bits)))
    policies = parse_policies(m.protect)
    segments = tuple(Segment(p.kind, p.count or MOST) for p in policies if p.anchors is None)
    return refusal(flavour, Codec(key, value, window=m.window, anchors=anchors_for_layer(policies)), segments)


def flavour_table() -> str:
    """Markdown: every method with its defaults, and which flavours it leaves in."""
    lines = ["| method | functions, custom | why not | gqa | why not |", "|---|---|---|---|---|"]
    for name in methods():
        cells = []
        for flavour in ("functions", "gqa"):
            try:
                reason = method_refusal(name, flavour)
            except KvsinkError as error:  # a method that no head of 64 channels can carry
                reason = str(error)
            cells += ["no" if reason else "yes", reason]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)
