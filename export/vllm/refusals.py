"""What of a rewritten folder, of a model's layers and of the engine's options is not served, in one line each, before weights load.

Source     ours
Raises     SidecarError for a folder whose plan cannot be read; UnsupportedError with the reason
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvsink.codecs import Codec, SideSpec
from kvsink.codecs.protect import Segment
from kvsink.errors import SidecarError, UnsupportedError
from kvsink.folder.sidecar import AGAIN, FORMAT, SIDECAR_JSON
from kvsink.kernels.pages import PAGE

__all__ = ["Plan", "check_engine", "check_folder", "check_layer", "read_plan"]

_AGAIN = "rewrite the model for it, or run it with transformers"


class Plan(NamedTuple):
    """What a folder's plan says without its tables, by layer. blocks: those that write massive activations; places: exact rows that
    pages need by calibration, 0 where none was counted."""

    codecs: tuple[Codec | None, ...]
    segments: tuple[tuple[Segment, ...], ...]
    reasons: tuple[str, ...]
    kv_heads: tuple[int, ...]
    blocks: tuple[int, ...]
    places: int


def read_plan(folder: Path) -> Plan:
    """The plan of a folder, of this version's format."""
    path = folder / SIDECAR_JSON
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["format"] != FORMAT:
            raise SidecarError(f"{path} has format {plan['format']!r}, this version reads {FORMAT}; {AGAIN}")
        rows = plan["layers"]
        return Plan(
            tuple(None if row["codec"] is None else Codec.parse(json.dumps(row["codec"])) for row in rows),
            tuple(tuple(Segment(str(source), int(count)) for source, count in row["segments"]) for row in rows),
            tuple(str(row["reason"]) for row in rows),
            tuple(int(row["heads"][1]) for row in rows),
            tuple(int(stage["block"]) for stage in plan["stages"]),
            int((plan.get("pages") or {}).get("places", 0)),
        )
    except UnsupportedError as error:
        raise SidecarError(f"{path} is not read: {error}; {AGAIN}") from error
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise SidecarError(f"{path} cannot be read ({error!r}); {AGAIN}") from error


def check_folder(plan: Plan) -> None:
    """Raise UnsupportedError for a layer that pages cannot hold."""
    for layer, (codec, segments, reason) in enumerate(zip(plan.codecs, plan.segments, plan.reasons, strict=True)):
        why = f"is left in 16 bit ({reason})" if codec is None else _codec(codec) or _segments(segments)
        if why:
            raise UnsupportedError(f"kvsink in vLLM: layer {layer} {why}; {_AGAIN}")


def _codec(codec: Codec) -> str:
    if codec.window:
        return f"keeps the newest {codec.window} rows exact, which pages that sequences share cannot"
    if codec.anchors is not None:
        return f"keeps {codec.anchors} exact, which later rows decide"
    return next((f"has {name} {why}" for name, side in (("keys", codec.key), ("values", codec.value)) if (why := _side(side))), "")


def _side(side: SideSpec) -> str:
    if not side.packed:
        return "in 16 bit"
    if side.by_token_block:
        return "coded in blocks of tokens"
    if side.outliers:
        return "with outliers, which share a record"
    if side.visual_bits:
        return "coded by modality"
    if side.reorder or (side.heads_per_group > 1 and not side.folded):
        return "that are turned across heads"
    if side.flush or side.newest:
        return "of which the newest rows stay exact"
    return ""


def _segments(segments: Sequence[Segment]) -> str:
    known = ("first", "sinks", "stage")
    other = next((s.source.partition(":")[0] for s in segments if s.source.partition(":")[0] not in known), "")
    return f"keeps rows exact by {other!r}, which a row does not decide for itself (use sinks:0.25+first:1)" if other else ""


def check_engine(plan: Plan, config: Any, platform: str) -> None:
    """Raise UnsupportedError for options of the engine. config: its VllmConfig; platform: what it runs on."""
    cache, parallel = config.cache_config, config.parallel_config
    ranks = parallel.tensor_parallel_size
    plain = ("auto", str(config.model_config.dtype).removeprefix("torch."))
    split = {h for h in plan.kv_heads if h % ranks and ranks % h}
    asked = getattr(cache, "user_specified_block_size", True)  # else it is chosen later, by what layers ask for
    of_token = any(s.shares_heads for c in plan.codecs if c is not None for s in (c.key, c.value))
    whys = (
        (platform not in ("cpu", "cuda"), f"the device is {platform}; pages have kernels on CPUs and NVIDIA GPUs alone"),
        (cache.cache_dtype not in plain, f"--kv-cache-dtype {cache.cache_dtype} codes a cache that is coded already; leave it out"),
        (
            asked and cache.block_size != PAGE,
            f"--block-size {cache.block_size} is not the page of {PAGE} tokens; pass --block-size {PAGE}",
        ),
        (config.speculative_config is not None, "speculative decoding takes rows back, which is not served yet; leave it out"),
        (bool(split), f"{sorted(split)} key-value heads do not divide among {ranks} ranks; change --tensor-parallel-size"),
        (ranks > 1 and of_token, f"a number of a token is shared by heads of {ranks} ranks; use --tensor-parallel-size 1"),
        (parallel.pipeline_parallel_size > 1, "a block that writes sinks may be on another rank; use --pipeline-parallel-size 1"),
        (getattr(parallel, "decode_context_parallel_size", 1) > 1, "context parallel attention is not served; use 1 rank for it"),
    )
    if why := next((why for found, why in whys if found), ""):
        raise UnsupportedError(f"kvsink in vLLM: {why}")


def check_layer(plan: Plan, index: int, layer: Any) -> None:
    """Raise UnsupportedError for an attention layer of vLLM that is not what the plan's layer was."""
    if index >= len(plan.codecs):
        raise UnsupportedError(f"kvsink in vLLM: {layer.layer_name} is not one of the plan's {len(plan.codecs)}; {AGAIN}")
    cap = getattr(layer.impl, "logits_soft_cap", None)
    whys = (
        (layer.attn_type != "decoder", f"attends as {layer.attn_type}, not as a decoder"),
        (layer.sliding_window is not None, f"has a window of {layer.sliding_window} tokens"),
        (layer.kv_sharing_target_layer_name is not None, f"reads the cache of {layer.kv_sharing_target_layer_name}"),
        (bool(cap), f"caps its logits at {cap}"),
        (getattr(layer.impl, "alibi_slopes", None) is not None, "has a position bias"),
        (bool(layer.has_sink), "has learned sink logits"),
    )
    if why := next((why for found, why in whys if found), ""):
        where = f"layer {index} ({layer.layer_name})"
        raise UnsupportedError(f"kvsink in vLLM: {where} {why}, which pages do not serve; run the folder with transformers")
