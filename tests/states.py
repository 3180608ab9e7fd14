"""The packed state of one layer without a model around it: real codecs, random rows, candidates by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvsink.cache.cache import KVSinkCache
from kvsink.cache.layer import KVSinkLayer
from kvsink.codecs import STATE_NAMES, Codec
from kvsink.kernels import append_
from kvsink.kernels.backends import Call, Device, LayerState, Shape
from kvsink.methods import get_method

from .graphs import rewritten
from .models import HEAD_DIM, KV_HEADS

SLOTS = 64
CPU, GPU = Device("cpu", place=torch.device("cpu")), Device("cuda", (8, 0), triton=True)
"""This machine's processor, and a GPU that is only asked about."""


def shape_of(k: Tensor, heads: int = 0, **more: Any) -> Shape:
    """The shape of a call whose new keys are k [B, H, S, D], values as wide."""
    rest = {"rotary": k.shape[3], "dtype": k.dtype, "rows": min(2, k.shape[2])} | more
    return Shape(heads or k.shape[1], k.shape[1], k.shape[3], k.shape[3], **rest)  # type: ignore[arg-type]


CODECS: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
    ("klt", ()),
    ("klt", (("window", 5), ("protect", "first:2+massive:3"))),
    ("klt", (("key_bits", 1.5), ("value_bits", 16))),
    ("klt:even", (("value_bits", 2),)),
    ("klt", ()),
    ("centred", (("window", 3),)),
    ("rotatekv", (("protect", "massive:4"),)),
    ("rotatekv", (("fold", False), ("key_bits", 3))),
    ("rtn", (("key_bits", 16), ("protect", "first:3"))),
    ("rtn", (("window", 4),)),
    ("klt", (("key_bits", 2), ("value_bits", 2.25), ("windows", 12))),
    ("cq", (("key_bits", 1.25), ("windows", 18), ("value_bits", 2), ("protect", "first:2"))),
    ("kvquant", (("window", 3),)),
    ("kivi/8", ()),
    ("kivi/8", (("window", 10),)),
    ("oscar/8", (("fold", False), ("window", 2))),
    ("kvquant-10%/8", (("protect", "first:2"),)),
)
"""Every method, both ways of leaving a side in 16 bit, exact rows with and without a window, blocks of 8 tokens."""


def asking(q: Tensor, k: Tensor, v: Tensor, state: Any, params: Any, mask: Tensor | None, scale: float, codec: Codec) -> Call:
    """A call that attends, of the arguments of `attend`."""
    return Call(codec, codec.text(), k, v, LayerState(*state), params, q, mask=mask, scale=scale, causal=mask is None)


def coding(
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    candidates: Any,
    state: Any,
    params: Any,
    codec: Any,
    roped: bool,
) -> Call:
    """A call that stores new rows, of the arguments of `append_`; codec: one, or its text."""
    codec = Codec.parse(codec) if isinstance(codec, str) else codec
    rest = {"positions": positions, "candidates": candidates, "turn": (cos, sin), "roped": roped}
    return Call(codec, codec.text(), k, v, LayerState(*state), params, **rest)


def method_named(name: str) -> Any:
    """A method; "klt-dense" is klt with keys coded before RoPE, "kivi/8" is kivi with blocks of 8 tokens in groups of 4,
    "kvquant-1%/8" has records of 8 tokens: small enough that tiny tests fill several."""
    if name.endswith("-dense"):
        method = get_method(name.removesuffix("-dense"))
        return replace(method, key=replace(method.key, block=1))
    name, _, flush = name.partition("/")
    if not flush:
        return name
    method, n = get_method(name), int(flush)
    if method.key.outliers:
        key, value = (replace(side, outlier_tokens=n) for side in (method.key, method.value))
        return replace(method, key=key, value=value)
    key = replace(method.key, group_tokens=n // 2, flush=n)
    value = replace(method.value, flush=n if method.value.flush else 0, newest=n if method.value.newest else 0)
    return replace(method, key=key, value=value)


@cache
def _model(method: str, options: tuple[tuple[str, Any], ...]) -> Any:
    return rewritten("llama", "sdpa", method_named(method), **dict(options))


def layer_of(method: str, options: tuple[tuple[str, Any], ...] = (), batch: int = 1, strict: bool = False) -> KVSinkLayer:
    """Layer 1 of a fresh static cache of a rewritten tiny Llama, ready to be written to."""
    cache = KVSinkCache.for_model(_model(method, options), batch, max_length=SLOTS, strict=strict)
    return cache.packed_layers()[1]


def rows(batch: int, length: int, seed: int = 0, heads: int = KV_HEADS) -> tuple[Tensor, Tensor]:
    """Random keys after RoPE and values [B, H, S, D]."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, length, HEAD_DIM, generator=g), torch.randn(batch, heads, length, HEAD_DIM, generator=g)


def candidates(layer: KVSinkLayer, batch: int, length: int, seed: int = 0) -> list[Tensor]:
    """Random scores for every new row, one pair per segment."""
    g, out = torch.Generator().manual_seed(100 + seed), []
    for segment in layer.segments:
        score, index = torch.randn(batch, length, generator=g).topk(min(segment.count, length), dim=1)
        out += [score, index]
    return out


def read_codes(
    codec: Any, p: dict[str, Tensor], k: Tensor, v: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys after RoPE and values as a fresh cache of one layer would read them from codes alone."""
    b, h, s, d = k.shape
    layout = codec.layout(b, h, d, v.shape[3], s, k.dtype)
    state = {name: torch.full(shape, fill, dtype=dtype) for name, (shape, dtype, fill) in layout.items()}
    state["positions"] = torch.zeros(b, s, dtype=torch.int32)
    state["real"] = torch.ones(b, s, dtype=torch.bool)
    held = [state[name] for name in STATE_NAMES]
    append_(k, v, positions, cos, sin, [], held, [p[n] for n in codec.param_names()], codec.text(), True)
    return codec.read_keys(state, p, 0, s), codec.read_values(state, p, 0, s)


def append_arguments(layer: KVSinkLayer, k: Tensor, v: Tensor, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `append_` for rows that follow the ones held."""
    positions = torch.arange(k.shape[2])[None] + layer.length
    cos, sin = layer.shared.runtime.angles(layer.layer, positions)
    return dict(
        k=k,
        v=v,
        positions=positions,
        cos=cos,
        sin=sin,
        candidates=candidates(layer, k.shape[0], k.shape[2], seed),
        state=layer.state(),
        params=layer.params,
        codec=layer.codec_text,
        roped=True,
    )


def filled(
    method: str,
    options: tuple[tuple[str, Any], ...] = (),
    batch: int = 2,
    lengths: tuple[int, ...] = (11, 1, 7),
    strict: bool = False,
) -> tuple[KVSinkLayer, Tensor, Tensor]:
    """A layer that has seen chunks of these lengths; the length stands before the last of them, as the ops expect."""
    layer = layer_of(method, options, batch, strict)
    k, v = rows(batch, sum(lengths))
    at = 0
    for i, n in enumerate(lengths):
        append_(**append_arguments(layer, k[:, :, at : at + n], v[:, :, at : at + n], seed=i))
        if i < len(lengths) - 1:
            layer.length.add_(n)
            at += n
    return layer, k, v
